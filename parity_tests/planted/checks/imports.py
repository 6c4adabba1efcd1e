"""A model that jaxlm imports, layer by layer against transformers' own module, in float64.

What enters and leaves every module that has a counterpart is compared. Where they differ, settings and weights are
changed in jaxlm's import: a change with which it gives transformers' values names the bug.
"""

import dataclasses
import functools
import itertools
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import family_models
import huggingface
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.torch  # noqa: F401, before huggingface.in_float64 changes the types it lists
import torch
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxlm.config import ModelConfig
from jaxlm.convert import from_hf
from jaxlm.convert.families import by_model_type
from jaxlm.convert.tensors import to_array, to_tensor
from jaxlm.model.build import build_model
from jaxlm.parity import Report, check_import
from jaxlm.parity.capture import Event, hooked, traced
from jaxlm.parity.measure import Results, Row, measure
from jaxlm.parity.networks import Values, computing
from jaxlm.parity.report import first_divergence

HINTS = (
    "a weight transposed, or split in another order",
    "a field of config.json that was not read, or read as another",
)
Change = tuple[str, dict[str, Any], dict[str, np.ndarray]]
"""Words, fields of the config, and leaves by path."""


def check_imports(case: str) -> Report:
    """Imports a model of `family_models` and compares it with its source."""
    module = _module(case)
    with computing("float64"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg, params = from_hf(module)
        leaves = {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
        tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, min(19, cfg.max_seq_len)))
        expected = _in_torch(case, module, tokens)
        found = _in_jax(cfg, leaves, tokens)
        events = [(event, _row(event, value, expected)) for event, value in found.items() if event in expected]
        rows: list[Row] = [row for event, row in events if event.side == "out"]
        first = first_divergence("activation", events, ("DIFFERS",))
        if first is None:
            return Report(tuple(rows))
        event, row, divergence = first
        every = itertools.chain(_seen(leaves, event), _tried(cfg, leaves, module, tokens, event, expected))
        causes = (*itertools.islice(every, 1), *HINTS)
    return Report((*rows, row), dataclasses.replace(divergence, causes=causes))


@functools.cache
def _module(case: str) -> torch.nn.Module:
    return family_models.model(case)


@functools.cache
def _names(case: str) -> dict[str, str]:
    """transformers' module for each of jaxlm's; first asked for while the code is sound."""
    module = _module(case)
    with computing("float64"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return by_model_type(module.config.model_type).modules(from_hf(module)[0])


def _in_torch(case: str, module: torch.nn.Module, tokens: np.ndarray) -> Values:
    names = _names(case)
    with huggingface.in_float64(), torch.no_grad(), hooked(module) as values:
        logits = module(to_tensor(tokens).long()).logits
    found: Values = {}
    for ours, their in names.items():
        # What enters an attention module first may be its mask.
        for side in ("out",) if ours.endswith("attention") or not ours else ("in", "out"):
            if (value := values.get(Event(their, side))) is not None:
                found[Event(ours, side)] = value
    return found | {Event("", "out"): to_array(logits)}


def _in_jax(cfg: ModelConfig, leaves: dict[str, np.ndarray], tokens: np.ndarray) -> Values:
    params, model = unflatten_dict(leaves, sep="/"), build_model(cfg)
    return jax.jit(traced(lambda params: model.apply({"params": params}, tokens)[0]))(params)[1].by_event()


def _row(event: Event, in_jax: np.ndarray, expected: Values) -> Row:
    theirs = expected[event]
    if theirs.shape[1:3] == in_jax.shape[1:3][::-1] != in_jax.shape[1:3]:
        theirs = theirs.swapaxes(1, 2)  # heads before tokens
    if theirs.size == in_jax.size:
        theirs = theirs.reshape(in_jax.shape)
    return measure("activation", str(event), [Results(in_jax, theirs)], "float64")


def _tried(
    cfg: ModelConfig,
    leaves: dict[str, np.ndarray],
    module: torch.nn.Module,
    tokens: np.ndarray,
    event: Event,
    expected: Values,
) -> Iterator[str]:
    at = Event(event.layer.removesuffix("/out"), "out") if event.layer.endswith("attention/out") else event
    for words, fields, changed in (*_settings(cfg, module.config, event), *_weights(cfg, leaves, event)):
        try:
            other = dataclasses.replace(cfg, **fields)
        except ValueError:  # such a model there is not
            continue
        values = _in_jax(other, {**leaves, **changed}, tokens)
        if at in values and at in expected and _row(at, values[at], expected).passed:
            yield f"{words} (tried: jaxlm then gives transformers' values)"


def _seen(leaves: dict[str, np.ndarray], event: Event) -> Iterator[str]:
    """What the imported weights themselves show."""
    if all(np.array_equal(leaf, leaf.astype(jnp.bfloat16).astype(leaf.dtype)) for leaf in leaves.values()):
        yield "weights rounded to bfloat16 (tried: every one is such a number)"
    own = {path for path in leaves if path.startswith(f"{event.layer}/")}
    for path, (other, leaf) in itertools.product(own, leaves.items()):
        for words, value in (("", leaf), (" transposed", leaf.T)):
            if path != other and np.array_equal(leaves[path], value):
                yield f"{path} is {other}{words} (tried: they are equal)"


def _settings(cfg: ModelConfig, theirs: Any, event: Event) -> Iterator[Change]:
    """Other settings that may explain a difference in what enters or leaves a layer."""
    layer, part = event.layer, event.layer.rpartition("/")[2]
    root = float(np.sqrt(cfg.embed_dim))
    values: dict[str, tuple[Any, ...]] = {}
    if "norm" in part and event.side == "out":
        values = {"norm_unit_offset": (True, False), "norm_eps": (1e-6, 1e-5)}
    elif layer == "block_0" and event.side == "in":
        values = {"embedding_scale": (root, 1.0, getattr(theirs, "embedding_multiplier", 1.0))}
    elif "attention" in layer and event.side in ("in", "out") and "norm" not in part:
        scalar, length = (
            getattr(theirs, "query_pre_attn_scalar", None),
            getattr(theirs, "max_position_embeddings", None),
        )
        windows, sliding = cfg.layer_windows, getattr(theirs, "sliding_window", None)
        thetas = tuple(one.rope_theta for one in cfg.layer_settings)
        other = list(dict.fromkeys(thetas))[::-1]
        swapped = dict(zip(dict.fromkeys(thetas), other, strict=True))
        rope = getattr(theirs, "rope_parameters", None) or {}
        values = {
            "attention_scale": (None, 1.0, scalar and scalar**-0.5),
            "attention_softcap": (None, getattr(theirs, "attn_logit_softcapping", None)),
            "window": (None, sliding, tuple(None if window else sliding for window in windows)),
            "rope_theta": (tuple(swapped[theta] for theta in thetas),),
            "rotary_dim": (None, 2 * round(cfg.resolved.head_dim * rope.get("partial_rotary_factor", 1.0) / 2)),
            "rope_original_len": (rope.get("original_max_position_embeddings"), length),
            "rope_attention_factor": (None,),
            "rope_factor": (rope.get("factor", 1.0),),
        }
        if cfg.rope_scaling == "none" and rope.get("rope_type") in ("linear", "llama3", "yarn"):
            ramp = (rope["low_freq_factor"], rope["high_freq_factor"]) if rope["rope_type"] == "llama3" else None
            yield (
                f"rope_scaling = {rope['rope_type']!r}",
                {
                    "rope_scaling": rope["rope_type"],
                    "rope_factor": rope["factor"],
                    "rope_original_len": rope.get("original_max_position_embeddings"),
                    "rope_ramp": ramp,
                },
                {},
            )
    elif "mlp" in layer and "norm" not in part:
        values = {"activation": ("gelu", "gelu_tanh", "relu", "silu", "swiglu", "geglu", "geglu_tanh")}
    elif layer in ("", "head"):
        scaling = getattr(theirs, "logits_scaling", 1.0)
        values = {
            "final_softcap": (None, getattr(theirs, "final_logit_softcapping", None)),
            "logit_divisor": (scaling, 1 / scaling, 1.0),
        }
    else:
        values = {
            "residual_scale": (getattr(theirs, "residual_multiplier", 1.0),),
            "block_layout": ("sequential", "parallel", "parallel_one_norm"),
            "norm_order": ("pre", "post", "reordered", "sandwich"),
        }
    for name, options in values.items():
        for value in dict.fromkeys(options):
            if value != getattr(cfg, name):
                yield f"{name} = {value!r} instead of {getattr(cfg, name)!r}", {name: value}, {}


def _weights(cfg: ModelConfig, leaves: dict[str, np.ndarray], event: Event) -> Iterator[Change]:
    """Other weights that may explain it."""
    layer = event.layer.removesuffix("/out") if event.side == "in" else event.layer
    kernel = leaves.get(f"{layer}/kernel")
    if kernel is not None and kernel.shape == kernel.T.shape:
        yield "kernel transposed", {}, {f"{layer}/kernel": kernel.T}
    attention = layer.removesuffix("/out")
    if attention.endswith("attention"):
        names = [f"{attention}/{part}" for part in ("query", "key", "value")]
        yield from _exchanged(leaves, names[0], names[1], "query and key exchanged")
        yield from _exchanged(leaves, names[1], names[2], "key and value exchanged")
        if len({leaves[f"{name}/kernel"].shape for name in names}) == 1:
            by_heads = {}
            for leaf in ("kernel", "bias"):
                if f"{names[0]}/{leaf}" in leaves:
                    whole = np.concatenate([leaves[f"{name}/{leaf}"] for name in names], axis=-1)
                    heads = whole.reshape(*whole.shape[:-1], cfg.num_heads, 3, -1)
                    shape = leaves[f"{names[0]}/{leaf}"].shape
                    by_heads |= {f"{name}/{leaf}": heads[..., i, :].reshape(shape) for i, name in enumerate(names)}
            yield "queries, keys and values fused head by head", {}, by_heads
    mlp = layer.removesuffix("/down")
    if mlp.endswith("mlp"):
        yield from _exchanged(leaves, f"{mlp}/gate", f"{mlp}/up", "gate and up exchanged")
    if "norm" in layer:
        for path in leaves:
            module = path.rpartition("/")[0]
            if "norm" in module and module != layer and leaves[path].shape == leaves[f"{layer}/scale"].shape:
                block = layer.partition("/")[0]
                if module.partition("/")[0] != block and module.endswith(layer.partition("/")[2]):
                    moved = {
                        p: leaves[p.replace(block, module.partition("/")[0], 1)] for p in leaves if p.startswith(block)
                    }
                    yield f"layers in another order: {block} is {module.partition('/')[0]}", {}, moved
                yield f"norms exchanged: {layer} has the scale of {module}", {}, {f"{layer}/scale": leaves[path]}


def _exchanged(leaves: dict[str, np.ndarray], one: str, other: str, words: str) -> Iterator[Change]:
    pairs = [(path, path.replace(one, other, 1)) for path in leaves if path.startswith(f"{one}/")]
    if pairs and all(b in leaves and leaves[a].shape == leaves[b].shape for a, b in pairs):
        yield words, {}, {**{a: leaves[b] for a, b in pairs}, **{b: leaves[a] for a, b in pairs}}


class Verdict(NamedTuple):
    """What a tool returns, see README.md."""

    passed: bool
    layer: str
    causes: tuple[str, ...]


def check_folder(case: str) -> Verdict:
    """The same by `jaxlm.parity.check_import`, as `jaxlm parity --reference hf` runs it: for `--tool imports=`."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        family_models.model(case, dtype=torch.float32).save_pretrained(folder)
        report = check_import(folder, draws=1, parts=())
    first = report.first
    return Verdict(report.passed, first.layer if first else "", first.causes if first else ())
