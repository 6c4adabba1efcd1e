"""Checkpoints of nanoGPT."""

import io
import os
from pathlib import Path
from typing import Literal

from jaxlm.config import ModelConfig
from jaxlm.convert.export import new_folder, torch_tensors
from jaxlm.convert.families.gpt2 import NANOGPT
from jaxlm.convert.families.holding import holding
from jaxlm.convert.files import in_memory
from jaxlm.convert.foreign import Fields, Tensors
from jaxlm.convert.hf import read_params
from jaxlm.convert.tensors import import_torch, load_training, to_tensor
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
    settings, model = load_training(path, "a nanoGPT checkpoint", "nanoGPT's ckpt.pt")
    fields = Fields(settings, f"{path}: model_args")
    tensors = Tensors(in_memory(model, str(path)), NANOGPT.buffers)
    values = NANOGPT.read_config(fields) | {"activation": activation}
    cfg = ModelConfig(**values, dtype=tensors.dtype, param_dtype=tensors.dtype)
    fields.finish()
    return cfg, read_params(NANOGPT, cfg, tensors)


def to_nanogpt(cfg: ModelConfig, params: Params, path: str | os.PathLike[str], step: int = 0) -> None:
    """Writes a model as a nanoGPT checkpoint, ckpt.pt in a new or empty folder. Needs torch.

    It holds what nanoGPT's sample.py reads; there is no state of an optimizer to go on from.

    Args:
      step: the checkpoint's iter_num.

    Raises:
      UserError: nanoGPT cannot hold the model (the message names the fields), parameters that do not fit the config,
        torch is missing, the folder is not empty or cannot be written.
    """
    folder = Path(path)
    torch = import_torch(f"writing {folder / 'ckpt.pt'}")
    held = holding(cfg, [NANOGPT])
    state = {name: to_tensor(array) for name, array in torch_tensors(held, cfg, params).arrays()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    args = {name: value for name, value in held.config.items() if name not in ("architectures", "model_type", "dtype")}
    record = {"model": state, "model_args": args, "iter_num": step, "best_val_loss": None, "config": {}}
    with new_folder(folder) as aside:
        content = io.BytesIO()  # torch does not say why a disk refuses what it writes
        torch.save(record, content)
        (aside / "ckpt.pt").write_bytes(content.getbuffer())
