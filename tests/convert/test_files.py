"""Files of weights: what is read of them one tensor at a time, what is refused, and how much memory it takes."""

import json

import flax.serialization
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from memory import memory_of_reading

from jaxlm.convert.files import TYPES, open_tensors
from jaxlm.convert.flax_files import torch_name
from jaxlm.errors import UserError

RNG = np.random.default_rng(0)
TENSORS = {
    "wte.weight": RNG.standard_normal((7, 5)).astype(np.float32),
    "h.0.attn.c_attn.weight": RNG.standard_normal((5, 15)).astype(jnp.bfloat16),
    "h.0.attn.c_attn.bias": RNG.standard_normal(15).astype(np.float16),
    "h.0.ln_1.weight": RNG.standard_normal(5),
    "h.0.attn.bias": np.tri(3, dtype=bool)[None, None],
    "count": np.full((), 3, np.int64),
    "empty": np.zeros((0, 3), np.float32),
}


def assert_holds(files, tensors):
    assert set(files.names) == set(tensors)
    for name, tensor in tensors.items():
        assert name in files
        assert (files.shape(name), files.dtype(name)) == (tensor.shape, str(tensor.dtype))
        found = files.read(name)
        assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
        assert found.tobytes() == tensor.tobytes()


def refused(path):
    with pytest.raises(UserError) as error:
        open_tensors(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def save(folder, name="model.safetensors", tensors=TENSORS):
    safetensors.numpy.save_file(tensors, folder / name)
    return folder / name


def save_shards(folder, **places):
    """Two files, with an index that `places` changes."""
    names = list(TENSORS)
    for number, part in enumerate((names[::2], names[1::2])):
        save(folder, f"{number}.safetensors", {name: TENSORS[name] for name in part})
        places = dict.fromkeys(part, f"{number}.safetensors") | places
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return index


def flax_tree(tensors):
    """The same tensors as a model of Flax has them: nested, with kernels transposed."""
    tree = {}
    for name, tensor in tensors.items():
        *modules, leaf = name.split(".")
        inner = tree
        for module in modules:
            inner = inner.setdefault(module, {})
        kind = leaf if leaf != "weight" else {"wte": "embedding", "ln_1": "scale"}.get(modules[-1], "kernel")
        inner[kind] = tensor.T if kind == "kernel" else tensor
    return tree


def save_flax(folder, tensors=TENSORS, name="flax_model.msgpack"):
    (folder / name).write_bytes(flax.serialization.msgpack_serialize(flax_tree(tensors)))
    return folder / name


# What is read


def test_a_file_is_read_tensor_by_tensor_in_every_type(tmp_path):
    file = save(tmp_path)
    files = open_tensors(tmp_path)
    assert files.where == str(file)
    assert_holds(files, TENSORS)
    assert_holds(open_tensors(file), TENSORS)
    every = {kind: np.arange(6).reshape(2, 3).astype(jnp.dtype(kind)) for kind in TYPES.values()}
    assert_holds(open_tensors(save(tmp_path, tensors=every)), every)


def test_shards_are_the_whole(tmp_path):
    index = save_shards(tmp_path)
    files = open_tensors(tmp_path)
    assert files.where == str(index)
    assert_holds(files, TENSORS)


@pytest.mark.parametrize("limit", [2**30, 40])
def test_weights_of_flax_have_the_names_and_the_layout_of_pytorch(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", limit)  # larger arrays are stored in pieces
    file = save_flax(tmp_path)
    assert (b"__msgpack_chunked_array__" in file.read_bytes()) == (limit == 40)
    files = open_tensors(tmp_path)
    assert files.where == str(file)
    assert_holds(files, TENSORS)


def test_shards_of_flax_are_the_whole(tmp_path):
    names, places = list(TENSORS), {}
    for number, part in enumerate((names[::2], names[1::2])):
        name = f"flax_model-0000{number + 1}-of-00002.msgpack"
        save_flax(tmp_path, {name: TENSORS[name] for name in part}, name)
        tree = flax.traverse_util.flatten_dict(flax_tree({name: TENSORS[name] for name in part}), sep="/")
        places |= dict.fromkeys(tree, name)
    assert "h/0/attn/c_attn/kernel" in places
    (tmp_path / "flax_model.msgpack.index.json").write_text(json.dumps({"weight_map": places}))
    assert_holds(open_tensors(tmp_path), TENSORS)


def test_names_of_flax():
    names = {"a/0/kernel": "a.0.weight", "a/scale": "a.weight", "wte/embedding": "wte.weight", "a/b/bias": "a.b.bias"}
    assert {path: torch_name(path) for path in names} == names


def test_safetensors_come_before_other_files(tmp_path):
    save_flax(tmp_path, {"other": np.ones(1)})
    save(tmp_path)
    assert_holds(open_tensors(tmp_path), TENSORS)


# What is refused


def test_a_folder_without_weights(tmp_path):
    words = "has none of model.safetensors, pytorch_model.bin, flax_model.msgpack, whole or in shards"
    assert words in refused(tmp_path)


@pytest.mark.parametrize("change", [lambda raw: raw[:5], lambda raw: raw[:-1], lambda raw: raw + b"x", lambda raw: b""])
def test_a_damaged_file(tmp_path, change):
    for file in (save(tmp_path), save_flax(tmp_path)):
        file.write_bytes(change(file.read_bytes()))
        message = refused(file)
        assert str(file) in message
        assert "damaged; copy it again" in message


def test_a_missing_file(tmp_path):
    assert "model.safetensors cannot be read (" in refused(tmp_path / "model.safetensors")
    assert "model.msgpack cannot be read as weights of Flax (" in refused(tmp_path / "model.msgpack")


def test_every_cut_of_a_flax_file_is_refused(tmp_path):
    file = save_flax(tmp_path)
    raw = file.read_bytes()
    for length in range(len(raw)):
        file.write_bytes(raw[:length])
        refused(file)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"a": {"step": 3}}, "'a/step' is no array"),
        ({"a": 1j}, "extension type 2 is no array"),
        ([np.ones(3)], "weights of Flax ("),
        ({"__msgpack_chunked_array__": True, "shape": {"0": 3}, "chunks": {"0": np.ones(2)}}, "is no array"),
        ({"a": {"__msgpack_chunked_array__": 1, "shape": {"0": 3}, "chunks": {"0": np.ones(2)}}}, "'a' lacks a piece"),
        ({"a": {"__msgpack_chunked_array__": 1}}, "weights of Flax ('shape')"),
        ({"a": np.ones(3, complex)}, "an array of type complex128"),
    ],
)
def test_a_flax_file_with_something_else(tmp_path, tree, words):
    file = tmp_path / "flax_model.msgpack"
    file.write_bytes(flax.serialization.msgpack_serialize(tree))
    assert words in refused(file)


def test_a_type_that_numpy_lacks(tmp_path):
    head = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [2, 3], "data_offsets": [0, 6]}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(head).to_bytes(8, "little") + head + bytes(6))
    assert "a is of type F8_E4M3: save it as bfloat16, float32, float64" in refused(file)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (save_shards(d), (d / "1.safetensors").unlink()), "1.safetensors cannot be read"),
        (lambda d: save_shards(d, surplus="0.safetensors"), "0.safetensors does not match"),
        (lambda d: save_shards(d, empty="1.safetensors"), "empty is missing or unexpected"),
        (lambda d: save_shards(d, far="../far.safetensors"), "names the file '../far.safetensors' outside its folder"),
        (lambda d: save_shards(d, far="/far.safetensors"), "names the file '/far.safetensors' outside its folder"),
        (lambda d: save_shards(d, far=".."), "names the file '..' outside its folder"),
        (lambda d: save_shards(d, far="."), "names the file '.' that has no plain name"),
        (lambda d: save_shards(d, far=""), "names the file '' that has no plain name"),
        (lambda d: save_shards(d, far="a\0.safetensors"), "names the file 'a\\x00.safetensors' that has no plain name"),
        (lambda d: save_shards(d, far=3), "has no weight_map from tensors to files"),
        (lambda d: save_shards(d).write_text("{}"), "has no weight_map from tensors to files"),
        (lambda d: save_shards(d).write_text("{"), "index.json is not JSON"),
        (lambda d: save_shards(d).write_text("[]"), "index.json does not hold a JSON object"),
        (lambda d: save_shards(d).write_bytes(b"\xff"), "index.json is not JSON"),
    ],
)
def test_shards_that_do_not_match(tmp_path, damage, words):
    damage(tmp_path)
    assert words in refused(tmp_path)


def test_a_file_that_goes_while_it_is_read(tmp_path):
    file = save(tmp_path)
    files = open_tensors(file)
    file.unlink()
    with pytest.raises(UserError, match="it changed while it was read"):
        files.read("wte.weight")


# Memory


@pytest.mark.parametrize("kind", ["safetensors", pytest.param("msgpack", marks=pytest.mark.slow)])
def test_a_model_is_never_in_memory_twice(tmp_path, kind):
    tensors = {f"{i}.bias": np.full((25, 1000, 250), i, np.float32) for i in range(8)}
    file = save(tmp_path, tensors=tensors) if kind == "safetensors" else save_flax(tmp_path, tensors)
    largest, dropped, held, kept = memory_of_reading(file)
    assert (largest, held) == (25, 200)
    assert dropped < 3 * largest
    assert kept < held + 3 * largest
