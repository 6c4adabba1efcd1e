"""A split of the data as a value: training windows as a function of (seed, step), and every target once to evaluate.

`TokenStream` is one long text; `PaddedRows` are rows that stand alone. Both hold NumPy arrays in memory. They are
pytrees too, so that the compiled training loop gets a copy on the device and cuts its batches there.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from jaxlm.data.shards import ShardedTokens
from jaxlm.errors import UserError

EVAL_GROUPS = 64
"""Batches that one call of the compiled evaluation reads, at most."""

VAL_FRACTION_FIX = "give more text, or a larger --data.val-fraction"
ROWS_FIX = "give more transcripts, another --data.val-fraction, or --data.val-path"

COUNT_BLOCK = 1 << 22
"""Tokens whose bytes are counted at once; bounds the memory it takes."""

Read: TypeAlias = Callable[[tuple[slice, ...]], np.ndarray]
"""Reads a part of an array, and nothing else of it: a slice of each axis."""


def batch_starts(seed: Int[Array, ""] | int, step: Int[Array, ""] | int, size: int, places: int) -> Int[Array, " B"]:
    """Where the windows of a step's batch begin: `size` places in 0 .. places - 1, from (seed, step) alone.

    The windows of a run are numbered from 0, and window i begins at the fraction frac(offset + i * golden ratio) of
    the text: an additive recurrence (Weyl sequence). Every stretch of it covers the text evenly; the seed gives the
    offset. Independent draws leave some text out and repeat other text; at equal steps they train a little worse
    (docs/log.md). The sequence repeats after 2^32 windows. From 2^31 places
    on `_host_starts` alone is used.
    """
    offset = _offset(seed)
    window = jnp.asarray(step, jnp.uint32) * np.uint32(size) + jnp.arange(size, dtype=jnp.uint32)
    fraction = window * np.uint32(0x9E3779B9) + offset  # in units of 2^-32; 2^32 over the golden ratio is 0x9E3779B9
    # floor(fraction * places / 2^32) in 16-bit halves, because JAX has no 64-bit product without jax_enable_x64.
    high, low = fraction >> 16, fraction & 0xFFFF
    places_high, places_low = np.uint32(places >> 16), np.uint32(places & 0xFFFF)
    middle, other = high * places_low, low * places_high
    carry = ((middle & 0xFFFF) + (other & 0xFFFF) + ((low * places_low) >> 16)) >> 16
    return (high * places_high + (middle >> 16) + (other >> 16) + carry).astype(jnp.int32)


def _offset(seed: Int[Array, ""] | int) -> Array:
    return jax.random.bits(jax.random.key(seed), (), jnp.uint32)


def _host_starts(offset: int, steps: np.ndarray, size: int, places: int) -> Int[np.ndarray, "steps B"]:
    """`batch_starts` of some steps in NumPy: cutting windows here must not wait for what the device computes.

    From 2^31 places on, fractions have 64 binary digits instead of 32, of which the offset gives the first 32.
    """
    windows: np.ndarray = steps.astype(np.uint64)[:, None] * np.uint64(size) + np.arange(size, dtype=np.uint64)
    if places >= 1 << 31:
        # 2^64 over the golden ratio; products of NumPy's uint64 are modulo 2^64.
        long = windows * np.uint64(0x9E3779B97F4A7C15) + (np.uint64(offset) << np.uint64(32))
        return _high_product(long, places).astype(np.int64)
    fractions = (windows * np.uint64(0x9E3779B9) + np.uint64(offset)) & np.uint64(0xFFFFFFFF)
    return (fractions * np.uint64(places) >> np.uint64(32)).astype(np.int64)


def _high_product(fractions: np.ndarray, places: int) -> np.ndarray:
    """floor(fractions * places / 2^64) of uint64 by 32-bit halves, as NumPy has no 128-bit product."""
    half, low_bits = np.uint64(32), np.uint64(0xFFFFFFFF)
    high, low = fractions >> half, fractions & low_bits
    places_high, places_low = np.uint64(places >> 32), np.uint64(places & 0xFFFFFFFF)
    middle = high * places_low + (low * places_low >> half)
    other = low * places_high + (middle & low_bits)
    return high * places_high + (middle >> half) + (other >> half)


def target_weights(windows: Int[Array, "B T1"], pad_token: int) -> Float[Array, "B T"]:
    """The weight of each target windows[:, 1:]: 0 on padding, and such that the mean over the batch is 1.

    At least one target must not be padding.
    """
    real = (windows[:, 1:] != pad_token).astype(float)
    return real / real.mean()


@dataclasses.dataclass(frozen=True, eq=False)
class EvalBatch:
    """Windows with the weight of each target: 1, or 0 where the target is only filling."""

    windows: Integer[np.ndarray, "groups B T1"]
    weights: Float[np.ndarray, "groups B T"]


@runtime_checkable
class BatchSource(Protocol):
    """What the compiled training loop reads: a pytree from which it cuts the batch of each step."""

    def windows(self, seed: int, step: Int[Array, ""] | int, batch_size: int) -> Int[Array, "B T1"]:
        """The token windows of a step; their first T tokens are read and their last T are the targets."""

    def weights(self, windows: Int[Array, "B T1"]) -> Float[Array, "B T"] | None:
        """The weight of each target in the loss; None = all count alike."""


@runtime_checkable
class Put(Protocol):
    """Puts an array on the devices: `jaxlm.sharding.layout.put`, or `on_one_device`."""

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype, read: Read, *names: str | None) -> Array:
        """Reads the parts that the devices of this process hold; `names` are the logical axes."""


def on_one_device(shape: tuple[int, ...], dtype: np.dtype, read: Read, *names: str | None) -> Array:
    """The whole array on JAX's default device."""
    return jax.device_put(read((slice(None),) * len(shape)))


def _put_whole(array: np.ndarray, put: Put) -> Array:
    return put(array.shape, array.dtype, lambda part: array[part], *[None] * array.ndim)


# The leaves are annotated Any, not as arrays: JAX rebuilds pytrees with placeholders for leaves.
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TokenStream:
    """One sequence of tokens. A batch cuts its windows anywhere; evaluation cuts them side by side."""

    tokens: Any
    """[n] unsigned integers: a NumPy array, a memory-mapped file, `ShardedTokens`, or a JAX array on the device."""
    seq_len: int = dataclasses.field(metadata={"static": True})
    """T, the targets of a window."""
    document_end: int | None = dataclasses.field(default=None, metadata={"static": True})
    """The token that ends each document of a prepared corpus, and stands nowhere else; None = one text."""

    def __len__(self) -> int:
        """Tokens."""
        return len(self.tokens)

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted: all but the first."""
        return max(len(self.tokens) - 1, 0)

    @property
    def targets_per_window(self) -> float:
        """Targets of a training window."""
        return float(self.seq_len)

    def head(self, size: int) -> "TokenStream":
        """The first `size` tokens."""
        is_sharded = isinstance(self.tokens, ShardedTokens)
        return dataclasses.replace(self, tokens=self.tokens.part(0, size) if is_sharded else self.tokens[:size])

    @property
    def is_mapped(self) -> bool:
        """Whether the tokens are in files, which may be larger than the device's memory."""
        return isinstance(self.tokens, np.memmap | ShardedTokens)

    def targets(self) -> Iterator[Integer[np.ndarray, " n"]]:
        """All targets, some at a time."""
        for start in range(1, len(self.tokens), COUNT_BLOCK):
            yield self.tokens[start : start + COUNT_BLOCK]

    def windows(self, seed: int, step: Int[Array, ""] | int, batch_size: int) -> Int[Array, "B T1"]:
        """The batch of a step."""
        starts = batch_starts(seed, step, batch_size, len(self.tokens) - self.seq_len)
        return self.tokens[starts[:, None] + jnp.arange(self.seq_len + 1)[None]].astype(jnp.int32)

    def weights(self, windows: Int[Array, "B T1"]) -> None:
        """None: all targets count alike."""
        return

    def feed(
        self, seed: int, batch_size: int, num_steps: int, put: Put = on_one_device
    ) -> Callable[[int], BatchSource]:
        """What the devices read, by first step: the whole stream, or the windows of `num_steps` steps of mapped files.

        Mapped files may be larger than a device's memory, so their windows are cut here, those rows only that `put`
        asks for. There are always equally many, so that the loop is compiled once.
        """
        if not self.is_mapped:
            resident = dataclasses.replace(self, tokens=_put_whole(self.tokens, put))
            return lambda first: resident

        offset, places = int(_offset(seed)), len(self.tokens) - self.seq_len
        shape = num_steps, batch_size, self.seq_len + 1

        def block(first: int) -> WindowBlock:
            starts = _host_starts(offset, np.arange(first, first + num_steps), batch_size, places)

            def read(part: tuple[slice, ...]) -> np.ndarray:
                mine, (start, stop, _) = starts[part[:2]], part[2].indices(shape[2])
                cut = [self.tokens[int(place) + start : int(place) + stop] for place in mine.flat]
                return np.stack(cut).reshape(*mine.shape, stop - start)

            windows = put(shape, self.tokens.dtype, read, None, "batch", None)
            return WindowBlock(windows, _put_whole(np.asarray(first, np.int32), put))

        return block

    @property
    def num_windows(self) -> int:
        """Windows of an exact evaluation: side by side, the shorter remainder included."""
        return -(-self.num_targets // self.seq_len)

    def eval_batches(self, batch_size: int, groups: int = EVAL_GROUPS, most: int | None = None) -> Iterator[EvalBatch]:
        """Windows of seq_len targets from position 0 on, the shorter remainder included: every target once.

        All batches have the same shape: `groups` batches of `batch_size` windows, or fewer when the whole split needs
        fewer.

        Args:
          most: only so many of the windows, spread evenly; None = all.
        """
        chosen = spread(most, self.num_windows)
        groups = min(groups, -(-len(chosen) // batch_size))
        count = groups * batch_size
        for first in _firsts(len(chosen), count):
            windows = np.zeros((count, self.seq_len + 1), self.tokens.dtype)
            real = np.zeros((count, self.seq_len), bool)
            for i, start in enumerate((chosen[first : first + count] * self.seq_len).tolist()):
                piece = self.tokens[start : start + self.seq_len + 1]
                windows[i, : len(piece)] = piece
                real[i, : len(piece) - 1] = True
            yield _eval_batch(windows, real, groups)

    def check_training(self) -> None:
        """Refuses a split too short to train on, or too long to address.

        Raises:
          UserError: fewer than seq_len + 1 tokens, or more than 2^31 - 1 that are not in files.
        """
        if len(self) <= self.seq_len:
            raise UserError(
                f"the training split has {len(self)} tokens, shorter than one context of max_seq_len = {self.seq_len} "
                "and its next token: give more text, or a smaller --model.max-seq-len"
            )
        if len(self) > np.iinfo(np.int32).max and not self.is_mapped:
            raise UserError(f"the training split has {len(self)} tokens: at most 2^31 - 1 can be addressed in memory")

    def check_evaluation(self, name: str = "the validation split", fix: str = VAL_FRACTION_FIX) -> None:
        """Refuses a split without a target.

        Raises:
          UserError: fewer than 2 tokens.
        """
        if len(self) < 2:
            raise UserError(f"{name} has {len(self)} tokens, too few for one target: {fix}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PaddedRows:
    """Independent rows of tokens, padded to one length. Padding is never a target."""

    rows: Any
    """[R, T + 1] unsigned integers: a NumPy array, or a JAX array on the device."""
    pad_token: int = dataclasses.field(metadata={"static": True})

    def __len__(self) -> int:
        """Rows."""
        return len(self.rows)

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted: all but the first of each row and but padding."""
        return int((self.rows[:, 1:] != self.pad_token).sum())

    @property
    def targets_per_window(self) -> float:
        """Targets of the average row."""
        return self.num_targets / len(self.rows)

    def head(self, size: int) -> "PaddedRows":
        """The first `size` rows."""
        return dataclasses.replace(self, rows=self.rows[:size])

    def targets(self) -> Iterator[Integer[np.ndarray, " n"]]:
        """All targets, some at a time."""
        count = max(1, COUNT_BLOCK // self.rows.shape[1])
        for start in range(0, len(self.rows), count):
            targets = self.rows[start : start + count, 1:]
            yield targets[targets != self.pad_token]

    def windows(self, seed: int, step: Int[Array, ""] | int, batch_size: int) -> Int[Array, "B T1"]:
        """The batch of a step; over the run each row is taken about as often."""
        return self.rows[batch_starts(seed, step, batch_size, len(self.rows))].astype(jnp.int32)

    def weights(self, windows: Int[Array, "B T1"]) -> Float[Array, "B T"]:
        """0 on padding; the others count alike, and their mean over the batch is 1."""
        return target_weights(windows, self.pad_token)

    def feed(
        self, seed: int, batch_size: int, num_steps: int, put: Put = on_one_device
    ) -> Callable[[int], BatchSource]:
        """What the devices read, by first step: always all rows, which are small."""
        resident = dataclasses.replace(self, rows=_put_whole(self.rows, put))
        return lambda first: resident

    @property
    def num_windows(self) -> int:
        """Windows of an exact evaluation: all rows."""
        return len(self.rows)

    def eval_batches(self, batch_size: int, groups: int = EVAL_GROUPS, most: int | None = None) -> Iterator[EvalBatch]:
        """The rows in order, in batches of one shape as those of a stream; rows of padding fill up the last.

        Args:
          most: only so many of the rows, spread evenly; None = all.
        """
        rows = self.rows if most is None else self.rows[spread(most, len(self))]
        groups = min(groups, -(-len(rows) // batch_size))
        count = groups * batch_size
        for first in _firsts(len(rows), count):
            piece = rows[first : first + count]
            windows = np.full((count, self.rows.shape[1]), self.pad_token, self.rows.dtype)
            windows[: len(piece)] = piece
            yield _eval_batch(windows, windows[:, 1:] != self.pad_token, groups)

    def check_training(self) -> None:
        """Refuses a split without a row.

        Raises:
          UserError: there is none.
        """
        self.check_evaluation("the training split")

    def check_evaluation(self, name: str = "the validation split", fix: str = ROWS_FIX) -> None:
        """Refuses a split without a row.

        Raises:
          UserError: there is none.
        """
        if not len(self):
            raise UserError(f"{name} has no row: {fix}")


Split: TypeAlias = TokenStream | PaddedRows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class WindowBlock:
    """The windows of some consecutive steps of a stream, cut in advance."""

    block: Any
    """[steps, B, T + 1] unsigned integers."""
    first: Any
    """The step of block[0], an int32 scalar."""

    def windows(self, seed: int, step: Int[Array, ""] | int, batch_size: int) -> Int[Array, "B T1"]:
        """The batch of a step, which must be one of the block; seed and batch size are those it was cut with."""
        return self.block[step - self.first].astype(jnp.int32)

    def weights(self, windows: Int[Array, "B T1"]) -> None:
        """None: all targets count alike."""
        return


def num_bytes(split: Split, token_bytes: Int[np.ndarray, " V"]) -> int:
    """Bytes of the UTF-8 text that the targets of a split spell.

    Args:
      token_bytes: of each token.
    """
    return sum(int(token_bytes[targets].sum()) for targets in split.targets())


def spread(count: int | None, total: int) -> Int[np.ndarray, " n"]:
    """At most `count` of the numbers 0 .. total - 1, spread evenly; None = all."""
    count = total if count is None else min(count, total)
    return np.arange(count) * total // max(count, 1)


def _firsts(total: int, count: int) -> Iterator[int]:
    return itertools.takewhile(lambda first: first < total, itertools.count(0, count))


def _eval_batch(windows: Integer[np.ndarray, "n T1"], real: np.ndarray, groups: int) -> EvalBatch:
    seq_len, weights = real.shape[1], real.astype(np.float32)
    return EvalBatch(windows.reshape(groups, -1, seq_len + 1), weights.reshape(groups, -1, seq_len))
