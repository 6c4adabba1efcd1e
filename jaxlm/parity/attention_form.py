"""Which attention a foreign layer computes, found by trying: heads, RoPE's layout and base, mask and window."""

import dataclasses
import itertools
import re
from collections.abc import Iterator

import numpy as np

from jaxlm.parity.capture import Event

THETAS = (1e4, 5e5, 1e6, 1e5, 1e3, 1e2, 1e7)
"""Bases of RoPE that are tried."""

CLOSE = 2.0**8
"""Units in the last place, of the largest value, within which a result is the same."""

POWERS = 141
"""Bases from 10 to 10^8 among which one that nobody would guess is looked for first."""

FIRST_ROWS = 3
"""Queries with which heads and RoPE are tried; they see the same keys in any window but the smallest."""


@dataclasses.dataclass(frozen=True)
class AttentionForm:
    """What attention computes between its projections. The names are those of ModelConfig."""

    head_dim: int
    rope_layout: str | None
    """half, interleaved, or None = no RoPE."""
    rope_theta: float | None
    causal: bool
    window: int | None


def differences(in_jax: AttentionForm, in_torch: AttentionForm) -> list[str]:
    """What differs between two forms, in words."""
    pairs = {name: (value, getattr(in_torch, name)) for name, value in dataclasses.asdict(in_jax).items()}
    return [
        f"{name} = {ours!r} in JAX, {theirs!r} in torch" for name, (ours, theirs) in pairs.items() if ours != theirs
    ]


def find_form(values: dict[Event, np.ndarray], layer: str, separator: str) -> AttentionForm | None:
    """The form with which a layer's queries, keys and values give what enters its output projection.

    Args:
      values: what passed through one framework's layers.
      layer: the path of the attention layer.
      separator: between the parts of a path.

    Returns: None if the layer has no such projections, or no form gives the result.
    """
    roles = _roles(values, f"{layer}{separator}" if layer else "", separator)
    if roles is None or roles["o"].shape != roles["q"].shape[:2] + roles["o"].shape[2:]:
        return None
    limit = CLOSE * float(np.finfo(roles["o"].dtype).eps) * float(np.abs(roles["o"]).max())
    q, k, v, result = (roles[role].astype(np.float64) for role in "qkvo")
    length = q.shape[1]
    first = (q[:, :FIRST_ROWS], k, v, result[:, :FIRST_ROWS])
    for form in itertools.chain(_forms(q.shape[2], k.shape[2]), _of_any_base(*first, limit)):
        rows = min(FIRST_ROWS, length)
        if np.abs(_attended(form, q[:, :rows], k, v) - result[:, :rows]).max() > limit:
            continue
        wider = (None, *range(rows, length)) if form.causal and form.window is None else (form.window,)
        for window in wider:
            whole = dataclasses.replace(form, window=window)
            if np.abs(_attended(whole, q, k, v) - result).max() <= limit:
                return whole
    return None


def _roles(values: dict[Event, np.ndarray], prefix: str, separator: str) -> dict[str, np.ndarray] | None:
    """The queries, keys and values [B, T, width] after their projections and norms, and what the last layer reads."""
    found: dict[str, np.ndarray] = {}
    for event, value in values.items():
        child = event.layer.removeprefix(prefix)
        if not event.layer.startswith(prefix) or not child or separator in child or value.ndim < 3:
            continue
        flat = value.reshape(*value.shape[:2], -1)
        if re.match(r"(qkv|c_attn|in_proj|query_key_value)", child):
            if event.side == "out":
                found |= dict(zip("qkv", np.split(flat, 3, axis=-1), strict=True)) if flat.shape[2] % 3 == 0 else {}
        elif re.match(r"(?:w_?|to_|linear_)?(o|c_proj|proj|dense)", child):
            if event.side == "in":
                found["o"] = flat
        elif (role := re.match(r"(?:w_?|to_|linear_)?([qkv])", child)) and event.side == "out":
            found[role[1]] = flat
    fits = set("qkvo") <= found.keys() and found["k"].shape == found["v"].shape and found["o"].shape == found["q"].shape
    return found if fits and found["q"].shape[2] % found["k"].shape[2] == 0 else None


def _forms(query_width: int, key_width: int) -> Iterator[AttentionForm]:
    """Every form without a window, and with one so small that it shows in the first rows."""
    for head_dim in (width for width in range(key_width, 0, -1) if key_width % width == 0):
        ropes = [(None, None), *itertools.product(("half", "interleaved"), THETAS)]
        for (layout, theta), causal in itertools.product(ropes if head_dim % 2 == 0 else ropes[:1], (True, False)):
            for window in (None, *range(1, FIRST_ROWS)) if causal else (None,):
                yield AttentionForm(head_dim, layout, theta, causal, window)


def _of_any_base(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, result: np.ndarray, limit: float
) -> Iterator[AttentionForm]:
    """Forms with a base of RoPE that nobody would guess: that which fits the first rows, to three digits."""

    def error(form: AttentionForm, power: float) -> float:
        return float(np.abs(_attended(dataclasses.replace(form, rope_theta=10**power), q, k, v) - result).max())

    widths = (width for width in range(k.shape[2], 1, -1) if k.shape[2] % width == 0 and width % 2 == 0)
    for head_dim, layout in itertools.product(widths, ("half", "interleaved")):
        form = AttentionForm(head_dim, layout, 1.0, causal=True, window=None)
        powers = np.linspace(1, 8, POWERS)
        best = powers[np.argmin([error(form, power) for power in powers])]
        low, high = best - powers[1] + powers[0], best + powers[1] - powers[0]
        for _ in range(60):  # the error has one valley in so short a piece
            third = (high - low) / 3
            low, high = (
                (low, high - third) if error(form, low + third) < error(form, high - third) else (low + third, high)
            )
        if error(form, low) <= limit:
            rounded = float(f"{10**low:.3g}")
            exact = error(form, float(np.log10(rounded))) <= limit
            yield dataclasses.replace(form, rope_theta=rounded if exact else float(10**low))


def _attended(form: AttentionForm, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """What the queries, the first of all tokens, read: [B, T, width]."""
    rows, seen = q.shape[1], k.shape[1]
    if form.causal:
        k, v, seen = k[:, :rows], v[:, :rows], rows
    heads = [x.reshape(*x.shape[:2], -1, form.head_dim).swapaxes(1, 2) for x in (q, k, v)]
    queries, keys, read = heads[0], *(np.repeat(x, heads[0].shape[1] // x.shape[1], axis=1) for x in heads[1:])
    if form.rope_layout is not None:
        queries, keys = _rotated(form, queries), _rotated(form, keys)
    scores = queries @ keys.swapaxes(2, 3) / np.sqrt(form.head_dim)
    behind = np.arange(rows)[:, None] - np.arange(seen)
    hidden = (behind < 0) & form.causal
    if form.window is not None:
        hidden |= behind >= form.window
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out = (weights / weights.sum(axis=-1, keepdims=True)) @ read
    return out.swapaxes(1, 2).reshape(q.shape)


def _rotated(form: AttentionForm, x: np.ndarray) -> np.ndarray:
    assert form.rope_theta is not None
    half = form.head_dim // 2
    angles = np.arange(x.shape[2])[:, None] * form.rope_theta ** (-np.arange(half) / half)
    pairs = (x[..., :half], x[..., half:]) if form.rope_layout == "half" else (x[..., 0::2], x[..., 1::2])
    a, b = pairs
    turned = a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)
    return np.concatenate(turned, axis=-1) if form.rope_layout == "half" else np.stack(turned, axis=-1).reshape(x.shape)
