"""What a run writes in its own folder; a link or a pipe under one of these names is refused before anything is written.

The folder of the run may be a link. In it, a link would lead what is written, cut off or removed to files of others.
"""

import stat
from pathlib import Path

from jaxlm.errors import UserError

FILES = (".lock", "config.json", "tokenizer.json", "metrics.jsonl", "loss.png")
FOLDERS = ("checkpoints", "samples", "tensorboard", "wandb")


def check_own(folder: Path) -> None:
    """Refuses what a run cannot write to, or would write to elsewhere. Names that are not there yet are sound.

    Raises:
      UserError: one of `FILES` is no regular file, one of `FOLDERS` no folder, or one of them or a checkpoint a link.
    """
    for path in (*(folder / name for name in FILES + FOLDERS), *sorted((folder / "checkpoints").glob("*"))):
        if problem := own_problem(path):
            raise UserError(f"{path} {problem}")


def own_problem(path: Path) -> str:
    """What is wrong with a path that a run writes, and the fix; empty if nothing is."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"cannot be read ({error.strerror}): let yourself read it, or move it away"
    if stat.S_ISLNK(mode):
        return "is a link, and a run writes in its own folder only: put in its place what it leads to"
    if path.name in FILES and not stat.S_ISREG(mode):
        return "is not a file: move it away"
    if path.name in FOLDERS and not stat.S_ISDIR(mode):
        return "is not a folder: move it away"
    return ""
