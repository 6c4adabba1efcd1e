"""Attention masks: the one place that decides which keys a query may see."""

from jaxtyping import Array, Bool, Int


def attention_mask(
    query_positions: Int[Array, "B T"], key_positions: Int[Array, "B S"], window: int | Int[Array, ""] | None = None
) -> Bool[Array, "B T S"]:
    """True where a query may see a key, given the absolute positions of both.

    A key is visible if its slot is filled (position >= 0), it is not in the future and, with a window W, it is among
    the W latest positions, the query's own included. Nothing sees a slot with position -1 (empty or padding), and a
    query with position -1 sees nothing.
    """
    query, key = query_positions[:, :, None], key_positions[:, None, :]
    mask = (key >= 0) & (key <= query)
    if window is not None:
        mask &= query - key < window
    return mask
