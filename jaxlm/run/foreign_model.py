"""A model of another format as a run in memory: its weights, its tokenizer, and the tokens that end its texts."""

import warnings
from pathlib import Path
from typing import Literal

import numpy as np

from jaxlm import convert
from jaxlm.config import ExperimentConfig, SampleConfig
from jaxlm.convert.hub import local_folder
from jaxlm.convert.stop_tokens import stop_tokens
from jaxlm.data.hugging_face import from_hugging_face
from jaxlm.data.reading import read_json
from jaxlm.data.tokenizer import IdTokenizer, Tokenizer, from_dict
from jaxlm.errors import UserError
from jaxlm.model.build import build_model
from jaxlm.run.folder import Run

Format = Literal["hf", "nanogpt", "meta", "llama2c", "torchref"]
Activation = Literal["gelu", "gelu_tanh"]
IDS = "ids"
"""Given instead of a tokenizer's file: texts are token ids."""


def is_hugging_face(path: Path) -> bool:
    """Whether a folder has the config.json of a Hugging Face model."""
    try:
        config = read_json(path / "config.json")
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config


def read_model(kind: Format, source: Path, tokenizer: Path | None = None, activation: Activation | None = None) -> Run:
    """Reads a model of another format: preset "imported", step 0, no data; its sample.stop_token is the model's own.

    Args:
      source: what `convert.from_hf` (also ORG/NAME on the Hub), `from_nanogpt`, `from_meta`, `from_llama2c` or
        `load_torchref` reads.
      tokenizer: a tokenizer.json of Hugging Face or jaxlm, or "ids"; None = the one in the source's folder, else ids.
      activation: that of a nanoGPT checkpoint, which does not say it; None = gelu.

    Raises:
      UserError: the model cannot be converted, or the tokenizer does not fit.

    Warns:
      UserWarning: a token that ends its texts is outside the vocabulary.
    """
    stops: tuple[int, ...] = ()
    if kind == "hf":
        source = local_folder(str(source))
        cfg, params = convert.from_hf(source)
        named = stop_tokens(source)
        stops = tuple(token for token in named if 0 <= token < cfg.vocab_size)
        if stops != named:
            warnings.warn(
                f"{source}: eos_token_id = {list(named)} names ids outside the vocabulary of {cfg.vocab_size}, which "
                "never end a text",
                stacklevel=3,
            )
    elif kind == "nanogpt":
        cfg, params = convert.from_nanogpt(source, activation or "gelu")
    else:
        readers = {"meta": convert.from_meta, "llama2c": convert.from_llama2c, "torchref": convert.load_torchref}
        cfg, params = readers[kind](source)
    stop = stops[0] if len(stops) == 1 else stops or None
    config = ExperimentConfig(preset="imported", model=cfg, sample=SampleConfig(stop_token=stop))
    text_tokenizer = _tokenizer(source, tokenizer, cfg.vocab_size)
    return Run(source, config, build_model(cfg), params, text_tokenizer, step=0, corpus_sha256=None)


def _tokenizer(source: Path, chosen: Path | None, rows: int) -> Tokenizer:
    """The chosen tokenizer, or else the one beside the model. It may have fewer entries than the model rows."""
    beside = source / "tokenizer.json" if source.is_dir() else source.parent / "tokenizer.json"
    file = chosen or (beside if beside.is_file() else None)
    if file is None or str(chosen) == IDS:
        return IdTokenizer(rows)
    try:
        content = read_json(file)
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
