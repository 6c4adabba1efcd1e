"""Writes a model of another format as a run folder, which every command on runs can open."""

import json
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from jaxlm import convert
from jaxlm.config import ExperimentConfig
from jaxlm.data.hugging_face import from_hugging_face
from jaxlm.data.tokenizer import IdTokenizer, Tokenizer, from_dict
from jaxlm.errors import UserError
from jaxlm.run import checkpoint
from jaxlm.run.folder import Run, load_run, new_folder
from jaxlm.run.training import fit_prompt
from jaxlm.training.step import TrainState

Format = Literal["hf", "nanogpt"]
FORMATS: dict[Format, str] = {"hf": "Hugging Face", "nanogpt": "nanoGPT"}
IDS = "ids"
"""Given instead of a tokenizer's file: texts are token ids."""


def import_run(kind: Format, source: Path, out: Path, tokenizer: Path | None = None) -> Run:
    """Writes a model of another format as the run folder `out`: preset "imported", no data, a checkpoint at step 0.

    Args:
      source: what `convert.from_hf` or `convert.from_nanogpt` reads.
      tokenizer: a tokenizer.json of Hugging Face or jaxlm, or "ids"; None = the one in the source's folder, else ids.

    Raises:
      UserError: `out` is not an empty or new folder, the model cannot be converted, or the tokenizer does not fit.
    """
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UserError(f"{out} already holds something: choose another DST")
    cfg, params = (convert.from_hf if kind == "hf" else convert.from_nanogpt)(source)
    text_tokenizer = _tokenizer(source, tokenizer, cfg.vocab_size)
    config = fit_prompt(ExperimentConfig(preset="imported", model=cfg), text_tokenizer)
    with new_folder(
        out, config, text_tokenizer, None, source={"format": FORMATS[kind], "name": source.resolve().name}
    ) as aside:
        state = TrainState(params, (), jax.numpy.int32(0))
        checkpoint.save(aside / "checkpoints", state, None, keep=1)
    return load_run(out)


def _tokenizer(source: Path, chosen: Path | None, rows: int) -> Tokenizer:
    """The chosen tokenizer, or else the one beside the model. It may have fewer entries than the model rows."""
    beside = source / "tokenizer.json" if source.is_dir() else source.parent / "tokenizer.json"
    file = chosen or (beside if beside.is_file() else None)
    if file is None or str(chosen) == IDS:
        return IdTokenizer(rows)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        tokenizer = from_dict(content) if "type" in content else from_hugging_face(content)
        tokenizer.decode(
            np.arange(min(tokenizer.vocab_size, 1))
        )  # what cannot decode fails here, not at the first text
    except Exception as error:  # the tokenizers library raises plain Exception
        raise UserError(
            f"{file} is not a tokenizer that jaxlm can read ({error}): give another --tokenizer, or --tokenizer {IDS}"
        ) from None
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"{file} has ids up to {tokenizer.vocab_size - 1}, the model up to {rows - 1}: "
            f"give the model's own tokenizer, or --tokenizer {IDS}"
        )
    return tokenizer
