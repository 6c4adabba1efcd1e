"""The folder of a run: how it is created and opened.

config.json  tokenizer.json  metrics.jsonl  checkpoints/<step>/  loss.png  samples/
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxlm.config import ExperimentConfig
from jaxlm.config.base import from_dict, to_dict
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.files import read_sealed, remove, sealed, staged, staging_path, to_disk, unwritable
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import CheckError, UserError
from jaxlm.model.build import build_model
from jaxlm.model.layers import LanguageModel
from jaxlm.ops.attention import cudnn_available
from jaxlm.run import checkpoint, lock
from jaxlm.sharding.layout import abstract_params
from jaxlm.sharding.mesh import find_devices
from jaxlm.types import Params

FIX = 'put the old one back; the options of --resume change settings (to let an edit stand, delete the entry "sha256")'
"""What to do about a config.json that was edited."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model, as `load_run` opens it."""

    path: Path
    config: ExperimentConfig
    model: LanguageModel
    params: Params
    tokenizer: Tokenizer
    step: int
    """The step of the checkpoint that holds these parameters."""
    corpus_sha256: str | None
    """sha256 of the data it was trained on; None if it was imported."""


class Record(NamedTuple):
    """What config.json says of a run."""

    config: ExperimentConfig
    corpus_sha256: str | None
    """sha256 of the data it was trained on; None if it was imported."""
    init_from: dict[str, Any] | None = None
    """The run that its first weights come from, as `init_from.source_entry` describes it; None if they were new."""
    changes: tuple[Mapping[str, Any], ...] = ()
    """What resuming has changed, oldest first, as `changes.changes` lists it."""


def read_config(path: Path) -> ExperimentConfig:
    """The configuration of a run.

    Raises:
      UserError: as `read_record`.
    """
    return read_record(path).config


def read_record(path: Path) -> Record:
    """Reads the config.json of a run.

    Raises:
      UserError: the folder is not a run, or its config.json does not fit this version.
    """
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{path} is not a run: it has no config.json; give the folder that `jaxlm train` names")
    record = read_sealed(file, FIX)
    try:
        config = from_dict(ExperimentConfig, record["config"])
        changes = tuple(record.get("changes", ()))
        return Record(config, record["corpus_sha256"], record.get("init_from"), changes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a configuration of this version: {error}") from None


def load_run(path: str | Path, step: int | None = None) -> Run:
    """Opens a run with the parameters of one checkpoint; on a mesh in context they are read split over it.

    Args:
      step: which checkpoint; None = the one with the lowest validation loss (exact ones come before estimates), or the
        latest if none was evaluated. If that one is damaged, a warning says so and the latest sound one is taken.

    Raises:
      UserError: there is no run or no such checkpoint.
      CheckError: the checkpoint is damaged, or all of them are.
    """
    path = Path(path)
    find_devices()
    record = read_record(path)
    config = record.config
    run_tokenizer = tokenizers.load(path / "tokenizer.json")
    check_vocabulary(path, run_tokenizer, record)
    candidates, problems = _candidates(path, step)
    if config.model.attention_impl == "cudnn" and not cudnn_available():
        warnings.warn(
            f"{path} was trained with cuDNN's attention, which needs an NVIDIA GPU: using 'auto'", stacklevel=2
        )
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention_impl="auto"))
    checkpoint.check_layers(path / "checkpoints", config.model)
    model = build_model(config.model)
    like = abstract_params(model)
    for candidate in candidates:
        try:
            params = checkpoint.restore_params(path / "checkpoints" / str(candidate), like)
        except CheckError as error:
            problems.append(str(error))
            continue
        for line in problems:
            warnings.warn(f"{line}; using step {candidate}", stacklevel=2)
        return Run(path, config, model, params, run_tokenizer, candidate, record.corpus_sha256)
    raise CheckError("; ".join(problems))


def _candidates(path: Path, step: int | None) -> tuple[list[int], list[str]]:
    """The checkpoints to try, in this order, and a line about each whose manifest cannot be read.

    Raises:
      UserError: there are none, or not the one of `step`.
    """
    folder = path / "checkpoints"
    steps = checkpoint.numbered(folder)
    if not steps:
        raise UserError(f"{path} has no checkpoint yet: continue its training with --resume")
    if step is not None and step not in steps:
        raise UserError(f"step {step} has no checkpoint in {path}: choose one of {', '.join(map(str, steps))}")
    latest = [number for number in reversed(steps) if checkpoint.readable(folder / str(number))]
    problems = [
        f"checkpoint {folder / str(number)} is damaged: its manifest is missing, cannot be read or has changed"
        for number in steps
        if number not in latest
    ]
    if step is not None:
        return [step], problems
    best = checkpoint.best_step(folder)
    return (latest if best is None else list(dict.fromkeys([best, *latest]))), problems


def check_vocabulary(path: Path, tokenizer: Tokenizer, record: Record) -> None:
    """Refuses a tokenizer that is not the run's.

    The model may have more rows than the tokenizer has ids if it was imported, or if its first weights come from a run.

    Raises:
      UserError: the message names both numbers.
    """
    size, rows = tokenizer.vocab_size, record.config.model.vocab_size
    exact = record.corpus_sha256 is not None and record.init_from is None
    if size > rows or (exact and size != rows):
        raise UserError(
            f"{path / 'tokenizer.json'} has {size} entries, the model {rows}: put the run's own tokenizer back"
        )


@contextlib.contextmanager
def new_folder(
    out: Path, config: ExperimentConfig, tokenizer: Tokenizer, sha256: str | None, **more: Any
) -> Iterator[Path]:
    """Yields a new run folder, which becomes `out` when the block ends well.

    Args:
      sha256: of the data; None if the run is imported.
      more: entries of config.json besides the usual ones.

    Raises:
      UserError: it cannot be written, or meanwhile something else is there.
    """
    lock.sweep_beginnings(out)
    with _filled(out) if out.is_dir() else _created(out) as folder:
        for name in ("checkpoints", "samples"):
            (folder / name).mkdir(parents=True)
        with staged(folder / "tokenizer.json") as path:
            path.write_text(json.dumps(sealed(tokenizer.to_dict())), encoding="utf-8")
        write_config(folder, config, sha256, **more)
        yield folder


@contextlib.contextmanager
def _created(out: Path) -> Iterator[Path]:
    """A staged folder, locked so that nobody takes it for what a killed process has left."""
    with staged(out.resolve(), "choose another --out") as folder:  # a link to a folder that is not there yet
        folder.mkdir()
        with lock.held(folder, "choose another --out"):
            yield folder


@contextlib.contextmanager
def _filled(out: Path) -> Iterator[Path]:
    """A folder within `out`, which is there and empty. Its content moves to `out`: a mount point cannot be replaced.

    config.json comes last, so until then `out` is no run.
    """
    with lock.held(out, "choose another --out"):
        refuse_occupied(out)
        for killed in out.glob(".new.*.partial"):
            remove(killed)
        staging = staging_path(out / "new", os.getpid())
        try:
            staging.mkdir()
            yield staging
            to_disk(staging)
            for name in sorted(os.listdir(staging), key=lambda name: (name == "config.json", name)):
                (staging / name).rename(out / name)
            to_disk(out, within=False)
        except OSError as error:
            raise unwritable(out, error, "choose another --out") from None
        finally:
            remove(staging)


def refuse_occupied(out: Path) -> None:
    """Refuses an `out` that holds something, but for what killed processes and an empty disk may hold.

    Raises:
      UserError: the message tells whether it is a run.
    """
    if not out.exists():
        return
    names = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    names -= {"lost+found", lock.NAME}
    if names - {name for name in names if name.startswith(".new.") and name.endswith(".partial")}:
        is_run = (out / "config.json").exists()
        fix = "continue it with --resume, or choose another --out" if is_run else "choose another --out"
        raise UserError(f"{out} already holds {'a run' if is_run else 'something'}: {fix}")


def write_config(folder: Path, config: ExperimentConfig, sha256: str | None, **more: Any) -> None:
    """Writes the config.json of a run, without the processes that train it; the arguments are those of `new_folder`."""
    config = dataclasses.replace(config, mesh=config.mesh.without_processes())
    record = {"config": to_dict(config), "corpus_sha256": sha256, **more, **provenance()}
    with staged(folder / "config.json") as path:
        path.write_text(json.dumps(sealed(record), indent=1), encoding="utf-8")


def check_named(run: Run) -> None:
    """Refuses an imported run without data.

    Raises:
      UserError: the run was imported, and `data.path` names no data.
    """
    if run.corpus_sha256 is None and run.config.data.path is None:
        raise UserError(f"{run.path} was imported and has no data of its own: name a text by --data.path")


def check_data(sha256: str, expected: str | None) -> None:
    """Refuses data that are not those of the run.

    Args:
      expected: the run's; None = an imported run, which takes any data.

    Raises:
      UserError: they differ.
    """
    if expected is not None and sha256 != expected:
        raise UserError(
            f"the data are not those of the run: their sha256 is {sha256[:12]}..., the run's is {expected[:12]}...; "
            "put the run's own data back, or name the place where they are now by --data.path"
        )


def provenance() -> dict[str, Any]:
    """Versions, git commit and device: what the numbers may depend on besides the config."""
    packages = "jaxlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"
    checkout, commit = Path(__file__).parents[2], None
    if (checkout / ".git").exists() and (git := shutil.which("git")):
        command = [git, "-C", str(checkout), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    device = find_devices()[0]
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "git_commit": commit,
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
    }
