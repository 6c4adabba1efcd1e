"""Weights that torch.save wrote and state dicts in memory, read one tensor at a time."""

import json

import flax.serialization
import jax
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import unflatten_dict
from foreign import gpt2, llama
from memory import memory_of_reading

from jaxlm import convert
from jaxlm.convert.files import in_memory, open_tensors
from jaxlm.convert.shards import write_shards
from jaxlm.convert.tensors import to_array
from jaxlm.errors import UserError

torch.manual_seed(0)
TENSORS = {
    "wte.weight": torch.randn(7, 5),
    "attn.weight": torch.randn(5, 15).bfloat16(),
    "attn.bias": torch.randn(15).half(),
    "ln.weight": torch.randn(5).double(),
    "turned": torch.randn(3, 4).T,
    "mask": torch.ones(1, 1, 3, 3).tril().bool(),
    "count": torch.tensor(3),
    "empty": torch.zeros(0, 3),
}


def assert_holds(files, tensors):
    assert set(files.names) == set(tensors)
    for name, tensor in tensors.items():
        expected = to_array(tensor)
        assert (files.shape(name), files.dtype(name)) == (tuple(tensor.shape), str(tensor.dtype).split(".")[1])
        found = files.read(name)
        assert (found.shape, found.dtype, found.tobytes()) == (expected.shape, expected.dtype, expected.tobytes())


def refused(read, *arguments):
    with pytest.raises(UserError) as error:
        read(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("new", [True, False])
def test_a_file_of_torch_is_read_tensor_by_tensor(tmp_path, new):
    file = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, file, _use_new_zipfile_serialization=new)
    files = open_tensors(tmp_path)
    assert files.where == str(file)
    assert_holds(files, TENSORS)


def test_shards_of_torch_are_the_whole(tmp_path):
    names, places = list(TENSORS), {}
    for number, part in enumerate((names[::2], names[1::2])):
        name = f"pytorch_model-0000{number + 1}-of-00002.bin"
        torch.save({key: TENSORS[key] for key in part}, tmp_path / name)
        places |= dict.fromkeys(part, name)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    files = open_tensors(tmp_path)
    assert files.where == str(index)
    assert_holds(files, TENSORS)
    index.write_text(json.dumps({"weight_map": {**places, "more": places["count"]}}))
    assert "more is missing or unexpected" in refused(open_tensors, tmp_path)


def test_a_state_dict_in_memory_is_not_copied():
    files = in_memory(TENSORS, "a module")
    assert files.where == "a module"
    assert_holds(files, TENSORS)
    assert np.shares_memory(files.read("wte.weight"), TENSORS["wte.weight"].numpy())


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (3, "a is not a dense tensor with values"),
        (torch.ones(2, device="meta"), "a is not a dense tensor with values"),
        (torch.eye(2).to_sparse(), "a is not a dense tensor with values"),
        (torch.ones(2).to(torch.float8_e4m3fn), "a is of type torch.float8_e4m3fn: save it as bfloat16"),
    ],
)
def test_what_is_no_tensor_of_numbers_is_refused_before_any_is_read(tmp_path, entry, words):
    tensors = {**TENSORS, "a": entry}
    assert f"a module: {words}" in refused(in_memory, tensors, "a module")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert f"pytorch_model.bin: {words}" in refused(open_tensors, tmp_path)


@pytest.mark.parametrize("new", [True, False])
def test_a_cut_file_and_another_content(tmp_path, new):
    file = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, file, _use_new_zipfile_serialization=new)
    file.write_bytes(file.read_bytes()[:-100])
    assert "cannot be read as a PyTorch checkpoint" in refused(open_tensors, tmp_path)
    torch.save([1], file, _use_new_zipfile_serialization=new)
    assert "does not hold a dict of tensors" in refused(open_tensors, tmp_path)
    torch.save({1: torch.ones(1)}, file, _use_new_zipfile_serialization=new)
    assert "has the key 1, which is no name of a tensor" in refused(open_tensors, tmp_path)


def test_a_model_of_torch_is_never_in_memory_twice(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save({str(i): torch.full((25, 1000, 250), float(i)) for i in range(8)}, file)
    largest, dropped, held, kept = memory_of_reading(file)
    assert (largest, held) == (25, 200)
    assert dropped < 3 * largest
    assert kept < held + 3 * largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shard_size", [10**9, 5000])
def test_transformers_finds_every_tensor_of_what_is_written(tmp_path, dtype, shard_size):
    theirs = gpt2(tie_word_embeddings=False).to(dtype)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard_size)
    ours = tmp_path / "ours"
    ours.mkdir()
    theirs.config.save_pretrained(ours)
    files = in_memory(theirs.state_dict(), "a module")
    shapes = {name: (files.shape(name), files.dtype(name)) for name in files.names}
    write_shards(ours, shapes, ((name, files.read(name)) for name in files.names), shard_size)

    weights = sorted(path.name for path in (tmp_path / "theirs").glob("model*"))
    assert (len(weights) > 3) == (shard_size == 5000)
    assert sorted(path.name for path in ours.glob("model*")) == weights
    if shard_size == 5000:
        name = "model.safetensors.index.json"
        assert (ours / name).read_text() == (tmp_path / "theirs" / name).read_text()
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(ours, dtype="auto", output_loading_info=True)
    assert not any(report.values())
    found = loaded.state_dict()
    assert found.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert found[name].dtype == dtype
        assert found[name].equal(tensor)


def as_flax(state):
    """The tree that transformers 4 saves for a module of these tensors: embedding and scale by module, else kernel."""
    tree = {}
    for name, tensor in state.items():
        *modules, leaf = name.split(".")
        array = to_array(tensor)
        if leaf == "weight":
            table, norm = modules[-1] in ("wte", "wpe", "embed_tokens"), "norm" in modules[-1] or "ln_" in modules[-1]
            leaf = "embedding" if table else "scale" if norm else "kernel"
            array = array.T if leaf == "kernel" else array
        tree[*modules, leaf] = array
    return unflatten_dict(tree)


@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize("form", ["shards", "bin", "bin in shards", "msgpack"])
def test_a_model_is_the_same_from_every_form(tmp_path, build, form):
    theirs = build()
    theirs.config.save_pretrained(tmp_path)
    state = theirs.state_dict()
    if form == "shards":
        theirs.save_pretrained(tmp_path, max_shard_size=5000)
    elif form == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    elif form == "bin in shards":
        places = {name: f"{i % 3}.bin" for i, name in enumerate(state)}
        for file in set(places.values()):
            torch.save({name: state[name] for name in places if places[name] == file}, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    else:
        if build is gpt2:
            state.pop("lm_head.weight")  # tied
        (tmp_path / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(as_flax(state)))
    cfg, params = convert.from_hf(tmp_path)
    expected_cfg, expected = convert.from_hf(theirs)
    assert cfg == expected_cfg
    jax.tree.map(np.testing.assert_array_equal, params, expected)
