"""ExperimentConfig: everything that decides a training run; frozen, validated, and the same again through JSON.

Imports neither JAX nor torch, so the command line answers at once and torchref can read the same file.
"""

import dataclasses
from pathlib import Path

from jaxlm.config.base import Validated, check_at_least
from jaxlm.config.data import DataConfig, Paths, absolute
from jaxlm.config.mesh import MeshConfig
from jaxlm.config.model import ModelConfig
from jaxlm.config.optim import OptimConfig
from jaxlm.config.sampling import SamplingParams, SpecialTokens
from jaxlm.config.train import TrainConfig
from jaxlm.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig(SamplingParams):
    """The prompt that text samples continue, how many there are, and how they are sampled."""

    prompt: str = "\n"
    """Text the samples continue."""
    num_samples: int = 1
    """Samples for the prompt."""
    special_tokens: SpecialTokens = "id"
    """What <|endoftext|> and the like in the prompt become, with an imported tokenizer: id, their one token each; text,
    the tokens of their characters."""
    stop: tuple[str, ...] = ()
    """Texts before which a sample ends."""
    max_new_tokens: int = 500
    """Tokens to generate after the prompt."""
    temperature: float = 0.8
    """The logits are divided by it; 0 is exactly greedy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "num_samples")
        for text in self.stop:
            if not text:
                raise UserError(f"stop = {self.stop!r} holds an empty text: give other texts")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise UserError(f"stop = {self.stop!r} holds a text that is not UTF-8: give other texts")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig(Validated):
    """Everything that decides a training run: the same ExperimentConfig gives the same numbers."""

    preset: str
    """The preset that the config started from; any other name if it did not."""
    model: ModelConfig
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.pack == "documents" and self.model.family != "transformer":
            raise UserError(
                f"data.pack = 'documents' is for attention, which family = {self.model.family!r} has not: use 'stream'"
            )
        if self.data.pack == "documents" and self.model.attention_impl == "cudnn":
            raise UserError("data.pack = 'documents' has no mask in attention_impl = 'cudnn': use 'auto'")

    def with_data_at(self, path: Paths | Path, val_path: Paths | Path) -> "ExperimentConfig":
        """The config with the data at these paths, made absolute; None leaves a path as it is."""
        data = self.data
        if path is not None:
            data = dataclasses.replace(data, path=absolute(path))
        if val_path is not None:
            data = dataclasses.replace(data, val_path=absolute(val_path))
        return dataclasses.replace(self, data=data)
