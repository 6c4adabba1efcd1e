"""Weights written as safetensors: what a reader finds, where they are cut, and what is left after a failure."""

import json
import resource
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

from jaxlm.convert.files import TYPES, open_tensors
from jaxlm.convert.shards import parse_size, write_shards
from jaxlm.errors import UserError

RNG = np.random.default_rng(0)
TENSORS = {
    "b.weight": RNG.standard_normal((7, 5)).astype(jnp.bfloat16),  # 70 bytes
    "a.weight": RNG.standard_normal((5, 3)).astype(np.float32),  # 60
    "c.weight": RNG.standard_normal((9, 5)),  # 360
    "c.bias": RNG.standard_normal(3).astype(np.float32),  # 12
    "mask": np.tri(3, dtype=bool),  # 9
    "empty": np.zeros((0, 3), jnp.bfloat16),
    "count": np.full((), 3, np.int64),  # 8
}


def shapes(tensors):
    return {name: (tensor.shape, str(tensor.dtype)) for name, tensor in tensors.items()}


def write(folder, tensors=TENSORS, shard_size=10**9):
    return write_shards(folder, shapes(tensors), reversed(tensors.items()), shard_size)


def assert_holds(folder, tensors):
    files = open_tensors(folder)
    assert sorted(files.names) == sorted(tensors)
    for name, tensor in tensors.items():
        found = files.read(name)
        assert (found.shape, found.dtype, found.tobytes()) == (tensor.shape, tensor.dtype, tensor.tobytes())


def test_one_file_holds_every_bit(tmp_path):
    assert write(tmp_path) == [tmp_path / "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert_holds(tmp_path, TENSORS)
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_every_type_and_a_turned_array(tmp_path):
    every = {kind: np.arange(6).reshape(2, 3).astype(jnp.dtype(kind)) for kind in TYPES.values()}
    write(tmp_path, every | {"turned": every["float32"].T})
    assert_holds(tmp_path, every | {"turned": every["float32"].T})


def test_shards_and_their_index(tmp_path):
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    written = write(tmp_path, shard_size=135)
    assert [path.name for path in written] == [*names, "model.safetensors.index.json"]
    assert sorted(tmp_path.iterdir()) == sorted(written)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 70 + 60 + 360 + 12 + 9 + 8, "total_parameters": 35 + 15 + 45 + 3 + 9 + 1}
    # 70 + 60 fit; 360 bytes stand alone, before what is not full yet; 12 more do not fit
    assert index["weight_map"] == {
        **{"c.weight": names[0], "b.weight": names[1], "a.weight": names[1]},
        **{"c.bias": names[2], "mask": names[2], "empty": names[2], "count": names[2]},
    }
    assert_holds(tmp_path, TENSORS)


def test_wide_types_begin_at_multiples_of_their_width(tmp_path):
    raw = write(tmp_path)[0].read_bytes()
    length = int.from_bytes(raw[:8], "little")
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__":
            assert (8 + length + entry["data_offsets"][0]) % TENSORS[name].itemsize == 0


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("200MB", 2 * 10**8), ("1.5 kb", 1500), (" 2TB ", 2 * 10**12)]
)
def test_a_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5", "GB", "5GiB", "-1GB", "0MB", "nanGB", "infGB", "5 gigs", "1e400GB"])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="is no size: give a number and KB, MB, GB, TB, such as 5GB") as error:
        parse_size(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda t: [*t.items(), ("more", np.ones(1))], "more comes twice or is not among the shapes"),
        (lambda t: [*t.items(), ("mask", t["mask"])], "mask comes twice"),
        (lambda t: list(t.items())[:-1], "count never came"),
        (lambda t: (t | {"mask": t["mask"][:2]}).items(), "mask is"),
        (lambda t: (t | {"mask": t["mask"].astype(np.int8)}).items(), "int8, not"),
    ],
)
def test_other_tensors_than_said_are_refused_and_leave_nothing(tmp_path, given, words):
    with pytest.raises(ValueError, match=words):
        write_shards(tmp_path, shapes(TENSORS), given(TENSORS), 135)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, limits[1]))  # the first file fits, the second does not
    try:
        with pytest.raises(UserError, match="cannot hold the weights .File too large.: give a folder with 1,000,012 b"):
            write(tmp_path, {"b": np.ones(3, np.float32), "a": np.ones(250_000, np.float32)}, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_there_stay(tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").write_text("old")
    with pytest.raises(UserError, match=r"model-00001-of-00002.safetensors is there already"):
        write(tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_only_one_tensor_is_in_memory(tmp_path):
    code = """
import re, sys
from pathlib import Path
import numpy as np
from jaxlm.convert.shards import write_shards
def used():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000
before = used()
shapes = {str(i): ((6250, 1000), "float32") for i in range(8)}
write_shards(Path(sys.argv[1]), shapes, ((name, np.full((6250, 1000), 1, np.float32)) for name in shapes), 10**9)
print(used() - before)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert (tmp_path / "model.safetensors").stat().st_size > 200e6
    assert float(done.stdout) < 75
