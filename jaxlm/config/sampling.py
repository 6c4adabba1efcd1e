"""SamplingParams: how tokens are sampled. Import it from jaxlm.config."""

import dataclasses
import math
from typing import Any, Literal

from jaxlm.config.base import Validated, check_at_least, check_seed
from jaxlm.errors import UserError

SpecialTokens = Literal["id", "text"]
"""What the spelling of a special token in a text, such as <|endoftext|>, becomes: its one id, or text like other."""

MIN_TEMPERATURE = 1e-6
"""Below it, logits / temperature may overflow float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams(Validated):
    """How many tokens are sampled, and how each is chosen from the model's logits.

    The options act in this order: repetition penalty, forbidden tokens, temperature, top-k, top-p, min-p. None turns an
    option off. Numbers may be NumPy's or JAX's; they are stored as Python's.

    Raises:
      UserError: a value of the wrong type or out of range. `check_vocabulary` checks token ids against a model.
    """

    max_new_tokens: int
    """Tokens to generate after the prompt."""
    temperature: float = 1.0
    """The logits are divided by it; 0 is exactly greedy."""
    top_k: int | None = None
    """Sample among the k likeliest tokens (and those as likely as the last of them)."""
    top_p: float | None = None
    """Sample among the fewest likeliest tokens whose probabilities, after temperature and top_k, reach top_p."""
    min_p: float | None = None
    """Sample among the tokens at least min_p times as probable as the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of the prompt and tokens already generated become less likely, under greedy choice too."""
    forbidden_tokens: tuple[int, ...] = ()
    """Token ids that are never generated."""
    stop_token: int | tuple[int, ...] | None = None
    """Token id that ends a row, or several of them. Default for a run on transcripts: <eos>; for one that was imported:
    the ends that its model names."""
    seed: int = 0
    """Seed of the random choices."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _python_number(getattr(self, field.name)))
        super().__post_init__()
        check_at_least(self, 1, "max_new_tokens", "top_k")
        check_seed(self)
        if not (self.temperature == 0 or MIN_TEMPERATURE <= self.temperature < math.inf):
            raise UserError(
                f"temperature = {self.temperature!r} is out of range: give 0 (greedy), or a finite number of at least "
                f"{MIN_TEMPERATURE}"
            )
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{name} = {value!r} is out of range: give 0 < {name} <= 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(
                f"repetition_penalty = {self.repetition_penalty!r} is out of range: give a finite number above 0; "
                "1 changes nothing"
            )
        if any(token < 0 for token in self.forbidden_tokens):
            raise UserError(f"forbidden_tokens = {self.forbidden_tokens!r} holds a negative id: give ids from 0 on")
        if any(token < 0 for token in self.stop_tokens):
            raise UserError(f"stop_token = {self.stop_token!r} is negative: give ids from 0 on")

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The ids that end a row, however many `stop_token` gives."""
        if self.stop_token is None:
            return ()
        return self.stop_token if isinstance(self.stop_token, tuple) else (self.stop_token,)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuses token ids that a model of this vocabulary does not have, and a ban on all that it has."""
        if any(token >= vocab_size for token in self.stop_tokens):
            raise UserError(f"stop_token = {self.stop_token}: the vocabulary has 0 to {vocab_size - 1}")
        largest = max(self.forbidden_tokens, default=0)
        if largest >= vocab_size:
            raise UserError(f"forbidden_tokens holds {largest}: the vocabulary has 0 to {vocab_size - 1}")
        if len(set(self.forbidden_tokens)) == vocab_size:
            raise UserError(f"forbidden_tokens holds all {vocab_size} tokens: leave one")


def _python_number(value: Any) -> Any:
    """A scalar of NumPy or JAX as Python's own number, several as a tuple of them; anything else as it is.

    Several may be a tuple, list, set or range, or an array of one axis.
    """
    if isinstance(value, tuple | list | set | frozenset | range) or getattr(value, "ndim", None) == 1:
        return tuple(map(_python_number, value))
    return value.item() if getattr(value, "shape", None) == () else value
