"""Exports of llama2.c and the head of Meta's folders, without torch: what is read, what is refused by its numbers."""

import json
import subprocess
import sys

import jax
import llama2c
import numpy as np
import pytest
from support import command

from jaxlm import convert
from jaxlm.errors import UserError
from jaxlm.run.folder import load_run

SIZES = llama2c.SIZES


def refused(converter, source):
    with pytest.raises(UserError) as error:
        converter(source)
    assert "\n" not in str(error.value)
    return str(error.value)


def export(folder, version=0, tied=True, **lies):
    state = llama2c.weights(tied=tied)
    return llama2c.write(folder / "model.bin", SIZES | lies, state, version, tied)


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_of_an_export_finds_its_place(tmp_path, version, tied):
    cfg, params = convert.from_llama2c(export(tmp_path, version, tied))
    assert (cfg.vocab_size, cfg.max_seq_len, cfg.num_layers, cfg.embed_dim, cfg.mlp_dim) == (11, 5, 2, 6, 7)
    assert (cfg.num_heads, cfg.num_kv_heads, cfg.tie_embeddings) == (3, 1, tied)
    assert (cfg.norm_eps, cfg.rope_theta, cfg.rope_layout) == (1e-5, 10000.0, "interleaved")
    state = llama2c.weights(tied=tied)
    expected = {
        "embedding": state["tok_embeddings.weight"],
        "final_norm": {"scale": state["norm.weight"]},
        **({} if tied else {"head": {"kernel": state["output.weight"].T}}),
    }
    names = {"query": "wq", "key": "wk", "value": "wv", "out": "wo"}
    parts = {"gate": "w1", "up": "w3", "down": "w2"}
    for i in range(2):
        layer = f"layers.{i}."
        expected[f"block_{i}"] = {
            "attention_norm": {"scale": state[f"{layer}attention_norm.weight"]},
            "attention": {ours: {"kernel": state[f"{layer}attention.{name}.weight"].T} for ours, name in names.items()},
            "mlp_norm": {"scale": state[f"{layer}ffn_norm.weight"]},
            "mlp": {ours: {"kernel": state[f"{layer}feed_forward.{name}.weight"].T} for ours, name in parts.items()},
        }
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_an_export_is_read_without_torch(tmp_path):
    code = "import sys, jaxlm; jaxlm.convert.from_llama2c(sys.argv[1]); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code, export(tmp_path)], capture_output=True, text=True)
    assert found.stdout == "False\n", found.stderr


def test_the_command_makes_a_run_of_an_export(tmp_path):
    source, out = export(tmp_path), tmp_path / "new"
    assert command("convert", "--from", "llama2c", source, out)[0] == 0
    jax.tree.map(np.testing.assert_array_equal, load_run(out).params, convert.from_llama2c(source)[1])
    assert json.loads((out / "config.json").read_text())["source"] == {"format": "llama2.c", "name": "model.bin"}


@pytest.mark.parametrize(
    ("version", "change", "words"),
    [
        (
            0,
            lambda raw: raw[:-4],
            "has 2,224 bytes, not 2,228, as its head says (dim = 6, hidden_dim = 7, n_layers = 2",
        ),
        (0, lambda raw: raw + b"x", "has 2,229 bytes, not 2,228, as its head says"),
        (1, lambda raw: raw[:-1], "has 2,415 bytes, not 2,416, as its head says"),
        (1, lambda raw: raw + bytes(4), "has 2,420 bytes, not 2,416, as its head says"),
        (0, lambda raw: raw[:27], "has 27 bytes, less than the head of an export: it is damaged"),
        (1, lambda raw: raw[:255], "has 255 bytes, less than the head of an export: it is damaged"),
        (0, lambda raw: b"", "has 0 bytes, less than the head of an export: it is damaged"),
        (0, lambda raw: bytes(28) + raw[28:], "dim = 0 is not supported: give a whole number of at least 1"),
        (0, lambda raw: b"\xff" * 4 + raw[4:], "dim = -1 is not supported: give a whole number of at least 1"),
        (0, lambda raw: raw[:8] + b"\xff\xff\xff\x7f" + raw[12:], "has 2,228 bytes, too few for its head (dim = 6"),
        (0, lambda raw: raw[:12] + b"\4\0\0\0" + raw[16:], "num_heads = 4 does not divide embed_dim = 6"),
        (1, lambda raw: raw[:4] + b"\2\0\0\0" + raw[8:], "version = 2 is not supported: jaxlm reads the legacy format"),
    ],
)
def test_a_damaged_export_is_refused_by_its_numbers(tmp_path, version, change, words):
    file = export(tmp_path, version)
    file.write_bytes(change(file.read_bytes()))
    assert words in refused(convert.from_llama2c, file)


@pytest.mark.parametrize("name", SIZES)
def test_every_wrong_size_in_the_head_is_refused(tmp_path, name):
    for version in (0, 1):
        file = export(tmp_path, version)
        raw, at = bytearray(file.read_bytes()), 4 * list(SIZES).index(name) + 8 * version
        raw[at : at + 4] = (SIZES[name] + 1 if name != "n_kv_heads" else 3).to_bytes(4, "little")
        file.write_bytes(raw)
        if (name, version) != ("max_seq_len", 1):  # version 1 has no table of that length
            refused(convert.from_llama2c, file)


def test_what_is_not_there_is_named(tmp_path):
    assert f"{tmp_path / 'ckpt.pt'} is not a file: give llama2.c's ckpt.pt" in refused(convert.from_llama2c, tmp_path)
    assert "has no consolidated.00.pth: give a folder with it" in refused(convert.from_meta, tmp_path)
    (tmp_path / "consolidated.00.pth").write_bytes(b"")
    assert "params.json cannot be read (No such file or directory)" in refused(convert.from_meta, tmp_path)


@pytest.mark.slow
def test_an_export_is_never_in_memory_twice(tmp_path):
    sizes = {**SIZES, "dim": 516, "hidden_dim": 1000, "n_layers": 20, "vocab_size": 1000}
    file = llama2c.write(tmp_path / "model.bin", sizes, llama2c.weights(sizes), 1, True)
    code = """
import re, sys
from pathlib import Path
import jax, jaxlm
from jaxlm.convert.files import TensorFiles
def used():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000
jax.block_until_ready(jax.numpy.ones(3))
before, most = used(), 0
def watched(self, name, read=TensorFiles.read):
    global most
    most = max(most, used())
    return read(self, name)
TensorFiles.read = watched
params = jax.block_until_ready(jaxlm.convert.from_llama2c(sys.argv[1])[1])
print(sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e6, max(most, used()) - before)
"""
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    size, most = map(float, done.stdout.split())
    assert size > 180
    assert most < 1.5 * size
