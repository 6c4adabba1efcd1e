"""Files written all at once or not at all, JSON that carries its own sha256, and text that must be UTF-8."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxlm.data.reading import read_json
from jaxlm.errors import UserError


@contextlib.contextmanager
def staged(
    target: Path, fix: str = "free some space, or choose another place", elsewhere: str | None = None
) -> Iterator[Path]:
    """Yields a path beside `target`; the file or folder written there becomes `target` when the block ends well.

    Whoever looks at `target` sees all of the new content or none of it, even after a kill or a loss of power: the
    content is on the disk before the name is. If the block raises, what it wrote is removed. The name holds the
    process's number, so two processes never write to the same place. A `target` that is a link is replaced itself; what
    it leads to stays.

    Args:
      fix: what the message tells the user to do.
      elsewhere: the same where space is not what is missing; None = `fix`.

    Raises:
      UserError: the block or the renaming raised an OSError, for example on a full disk or in a read-only folder.
    """
    target = _in_place(target)
    staging = staging_path(target, os.getpid())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if staging.is_symlink():  # in a folder of several users, another one may have guessed the name
            staging.unlink()
        yield staging
        to_disk(staging)
        staging.replace(target)
        to_disk(target.parent, within=False)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and target.is_dir():
            raise UserError(f"{target} was created by another process in the meantime: {fix}") from None
        raise unwritable(target, error, fix, elsewhere) from None
    finally:
        remove(staging)


def to_disk(path: Path, within: bool = True) -> None:
    """Returns when a file, or a folder with all that is `within`, is on the disk and survives a loss of power."""
    paths = [*path.rglob("*"), path] if within else [path]
    for each in paths:
        if each.is_symlink():
            continue
        opened = os.open(each, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(opened)
        except OSError as error:
            if error.errno != errno.EINVAL:  # which file systems say that cannot do it
                raise
        finally:
            os.close(opened)


def remove(path: Path) -> None:
    """Removes a file, or a folder with all that is in it; nothing if there is none.

    A folder loses its name first, so that what a kill leaves of it is a `.partial`, never half a folder.
    """
    if path.is_dir() and not path.is_symlink():
        if not path.name.endswith(".partial"):
            path = path.rename(staging_path(path, os.getpid()).with_suffix(".removed.partial"))
        shutil.rmtree(path)
    elif path.is_symlink() or path.exists():
        path.unlink()


def unwritable(target: Path, error: OSError, fix: str, elsewhere: str | None = None) -> UserError:
    """The refusal of a place that cannot be written, with the fixes of `staged`."""
    # Libraries raise without an errno when the disk is full.
    is_full = error.errno in (None, errno.ENOSPC, errno.EDQUOT)
    return UserError(f"{target} cannot be written ({error.strerror or error}): {fix if is_full else elsewhere or fix}")


def staging_path(target: Path, pid: int) -> Path:
    """Where the process of this number writes what becomes `target`."""
    target = _in_place(target)
    return target.with_name(f".{target.name}.{pid}.partial")


def _in_place(target: Path) -> Path:
    """The absolute path of a target; links among its folders are followed, the target's own is not."""
    return target.parent.resolve() / target.name if target.is_symlink() else target.resolve()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON content with the sha256 of the rest as its last entry, for `read_sealed`."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    return {**rest, "sha256": json_digest(rest)}


def read_sealed(file: Path, fix: str) -> dict[str, Any]:
    """Reads a JSON object that `sealed` made. That of an older version carries no sha256, and passes.

    Args:
      fix: what the message tells the user to do about a file that was changed.

    Raises:
      UserError: the file cannot be read or holds no object, or it was changed after it was written.
    """
    try:
        content = read_json(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): {fix}") from None
    except ValueError as error:
        raise UserError(f"{file} cannot be read as JSON ({error}): {fix}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} does not hold a JSON object: {fix}")
    given = content.get("sha256")
    if given is not None and given != sealed(content)["sha256"]:
        raise UserError(f"{file} was changed after it was written (its sha256 is another): {fix}")
    return content


def json_digest(content: Mapping[str, Any]) -> str:
    """The sha256 of JSON content, whatever the order of its entries and the spaces between them."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_new_npz(path: Path) -> None:
    """Refuses a name for a new .npz file that could not be written, before anything is computed.

    Raises:
      UserError: another suffix, something that is there already, or a missing folder.
    """
    if path.suffix.lower() != ".npz":
        raise UserError(f"{path} is not the name of an .npz file: give one that ends in .npz")
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists already: choose another name, or move it away")
    if not path.parent.is_dir():
        raise UserError(
            f"{path} cannot be written: there is no folder {path.parent}; create it, or choose another name"
        )


def not_utf8(name: str, byte: int, offset: int, line: int | None = None) -> UserError:
    """The refusal of a text called `name`; `offset` counts bytes from 0, `line` counts from 1."""
    place = f"offset {offset}" if line is None else f"offset {offset}, line {line}"
    return UserError(f"{name} is not UTF-8: byte 0x{byte:02x} at {place}; convert it to UTF-8 first")


def decode_utf8(content: bytes, name: str, lines: bool = False) -> str:
    """The text of UTF-8 bytes.

    Args:
      name: what the message calls the text.
      lines: also say in which line the wrong byte is.

    Raises:
      UserError: the bytes are not UTF-8.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1 if lines else None
        raise not_utf8(name, content[error.start], error.start, line) from None


def check_utf8(text: str, name: str) -> None:
    """Refuses a text with surrogates, which is what Python makes of command-line bytes that are not UTF-8.

    Raises:
      UserError: the text has no UTF-8 form.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = text[error.start].encode("utf-8", "surrogatepass")[0]
        with contextlib.suppress(UnicodeEncodeError):
            byte = text[error.start].encode("utf-8", "surrogateescape")[0]  # the byte that was typed
        raise not_utf8(name, byte, len(text[: error.start].encode())) from None
