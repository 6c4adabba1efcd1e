"""The one place that decides which key a query may see."""

from jaxtyping import Array, Bool, Int


def attention_mask(
    query_positions: Int[Array, "B T"], key_positions: Int[Array, "B S"], window: int | Int[Array, ""] | None = None
) -> Bool[Array, "B T S"]:
    """True where the query at one absolute position may see the key at another.

    A key is seen if it holds something (position >= 0), does not lie in the future, and, with a window W, is
    among the W latest positions, the query's own included. Slots with position -1 (empty or padding) are seen
    by none; a query of position -1 sees nothing.
    """
    query, key = query_positions[:, :, None], key_positions[:, None, :]
    mask = (key >= 0) & (key <= query)
    if window is not None:
        mask &= query - key < window
    return mask
