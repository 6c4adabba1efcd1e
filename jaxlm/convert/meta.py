"""Llama in Meta's own format, and what that of llama2.c has in common with it: settings and names of tensors."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.convert.families.family import shapes
from jaxlm.convert.families.meta import META
from jaxlm.convert.files import TensorFiles, open_tensors, read_json
from jaxlm.convert.foreign import Fields, Tensors, check_layers
from jaxlm.convert.hf import read_params
from jaxlm.convert.tensors import StoredTensor
from jaxlm.errors import UserError
from jaxlm.types import Params

EMBEDDING, HEAD, NORM = "tok_embeddings.weight", "output.weight", "norm.weight"


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
    cfg = read_args(fields, _rows(parts, content.get("dim")) if rows == -1 else rows, tied=False)
    fields.finish()
    check_layers(cfg.num_layers, len({name for part in parts for name in part.names}), str(folder))
    whole = tensor_shapes(cfg)
    joined = {
        name: _joined([part for part in parts if name in part], name, whole.get(name, ()))
        for part in parts
        for name in part.names
    }
    return read_tensors(cfg, TensorFiles(str(files[0] if len(files) == 1 else folder), joined))


def read_args(fields: Fields, vocab_size: int, tied: bool) -> ModelConfig:
    """The model that params.json or llama2.c's `model_args` describe, with Meta's defaults; `finish` is the caller's.

    Raises:
      UserError: a setting is missing, out of range, or not supported.
    """
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


def tensor_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor."""
    ours = shapes(cfg)
    return {name: layout.shape([ours[path] for path in paths]) for name, paths, layout in META.entries(cfg)}


def read_tensors(cfg: ModelConfig, files: TensorFiles) -> tuple[ModelConfig, Params]:
    """The config in the type of the tensors, and the parameters, read one tensor at a time.

    Raises:
      UserError: tensors that are missing, unused or of other shapes.
    """
    tensors = Tensors(files, META.buffers)
    cfg = dataclasses.replace(cfg, dtype=tensors.dtype, param_dtype=tensors.dtype)
    return cfg, read_params(META, cfg, tensors)


def _rows(parts: Sequence[TensorFiles], width: object) -> int:
    """The size of a vocabulary that params.json gives as -1: that of the tokenizer, so that of the embedding.

    Among several files Llama 1 and 2 cut the embedding by features, Llama 3 by tokens.
    """
    tables = [part.shape(EMBEDDING) for part in parts if EMBEDDING in part]
    if not tables or len(tables[0]) != 2:
        raise UserError(f"{parts[0].where} has no matrix {EMBEDDING}, which params.json needs for vocab_size = -1")
    return sum(table[0] for table in tables) if tables[0][1] == width else tables[0][0]


def _joined(parts: Sequence[TensorFiles], name: str, whole: tuple[int, ...]) -> StoredTensor:
    """A tensor of which each file has a part, along the axis in which a part differs from the whole, or the whole."""
    first = parts[0].stored[name]
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
