"""Every configuration of jaxlm: frozen dataclasses that validate themselves and round-trip through JSON.

Imports neither JAX nor torch, so the command line answers at once and torchref can read the same file.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from jaxlm.config.base import Validated, check_at_least, check_rate, check_seed
from jaxlm.config.model import ModelConfig as ModelConfig
from jaxlm.config.sampling import SamplingParams, SpecialTokens
from jaxlm.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Validated):
    """Which text or transcripts, and how they become tokens."""

    dataset: str = "tinyshakespeare"
    """Name of a dataset, tinyshakespeare or librispeech; ignored if path is given."""
    path: str | None = None
    """Your own data instead of a recipe: a UTF-8 text file; a folder of `jaxlm prepare`; for transcripts a CSV file
    (id,transcript), a folder of CSV files, or a folder of .npy files with one utterance each."""
    val_path: str | None = None
    """Transcripts held out for validation, in the same form as path; None = the last val_fraction of path's."""
    tokenizer: Literal["char", "bpe", "transcript", "source"] = "char"
    """char: one token per character of the text; bpe: byte-level BPE trained on the training split; transcript: A-Z,
    apostrophe, space, <eos> and <pad>, each transcript in rows of its own as <eos> ... <eos>; source: that of the model
    that training goes on from (--init-from). A folder of `jaxlm prepare` has its own, which is bpe."""
    bpe_vocab_size: int = 4096
    """Most entries of the byte-level BPE, including its 256 bytes."""
    special_tokens: SpecialTokens = "text"
    """What <|endoftext|> and the like in the text become, with an imported tokenizer: id, their one token each; text,
    the tokens of their characters."""
    pack: Literal["stream", "documents"] = "stream"
    """What a token of a window attends to. stream: all before it; documents: those of its own document, in a corpus
    that `jaxlm prepare` wrote. The windows are the same."""
    val_fraction: float = 0.1
    """Share of the text (of the documents, or of the transcripts) that is held out for validation, at the end; unused
    if val_path or the dataset gives held-out files."""
    resident_mb: int = 256
    """Texts up to this many MiB are tokenized in memory and live on the device; larger ones go through a
    memory-mapped token file in the data cache. Transcripts are always in memory, prepared corpora never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 256, "bpe_vocab_size")
        check_at_least(self, 0, "resident_mb")
        if not 0 < self.val_fraction < 1:
            raise UserError(f"val_fraction = {self.val_fraction!r} is out of range: give 0 < val_fraction < 1")
        for name in ("path", "val_path"):
            if getattr(self, name) == "":
                raise UserError(f"data.{name} = '' names nothing: give a path, or leave it out")
        if self.val_path is not None and self.tokenizer not in ("transcript", "source"):
            raise UserError(
                f"val_path = {self.val_path!r} is for tokenizer = 'transcript', not {self.tokenizer!r}: leave it out; "
                "val_fraction splits a text"
            )
        if self.val_path is not None and self.path is None:
            raise UserError(
                f"val_path = {self.val_path!r} needs a path of your own: give path too, or leave val_path out"
            )


_MOMENTS = {"read_by": ("adam", "adamw", "adamsn")}
_ADAMSN = {"read_by": ("adamsn",)}

SubsetRule = Literal["per_output", "per_input", "auto", "smaller"]
"""Which numbers of a linear map share a second moment in AdamSN; `jaxlm.optim.scale_by_adamsn` has the meanings."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig(Validated):
    """The optimizer and its schedule.

    A field with `read_by` in its metadata is read by these optimizers alone, the others by all. A config always holds
    the number of its weight_decay: None becomes that number at once.
    """

    name: str = "adamw"
    """sgd, adam, adamw, adamsn, adafactor, or the name of any optimizer in Optax. All have decoupled decay by
    weight_decay; adam is adamw, but decays nothing unless a weight_decay is given."""
    learning_rate: float = 1e-3
    """Peak learning rate; adamsn needs about ten times that of adamw."""
    schedule: Literal["cosine", "constant", "rsqrt"] = "cosine"
    """cosine decays to min_lr_ratio of the peak at the last step; rsqrt falls as 1/sqrt(step) after the warm-up."""
    warmup_steps: int = 100
    """Steps over which the rate rises linearly: step t (from 0) uses peak * (t + 1) / (warmup_steps + 1)."""
    min_lr_ratio: float = 0.1
    """Final rate of the cosine as a share of the peak."""
    weight_decay: float | None = None
    """Decoupled decay, times the rate, on matrices only; None = 0.1, but 0 for adam."""
    b1: float = dataclasses.field(default=0.9, metadata=_MOMENTS)
    """Decay rate of the first moment (adam, adamw, adamsn)."""
    b2: float = dataclasses.field(default=0.99, metadata={"read_by": (*_MOMENTS["read_by"], "adafactor")})
    """Decay rate of the second moment (adam, adamw, adamsn, adafactor)."""
    eps: float = dataclasses.field(default=1e-8, metadata={"read_by": (*_MOMENTS["read_by"], "adafactor")})
    """Added to sqrt(v_hat); in adafactor, to v_hat."""
    subset: SubsetRule = dataclasses.field(default="auto", metadata=_ADAMSN)
    """Which numbers of a linear map share a second moment in adamsn: the inputs of each output (per_output), the
    outputs of each input (per_input), or per_output if there are at least as many outputs as inputs, as its authors do
    (auto), or the other way round, which keeps one number for each entry of the smaller dimension (smaller)."""
    adam_lr_ratio: float = dataclasses.field(default=0.1, metadata=_ADAMSN)
    """Rate of all parameters that are not linear maps in adamsn, and of all decay, as a share of the learning rate."""
    arguments: tuple[str, ...] = ()
    """Further arguments of the optimizer, NAME=VALUE each: momentum=0.9 nesterov=true (sgd), mu_dtype=bfloat16."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient; None = no clipping."""
    max_nonfinite: int = 0
    """How many steps in a row may be skipped because their gradient is not finite; one more ends the run with an error.
    A skipped step changes neither the parameters nor the optimizer, and the schedule does not count it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight_decay is None:
            object.__setattr__(self, "weight_decay", 0.0 if self.name == "adam" else 0.1)
        check_at_least(self, 0, "learning_rate", "warmup_steps", "min_lr_ratio", "weight_decay", "eps", "adam_lr_ratio")
        check_at_least(self, 0, "max_nonfinite")
        check_rate(self, "b1", "b2")
        for name, default in idle_optim_fields(self.name).items():
            if getattr(self, name) != default:
                raise UserError(
                    f"{name} = {getattr(self, name)!r} is not read by {self.name}: leave it out, or pass the optimizer "
                    "an argument of its own by arguments"
                )
        if self.min_lr_ratio > 1:
            raise UserError(f"min_lr_ratio = {self.min_lr_ratio!r} is above 1: give a share of the peak rate")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UserError(f"clip_norm = {self.clip_norm!r} is too small: give more than 0, or None for no clipping")


def optimizer_fields(name: str) -> tuple[str, ...]:
    """The fields that an optimizer reads besides those that all read; an optimizer of Optax reads none of them."""
    return tuple(field.name for field in dataclasses.fields(OptimConfig) if name in field.metadata.get("read_by", ()))


def idle_optim_fields(name: str) -> dict[str, Any]:
    """The fields of OptimConfig that an optimizer does not read, with their defaults."""
    fields = [field for field in dataclasses.fields(OptimConfig) if "read_by" in field.metadata]
    return {field.name: field.default for field in fields if name not in field.metadata["read_by"]}


MatmulPrecision = Literal["default", "float32", "tensorfloat32"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Validated):
    """How long a training run is, and how often it logs, evaluates and saves. Steps are optimizer steps."""

    steps: int = 2000
    """Optimizer steps of the whole run."""
    batch_size: int = 12
    """Sequences of an optimizer step, all micro-batches together."""
    grad_accum: int = 1
    """Micro-batches that a batch is cut into: less memory, same gradient."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    eval_every: int = 500
    """Steps between evaluations; the last step always has one."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step always has one."""
    keep: int = 2
    """How many of the latest checkpoints are kept, besides the one with the best validation loss."""
    seed: int = 0
    """Seed of the initial parameters, the batches and dropout."""
    matmul_precision: MatmulPrecision = "default"
    """How products of float32 are computed in training and its evaluations. default: as JAX does, which on a recent
    NVIDIA GPU is TF32; float32: exactly; tensorfloat32: with 11 bits of each factor where the device can (TF32). On a
    CPU all are float32, and products of bfloat16 (model.dtype) are always what they are."""
    max_minutes: float | None = None
    """Stop cleanly after this wall time, with a checkpoint; None = no limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(
            self, 1, "steps", "batch_size", "grad_accum", "log_every", "eval_every", "checkpoint_every", "keep"
        )
        check_at_least(self, 0, "max_minutes")
        check_seed(self)
        if self.batch_size % self.grad_accum:
            raise UserError(
                f"grad_accum = {self.grad_accum} does not divide batch_size = {self.batch_size}: change one"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Validated):
    """Over how many devices training is spread, and which processes take part. All defaults: one device, one process.

    The three axes decide how the work is cut, never what is computed. `jaxlm.sharding` has what each axis does.
    """

    data: int = 1
    """Copies of the model, each of which trains on its part of the batch; -1 = the rest of the devices."""
    fsdp: int = 1
    """Devices that cut the parameters, the optimizer's state and the batch among them; -1 = the rest of the devices."""
    tensor: int = 1
    """Devices that cut heads, MLP and vocabulary among them; -1 = the rest of the devices."""
    coordinator: str | None = None
    """HOST:PORT of process 0, for training by several processes; auto = what Slurm, Kubernetes, TPU or Open MPI say of
    this job; None = this process alone."""
    processes: int | None = None
    """How many processes there are, with a coordinator of HOST:PORT."""
    process_id: int | None = None
    """Which of them this is, from 0, with a coordinator of HOST:PORT."""

    def __post_init__(self) -> None:
        super().__post_init__()
        axes = {name: getattr(self, name) for name in ("data", "fsdp", "tensor")}
        for name, size in axes.items():
            if size < 1 and size != -1:
                raise UserError(
                    f"mesh.{name} = {size} is out of range: give at least 1, or -1 for the rest of the devices"
                )
        rest = [name for name, size in axes.items() if size == -1]
        if len(rest) > 1:
            raise UserError(
                f"mesh.{rest[0]} = -1 and mesh.{rest[1]} = -1: only one axis can be the rest of the devices; "
                "give a number for the other"
            )
        self._check_processes()

    def _check_processes(self) -> None:
        numbers = {"mesh.processes": self.processes, "mesh.process_id": self.process_id}
        if self.coordinator in (None, "auto"):
            for name, value in numbers.items():
                if value is not None:
                    fix = "leave it out" if self.coordinator else "give mesh.coordinator too, HOST:PORT of process 0"
                    raise UserError(f"{name} = {value} with mesh.coordinator = {self.coordinator}: {fix}")
            return
        host, _, port = str(self.coordinator).rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise UserError(
                f"mesh.coordinator = {self.coordinator!r} is not an address: give HOST:PORT of process 0, or auto"
            )
        for name, value in numbers.items():
            if value is None:
                raise UserError(f"mesh.coordinator = {self.coordinator} needs {name} too: give it")
        if self.processes < 1 or not 0 <= self.process_id < self.processes:  # type: ignore[operator]
            raise UserError(
                f"mesh.process_id = {self.process_id} of mesh.processes = {self.processes} is out of range: "
                "give 0 <= process_id < processes"
            )

    def without_processes(self) -> "MeshConfig":
        """The axes alone: the processes that take part are a matter of each session, not of the run."""
        return dataclasses.replace(self, coordinator=None, processes=None, process_id=None)


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

    def with_data_at(self, path: str | Path | None, val_path: str | Path | None) -> "ExperimentConfig":
        """The config with the data at these paths, made absolute; None leaves a path as it is."""
        data = self.data
        if path is not None:
            data = dataclasses.replace(data, path=str(Path(path).absolute()))
        if val_path is not None:
            data = dataclasses.replace(data, val_path=str(Path(val_path).absolute()))
        return dataclasses.replace(self, data=data)
