"""The manifest of a checkpoint: the sha256 of every file in its folder, its own included.

    manifest.json  {"step", "val_loss", "eval_batches", "metrics": {"bytes", "sha256"}, "sha256": {file: digest}}

"eval_batches" is the number of batches that val_loss is an estimate from, null if it is exact. "metrics" is the start
of metrics.jsonl, up to this step. The digest of manifest.json is that of its other entries. Older versions wrote none
of these; their checkpoints are read all the same, and their losses count as exact.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.data.files import json_digest, remove, staging_path, to_disk, unwritable
from jaxlm.data.reading import open_regular, read_json
from jaxlm.errors import CheckError

NAME = "manifest.json"


class Loss(NamedTuple):
    """A validation loss. `rank` orders them."""

    val_loss: float
    """Nats per token."""
    eval_batches: int | None = None
    """The batches that it is an estimate from (train.eval_batches); None = it is exact."""

    @property
    def rank(self) -> tuple[float, float]:
        """Lower is better. Kinds are not mixed: exact losses come first, then estimates from more batches."""
        return -math.inf if self.eval_batches is None else -self.eval_batches, self.val_loss


def write(path: Path, step: int, loss: Loss | None, log: dict[str, Any] | None) -> None:
    """Writes the manifest of a checkpoint folder whose other files are there; `log` is its entry "metrics"."""
    files, metrics = digests(path), {} if log is None else {"metrics": log}
    content = {"step": step, **_fields(loss), **metrics, "sha256": files}
    files[NAME] = json_digest(content)
    (path / NAME).write_text(json.dumps(content, indent=1), encoding="utf-8")


def change(path: Path, loss: Loss, log: dict[str, Any] | None) -> None:
    """Gives the manifest of a checkpoint a loss, and the entry "metrics" if there is a new one; all at once.

    Raises:
      UserError: it cannot be written.
      CheckError: it is damaged.
    """
    content = read(path) | _fields(loss) | ({} if log is None else {"metrics": log})
    if "sha256" not in content:
        raise CheckError(f"checkpoint {path} is damaged: {NAME} cannot be read or has changed")
    content["sha256"][NAME] = json_digest(content)
    staging = staging_path(path, os.getpid())  # not in the checkpoint, where a kill would leave a strange file
    try:
        staging.write_text(json.dumps(content, indent=1), encoding="utf-8")
        to_disk(staging)
        staging.replace(path / NAME)
        to_disk(path, within=False)
    except OSError as error:
        raise unwritable(path / NAME, error, "free some space, and go on with --resume") from None
    finally:
        remove(staging)


def _fields(loss: Loss | None) -> dict[str, Any]:
    return {"val_loss": None, "eval_batches": None} if loss is None else loss._asdict()


def loss(path: Path) -> Loss | None:
    """The loss of a checkpoint; None if it was not evaluated, or its manifest cannot be read."""
    content = read(path)
    val_loss = content.get("val_loss")
    return None if val_loss is None else Loss(val_loss, content.get("eval_batches"))


def read(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; {} if it cannot be read or has changed."""
    try:
        manifest = read_json(path / NAME)
    except (OSError, ValueError):
        return {}
    if not isinstance(manifest, dict) or not isinstance(manifest.get("sha256"), dict):
        return {}
    own = manifest["sha256"].pop(NAME, None)
    is_typed = isinstance(manifest.get("val_loss"), float | None) and isinstance(
        manifest.get("eval_batches"), int | None
    )
    is_sound = own in (None, json_digest(manifest)) and is_typed
    return manifest if is_sound else {}


def verify(path: Path) -> None:
    """Compares every file of a checkpoint with its manifest.

    Raises:
      CheckError: a file is missing, is not in the manifest, or has changed; the message names it.
    """
    manifest = read(path)
    if not manifest:
        raise CheckError(f"checkpoint {path} is damaged: {NAME} cannot be read or has changed")
    if str(manifest.get("step")) != path.name:
        raise CheckError(f"checkpoint {path} is damaged: its {NAME} is that of step {manifest.get('step')}")
    if links := [file for file in path.rglob("*") if file.is_symlink()]:  # to a folder, it hides what is read
        raise CheckError(f"checkpoint {path} is damaged: {links[0].relative_to(path)} is a link")
    expected, actual = manifest["sha256"], digests(path)
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


def digests(path: Path) -> dict[str, str]:
    """The sha256 of each file below a folder but its manifest; "cannot be read" for one that cannot."""
    return {str(file.relative_to(path)): _digest(file) for file in _files(path)}


def _digest(file: Path) -> str:
    try:
        with open_regular(file) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return "cannot be read"


def _files(path: Path) -> Iterator[Path]:
    return (each for each in sorted(path.rglob("*")) if not each.is_dir() and each != path / NAME)
