"""What a caller asks of a sampler, checked once: the arguments that `generate`, `generate_naive` and `stream` share."""

import dataclasses
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxlm.config import ModelConfig
from jaxlm.decode.filters import Rules, Settings
from jaxlm.errors import UserError
from jaxlm.types import Tokens

MIN_TEMPERATURE = 1e-6
"""Below it logits / temperature may overflow float32."""


@dataclasses.dataclass(frozen=True)
class Request:
    """Prompts and how to continue them; `generate` documents each argument.

    Raises:
      UserError: an argument out of range, prompt ids outside the vocabulary, or, with on_overflow="error", more tokens
        than the capacity.
    """

    cfg: ModelConfig
    prompt: Tokens
    _: dataclasses.KW_ONLY
    max_new_tokens: int
    key: Key[Array, "*rows"]
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    num_samples: int = 1
    stop_token: int | None = None
    forbidden_tokens: Sequence[int] = ()
    prompt_lengths: Int[Array | np.ndarray, " B"] | Sequence[int] | None = None
    capacity: int | None = None
    on_overflow: Literal["continue", "error"] = "continue"

    def __post_init__(self) -> None:
        self._check_prompt()
        self._check_values()
        self._check_overflow()

    @property
    def rows(self) -> int:
        """R = B * num_samples."""
        return len(self.lengths) * self.num_samples

    @property
    def ids(self) -> Int[np.ndarray, "B P"]:
        """The prompts, P that of the longest, 0 where padding stands."""
        ids = np.asarray(self.prompt)[:, : self.longest]
        return np.where(np.arange(ids.shape[1])[None] < self.lengths[:, None], ids, 0).astype(np.int32)

    @property
    def lengths(self) -> Int[np.ndarray, " B"]:
        """The tokens of each prompt."""
        batch, width = np.shape(self.prompt)
        return np.full(batch, width) if self.prompt_lengths is None else np.asarray(self.prompt_lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return int(self.lengths.max())

    @property
    def context(self) -> int:
        """The capacity: the one asked for, else min(prompt + new, max_seq_len)."""
        return self.capacity or min(self.longest + self.max_new_tokens, self.cfg.max_seq_len)

    @property
    def overflows(self) -> bool:
        """Whether some layer would see more tokens than the capacity; the last new token is never fed."""
        if self.cfg.family != "transformer":
            return False
        reach = max(math.inf if window is None else window for window in self.cfg.layer_windows)
        fed = self.longest + self.max_new_tokens - 1
        return self.context < (fed if self.cfg.has_position_table else min(reach, fed))

    @property
    def cached_steps(self) -> int:
        """New tokens that the cache serves: all, but for a learned table no more than have a place in it."""
        if not (self.overflows and self.cfg.has_position_table):
            return self.max_new_tokens
        return min(max(self.context - self.longest + 1, 0), self.max_new_tokens)

    @property
    def rules(self) -> Rules:
        """What is compiled in; top-k's ceiling is a power of two, so that near values share a program."""
        greedy, vocab_size = self.temperature == 0, self.cfg.vocab_size
        top_k = None if greedy or self.top_k is None or self.top_k >= vocab_size else self.top_k
        return Rules(
            greedy=greedy,
            top_k_ceiling=None if top_k is None else min(power_of_two(top_k), vocab_size),
            top_p=not greedy and self.top_p is not None and self.top_p < 1,
            min_p=not greedy and self.min_p is not None,
            repetition_penalty=self.repetition_penalty != 1,
            forbidden=len(self.forbidden_tokens) > 0,
        )

    @property
    def settings(self) -> Settings:
        """The values, as arrays."""
        forbidden = np.zeros(self.cfg.vocab_size, bool)
        forbidden[list(self.forbidden_tokens)] = True
        return Settings(
            temperature=np.asarray(self.temperature or 1.0, np.float64),
            top_k=np.asarray(self.top_k or 1, np.int32),
            top_p=np.asarray(1.0 if self.top_p is None else self.top_p, np.float64),
            min_p=np.asarray(self.min_p or 0.0, np.float64),
            repetition_penalty=np.asarray(self.repetition_penalty, np.float64),
            forbidden=forbidden,
            stop_token=np.asarray(-1 if self.stop_token is None else self.stop_token, np.int32),
        )

    def _check_prompt(self) -> None:
        shape, vocab_size = np.shape(self.prompt), self.cfg.vocab_size
        if len(shape) != 2 or 0 in shape:
            raise UserError(f"prompt has shape {shape}: give [B, P] token ids with B and P at least 1")
        if not np.issubdtype(np.asarray(self.prompt).dtype, np.integer):
            raise UserError(f"prompt has type {np.asarray(self.prompt).dtype}: give integer token ids")
        lengths = self.lengths
        if lengths.shape != shape[:1] or not np.issubdtype(lengths.dtype, np.integer):
            raise UserError(f"prompt_lengths = {lengths.tolist()}: give one integer for each of the {shape[0]} prompts")
        if lengths.min() < 1 or lengths.max() > shape[1]:
            raise UserError(f"prompt_lengths = {lengths.tolist()}: each must be 1 to the prompt's width {shape[1]}")
        real = np.asarray(self.prompt)[np.arange(shape[1])[None] < lengths[:, None]]
        if real.min() < 0 or real.max() >= vocab_size:
            raise UserError(f"prompt holds ids {real.min()} to {real.max()}: the vocabulary has 0 to {vocab_size - 1}")

    def _check_values(self) -> None:
        vocab_size = self.cfg.vocab_size
        for name in ("max_new_tokens", "num_samples", "top_k", "capacity"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int | np.integer) or value < 1):
                raise UserError(f"{name} = {value}: give a whole number of at least 1")
        if not (self.temperature == 0 or MIN_TEMPERATURE <= self.temperature < math.inf):
            raise UserError(f"temperature = {self.temperature}: give 0 (greedy), or at least {MIN_TEMPERATURE}")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{name} = {value}: give more than 0 and at most 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"repetition_penalty = {self.repetition_penalty}: give a number above 0; 1 changes nothing")
        if self.stop_token is not None and not 0 <= self.stop_token < vocab_size:
            raise UserError(f"stop_token = {self.stop_token}: the vocabulary has 0 to {vocab_size - 1}")
        outside = [token for token in self.forbidden_tokens if not 0 <= token < vocab_size]
        if outside:
            raise UserError(f"forbidden_tokens holds {outside[0]}: the vocabulary has 0 to {vocab_size - 1}")
        if len(set(self.forbidden_tokens)) == vocab_size:
            raise UserError(f"forbidden_tokens holds all {vocab_size} tokens: leave one")
        kind = getattr(self.key, "dtype", type(self.key).__name__)
        if not (isinstance(self.key, jax.Array) and jnp.issubdtype(kind, jax.dtypes.prng_key)):
            raise UserError(f"key has type {kind}: give jax.random.key(seed)")
        if self.key.shape not in ((), (self.rows,)):
            raise UserError(f"key has shape {self.key.shape}: give one key, or one for each of the {self.rows} rows")

    def _check_overflow(self) -> None:
        if self.on_overflow not in ("continue", "error"):
            raise UserError(f"on_overflow = {self.on_overflow!r}: give 'continue' or 'error'")
        max_seq_len = self.cfg.max_seq_len
        if self.cfg.has_position_table and self.context > max_seq_len:
            raise UserError(
                f"capacity = {self.capacity} is beyond the learned position table: "
                f"give at most max_seq_len = {max_seq_len}"
            )
        if not self.overflows:
            return
        numbers = f"prompt {self.longest} + {self.max_new_tokens} new tokens"
        if self.on_overflow == "error":
            raise UserError(f"{numbers} pass the capacity {self.context}: give fewer, or let generate go on past it")
        if self.cfg.has_position_table:
            warnings.warn(
                f"{numbers} pass the learned position table (capacity {self.context}, max_seq_len = {max_seq_len}): "
                f"from there each token recomputes the latest {self.context}",
                stacklevel=5,
            )


class Block(NamedTuple):
    """Some new tokens of every row, and their log-probabilities."""

    tokens: Int[np.ndarray, "R b"]
    log_probs: Float[np.ndarray, "R b"]


class Generation(NamedTuple):
    """What `generate` drew, R = B * num_samples rows (a prompt's samples follow one another).

    tokens: [R, n] int32; slots after a stop token hold it again.
    log_probs: [R, n] log-probability in nats of each token under the model itself (before temperature and
      filters); 0 after the stop token.
    lengths: [R] tokens before the stop token.
    """

    tokens: Int[Array, "R n"]
    log_probs: Float[Array, "R n"]
    lengths: Int[Array, " R"]


def assemble(request: Request, blocks: Iterable[Block]) -> Generation:
    """All blocks together; where they end early every row is done, and the rest holds the stop token."""
    parts = list(blocks)
    tokens = np.concatenate([part.tokens for part in parts], axis=1)
    log_probs = np.concatenate([part.log_probs for part in parts], axis=1)
    missing = ((0, 0), (0, request.max_new_tokens - tokens.shape[1]))
    stop = request.settings.stop_token
    tokens, log_probs = np.pad(tokens, missing, constant_values=stop), np.pad(log_probs, missing)
    lengths = np.cumprod(tokens != stop, axis=1, dtype=np.int32).sum(axis=1, dtype=np.int32)
    return Generation(jnp.asarray(tokens), jnp.asarray(log_probs), jnp.asarray(lengths))


def power_of_two(n: int) -> int:
    """The least one that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
