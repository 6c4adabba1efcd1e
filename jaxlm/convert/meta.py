"""Llama in Meta's own format and in that of llama2.c, which has the same names and the same order of rotated pairs."""

import dataclasses
import functools
import math
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.convert.families.meta import META
from jaxlm.convert.files import TensorFiles, in_memory, open_tensors, read_json
from jaxlm.convert.foreign import Fields, Tensors
from jaxlm.convert.hf import read_params
from jaxlm.convert.tensors import StoredTensor, load_torch
from jaxlm.errors import UserError
from jaxlm.types import Params

EMBEDDING, HEAD, NORM = "tok_embeddings.weight", "output.weight", "norm.weight"
MAGIC = 0x616B3432
"""The first four bytes of llama2.c's exports from version 1 on: "ak42" as a number."""
SIZES = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
"""The seven numbers in the head of an export of llama2.c."""
_ATTENTION = tuple(f"attention.{which}.weight" for which in ("wq", "wk", "wv", "wo"))
_MLP = tuple(f"feed_forward.{which}.weight" for which in ("w1", "w2", "w3"))
_ORDERS = {
    0: (
        *(EMBEDDING, "attention_norm.weight", *_ATTENTION, "ffn_norm.weight", *_MLP, NORM),
        *("freqs_cos", "freqs_sin", HEAD),
    ),
    1: ("attention_norm.weight", "ffn_norm.weight", NORM, EMBEDDING, *_ATTENTION, *_MLP, HEAD),
}
"""The order of the tensors in each version. One that every layer has comes for all layers together."""


def from_meta(path: str | os.PathLike[str]) -> tuple[ModelConfig, Params]:
    """Reads a Llama in the format in which Meta publishes it: a folder with params.json and consolidated.00.pth.

    Needs torch. Weights cut for model parallelism (consolidated.00.pth, consolidated.01.pth, ...) are joined. The
    head is a matrix of its own, as in Meta's code. Where params.json has no max_seq_len, the context is 2,048 tokens,
    Meta's default; rotary positions go on beyond it. Parameters and computation have the weights' type; float16
    becomes float32.

    Returns: the config, with rope_layout = "interleaved", and parameters that `build_model(cfg)` takes.

    Raises:
      UserError: a file is missing or damaged, torch is missing, or params.json and the tensors do not fit each other
        or jaxlm; the message names the entry and its value.
    """
    folder = Path(path)
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise UserError(f"{folder} has no consolidated.00.pth: give a folder with it and params.json, as Meta has it")
    content = read_json(folder / "params.json")
    fields = Fields(content, str(folder / "params.json"))
    parts = [open_tensors(file) for file in files]
    fields.ignore(["max_batch_size"])
    rows = fields.optional("vocab_size", -1)
    cfg = _config(fields, _rows(parts, content.get("dim")) if rows == -1 else rows, tied=False)
    fields.finish()
    shapes = _shapes(cfg)
    joined = {
        name: _joined([part for part in parts if name in part], name, shapes) for part in parts for name in part.names
    }
    return _converted(cfg, TensorFiles(str(files[0] if len(files) == 1 else folder), joined))


def from_llama2c(path: str | os.PathLike[str]) -> tuple[ModelConfig, Params]:
    """Reads a model of llama2.c: the checkpoint of its training, or an export for its C programs.

    A checkpoint (ckpt.pt, or the folder that holds it) needs torch. An export (.bin) is read without it: the legacy
    format and version 1, in float32; its norms use eps = 1e-5 and its rotary angles base 10,000, as run.c has them.
    The head is tied to the embedding if the two are equal or the head is missing, as llama2.c's own exports decide.

    Returns: the config, with rope_layout = "interleaved", and parameters that `build_model(cfg)` takes.

    Raises:
      UserError: the file is missing or damaged or of another length than its head says, its weights are int8
        (version 2), torch is missing, or the head and the tensors do not fit each other or jaxlm.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "ckpt.pt"
    if not file.is_file():
        raise UserError(f"{file} is not a file: give llama2.c's ckpt.pt, the folder that holds it, or an exported .bin")
    if file.suffix == ".bin":
        return _from_export(file)
    checkpoint = load_torch(file)
    parts: list[Any] = [
        checkpoint.get(name) if isinstance(checkpoint, dict) else None for name in ("model_args", "model")
    ]
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(
            f"{file} is not a checkpoint of llama2.c: it lacks the dicts model_args and model; give llama2.c's ckpt.pt"
        )
    compiled = "_orig_mod."  # the prefix that torch.compile adds
    stored = in_memory(parts[1], str(file)).stored
    tensors = TensorFiles(str(file), {name.removeprefix(compiled): tensor for name, tensor in stored.items()})
    fields = Fields(parts[0], f"{file}: model_args")
    fields.only("lora_modules", {}, None)
    tied = HEAD not in tensors or (EMBEDDING in tensors and np.array_equal(tensors.read(HEAD), tensors.read(EMBEDDING)))
    cfg = _config(fields, fields.required("vocab_size"), tied)
    fields.finish()
    return _converted(cfg, tensors)


def _config(fields: Fields, vocab_size: int, tied: bool) -> ModelConfig:
    width, hidden = fields.required("dim"), fields.optional("hidden_dim", None)
    multiple, factor = fields.optional("multiple_of", 256), fields.optional("ffn_dim_multiplier", None)
    for name, value in {"dim": width, "multiple_of": multiple}.items():
        if not isinstance(value, int) or value < 1:
            fields.refuse(name, value, "give a whole number of at least 1")
    if factor is not None and not (isinstance(factor, int | float) and 0 < factor < math.inf):
        fields.refuse("ffn_dim_multiplier", factor, "give a number above 0, or null")
    if hidden is None:
        hidden = int(2 * (4 * width) / 3)
        hidden = hidden if factor is None else int(factor * hidden)
        hidden = multiple * math.ceil(hidden / multiple)
    dropout = fields.optional("dropout", 0.0)
    return ModelConfig(
        vocab_size=vocab_size,
        max_seq_len=fields.optional("max_seq_len", 2048),
        num_layers=fields.required("n_layers"),
        embed_dim=width,
        num_heads=fields.required("n_heads"),
        num_kv_heads=fields.optional("n_kv_heads", None),
        mlp_dim=hidden,
        activation="swiglu",
        norm="rmsnorm",
        norm_eps=fields.optional("norm_eps", 1e-5),
        use_bias=False,
        init="normal",
        tie_embeddings=tied,
        position="rope",
        rope_theta=fields.optional("rope_theta", 10000.0),
        rope_layout="interleaved",
        dropout=dropout,
        attention_dropout=dropout,
        **_rope_scaling(fields),
    )


def _rope_scaling(fields: Fields) -> dict[str, Any]:
    """The fields of scaled rotary positions, which Llama has from 3.1 on.

    Its params.json says only that there is a scaling; the factor stands in the code, and 3.2 has another than 3.1.
    """
    scaled, factor = fields.optional("use_scaled_rope", False), fields.optional("rope_scaling_factor", None)
    if not scaled:
        return {}
    if factor is None:
        fix = "add its factor as rope_scaling_factor, 8 for Llama 3.1 and 3.3 or 32 for Llama 3.2"
        fields.refuse("use_scaled_rope", scaled, fix)
    return {"rope_scaling": "llama3", "rope_factor": factor, "rope_original_len": 8192}


def _shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, by its whole name."""
    layer = _layer_shapes(cfg)
    found = {f"layers.{i}.{name}": shape for i in range(cfg.num_layers) for name, shape in layer.items()}
    table = (cfg.vocab_size, cfg.embed_dim)
    return {EMBEDDING: table, **found, NORM: (cfg.embed_dim,), **({} if cfg.tie_embeddings else {HEAD: table})}


def _layer_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    width, hidden = cfg.embed_dim, cfg.resolved.mlp_dim
    keys = cfg.resolved.num_kv_heads * cfg.resolved.head_dim
    attention = dict(zip(_ATTENTION, [(width, width), (keys, width), (keys, width), (width, width)], strict=True))
    mlp = dict(zip(_MLP, [(hidden, width), (width, hidden), (hidden, width)], strict=True))
    return {**attention, **mlp, "attention_norm.weight": (width,), "ffn_norm.weight": (width,)}


def _converted(cfg: ModelConfig, files: TensorFiles) -> tuple[ModelConfig, Params]:
    tensors = Tensors(files, META.buffers)
    cfg = dataclasses.replace(cfg, dtype=tensors.dtype, param_dtype=tensors.dtype)
    return cfg, read_params(META, cfg, tensors)


def _rows(parts: Sequence[TensorFiles], width: object) -> int:
    """The size of a vocabulary that params.json gives as -1: that of the tokenizer, so that of the embedding.

    Among several files Llama 1 and 2 cut the embedding by features, Llama 3 by tokens.
    """
    shapes = [part.shape(EMBEDDING) for part in parts if EMBEDDING in part]
    if not shapes or len(shapes[0]) != 2:
        raise UserError(f"{parts[0].where} has no matrix {EMBEDDING}, which params.json needs for vocab_size = -1")
    return sum(shape[0] for shape in shapes) if shapes[0][1] == width else shapes[0][0]


def _joined(parts: Sequence[TensorFiles], name: str, shapes: Mapping[str, tuple[int, ...]]) -> StoredTensor:
    """A tensor of which each file has a part, along the axis in which a part differs from the whole, or the whole."""
    first, whole = parts[0].stored[name], shapes.get(name, ())
    axis = next((i for i, (part, full) in enumerate(zip(first.shape, whole, strict=False)) if part != full), None)
    if axis is None:
        return first
    sizes = [part.shape(name) for part in parts]
    if {part.dtype(name) for part in parts} != {first.dtype} or any(
        size[:axis] + size[axis + 1 :] != first.shape[:axis] + first.shape[axis + 1 :] for size in sizes
    ):
        raise UserError(f"{name} has parts of several types or shapes in {parts[0].where} and the files beside it")
    shape = (*first.shape[:axis], sum(size[axis] for size in sizes), *first.shape[axis + 1 :])
    return StoredTensor(shape, first.dtype, lambda: np.concatenate([part.read(name) for part in parts], axis))


def _from_export(file: Path) -> tuple[ModelConfig, Params]:
    """Reads an export of llama2.c: a head of 28 bytes (legacy) or 256, then the tensors in float32."""
    with file.open("rb") as opened:
        head = opened.read(256)
    magic, version = struct.unpack("<Ii", head[:8]) if len(head) >= 8 else (0, 0)
    if magic != MAGIC:
        version = 0
    elif version != 1:
        raise UserError(
            f"{file}: version = {version} is not supported: jaxlm reads the legacy format and version 1, both float32; "
            "export it with --version 1"
        )
    at, begin = (8, 256) if version else (0, 28)
    if len(head) < begin:
        raise UserError(
            f"{file} has {len(head)} bytes, less than the head of an export: it is damaged; export it again"
        )
    sizes = dict(zip(SIZES, struct.unpack("<7i", head[at : at + 28]), strict=True))
    tied = head[36] != 0 if version else sizes["vocab_size"] > 0
    if not version:
        sizes["vocab_size"] = abs(sizes["vocab_size"])
    fields = Fields(sizes, str(file))
    cfg = _config(fields, fields.required("vocab_size"), tied)
    fields.finish()
    layer, whole = _layer_shapes(cfg), _shapes(dataclasses.replace(cfg, num_layers=1))
    angles = (cfg.max_seq_len, cfg.resolved.head_dim // 2)
    whole |= {"freqs_cos": angles, "freqs_sin": angles}
    order = [name for name in _ORDERS[version] if name in layer or name in whole]
    needed = begin + sum(
        4 * math.prod(layer[n]) * cfg.num_layers if n in layer else 4 * math.prod(whole[n]) for n in order
    )
    if (size := file.stat().st_size) != needed:
        text = ", ".join(f"{name} = {value}" for name, value in sizes.items())
        raise UserError(f"{file} has {size:,} bytes, not {needed:,}, as its head says ({text}): export it again")
    stored = {}
    for name in order:
        for one in [f"layers.{i}.{name}" for i in range(cfg.num_layers)] if name in layer else [name]:
            shape = layer.get(name) or whole[name]
            stored[one] = StoredTensor(shape, "float32", functools.partial(_mapped, file, begin, shape))
            begin += 4 * math.prod(shape)
    return _converted(cfg, TensorFiles(str(file), stored))


def _mapped(file: Path, at: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(np.memmap(file, "<f4", "r", at, shape))
