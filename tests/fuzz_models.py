"""What reads models of others: valid weights of each format, each with its reader."""

import dataclasses
import json
from pathlib import Path

import foreign_folders
import llama2c
import numpy as np
import safetensors.numpy
from fuzz_target import MODEL, Target, written


def _read_tensors(folder: Path) -> None:
    from jaxlm.convert.files import open_tensors

    files = open_tensors(folder)
    for name in files.names:
        files.read(name)


def _make_shards(folder: Path) -> None:
    places = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    for name, file in places.items():
        safetensors.numpy.save_file({name: np.ones((2, 3), np.float32)}, folder / file)
    content = {"metadata": {"total_size": 48}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def _make_hugging_face(folder: Path) -> None:
    foreign_folders.write(folder, {**foreign_folders.GPT2, "eos_token_id": 3})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    (folder / "tokenizer.json").write_text(json.dumps(foreign_folders.word_tokenizer()))


def _read_hugging_face(folder: Path) -> None:
    from jaxlm.run.foreign_model import read_model

    read_model("hf", folder)


def _make_llama(folder: Path) -> None:
    foreign_folders.write(folder, {**foreign_folders.LLAMA, "rope_theta": 1e4, "rms_norm_eps": 1e-5})


def _make_flax(folder: Path) -> None:
    import flax.serialization

    tree = {
        "transformer": {"ln_f": {"scale": np.ones(3, np.float32)}, "h": {"0": {"kernel": np.ones((2, 3), np.float16)}}}
    }
    (folder / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))


def _nanogpt():
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": 8, "bias": False, "vocab_size": 30, "dropout": 0.0}
    from jaxlm.convert.nanogpt import to_nanogpt
    from jaxlm.model.build import build_model, init_params

    return sizes, to_nanogpt, build_model, init_params


def _make_nanogpt(folder: Path) -> None:
    import jax

    _, to_nanogpt, build_model, init_params = _nanogpt()
    cfg = dataclasses.replace(MODEL, tie_embeddings=True)
    to_nanogpt(cfg, init_params(build_model(cfg), jax.random.key(0)), folder / "model")


def _read_nanogpt(folder: Path) -> None:
    from jaxlm.convert.nanogpt import from_nanogpt

    from_nanogpt(folder / "model")


def _make_torch(folder: Path) -> None:
    import torch

    torch.save({"a": torch.ones(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}, folder / "pytorch_model.bin")
    legacy = folder / "legacy.bin"
    torch.save({"a": torch.ones(2, 3)}, legacy, _use_new_zipfile_serialization=False)


def _read_torch(folder: Path) -> None:
    from jaxlm.convert.files import open_tensors

    for file in ("pytorch_model.bin", "legacy.bin"):
        files = open_tensors(folder / file)
        for name in files.names:
            files.read(name)


def _make_llama2c(folder: Path) -> None:
    for version in (0, 1):
        llama2c.write(folder / f"model{version}.bin", llama2c.SIZES, llama2c.weights(), version, True)


def _read_llama2c(folder: Path) -> None:
    from jaxlm.convert import from_llama2c

    for version in (0, 1):
        from_llama2c(folder / f"model{version}.bin")


def _make_meta(folder: Path) -> None:
    import torch

    sizes = {
        "dim": 6,
        "n_layers": 2,
        "n_heads": 3,
        "n_kv_heads": 1,
        "multiple_of": 1,
        "vocab_size": -1,
        "norm_eps": 1e-5,
    }
    (folder / "params.json").write_text(json.dumps({**sizes, "rope_theta": 1e4}))
    state = llama2c.weights({**llama2c.SIZES, "hidden_dim": 16}, tied=False)
    torch.save({name: torch.from_numpy(array) for name, array in state.items()}, folder / "consolidated.00.pth")


def _read_meta(folder: Path) -> None:
    from jaxlm.convert import from_meta

    from_meta(folder)


MODELS: dict[str, Target] = {
    "safetensors": Target(
        written(
            model__safetensors=safetensors.numpy.save({"a": np.ones((2, 3), np.float32), "b": np.ones(2, np.float16)})
        ),
        _read_tensors,
        ("*",),
    ),
    "index": Target(_make_shards, _read_tensors, ("*",)),
    "gpt2": Target(_make_hugging_face, _read_hugging_face, ("*",)),
    "llama": Target(_make_llama, _read_hugging_face, ("*",)),
    "flax": Target(_make_flax, _read_tensors, ("*",)),
    "llama2c": Target(_make_llama2c, _read_llama2c, ("*",)),
    "torch": Target(_make_torch, _read_torch, ("*",)),
    "nanogpt": Target(_make_nanogpt, _read_nanogpt, ("model/*",)),
    "meta": Target(_make_meta, _read_meta, ("*",)),
}
"""By name; the last three need torch."""
