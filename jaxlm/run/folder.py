"""The folder of a run: what stands in it, and how it is opened and made."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxlm.config import ExperimentConfig
from jaxlm.config.base import from_dict, to_dict
from jaxlm.data import tokenizer
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import CheckError, UserError
from jaxlm.model.build import build_model, init_params
from jaxlm.model.layers import LanguageModel
from jaxlm.run import checkpoint
from jaxlm.types import Params


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model: `load_run` makes it."""

    path: Path
    config: ExperimentConfig
    model: LanguageModel
    params: Params
    tokenizer: Tokenizer
    step: int
    """The checkpoint the parameters come from."""
    corpus_sha256: str | None
    """Of the data it was trained on; None where it was brought in from elsewhere."""


def read_config(path: Path) -> ExperimentConfig:
    """The configuration of a run.

    Raises:
      UserError: as `_read_record`.
    """
    return _read_record(path)[0]


def _read_record(path: Path) -> tuple[ExperimentConfig, str | None]:
    """The configuration of a run and the sha256 of its text (None: it was brought in).

    Raises:
      UserError: the folder is no run, or its config.json is not one of this version.
    """
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{path} is not a run: it has no config.json; give the folder `jaxlm train` names")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return from_dict(ExperimentConfig, record["config"]), record["corpus_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no configuration of this version: {error}") from None


def load_run(path: str | Path, step: int | None = None) -> Run:
    """Opens a run with the parameters of one checkpoint.

    Args:
      step: which checkpoint; None = the one with the lowest validation loss (the latest if none was evaluated),
        and when that is damaged, which a warning says, the latest sound one.

    Raises:
      UserError: no run there, or no such checkpoint.
      CheckError: the checkpoint, or every one of them, is damaged.
    """
    path = Path(path)
    config, sha256 = _read_record(path)
    folder = path / "checkpoints"
    steps = checkpoint.steps(folder)
    if not steps:
        raise UserError(f"{path} has no checkpoint yet: train on with --resume")
    if step is not None and step not in steps:
        raise UserError(f"step {step} has no checkpoint in {path}: choose one of {', '.join(map(str, steps))}")
    best = checkpoint.best_step(folder)
    latest = [number for number in reversed(steps) if checkpoint.readable(folder / str(number))]
    errors = [
        f"checkpoint {folder / str(number)} is damaged: its manifest cannot be read"
        for number in steps
        if number not in latest
    ]
    candidates = [step] if step is not None else latest if best is None else list(dict.fromkeys([best, *latest]))
    made = tokenizer.load(path / "tokenizer.json")
    surplus = made.vocab_size > config.model.vocab_size  # a model brought in may have more rows than there are tokens
    if surplus or (sha256 is not None and made.vocab_size != config.model.vocab_size):
        raise UserError(
            f"{path / 'tokenizer.json'} has {made.vocab_size} entries, the model {config.model.vocab_size}: "
            "put the run's own tokenizer back"
        )
    if config.model.attention_impl == "cudnn" and jax.default_backend() != "gpu":
        warnings.warn(
            f"{path} was trained with cuDNN's attention, which needs an NVIDIA GPU: using 'auto'", stacklevel=2
        )
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention_impl="auto"))
    model = build_model(config.model)
    like = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    for candidate in candidates:
        try:
            params = checkpoint.restore_params(folder / str(candidate), like)
        except CheckError as error:
            errors.append(str(error))
            continue
        for line in errors:
            warnings.warn(f"{line}; using step {candidate}", stacklevel=2)
        return Run(path, config, model, params, made, candidate, sha256)
    raise CheckError("; ".join(errors))


@contextlib.contextmanager
def new_folder(out: Path, config: ExperimentConfig, made: Tokenizer, sha256: str | None, **more: Any) -> Iterator[Path]:
    """A run folder aside, which is `out` once the block ends: it is there whole or not at all.

    Args:
      sha256: of the data; None where the run is brought in.
      more: entries of config.json besides the usual ones.

    Raises:
      UserError: it cannot be written.
    """
    out = out.resolve()
    aside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        for folder in ("checkpoints", "samples"):
            (aside / folder).mkdir(parents=True)
        (aside / "tokenizer.json").write_text(json.dumps(made.to_dict()), encoding="utf-8")
        _write_config(aside, config, sha256, **more)
        yield aside
        aside.rename(out)
    except OSError as error:
        raise UserError(f"{out} cannot be made ({error.strerror}): choose another place") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_config(folder: Path, config: ExperimentConfig, sha256: str | None, **more: Any) -> None:
    aside = folder / "config.json.partial"
    record = {"config": to_dict(config), "corpus_sha256": sha256, **more, **provenance()}
    aside.write_text(json.dumps(record, indent=1), encoding="utf-8")
    aside.replace(folder / "config.json")


def check_named(run: Run) -> None:
    """Refuses a run that was brought in and is given no data.

    Raises:
      UserError: it was, and `data.path` names none.
    """
    if run.corpus_sha256 is None and run.config.data.path is None:
        raise UserError(f"{run.path} was brought in and has no data of its own: name a text by --data.path")


def check_data(found: str, wanted: str | None) -> None:
    """Refuses data whose sha256 is not that of the run; None takes any.

    Raises:
      UserError: they differ.
    """
    if wanted is not None and found != wanted:
        raise UserError(
            f"the text has changed: its sha256 is {found[:12]}..., the run's {wanted[:12]}...; "
            "put the run's own text back, or name it by --data.path"
        )


def provenance() -> dict[str, Any]:
    """Versions, git commit and device: what besides a config the numbers may depend on."""
    packages = "jaxlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"
    checkout, commit = Path(__file__).parents[2], None
    if (checkout / ".git").exists() and (git := shutil.which("git")):
        command = [git, "-C", str(checkout), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    device = jax.devices()[0]
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "git_commit": commit,
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
    }
