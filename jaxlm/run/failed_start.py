"""A run that ends before it has saved anything, out of memory or refused: its folder is free again."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxlm.analysis.expected import gigabytes
from jaxlm.data.files import remove
from jaxlm.errors import CheckError, UserError
from jaxlm.run import checkpoint
from jaxlm.run.own_files import FILES, FOLDERS
from jaxlm.sharding import processes

FIX = "give a smaller --train.batch-size, or a larger --train.grad-accum, which computes it in parts"


@contextlib.contextmanager
def named_out_of_memory(out: Path, is_new: bool) -> Iterator[None]:
    """In the block, running out of memory is an error of one line.

    Args:
      is_new: the folder `out` is that of a new run, which `freed_if_refused` frees.

    Raises:
      UserError: out of memory before anything was saved.
      CheckError: out of memory later; the message names the checkpoint that is kept.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        what = described(error)
        if what is None:
            raise
        if saved := _saved(out):
            raise CheckError(
                f"{what}; {out} keeps its checkpoint of step {saved[-1]}: go on with --resume --out {out} where more "
                "memory is free"
            ) from None
        free = ", and it is free again" if is_new and processes.count() == 1 else ""
        raise UserError(f"{what}; nothing was saved in {out}{free}: {FIX}") from None


@contextlib.contextmanager
def freed_if_refused(out: Path, existed: bool) -> Iterator[None]:
    """In the block, a UserError frees the folder of a new run in which nothing was saved.

    Args:
      out: the folder, made by this session. What the run wrote goes, and the folder unless it `existed`.
    """
    try:
        yield
    except UserError:
        if processes.count() == 1 and not _saved(out):
            _clear(out, existed)
        raise


def _saved(out: Path) -> list[int]:
    """The steps of its own that a run has saved; checkpoint 0 holds the weights of another one."""
    return [step for step in checkpoint.steps(out / "checkpoints") if step > 0]


def described(error: BaseException) -> str | None:
    """What could not be allocated; None if the error is another one."""
    text = str(error)
    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in text and "OUT_OF_MEMORY" not in text:
        return None
    found = re.search(r"([\d.,]+) ?(bytes|[KMGTPE]i?B)\b", text)
    if found is None:
        return f"out of memory ({' '.join(text.split())[:200]})" if text else "out of memory"
    amount = gigabytes(float(found[1].replace(",", ""))) if found[2] == "bytes" else f"{found[1]} {found[2]}"
    return f"out of memory: {amount} more cannot be allocated"


def _clear(out: Path, existed: bool) -> None:
    """Removes what a run has written and nothing else; a folder that was there before it stays."""
    for path in [*out.glob(".*.partial"), *(out / name for name in (*FOLDERS, *reversed(FILES)))]:
        with contextlib.suppress(OSError):  # the refusal under way says more than that something of the run stays
            remove(path)
    if not existed:
        with contextlib.suppress(OSError):  # it holds what is not the run's
            out.rmdir()
