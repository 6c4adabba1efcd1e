"""Writes a model as a folder of Hugging Face."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jaxlm.config import ModelConfig
from jaxlm.convert.families import FAMILIES
from jaxlm.convert.families.family import shapes
from jaxlm.convert.families.holding import Held, holding
from jaxlm.convert.shards import SHARD_SIZE, parse_size, write_shards
from jaxlm.data.files import staged
from jaxlm.data.hugging_face import hugging_face_files
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import UserError
from jaxlm.finite import check_finite_params
from jaxlm.model.layer_stack import unstack_params
from jaxlm.types import Params


def to_hf(
    cfg: ModelConfig,
    params: Params,
    path: str | os.PathLike[str],
    tokenizer: Tokenizer | None = None,
    *,
    stop_tokens: Sequence[int] = (),
    shard_size: str = SHARD_SIZE,
    card: str | None = None,
) -> str:
    """Writes a model as a folder that transformers' `from_pretrained` loads as the same function.

    The folder gets config.json, generation_config.json, the weights as safetensors and, with a tokenizer, its files.
    The model goes out as the first family that can hold it: a family that has biases where the model has none gets
    zeros, and interleaved RoPE is permuted to the halves that transformers rotates. Tensors are written one by one.

    Args:
      path: a new or empty folder.
      stop_tokens: ids at which transformers' `generate` ends.
      shard_size: weights above it are cut into shards, such as "5GB" or "200MB".
      card: the text of README.md; None = none.

    Returns: the family's model_type.

    Raises:
      UserError: no family holds the model (the message names the fields), parameters that do not fit the config, a
        folder that is not empty or cannot be written.
    """
    folder, size = Path(path), parse_size(shard_size)
    check_new(folder)
    held = holding(cfg, list(FAMILIES.values()))
    written = torch_tensors(held, cfg, params)
    files: dict[str, Any] = {"config.json": held.config}
    end = None if not stop_tokens else stop_tokens[0] if len(stop_tokens) == 1 else [*stop_tokens]
    ends = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": None}  # or transformers has numbers of its own
    files["config.json"] |= ends
    files["generation_config.json"] = {"_from_model_config": True, **ends}
    if tokenizer is not None:
        files |= hugging_face_files(tokenizer, stop_tokens, cfg.max_seq_len)
    with new_folder(folder) as aside:
        for name, content in files.items():
            (aside / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if card is not None:
            (aside / "README.md").write_text(card, encoding="utf-8")
        write_shards(aside, written.shapes, written.arrays(), size)
    return held.family.model_type


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder aside that becomes `folder` when all is written, and vanishes on an error.

    Raises:
      UserError: `folder` holds something, or cannot be written.
    """
    check_new(folder)
    with staged(folder, "choose another folder") as aside:
        aside.mkdir(parents=True)
        yield aside


def check_new(folder: Path) -> None:
    """Refuses a folder that holds something, so that nothing is overwritten.

    Raises:
      UserError: it does.
    """
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise UserError(f"{folder} already holds something: choose another folder")


class TorchTensors:
    """A model's tensors under a family's names, made one at a time."""

    def __init__(self, held: Held, cfg: ModelConfig, leaves: Mapping[str, Any]) -> None:
        self._leaves, self._cfg = leaves, cfg
        self._entries, self._shapes = held.family.entries(held.cfg), shapes(held.cfg)
        self._dtype = np.dtype(jax.numpy.dtype(cfg.param_dtype))

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of each tensor."""
        made = {e.name: e.layout.shape([self._shapes[path] for path in e.paths]) for e in self._entries}
        return {name: (shape, self._cfg.param_dtype) for name, shape in made.items()}

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name and values of each tensor."""
        for entry in self._entries:
            yield entry.name, entry.layout.join([self._leaf(path) for path in entry.paths])

    def _leaf(self, path: str) -> np.ndarray:
        if path not in self._leaves:  # a bias that only the family has
            return np.zeros(self._shapes[path], self._dtype)
        leaf = np.asarray(self._leaves[path])
        pairs = self._cfg.position == "rope" and self._cfg.rope_layout == "interleaved"
        rotated = any(f"/{name}/" in path for name in ("query", "key", "query_norm", "key_norm"))
        return in_halves(leaf, self._cfg) if pairs and rotated else leaf


def torch_tensors(held: Held, cfg: ModelConfig, params: Params) -> TorchTensors:
    """The tensors of a model as a family names them.

    Raises:
      UserError: parameters that do not fit the config.
      CheckError: a parameter holds NaN or infinity.
    """
    leaves = flatten_dict(unstack_params(cfg, params) if cfg.scan_layers else params, sep="/")
    wanted = shapes(cfg)
    given = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    wrong = [path for path in sorted(given.keys() | wanted.keys()) if given.get(path) != wanted.get(path)]
    if wrong:
        raise UserError(
            f"the parameters do not fit the config: {wrong[0]} is {given.get(wrong[0])}, not {wanted.get(wrong[0])}"
        )
    check_finite_params(params, "the model cannot be written")
    return TorchTensors(held, cfg, leaves)


def in_halves(leaf: np.ndarray, cfg: ModelConfig) -> np.ndarray:
    """Moves features of queries or keys (the last axis, head by head) from RoPE's interleaved layout to halves."""
    width = cfg.resolved.head_dim
    rotated = cfg.rotary_dim or width
    order = np.concatenate([np.arange(0, rotated, 2), np.arange(1, rotated, 2), np.arange(rotated, width)])
    return leaf.reshape(*leaf.shape[:-1], -1, width)[..., order].reshape(leaf.shape)
