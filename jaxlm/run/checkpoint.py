"""Checkpoints: Orbax arrays, written aside and renamed, with a sha256 manifest that every restore checks.

    checkpoints/<step>/params/        the parameters
    checkpoints/<step>/opt_state/     the optimizer's state, if it has any
    checkpoints/<step>/manifest.json  {"step", "val_loss", "sha256": {file: digest}}

The rest of a run's state (batches, dropout) is a function of seed and step. This is the one module that knows Orbax.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from jaxlm.errors import CheckError, UserError
from jaxlm.training.step import TrainState

log = logging.getLogger("jaxlm")
_Tree = TypeVar("_Tree")


def save(folder: Path, state: TrainState, val_loss: float | None, keep: int) -> Path:
    """Writes the state as folder/<step>; returns once it is whole on disk.

    Afterwards this one, the latest `keep` and the one with the lowest val_loss are left.
    """
    step = int(state.step)
    target, aside = folder / str(step), folder / f".{step}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(aside.absolute() / "params", state.params)
        if jax.tree.leaves(state.opt_state):  # Orbax refuses an empty tree
            checkpointer.save(aside.absolute() / "opt_state", state.opt_state)
    manifest = {"step": step, "val_loss": val_loss, "sha256": _digests(aside)}
    (aside / "manifest.json").write_text(json.dumps(manifest, indent=1))
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    kept = {step, best_step(folder), *steps(folder)[-keep:]}
    for old in steps(folder):
        if old not in kept:
            shutil.rmtree(folder / str(old))
    return target


def steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint folder with a manifest, oldest first; whether they are sound, `verify` tells."""
    return sorted(int(path.parent.name) for path in folder.glob("*/manifest.json") if path.parent.name.isdigit())


def best_step(folder: Path) -> int | None:
    """The step with the lowest validation loss among those evaluated; None if there is none."""
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
      CheckError: naming the file that is missing, surplus or changed.
    """
    expected = _manifest(path).get("sha256")
    if expected is None:
        raise CheckError(f"checkpoint {path} is damaged: manifest.json cannot be read")
    found = _digests(path)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            state = "is missing" if name not in found else "is not of it" if name not in expected else "has changed"
            raise CheckError(f"checkpoint {path} is damaged: {name} {state}")


def restore_params(path: Path, like: _Tree) -> _Tree:
    """The parameters of a verified checkpoint; `like` gives structure, shapes and types.

    Raises:
      CheckError: a damaged checkpoint.
      UserError: parameters of other names, shapes or types than `like`.
    """
    verify(path)
    return _restore(path / "params", like)


def restore_latest(folder: Path, like: TrainState) -> tuple[TrainState, list[str]] | None:
    """The newest sound state, and a line about each damaged checkpoint passed over; None if nothing was saved.

    Once a sound one is found, the damaged ones are renamed to .<step>.damaged: they no longer count as latest or best.

    Raises:
      CheckError: there are checkpoints, and all are damaged.
      UserError: the state was made by other fields than `like`.
    """
    damaged: dict[Path, str] = {}
    for step in reversed(steps(folder)):
        path = folder / str(step)
        try:
            verify(path)
        except CheckError as error:
            damaged[path] = str(error)
            continue
        state = TrainState(
            params=_restore(path / "params", like.params),
            opt_state=_restore(path / "opt_state", like.opt_state),
            step=jax.numpy.int32(step),
        )
        for bad in damaged:
            bad.rename(folder / f".{bad.name}.damaged")
        return state, list(damaged.values())
    if damaged:
        raise CheckError("; ".join(damaged.values()))
    return None


def _restore(path: Path, like: _Tree) -> _Tree:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like)
    with ocp.StandardCheckpointer() as checkpointer:
        saved = _shapes(checkpointer.metadata(path.absolute()).item_metadata.tree)
        wanted = _shapes(abstract)
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise UserError(
                    f"{path} was made by another config: {name} is {saved.get(name, 'absent')} there, "
                    f"{wanted.get(name, 'absent')} here"
                )
        return checkpointer.restore(path.absolute(), abstract)


def _shapes(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (tuple(x.shape), str(x.dtype)) for path, x in leaves
    }


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; {} if it cannot be read."""
    try:
        found = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError):
        return {}
    sound = isinstance(found, dict) and isinstance(found.get("sha256"), dict)
    return found if sound and isinstance(found.get("val_loss"), float | None) else {}


def _files(path: Path) -> Iterator[Path]:
    return (p for p in sorted(path.rglob("*")) if p.is_file() and p.name != "manifest.json")


def _digests(path: Path) -> dict[str, str]:
    digests = {}
    for file in _files(path):
        with file.open("rb") as stream:
            digests[str(file.relative_to(path))] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests
