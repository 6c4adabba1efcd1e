"""Checkpoints, written all at once or not at all, with a sha256 manifest that every restore checks.

    checkpoints/<step>/params/        the parameters
    checkpoints/<step>/opt_state/     the optimizer's state, if it has any
    checkpoints/<step>/manifest.json  what `manifest` describes

The rest of a run's state (batches, dropout) is a function of seed and step.
"""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.data.files import remove, staged, staging_path, unwritable
from jaxlm.errors import CheckError, UserError
from jaxlm.run import arrays, manifest
from jaxlm.run.manifest import Loss
from jaxlm.sharding import processes
from jaxlm.sharding.layout import put_like
from jaxlm.training.step import TrainState

_Tree = TypeVar("_Tree")

MARGIN = 1 << 16
"""Bytes that a checkpoint takes besides its arrays, for the names of its files."""


def save(folder: Path, state: TrainState, loss: Loss | None, keep: int, log: dict[str, Any] | None = None) -> Path:
    """Writes the state as folder/<step>; returns when all of it is on disk. All processes of a training call it alike.

    Keeps this checkpoint, the latest `keep` and the best one, and removes the others.

    Args:
      log: the start of metrics.jsonl up to this step, as `MetricsFile.entry` describes it.

    Raises:
      UserError: it cannot be written, for example because the disk is full. What was written of it is removed.
    """
    step, first = int(state.step), processes.first()
    target = folder / str(step)
    with together(target, _new_folder(target, arrays.size(state) + MARGIN)) as staging:
        arrays.write(staging / "params", state.params)
        if jax.tree.leaves(state.opt_state):  # Orbax refuses an empty tree
            arrays.write(staging / "opt_state", state.opt_state)
        if first:
            manifest.write(staging, step, loss, log)
            remove(target)  # a folder with files cannot be replaced
    _prune(folder, keep)
    processes.wait(f"checkpoint {step} is there")
    return target


def add_loss(folder: Path, step: int, loss: Loss, keep: int, log: dict[str, Any] | None = None) -> None:
    """Writes the loss of an evaluation into the manifest of the checkpoint of its step, and prunes as `save` does.

    Raises:
      UserError: it cannot be written.
    """
    if processes.first():
        manifest.change(folder / str(step), loss, log)
    _prune(folder, keep)


def _prune(folder: Path, keep: int) -> None:
    """Removes all checkpoints but the latest `keep` and the best one."""
    kept = {best_step(folder), *steps(folder)[-keep:]}
    for old in steps(folder) if processes.first() else ():
        if old not in kept:
            remove(folder / str(old))


@contextlib.contextmanager
def together(target: Path, folder: AbstractContextManager[Path]) -> Iterator[Path]:
    """The folder that becomes `target` when the block ends well in process 0, which creates it by `folder`, staged.

    Of several processes all get the same path, to write into it.

    Raises:
      UserError: in all processes, if one of them does not find it: its host has another disk there.
    """
    if not processes.first():
        pid, is_within = processes.agree(0, 0)[0].tolist()
        yield _found_by_all(staging_path(target / "new" if is_within else target.resolve(), pid))
        return
    with folder as staging:
        processes.agree(os.getpid(), staging.parent == target.resolve())
        yield _found_by_all(staging)


def _found_by_all(staging: Path) -> Path:
    there = processes.agree(staging.is_dir())[:, 0]
    if not there.all():
        raise UserError(
            f"process {int(there.argmin())} does not find what process 0 writes in {staging.parent}: give an --out on "
            "a disk that all processes share"
        )
    return staging


@contextlib.contextmanager
def _new_folder(target: Path, needed: int) -> Iterator[Path]:
    """A staged folder on a disk that has so many bytes free."""
    saved, place = steps(target.parent), target.parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    last = f"go on with --resume from step {saved[-1]}, the last good one" if saved else "no step is saved yet"
    fix = f"it needs up to {_amount(needed)}, {_amount(free)} were free; free some space, and {last}"
    if free < needed:
        raise unwritable(target, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), fix)
    with staged(target, fix) as staging:
        staging.mkdir()
        yield staging


def _amount(size: int) -> str:
    """A number of bytes, such as "1.25 MB"."""
    units = {"GB": 10**9, "MB": 10**6, "kB": 10**3}
    name, unit = next(((name, unit) for name, unit in units.items() if size >= unit), ("bytes", 1))
    amount = size / unit
    return f"{amount:,.0f} {name}" if amount >= 100 else f"{amount:.3g} {name}"


_STEP = "0|[1-9][0-9]{0,17}"
"""The name of a checkpoint; other digits of Unicode are none."""


def steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint folder with a manifest, oldest first; `manifest.verify` tells if they are sound."""
    names = (path.parent.name for path in folder.glob("*/manifest.json"))
    return sorted(int(name) for name in names if re.fullmatch(_STEP, name))


def numbered(folder: Path) -> list[int]:
    """As `steps`, with the folders that have lost their manifest: an empty one is no checkpoint."""
    named = (path for path in folder.glob("*") if re.fullmatch(_STEP, path.name) and path.is_dir())
    return sorted(int(path.name) for path in named if any(path.iterdir()))


def best_step(folder: Path) -> int | None:
    """The step with the lowest validation loss, exact ones before estimates; None if no step was evaluated."""
    losses = ((step, manifest.loss(folder / str(step))) for step in steps(folder))
    ranks = {step: loss.rank for step, loss in losses if loss is not None}
    return min(ranks, key=lambda step: ranks[step], default=None)


def best_loss(folder: Path) -> Loss | None:
    """The validation loss of `best_step`; None if no step was evaluated."""
    step = best_step(folder)
    return None if step is None else manifest.loss(folder / str(step))


def log_entry(path: Path) -> dict[str, Any] | None:
    """What a checkpoint's manifest says of metrics.jsonl; None if an older version saved it.

    Raises:
      CheckError: it says something else than {"bytes": a size, "sha256": a digest}.
    """
    match manifest.read(path).get("metrics"):
        case None:
            return None
        case {"bytes": int(size), "sha256": str()} as entry if size >= 0 and len(entry) == 2:
            return dict(entry)
    raise CheckError(
        f"checkpoint {path} is damaged: the entry metrics of its {manifest.NAME} is not a size and a sha256"
    )


def readable(path: Path) -> bool:
    """Whether a checkpoint's manifest can be read."""
    return bool(manifest.read(path))


def check_layers(folder: Path, model: ModelConfig) -> None:
    """Refuses a model with more layers than the newest sound checkpoint, before it is built: that takes time by layers.

    Raises:
      UserError: the message names both numbers.
      CheckError: there are checkpoints, and all are damaged.
    """
    wanted = len(model.layer_period) if model.scan_layers else model.num_layers
    damaged = []
    for step in reversed(numbered(folder) if model.family in ("transformer", "recurrent") else []):
        path = folder / str(step)
        try:
            found = arrays.blocks(path / "params")
        except (OSError, ValueError) as error:
            found, reason = 0, f"checkpoint {path} is damaged: params cannot be read ({error})"
        else:
            reason = ""
        if found >= wanted:
            return
        try:
            manifest.verify(path)
        except CheckError as error:
            reason = str(error)
        if not reason:
            raise UserError(
                f"{path} was written with another config: it has the arrays of {found} layers, and config.json needs "
                f"{wanted}"
            )
        damaged.append(reason)
    if damaged:
        raise CheckError("; ".join(damaged))


def restore_params(path: Path, like: _Tree) -> _Tree:
    """The parameters of a verified checkpoint; `like` gives structure, shapes and types.

    Raises:
      CheckError: the checkpoint is damaged.
      UserError: its parameters have other names, shapes or types than `like`.
    """
    manifest.verify(path)
    return arrays.read(path / "params", like)


def restore_latest(folder: Path, like: TrainState) -> tuple[TrainState, list[str]] | None:
    """The newest sound state, and a line about each damaged checkpoint that is newer; None if nothing was saved.

    The damaged ones are renamed to .<step>.damaged, if there is a sound one: they no longer count as latest or best.

    Raises:
      CheckError: there are checkpoints, and all are damaged.
      UserError: the state has other names, shapes or types than `like`.
    """
    damaged: dict[Path, str] = {}
    for step in reversed(numbered(folder)):
        path = folder / str(step)
        try:
            manifest.verify(path)
        except CheckError as error:
            damaged[path] = str(error)
            continue
        processes.check_same({"the latest sound checkpoint": step})
        state = TrainState(
            params=arrays.read(path / "params", like.params),
            opt_state=arrays.read(path / "opt_state", like.opt_state),
            step=put_like(np.asarray(step, np.int32), like.step),
        )
        for bad in damaged if processes.first() else ():
            remove(folder / f".{bad.name}.damaged")  # an earlier one of this step
            bad.rename(folder / f".{bad.name}.damaged")
        return state, list(damaged.values())
    if damaged:
        raise CheckError("; ".join(damaged.values()))
    return None
