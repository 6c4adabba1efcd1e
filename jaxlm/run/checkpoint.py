"""Checkpoints: Orbax arrays, written all at once or not at all, with a sha256 manifest that every restore checks.

    checkpoints/<step>/params/        the parameters
    checkpoints/<step>/opt_state/     the optimizer's state, if it has any
    checkpoints/<step>/manifest.json  {"step", "val_loss", "sha256": {file: digest}}

The rest of a run's state (batches, dropout) is a function of seed and step. No other module uses Orbax, which is
imported when it is first needed: that takes a tenth of a second, and a run begins without it.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from jaxlm.data.files import staged, staging_path, unwritable
from jaxlm.data.reading import read_json
from jaxlm.errors import CheckError, UserError
from jaxlm.sharding import processes
from jaxlm.sharding.layout import put_like
from jaxlm.training.step import TrainState

_Tree = TypeVar("_Tree")


def save(folder: Path, state: TrainState, val_loss: float | None, keep: int) -> Path:
    """Writes the state as folder/<step>; returns when all of it is on disk. All processes of a training call it alike.

    Keeps this checkpoint, the latest `keep` and the one with the lowest val_loss, and removes the others.
    """
    step, first = int(state.step), processes.first()
    target = folder / str(step)
    if first:
        for killed in folder.glob(".*.partial"):  # what a killed process has left; a run is trained by one at a time
            shutil.rmtree(killed)
    with together(target, _new_folder(target)) as staging:
        _write(staging / "params", state.params)
        if jax.tree.leaves(state.opt_state):  # Orbax refuses an empty tree
            _write(staging / "opt_state", state.opt_state)
        if first:
            manifest = {"step": step, "val_loss": val_loss, "sha256": _digests(staging)}
            (staging / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            shutil.rmtree(target, ignore_errors=True)  # a folder with files cannot be replaced
    _prune(folder, keep)
    processes.wait(f"checkpoint {step} is there")
    return target


def add_loss(folder: Path, step: int, val_loss: float, keep: int) -> None:
    """Writes the loss of an evaluation into the manifest of the checkpoint of its step, the latest one."""
    if not processes.first():
        return
    target = folder / str(step)
    content = {**json.loads((target / "manifest.json").read_text(encoding="utf-8")), "val_loss": val_loss}
    staging = staging_path(target, os.getpid())  # not in the checkpoint, where a kill would leave it as a strange file
    try:
        staging.mkdir()
        (staging / "manifest.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        (staging / "manifest.json").replace(target / "manifest.json")
    except OSError as error:
        raise unwritable(target / "manifest.json", error, "free some space") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _prune(folder, keep)


def _prune(folder: Path, keep: int) -> None:
    """Removes all checkpoints but the latest `keep` and the one with the lowest val_loss."""
    kept = {best_step(folder), *steps(folder)[-keep:]}
    for old in steps(folder) if processes.first() else ():
        if old not in kept:
            shutil.rmtree(folder / str(old))


@contextlib.contextmanager
def together(target: Path, folder: AbstractContextManager[Path]) -> Iterator[Path]:
    """The folder that becomes `target` when the block ends well in process 0, which creates it by `folder`, staged.

    Of several processes all get the same path, to write into it.

    Raises:
      UserError: in all processes, if one of them does not find it: its host has another disk there.
    """
    if not processes.first():
        pid = int(processes.agree(0)[0, 0])
        yield _found_by_all(staging_path(target, pid))
        return
    with folder as staging:
        processes.agree(os.getpid())
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
def _new_folder(target: Path) -> Iterator[Path]:
    with staged(target) as staging:
        staging.mkdir()
        yield staging


def _write(path: Path, tree: Any) -> None:
    """Writes arrays; returns when those of all processes are on disk."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    processes.wait(f"{path.name} is written")


def steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint folder with a manifest, oldest first; `verify` tells whether they are sound."""
    names = (path.parent.name for path in folder.glob("*/manifest.json"))
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]{0,17}", name))


def best_step(folder: Path) -> int | None:
    """The step with the lowest validation loss; None if no step was evaluated."""
    losses = {
        step: loss for step in steps(folder) if (loss := _manifest(folder / str(step)).get("val_loss")) is not None
    }
    return min(losses, key=lambda step: losses[step], default=None)


def readable(path: Path) -> bool:
    """Whether a checkpoint's manifest can be read."""
    return bool(_manifest(path))


def verify(path: Path) -> None:
    """Compares every file of a checkpoint with its manifest.

    Raises:
      CheckError: a file is missing, is not in the manifest, or has changed; the message names it.
    """
    expected = _manifest(path).get("sha256")
    if expected is None:
        raise CheckError(f"checkpoint {path} is damaged: manifest.json cannot be read")
    if links := [file for file in path.rglob("*") if file.is_symlink()]:
        raise CheckError(f"checkpoint {path} is damaged: {links[0].name} is a link, whose target may change")
    actual = _digests(path)
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name):
            state = (
                "is missing"
                if name not in actual
                else "is not in the manifest"
                if name not in expected
                else "has changed"
            )
            raise CheckError(f"checkpoint {path} is damaged: {name} {state}")


def restore_params(path: Path, like: _Tree) -> _Tree:
    """The parameters of a verified checkpoint; `like` gives structure, shapes and types.

    Raises:
      CheckError: the checkpoint is damaged.
      UserError: its parameters have other names, shapes or types than `like`.
    """
    verify(path)
    return _restore(path / "params", like)


def restore_latest(folder: Path, like: TrainState) -> tuple[TrainState, list[str]] | None:
    """The newest sound state, and a line about each damaged checkpoint that is newer; None if nothing was saved.

    The damaged ones are renamed to .<step>.damaged, if there is a sound one: they no longer count as latest or best.

    Raises:
      CheckError: there are checkpoints, and all are damaged.
      UserError: the state has other names, shapes or types than `like`.
    """
    damaged: dict[Path, str] = {}
    for step in reversed(steps(folder)):
        path = folder / str(step)
        try:
            verify(path)
        except CheckError as error:
            damaged[path] = str(error)
            continue
        processes.check_same({"the latest sound checkpoint": step})
        state = TrainState(
            params=_restore(path / "params", like.params),
            opt_state=_restore(path / "opt_state", like.opt_state),
            step=put_like(np.asarray(step, np.int32), like.step),
        )
        for bad in damaged if processes.first() else ():
            bad.rename(folder / f".{bad.name}.damaged")
        return state, list(damaged.values())
    if damaged:
        raise CheckError("; ".join(damaged.values()))
    return None


def _restore(path: Path, like: _Tree) -> _Tree:
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def target(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or one)

    abstract = jax.tree.map(target, like)
    try:
        return _read(path.absolute(), abstract)
    except UserError:
        raise
    except Exception as error:  # of many kinds: Orbax trusts its own files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckError(f"checkpoint {path.parent} is damaged: {path.name} cannot be read ({reason:.200})") from None


def _read(path: Path, abstract: _Tree) -> _Tree:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        stored = _shapes(checkpointer.metadata(path).item_metadata.tree)
        wanted = _shapes(abstract)
        for name in sorted(stored.keys() | wanted.keys()):
            if stored.get(name) != wanted.get(name):
                raise UserError(
                    f"{path} was written with another config: {name} is {stored.get(name, 'absent')} there, "
                    f"{wanted.get(name, 'absent')} here"
                )
        return checkpointer.restore(path, abstract)


def _shapes(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (tuple(x.shape), str(x.dtype)) for path, x in leaves
    }


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; {} if it cannot be read."""
    try:
        manifest = read_json(path / "manifest.json")
    except (OSError, ValueError):
        return {}
    is_sound = isinstance(manifest, dict) and isinstance(manifest.get("sha256"), dict)
    return manifest if is_sound and isinstance(manifest.get("val_loss"), float | None) else {}


def _files(path: Path) -> Iterator[Path]:
    return (p for p in sorted(path.rglob("*")) if p.is_file() and p.name != "manifest.json")


def _digests(path: Path) -> dict[str, str]:
    digests = {}
    for file in _files(path):
        with file.open("rb") as stream:
            digests[str(file.relative_to(path))] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests
