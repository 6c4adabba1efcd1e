"""What is read in a comparison: token windows and the weights of their targets, given or random."""

import dataclasses
import math

import numpy as np
from jaxtyping import Integer

from jaxlm.config import ModelConfig
from jaxlm.errors import UserError
from jaxlm.ops.partition import mesh_shape

ROWS, DRAWS = 3, 3
"""Rows of a random batch (on a mesh as many more as it takes to split them), and batches over which rounding errors are
averaged."""

SUMMED = 64 * 64
"""Tokens of a batch for bfloat16, in a single draw. A sum kept in bfloat16 is wrong by more the longer it is: 3 rows
hide it, and over this many tokens a bias gradient is 5 to 27% off."""

DECODED_ROWS = 16
"""Rows of a random batch that are decoded, at most: the many of bfloat16 would take long and show nothing more."""

LARGEST_LOGITS = 2**26
"""Logits of such a batch, at most: large vocabularies get fewer tokens, for float64 logits take 8 bytes each."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A batch to read."""

    windows: Integer[np.ndarray, "B T1"]
    """Token ids; T of each row are read, the last T are the targets."""
    weights: np.ndarray
    """[B, T], float64: the weights of the targets in the loss. The end of the last row has weight 0, as padding."""


class Batches:
    """The batches of one comparison: the tokens given, or random ones; after them as many random ones as are asked for.

    Args:
      short: one row in one batch, as large models need.

    Raises:
      UserError: tokens that the model cannot read.
    """

    def __init__(
        self, cfg: ModelConfig, tokens: np.ndarray | None, seed: int, draws: int | None, short: bool = False
    ) -> None:
        self._cfg, self._rng = cfg, np.random.default_rng(seed)
        self.short = short
        if tokens is None:
            tokens = self._rng.integers(0, cfg.vocab_size, _random_shape(cfg, 1 if short else ROWS))
            self.decoded_rows = min(DECODED_ROWS, len(tokens))
            self.draws = draws or (1 if short or cfg.dtype == "bfloat16" else DRAWS)
        else:
            tokens = np.asarray(tokens)
            self.draws, self.decoded_rows = 1, len(tokens)
        _check(cfg, tokens)
        self._batches = [self._weighted(tokens)]

    @property
    def length(self) -> int:
        """Tokens read in a row, T."""
        return self._batches[0].weights.shape[1]

    def first(self, count: int) -> list[Inputs]:
        """The first `count` batches, all of one shape."""
        while len(self._batches) < count:
            shape = self._batches[0].windows.shape
            self._batches.append(self._weighted(self._rng.integers(0, self._cfg.vocab_size, shape)))
        return self._batches[:count]

    def _weighted(self, windows: np.ndarray) -> Inputs:
        rows, read = len(windows), windows.shape[1] - 1
        weights = self._rng.uniform(0.5, 1.5, (rows, read))
        weights[-1, -(read // 3) - 1 :] = 0
        return Inputs(windows.astype(np.int32), weights)


def _random_shape(cfg: ModelConfig, rows: int) -> tuple[int, int]:
    if cfg.max_seq_len < 2:
        raise UserError(f"max_seq_len = {cfg.max_seq_len} leaves nothing to compare: give at least 2")
    widest = max((window or 0 for window in cfg.layer_windows), default=0)
    length = min(max(128, 3 * widest) + 3, cfg.max_seq_len)  # local attention begins at 128 tokens and 3 windows
    if cfg.dtype == "bfloat16":
        rows = max(rows, math.ceil(min(SUMMED, LARGEST_LOGITS // cfg.vocab_size) / length))
    mesh = mesh_shape()
    ways = mesh.get("data", 1) * mesh.get("fsdp", 1)
    return math.ceil(rows / ways) * ways, length + 1


def _check(cfg: ModelConfig, windows: np.ndarray) -> None:
    read = windows.shape[-1] - 1
    readable = windows.ndim == 2 and windows.size and np.issubdtype(windows.dtype, np.integer)
    if not readable or read < 2 or not 0 <= windows.min() <= windows.max() < cfg.vocab_size:
        raise UserError(
            f"tokens {list(windows.shape)} cannot be compared: give 3 or more ids below {cfg.vocab_size} a row"
        )
    cfg.check_reach(read)
