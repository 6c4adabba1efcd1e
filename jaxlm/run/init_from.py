"""Going on from another model: its weights and its vocabulary begin a new run, with a new optimizer at step 0."""

import dataclasses
import hashlib
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxlm.config import ExperimentConfig, ModelConfig, presets
from jaxlm.config.base import difference
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.corpus import Corpus, learn_tokenizer, load_corpus
from jaxlm.data.tokenizer import IdTokenizer, Tokenizer
from jaxlm.data.tokenizer_file import kind as kind_of
from jaxlm.errors import UserError
from jaxlm.model.build import build_model, init_params
from jaxlm.model.layer_stack import stack_params, unstack_params
from jaxlm.run.folder import Run, load_run, read_config
from jaxlm.run.foreign_model import is_hugging_face, read_model
from jaxlm.sharding.layout import to_host
from jaxlm.types import Params

POSITIONS = "position_embedding"
"""Path of the learned position table."""

FREE = {
    *("vocab_size", "max_seq_len", "window", "dropout", "attention_dropout", "embedding_dropout", "init"),
    *("dtype", "attention_impl", "scan_layers", "remat"),
}
"""Fields of ModelConfig that may change without a word; vocab_size and max_seq_len have checks of their own."""

SHOWN = 6
"""A refusal names at most so many parameters."""


def open_source(source: str | Path | Run) -> Run:
    """The model to go on from: a run in memory or its folder, or a Hugging Face folder.

    Raises:
      UserError: as `load_run` and `foreign_model.read_model`.
      CheckError: every checkpoint of the run is damaged.
    """
    if isinstance(source, Run):
        return source
    return read_model("hf", Path(source)) if is_hugging_face(Path(source)) else load_run(source)


def default_config(source: Path | Run, preset: str | None) -> ExperimentConfig:
    """What `jaxlm train [PRESET] --init-from SOURCE` changes: the settings of the preset, or else those of the source.

    The model's settings and the kind of tokenizer are the source's in any case.

    Args:
      source: the folder of a run, or a model that is open already.

    Raises:
      UserError: the folder is not a run, or the preset is unknown.
    """
    run = source.config if isinstance(source, Run) else read_config(source)
    base = run if preset is None else dataclasses.replace(presets.preset(preset), model=run.model)
    kind = kind_of(source.tokenizer if isinstance(source, Run) else tokenizers.load(source / "tokenizer.json"))
    data = dataclasses.replace(base.data, tokenizer=kind, bpe_vocab_size=run.data.bpe_vocab_size)
    return dataclasses.replace(base, data=data)


def with_source_settings(config: ExperimentConfig, source: Run) -> ExperimentConfig:
    """The config with the source's kind of tokenizer for "source", and its stop tokens unless others are given."""
    data, sample = config.data, config.sample
    if data.tokenizer == "source":
        data = dataclasses.replace(data, tokenizer=kind_of(source.tokenizer))
    if sample.stop_token is None:
        sample = dataclasses.replace(sample, stop_token=source.config.sample.stop_token)
    return dataclasses.replace(config, data=data, sample=sample)


def source_corpus(config: ExperimentConfig, source: Run) -> Corpus:
    """The data of a config as the source's tokenizer reads them.

    Raises:
      UserError: as `load_corpus`.
    """
    try:
        return load_corpus(config.data, config.model.max_seq_len, source.tokenizer)
    except UserError as error:
        if not isinstance(source.tokenizer, IdTokenizer):
            raise
        raise UserError(f"{error}; {source.path} has no tokenizer.json of its own, so its texts are ids") from None


def check_tokenizer(config: ExperimentConfig, source: Run) -> None:
    """Refuses data whose tokens would have other ids than those of the source.

    Raises:
      UserError: the message names the first id that differs.
    """
    data, kind = config.data, kind_of(source.tokenizer)
    if data.tokenizer != kind:
        raise UserError(
            f"data.tokenizer = {data.tokenizer!r} has another vocabulary than {source.path}: "
            f"{_first_difference(learn_tokenizer(data), source.tokenizer)}; give --data.tokenizer {kind}"
        )
    size = source.tokenizer.vocab_size
    usual = type(data)().bpe_vocab_size, source.config.data.bpe_vocab_size
    if kind == "bpe" and data.bpe_vocab_size not in (*usual, size):
        raise UserError(
            f"data.bpe_vocab_size = {data.bpe_vocab_size} is not that of {source.path}, whose {size} entries stay "
            f"(ids from {min(size, data.bpe_vocab_size)} on differ): leave it out"
        )


def fitting_params(source: Run, cfg: ModelConfig, extend_positions: bool) -> Params:
    """The weights of a run as the parameters of the model that `cfg` describes: the same numbers to the bit.

    Layers are stacked or unstacked as scan_layers asks. A learned position table is cropped to its first max_seq_len
    rows, or, if `extend_positions`, gets new rows of zeros: at zero the new places are told apart by nothing until
    they are trained. A warning names each other setting under which the same weights compute something else.

    Raises:
      UserError: parameters that are missing, surplus, or of another shape or type, by path; a table that is too short
        without `extend_positions`, or nothing to extend with it.
    """
    own = source.model.cfg
    weights = flatten_dict(unstack_params(own, source.params) if own.scan_layers else source.params, sep="/")
    # Unrolled: the paths are the same whatever scan_layers and window are.
    plain = dataclasses.replace(cfg, scan_layers=False)
    wanted = flatten_dict(jax.eval_shape(lambda: init_params(build_model(plain), jax.random.key(0))), sep="/")
    both_learned = own.has_position_table and cfg.has_position_table
    if extend_positions and not both_learned:
        where = "the new model" if own.has_position_table else source.path
        raise UserError(f"--model.extend-positions is for a learned position table, and {where} has none: leave it out")
    if both_learned and own.embed_dim == cfg.embed_dim:
        weights[POSITIONS] = _fitting_table(source.path, weights[POSITIONS], cfg.max_seq_len, extend_positions)
    _check_fit(source.path, weights, wanted)
    changed = [
        f"{name} = {ours!r} instead of {theirs!r}" for name, ours, theirs in difference(cfg, own) if name not in FREE
    ]
    if changed:
        warnings.warn(f"the weights of {source.path} are read with {', '.join(changed)}", stacklevel=5)
    params = unflatten_dict(weights, sep="/")
    return stack_params(cfg, params) if cfg.scan_layers else params


def source_entry(source: Run) -> dict[str, Any]:
    """What config.json says of the source, under "init_from": {"run": absolute path, "step", "sha256"}."""
    return {"run": str(source.path.absolute()), "step": source.step, "sha256": params_sha256(source.params)}


def params_sha256(params: Params) -> str:
    """sha256 (hex) of all parameters, whatever files hold them.

    It is taken over each parameter in the order of the paths: the line "path dtype shape" (block_0/mlp/up/kernel
    float32 [128, 512]), and then its numbers in C order.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(params, sep="/").items()):
        digest.update(f"{path} {leaf.dtype} {list(leaf.shape)}\n".encode())
        digest.update(to_host(leaf).tobytes())
    return digest.hexdigest()


def _first_difference(ours: Tokenizer, theirs: Tokenizer) -> str:
    def shown(tokenizer: Tokenizer, i: int) -> str:
        return repr(tokenizer.decode([i])) if i < tokenizer.vocab_size else "absent"

    ids = range(max(ours.vocab_size, theirs.vocab_size))
    first = next(i for i in ids if shown(ours, i) != shown(theirs, i))  # two kinds always differ
    return f"id {first} is {shown(ours, first)}, and {shown(theirs, first)} there"


def _fitting_table(path: Path, table: jax.Array, places: int, extend: bool) -> jax.Array:
    rows, width = table.shape
    if extend and places <= rows:
        raise UserError(
            f"--model.extend-positions has nothing to add: {path} has a learned position table of {rows} "
            f"places, and max_seq_len = {places}: leave it out, or give a longer --model.max-seq-len"
        )
    if places > rows and not extend:
        raise UserError(
            f"max_seq_len = {places} is beyond the learned position table of {path}, {rows} places: "
            "give --model.extend-positions (the new places begin at zero), or a --model.max-seq-len up to that"
        )
    if places <= rows:
        return table[:places]
    return jnp.concatenate([table, jnp.zeros((places - rows, width), table.dtype)])


def _check_fit(path: Path, weights: dict[str, Any], wanted: dict[str, Any]) -> None:
    def shown(leaf: Any) -> str:
        return "absent" if leaf is None else f"{list(leaf.shape)} {leaf.dtype}"

    pairs = {name: (shown(weights.get(name)), shown(wanted.get(name))) for name in weights.keys() | wanted.keys()}
    wrong = [
        f"{name} is {theirs} there, {ours} here" for name, (theirs, ours) in sorted(pairs.items()) if theirs != ours
    ]
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise UserError(
            f"the weights of {path} do not fit the model: {'; '.join(wrong[:SHOWN])}{more}: "
            "drop the --model options that need other parameters"
        )
