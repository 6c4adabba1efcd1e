"""A model that jaxlm writes for transformers: what transformers loads against the module that it came from.

The source is imported first, so what is written should be the source again. Where a module differs, its tensors are
compared with the source's.
"""

import dataclasses
import functools
import itertools
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import huggingface
import numpy as np
import torch
import transformers

from jaxlm.config import ModelConfig
from jaxlm.convert import from_hf, to_hf
from jaxlm.convert.tensors import to_array
from jaxlm.parity import Report
from jaxlm.parity.capture import Event, hooked
from jaxlm.parity.measure import Results, Row, measure
from jaxlm.parity.networks import Values, computing
from jaxlm.parity.report import first_divergence
from planted.checks.imports import _module, _names

HINTS = ("a weight transposed, or joined in another order", "a layer or module under another name")


def check_exports(case: str) -> Report:
    """Writes a model of `family_models` and compares what transformers makes of it with the source."""
    source = _module(case)
    with tempfile.TemporaryDirectory() as folder, computing("float64"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg, params = _imported(case)
        to_hf(cfg, params, f"{folder}/out")
        with huggingface.in_float64():
            loaded = transformers.AutoModelForCausalLM.from_pretrained(
                f"{folder}/out", dtype=torch.float64, attn_implementation="eager"
            ).eval()
    tokens = torch.randint(cfg.vocab_size, (2, 19), generator=torch.Generator().manual_seed(0))
    expected, found = (_values(case, module, tokens) for module in (source, loaded))
    events = [(event, _row(event, found[event], value)) for event, value in expected.items()]
    rows: list[Row] = [row for event, row in events if event.side == "out"]
    first = first_divergence("activation", events, ("DIFFERS",))
    if first is None:
        return Report(tuple(rows))
    _, row, divergence = first
    causes = (*itertools.islice(_tensors(case, source, loaded, divergence.layer), 1), *HINTS)
    return Report((*rows, row), dataclasses.replace(divergence, causes=causes))


@functools.cache
def _imported(case: str) -> tuple[ModelConfig, Any]:
    """The source in jaxlm; first asked for while the code is sound."""
    return from_hf(_module(case))


def _values(case: str, module: torch.nn.Module, tokens: torch.Tensor) -> Values:
    """What enters and leaves the modules, under jaxlm's names and in the order of computation."""
    ours = {theirs: path for path, theirs in _names(case).items()}
    with huggingface.in_float64(), torch.no_grad(), hooked(module) as values:
        logits = module(tokens).logits
    found = {
        event._replace(layer=ours[event.layer]): value
        for event, value in values.items()
        if event.layer in ours and not (event.side == "in" and ours[event.layer].endswith("attention"))
    }
    return found | {Event("", "out"): to_array(logits)}


def _row(event: Event, found: np.ndarray, expected: np.ndarray) -> Row:
    return measure("activation", str(event), [Results(found, expected)], "float64")


def _tensors(case: str, source: torch.nn.Module, loaded: torch.nn.Module, layer: str) -> Iterator[str]:
    """How the tensors of a module differ from the source's."""
    prefix = "" if layer == "embedding" else _names(case).get(layer, layer)
    theirs, found = dict(source.state_dict()), loaded.state_dict()
    if all(torch.equal(tensor.bfloat16().to(tensor.dtype), tensor) for tensor in found.values()):
        yield "weights rounded to bfloat16 (tried: every one is such a number)"
    for name, tensor in found.items():
        wanted = theirs.get(name)
        if wanted is None or not name.startswith(prefix) or torch.equal(tensor, wanted):
            continue
        is_matrix = tensor.ndim == wanted.ndim == 2
        if is_matrix and tensor.shape == wanted.T.shape and torch.equal(tensor, wanted.T):
            yield f"{name} transposed (tried: it is the source's transpose)"
        for other, value in theirs.items():
            if value.shape == tensor.shape and torch.equal(value, tensor):
                yield f"{name} is the source's {other} (tried: they are equal)"
        if is_matrix and (_lines(tensor) == _lines(wanted) or _lines(tensor.T) == _lines(wanted.T)):
            yield f"{name} joined in another order (tried: its rows or columns are the source's)"


def _lines(tensor: torch.Tensor) -> list[tuple[float, ...]]:
    return sorted(map(tuple, tensor.tolist()))
