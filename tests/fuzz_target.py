"""What a target of fuzzing is, and the small model that several have."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from jaxlm.config import ModelConfig

MODEL = ModelConfig(vocab_size=30, max_seq_len=8, num_layers=1, embed_dim=4, num_heads=1)


@dataclasses.dataclass(frozen=True)
class Target:
    """Valid files, by their path in a folder, and what reads them."""

    make: Callable[[Path], None]
    read: Callable[[Path], object]
    damaged: tuple[str, ...]
    """The files that are damaged, one at a time; patterns for glob."""


def written(**files):
    """A maker of files, given as bytes or as what JSON holds; __ stands for a dot in a name."""

    def make(folder: Path) -> None:
        for name, content in files.items():
            path = folder / name.replace("__", ".")
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())

    return make
