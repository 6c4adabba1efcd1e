"""A model as files for torchref: its ModelConfig in config.json, its state dict in model.safetensors."""

import json
import os
from pathlib import Path

from jaxlm.config import ModelConfig
from jaxlm.config.base import from_dict, to_dict
from jaxlm.convert.export import new_folder
from jaxlm.convert.files import open_tensors, read_json
from jaxlm.convert.foreign import check_layers
from jaxlm.convert.shards import write_shards
from jaxlm.convert.tensors import to_array, to_tensor
from jaxlm.convert.torchref import TIED_HEAD, from_torchref, to_torchref
from jaxlm.errors import UserError
from jaxlm.finite import check_finite_params
from jaxlm.types import Params


def save_torchref(cfg: ModelConfig, params: Params, path: str | os.PathLike[str]) -> None:
    """Writes a new or empty folder with which `torchref.build_model(cfg)` is the same function. Needs torch.

    config.json holds {"torchref": the fields of cfg}; model.safetensors the state dict, a tied head only once.

    Raises:
      UserError: parameters that do not fit the config, a folder that is not empty or cannot be written.
      CheckError: a parameter holds NaN or infinity.
    """
    check_finite_params(params, "the model cannot be written")
    arrays = {name: to_array(tensor) for name, tensor in to_torchref(cfg, params).items()}
    if cfg.tie_embeddings:
        arrays.pop(TIED_HEAD, None)
    shapes = {name: (array.shape, str(array.dtype)) for name, array in arrays.items()}
    with new_folder(Path(path)) as aside:
        content = json.dumps({"torchref": to_dict(cfg)}, indent=2) + "\n"
        (aside / "config.json").write_text(content, encoding="utf-8")
        write_shards(aside, shapes, arrays.items(), sum(array.nbytes for array in arrays.values()))


def load_torchref(path: str | os.PathLike[str]) -> tuple[ModelConfig, Params]:
    """Reads what `save_torchref` wrote. Needs torch.

    Raises:
      UserError: a file is missing or damaged, or the tensors do not fit the config.
      CheckError: a tensor holds NaN or infinity.
    """
    folder = Path(path)
    fields = read_json(folder / "config.json").get("torchref")
    if not isinstance(fields, dict):
        raise UserError(f"{folder / 'config.json'} has no torchref: give a folder that convert --to torchref wrote")
    cfg, files = from_dict(ModelConfig, fields), open_tensors(folder)
    check_layers(cfg.num_layers, len(files.names), str(folder))
    state = {}
    for name in files.names:
        array = files.read(name)
        check_finite_params({name: array}, files.where)
        state[name] = to_tensor(array)
    if cfg.tie_embeddings and "embedding.weight" in state:
        state[TIED_HEAD] = state["embedding.weight"]
    return cfg, from_torchref(cfg, state)
