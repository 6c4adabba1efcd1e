"""A model from elsewhere as a run folder, which every command on runs opens."""

import json
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from jaxlm import convert
from jaxlm.config import ExperimentConfig
from jaxlm.data.tokenizer import IdTokenizer, Tokenizer, from_dict, from_hugging_face
from jaxlm.errors import UserError
from jaxlm.run import checkpoint
from jaxlm.run.folder import Run, load_run, new_folder
from jaxlm.run.training import fit_prompt
from jaxlm.training.step import TrainState

Format = Literal["hf", "nanogpt"]
FORMATS: dict[Format, str] = {"hf": "Hugging Face", "nanogpt": "nanoGPT"}
IDS = "ids"
"""In place of a tokenizer's file: text is bare ids."""


def import_run(kind: Format, source: Path, out: Path, tokenizer: Path | None = None) -> Run:
    """Writes a foreign model as the run folder `out`: preset "imported", no data, one checkpoint at step 0.

    Args:
      source: what `convert.from_hf` or `convert.from_nanogpt` reads.
      tokenizer: Hugging Face's or jaxlm's tokenizer.json, or "ids"; None = that of the source's folder, else ids.

    Raises:
      UserError: an `out` that holds something, a model that cannot be converted, a tokenizer that is unfit.
    """
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UserError(f"{out} already holds something: choose another DST")
    cfg, params = (convert.from_hf if kind == "hf" else convert.from_nanogpt)(source)
    made = _tokenizer(source, tokenizer, cfg.vocab_size)
    config = fit_prompt(ExperimentConfig(preset="imported", model=cfg), made)
    with new_folder(out, config, made, None, source={"format": FORMATS[kind], "name": source.resolve().name}) as aside:
        state = TrainState(params, (), jax.numpy.int32(0))
        checkpoint.save(aside / "checkpoints", state, None, keep=1)
    return load_run(out)


def _tokenizer(source: Path, chosen: Path | None, rows: int) -> Tokenizer:
    """The tokenizer that was asked for, or lies beside the model; it may have fewer entries than the model rows."""
    beside = source / "tokenizer.json" if source.is_dir() else source.parent / "tokenizer.json"
    file = chosen or (beside if beside.is_file() else None)
    if file is None or str(chosen) == IDS:
        return IdTokenizer(rows)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        made = from_dict(found) if "type" in found else from_hugging_face(found)
        made.decode(np.arange(min(made.vocab_size, 1)))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise UserError(
            f"{file} holds no tokenizer that jaxlm reads ({error}): give another --tokenizer, or --tokenizer {IDS}"
        ) from None
    if made.vocab_size > rows:
        raise UserError(
            f"{file} has ids up to {made.vocab_size - 1}, the model up to {rows - 1}: give the model's own tokenizer, "
            f"or --tokenizer {IDS}"
        )
    return made
