"""A config or a head that promises more than a file holds is refused before anything of that size is made."""

import dataclasses
import os
import resource

import foreign_folders
import jax
import numpy as np
import pytest

from jaxlm import convert
from jaxlm.config import ModelConfig
from jaxlm.convert.files import open_tensors
from jaxlm.errors import UserError

GPT2 = foreign_folders.GPT2


@pytest.fixture(autouse=True)
def no_room():
    """Leaves 2 GB of addresses: less than any of these configs asks for."""
    jax.devices()
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2 * 10**9, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (before, hard))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"vocab_size": 2**31 - 1}, r"wte.weight has shape \(37, 15\), not \(2147483647, 15\)"),
        ({"n_positions": 2**30}, r"wpe.weight has shape \(23, 15\), not \(1073741824, 15\)"),
        ({"n_inner": 2**30}, r"c_fc.weight has shape \(15, 60\), not \(15, 1073741824\)"),
        ({"n_layer": 9999}, "9999 layers, and 28 tensors in all"),
        ({"n_layer": 10**9}, "num_layers = 1000000000 is too large: give at most 10000"),
        ({"vocab_size": 2**62}, "vocab_size = 4611686018427387904 is out of range"),
    ],
)
def test_a_config_that_promises_too_much_is_refused(tmp_path, fields, words):
    folder = foreign_folders.write(tmp_path / "model", GPT2 | fields, foreign_folders.weights(GPT2))
    with pytest.raises(UserError, match=words):
        convert.from_hf(folder)


def test_all_that_does_not_fit_is_still_listed_together(tmp_path):
    tensors = foreign_folders.weights(GPT2)
    tensors["transformer.extra"] = tensors.pop("transformer.ln_f.bias")
    tensors["transformer.wpe.weight"] = np.zeros((3, 3), np.float32)
    folder = foreign_folders.write(tmp_path / "model", GPT2, tensors)
    with pytest.raises(UserError) as error:
        convert.from_hf(folder)
    for words in ("ln_f.bias is missing", "wpe.weight has shape (3, 3), not (23, 15)", "extra is unexpected"):
        assert words in str(error.value)
    assert "lm_head" not in str(error.value)


def test_whole_numbers_beyond_32_bits_become_floats_where_floats_are_meant():
    cfg = ModelConfig(vocab_size=5, max_seq_len=4, num_layers=1, embed_dim=4, num_heads=1, rope_theta=10**10)
    assert (type(cfg.rope_theta), cfg.rope_theta) == (float, 1e10)
    assert dataclasses.replace(cfg, rope_theta=10**4).rope_theta == 10**4


@pytest.mark.parametrize("name", ["model.safetensors", "flax_model.msgpack"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_weights_that_are_no_file_are_refused(tmp_path, name, kind):
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(UserError, match="pipe or a device"):
        open_tensors(tmp_path / name)
