"""NumPy's files of others: what numpy.save and numpy.savez write, no objects, no more bytes than there are."""

import io
import struct
import zipfile

import numpy as np
import pytest

from jaxlm.data import arrays

ARRAYS = [
    *(np.arange(6).reshape(2, 3), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.array(list("aé漢"))),
    *(np.array("abc"), np.zeros((3, 0), np.int8), np.array([]), np.array(["ab", "c"], ">U2"), np.array([b"a"])),
    *(np.array(7), np.array([1 + 2j]), np.array([True])),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype} {array.shape}")
def test_what_numpy_saves_is_read_as_numpy_reads_it(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    read = arrays.read_npy(tmp_path / "a.npy")
    np.testing.assert_array_equal(read, np.load(tmp_path / "a.npy", allow_pickle=False))
    assert (read.dtype, read.shape) == (array.dtype, array.shape)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_archives_are_read(tmp_path, save):
    save(tmp_path / "a.npz", b=np.arange(1000), a=np.array(["x"]))
    read = arrays.read_npz(tmp_path / "a.npz")
    assert list(read) == ["a", "b"]
    np.testing.assert_array_equal(read["b"], np.arange(1000))


def npy(head, content=b"abcd", version=b"\x01\x00"):
    text = head.encode()
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + content


def head(kind="|u1", shape="(4,)"):
    return f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}, }}\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (npy(head("|O")), "values of type object"),
        (npy(head("|V1")), "values of type"),
        (npy(head("<M8[s]", "(0,)"), b""), "values of type datetime"),
        (npy(head(shape="(1000000000000,)")), "says 1,000,000,000,000 bytes, it has 4"),
        (npy(head(shape="(4611686018427387904, 4)")), "shape"),
        (npy(head(shape="(-4,)")), "shape"),
        (npy(head(shape="(5,)")), "says 5 bytes, it has 4"),
        (npy(head(), b"abcde"), "says 4 bytes, it has 5"),
        (npy(head("<U1", "(1,)"), b"\x00\x00\x11\x00"), "characters that do not exist"),
        (npy("{'descr': ("), "head is damaged"),
        (npy("__import__('os').system('touch escaped')"), "head is damaged|malformed|Cannot parse"),
        (npy(head(), version=b"\x09\x00"), "version"),
        (b"", "magic|EOF|expected"),
        (b"PK\x03\x04", "magic|expected"),
    ],
)
def test_a_damaged_array_is_refused(tmp_path, content, words):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        arrays.read_npy(tmp_path / "a.npy")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", content)
    with pytest.raises(ValueError, match=words):
        arrays.read_npz(tmp_path / "a.npz")


def archive(**members):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in members.items():
            new.writestr(name.replace("__", "."), content)
    return made.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (archive(a__npy=bytes(arrays.UNPACKED + 10**6)), "34,554,432 unpacked"),
        (archive(a__txt=b"x"), "'a.txt', which is no array"),
        (archive(a__npy=npy(head()))[:-30], "not an archive"),
        (b"", "not an archive"),
        (npy(head()), "not an archive"),
    ],
)
def test_a_damaged_archive_is_refused(tmp_path, content, words):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        arrays.read_npz(tmp_path / "a.npz")
