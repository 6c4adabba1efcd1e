"""What the processes of `gpu.py` share: the sizes they time, and how a process offers work to be timed.

A lane is one thing to time, named KIND:SIZE:PRECISION[:dropout]. A process builds its lanes one after another and says
so; then each line of its stdin names a lane, it runs one round of it and answers with the seconds. So processes of JAX
and of PyTorch, each alone in its process, take turns on one GPU.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

PREFIX = "gpu> "
"""Begins the lines of stdout that answer; other lines are what libraries print."""


class Size(NamedTuple):
    """A GPT of nanoGPT's kind without biases, and what it is trained or asked for."""

    vocab: int
    context: int
    layers: int
    width: int
    heads: int
    batch: int
    steps: int
    """Training steps of a round."""

    @property
    def parameters(self) -> int:
        """Weights of matrices and tables but for the position table; the head is the embedding."""
        return self.vocab * self.width + 12 * self.layers * self.width**2

    @property
    def flops_per_token(self) -> int:
        """Of a training step, as nanoGPT and PaLM count: 6 a weight, and 12 L D T for attention.

        Source: Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B. The scores that the causal mask
        hides count too.
        """
        return 6 * self.parameters + 12 * self.layers * self.width * self.context


SIZES = {
    "shakespeare-char": Size(65, 256, 6, 384, 6, batch=64, steps=50),
    "gpt2-124m": Size(50304, 1024, 12, 768, 12, batch=16, steps=10),  # nanoGPT pads the vocabulary to this
    "smoke": Size(65, 32, 2, 32, 2, batch=4, steps=2),
}
PROMPT, NEW = 16, 240
"""Tokens of a decoding round: given, generated."""

Lane = Callable[[], object]
Made = tuple[Lane, dict[str, Any]]
"""A round of the lane, which returns when the device is done, and what there is to say about it."""


def say(**facts: Any) -> None:
    """Answers with one line."""
    print(PREFIX + json.dumps(facts), flush=True)


def reason(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def last_line(text: str) -> str:
    """The last line that says something: not the note that JAX puts behind an error."""
    lines = [line.strip() for line in text.splitlines()]
    said = [line for line in lines if line.strip("-") and not line.startswith("For simplicity, JAX has removed")]
    return said[-1][:300] if said else ""


def serve(lanes: list[str], make: Callable[[str], Made]) -> None:
    """Builds the lanes and runs their rounds, until stdin ends. A lane that fails says why; the others go on."""
    rounds: dict[str, Lane] = {}
    for name in lanes:
        started = time.perf_counter()
        try:
            run, facts = make(name)
            run()
            say(lane=name, ready_s=round(time.perf_counter() - started, 1), **facts)
            rounds[name] = run
        except Exception as error:
            say(lane=name, failed=reason(error))
    for line in sys.stdin:
        name = line.strip()
        started = time.perf_counter()
        try:
            rounds[name]()
            say(lane=name, seconds=time.perf_counter() - started)
        except Exception as error:
            say(lane=name, failed=reason(error))
