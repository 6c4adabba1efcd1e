"""Models of llama2.c: checkpoints of its training and exports for its C programs."""

import dataclasses
import functools
import math
import os
import struct
from pathlib import Path

import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.convert.files import TensorFiles, in_memory
from jaxlm.convert.foreign import Fields
from jaxlm.convert.meta import EMBEDDING, HEAD, NORM, read_args, read_tensors, tensor_shapes
from jaxlm.convert.tensors import StoredTensor, load_training
from jaxlm.data.reading import open_regular
from jaxlm.errors import UserError
from jaxlm.types import Params

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
    settings, model = load_training(file, "a checkpoint of llama2.c", "llama2.c's ckpt.pt")
    compiled = "_orig_mod."  # the prefix that torch.compile adds
    stored = in_memory(model, str(file)).stored
    tensors = TensorFiles(str(file), {name.removeprefix(compiled): tensor for name, tensor in stored.items()})
    fields = Fields(settings, f"{file}: model_args")
    fields.only("lora_modules", {}, None)
    tied = HEAD not in tensors or (EMBEDDING in tensors and np.array_equal(tensors.read(HEAD), tensors.read(EMBEDDING)))
    cfg = read_args(fields, fields.required("vocab_size"), tied)
    fields.finish()
    return read_tensors(cfg, tensors)


def _from_export(file: Path) -> tuple[ModelConfig, Params]:
    """Reads an export of llama2.c: a head of 28 bytes (legacy) or 256, then the tensors in float32."""
    with open_regular(file) as opened:
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
    size = file.stat().st_size
    text = ", ".join(f"{name} = {value}" for name, value in sizes.items())
    if 4 * max(value for name, value in sizes.items() if name != "max_seq_len") > size:
        raise UserError(f"{file} has {size:,} bytes, too few for its head ({text}): export it again")
    fields = Fields(sizes, str(file))
    cfg = read_args(fields, fields.required("vocab_size"), tied)
    fields.finish()
    # one layer is enough to know the length that the head promises
    one = tensor_shapes(dataclasses.replace(cfg, num_layers=1))
    angles = (cfg.max_seq_len, cfg.resolved.head_dim // 2)
    every = {
        name.removeprefix("layers.0."): (shape, cfg.num_layers if "layers" in name else 1)
        for name, shape in one.items()
    }
    every |= {"freqs_cos": (angles, 1), "freqs_sin": (angles, 1)}
    order = {name: every[name] for name in _ORDERS[version] if name in every}
    needed = begin + sum(4 * math.prod(shape) * count for shape, count in order.values())
    if size != needed:
        raise UserError(f"{file} has {size:,} bytes, not {needed:,}, as its head says ({text}): export it again")
    stored = {}
    for name, (shape, _) in order.items():
        for full in [f"layers.{i}.{name}" for i in range(cfg.num_layers)] if f"layers.0.{name}" in one else [name]:
            stored[full] = StoredTensor(shape, "float32", functools.partial(_mapped, file, begin, shape))
            begin += 4 * math.prod(shape)
    return read_tensors(cfg, TensorFiles(str(file), stored))


def _mapped(file: Path, at: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(np.memmap(file, "<f4", "r", at, shape))
