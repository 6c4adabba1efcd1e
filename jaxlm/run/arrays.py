"""Trees of arrays on disk, written and read by Orbax. No other module uses it.

It is imported when it is first needed: that takes a tenth of a second, and a run begins without it.
"""

import contextlib
import gc
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax

from jaxlm.data.reading import read_json
from jaxlm.errors import CheckError, UserError
from jaxlm.sharding import processes

_Tree = TypeVar("_Tree")


def size(tree: Any) -> int:
    """The bytes of all arrays; on disk they are compressed, so they take about as many or fewer."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def plain(tree: _Tree) -> _Tree:
    """The same tree with PRNG keys (the state of noisy_sgd holds one) as uint32 arrays: so they are written."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)


def _is_key(leaf: Any) -> bool:
    return bool(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _like(data: Any, leaf: Any) -> Any:
    """What was read, as a PRNG key if `leaf` is one; that may be a shape without a value."""
    if not _is_key(leaf):
        return data
    found: list[Any] = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
    return jax.random.wrap_key_data(data, impl=found[0])


def write(path: Path, tree: Any) -> None:
    """Writes arrays; returns when those of all processes are written.

    Raises:
      OSError: the file system refused them, for example because it is full.
    """
    import orbax.checkpoint as ocp

    with _one_error(), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, plain(tree))
    processes.wait(f"{path.name} is written")


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
    """Turns a failed write into an OSError and nothing else.

    Orbax logs the same error from each of its threads, and leaves writes under way when it gives up, each of which
    prints or logs that its event loop is closed. After a failure these are left out for the rest of the process.
    """
    logs, unraisablehook = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook

    def on_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
        is_left = str(unraisable.exc_value) == "Event loop is closed" or "async_serialize" in repr(unraisable.object)
        if not is_left:
            unraisablehook(unraisable)

    for log in logs:
        log.addFilter(_is_not_of_a_thread)
    sys.unraisablehook = on_unraisable
    has_failed = False
    try:
        yield
    except Exception as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        has_failed = True
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from None
    finally:
        if has_failed:
            warnings.filterwarnings("ignore", "coroutine 'async_serialize.*' was never awaited", RuntimeWarning)
            gc.collect()  # coroutines that end here do not print at the end of the interpreter
        else:
            sys.unraisablehook = unraisablehook
            for log in logs:
                log.removeFilter(_is_not_of_a_thread)


def _is_not_of_a_thread(record: logging.LogRecord) -> bool:
    """Whether a line of the log says something that no exception says."""
    return record.levelno < logging.ERROR or record.exc_info is None


def read(path: Path, like: _Tree) -> _Tree:
    """Reads arrays; `like` gives structure, shapes, types and places.

    Raises:
      UserError: those on disk have other names, shapes or types; the message names one.
      CheckError: they cannot be read.
    """
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def target(leaf: Any) -> jax.ShapeDtypeStruct:
        data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=getattr(leaf, "sharding", None) or one)

    abstract = jax.tree.map(target, like)
    try:
        return jax.tree.map(_like, _restore(path, abstract), like)
    except UserError:
        raise
    except Exception as error:  # of many kinds: Orbax trusts its own files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckError(f"checkpoint {path.parent} is damaged: {path.name} cannot be read ({reason:.200})") from None


def _restore(path: Path, abstract: _Tree) -> _Tree:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        stored = _shapes(checkpointer.metadata(path.absolute()).item_metadata.tree)
        wanted = _shapes(abstract)
        for name in sorted(stored.keys() | wanted.keys()):
            if stored.get(name) != wanted.get(name):
                raise UserError(
                    f"{path} was written with another config: {name} is {stored.get(name, 'absent')} there, "
                    f"{wanted.get(name, 'absent')} here"
                )
        return checkpointer.restore(path.absolute(), abstract)


def blocks(path: Path) -> int:
    """How many blocks have arrays there; Orbax is not imported.

    Raises:
      OSError, ValueError: what lists the arrays cannot be read.
    """
    content = read_json(path / "_METADATA")
    names = content.get("tree_metadata") if isinstance(content, dict) else None
    if not isinstance(names, dict):
        raise ValueError("_METADATA lists no arrays")
    # Each name is a text such as "('block_0', 'mlp', 'up', 'kernel')".
    return len({found[0] for name in names if (found := re.search(r"\bblock_\d+\b", name))})


def _shapes(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (tuple(x.shape), str(x.dtype)) for path, x in leaves
    }
