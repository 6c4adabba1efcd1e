"""Checkpoints of nanoGPT."""

import os
from pathlib import Path
from typing import Any, Literal

from jaxlm.config import ModelConfig
from jaxlm.convert.families.gpt2 import NANOGPT
from jaxlm.convert.files import in_memory
from jaxlm.convert.foreign import Fields, Tensors
from jaxlm.convert.hf import read_params
from jaxlm.convert.tensors import load_torch
from jaxlm.errors import UserError
from jaxlm.types import Params


def from_nanogpt(
    path: str | os.PathLike[str], activation: Literal["gelu", "gelu_tanh"] = "gelu"
) -> tuple[ModelConfig, Params]:
    """Reads the model in a nanoGPT checkpoint, a file ckpt.pt or the folder that holds it. Needs torch.

    Parameters and computation have the weights' type; float16 becomes float32. What `torch.compile` and the like put
    in front of all names is taken off.

    Args:
      activation: "gelu" is the exact (erf) form; nanoGPT of early 2023 and its GPT-2 weights have "gelu_tanh". A
        checkpoint does not say which, so it cannot be told from the file. The logits of the two differ by about 1e-3.

    Returns: the config, and parameters that `build_model(cfg)` takes.

    Raises:
      UserError: no such file, torch is missing, the file is damaged or holds something else, or `model_args` and
        the tensors do not fit each other or jaxlm; the message names the entry and its value.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "ckpt.pt"
    if not path.is_file():
        raise UserError(f"{path} is not a file: give a nanoGPT checkpoint (ckpt.pt) or the folder that holds it")
    checkpoint = load_torch(path)
    parts: list[Any] = [
        checkpoint.get(name) if isinstance(checkpoint, dict) else None for name in ("model_args", "model")
    ]
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(
            f"{path} is not a nanoGPT checkpoint: it lacks the dicts model_args and model; give nanoGPT's ckpt.pt"
        )
    fields = Fields(parts[0], f"{path}: model_args")
    tensors = Tensors(in_memory(parts[1], str(path)), NANOGPT.buffers)
    dropout = fields.optional("dropout", 0.0)
    cfg = ModelConfig(
        vocab_size=fields.required("vocab_size"),
        max_seq_len=fields.required("block_size"),
        num_layers=fields.required("n_layer"),
        embed_dim=fields.required("n_embd"),
        num_heads=fields.required("n_head"),
        activation=activation,
        use_bias=fields.required("bias"),
        dropout=dropout,
        attention_dropout=dropout,
        dtype=tensors.dtype,
        param_dtype=tensors.dtype,
    )
    fields.finish()
    return cfg, read_params(NANOGPT, cfg, tensors)
