"""Compressed files are read as what they hold, and damaged ones are named."""

import bz2
import gzip
import importlib.util
import lzma
from pathlib import Path

import pytest

from jaxlm.data.compressed import is_compressed, num_bytes, opened, plain_suffix
from jaxlm.errors import UserError

CONTENT = bytes(range(256)) * 40
PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".txt": bytes}


def read(path):
    with opened(path) as file:
        return file.read()


@pytest.mark.parametrize("suffix", list(PACKED))
def test_what_a_file_holds_is_read_from_any_place(tmp_path, suffix):
    path = tmp_path / f"a{suffix.upper()}"
    path.write_bytes(PACKED[suffix](CONTENT))
    assert read(path) == CONTENT
    assert num_bytes(path) == len(CONTENT)
    with opened(path) as file:
        file.seek(9000)
        assert file.read(3) == CONTENT[9000:9003]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "plain"])
def test_a_damaged_file_is_named(tmp_path, suffix, damage):
    path, packed = tmp_path / f"a{suffix}", bytearray(PACKED[suffix](CONTENT))
    if damage == "cut":
        packed = packed[:-9]
    elif damage == "flipped":
        packed[len(packed) // 2] ^= 16
    path.write_bytes(b"just text" if damage == "plain" else packed)
    with pytest.raises(UserError, match=rf"a{suffix} is not a whole {suffix} file \(.*: restore it, or leave it out"):
        read(path)


@pytest.mark.skipif(importlib.util.find_spec("compression") is not None, reason="this Python reads .zst")
def test_zst_without_a_reader_says_how_to_go_on(tmp_path):
    (tmp_path / "a.zst").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a.zst needs Python 3.14 to be read: decompress it first \(zstd -d"):
        read(tmp_path / "a.zst")


def test_kinds_come_from_the_name_without_the_compression():
    assert [plain_suffix(Path(name)) for name in ("a.txt", "b.TXT.gz", "c.jsonl.XZ", "d.gz", "e")] == [
        ".txt",
        ".txt",
        ".jsonl",
        "",
        "",
    ]
    assert [is_compressed(Path(name)) for name in ("a.txt", "b.TXT.gz", "c.GZ")] == [False, True, True]
    with pytest.raises(FileNotFoundError):
        num_bytes(Path("none.txt"))
