"""Weights that go on in a longer, shorter or scanned model: every number against NumPy, logits against torchref."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import flatten_dict

import torchref
from jaxlm.config import ModelConfig, presets
from jaxlm.convert import to_torchref
from jaxlm.convert.tensors import to_array, to_tensor
from jaxlm.data.tokenizer import CharTokenizer
from jaxlm.model.build import build_model
from jaxlm.model.layer_stack import stack_params
from jaxlm.parity import Report, random_params
from jaxlm.parity.measure import Results, Row, measure
from jaxlm.parity.networks import computing
from jaxlm.parity.report import Divergence
from jaxlm.run.folder import Run
from jaxlm.run.init_from import fitting_params

TABLE = "position_embedding"
HINTS = (
    "new places of a position table: zeros, behind the old ones",
    "a shorter table keeps the first places",
    "layers stacked in another order: entry k of block_j is layer k * period + j",
    "numbers that pass through another type",
)
SILENT = "a field that changes the function taken as one that does not (tried: no warning names it)"


def check_extension(cfg: ModelConfig, changes: tuple[tuple[str, Any], ...]) -> Report:
    """Goes on from a model with some fields changed."""
    new = dataclasses.replace(cfg, **dict(changes))
    with computing("float64"):
        plain = dataclasses.replace(cfg, scan_layers=False)
        unstacked = random_params(plain)
        leaves = {path: np.asarray(leaf) for path, leaf in flatten_dict(unstacked, sep="/").items()}
        source = stack_params(cfg, unstacked) if cfg.scan_layers else unstacked
        if cfg.scan_layers:  # as documented, not as the code does it
            source = _nested(_stacked(cfg, leaves))
        params, said = _fitted(cfg, new, source)
        wanted_plain = _resized(leaves, new)
        wanted = _stacked(new, wanted_plain) if new.scan_layers else wanted_plain
        rows: list[Row] = []
        for path in sorted(wanted):
            row = measure("parameter", path, [Results(params[path], wanted[path])], "float64")
            rows.append(row)
            if not np.array_equal(params[path], wanted[path]):
                layer = path.rpartition("/")[0] or "embedding"
                where = f"{path} is not what the source has"
                return Report(
                    (dataclasses.replace(row, verdict="DIFFERS"), *rows),
                    Divergence(
                        "parameter", layer, True, where, (*_tried(params[path], wanted[path], leaves, path), *HINTS)
                    ),
                )
        silent = [name for name, _ in changes if name in ("rope_theta", "norm_eps", "activation") and name not in said]
        if silent:
            where = f"{silent[0]} changes without a word"
            return Report(tuple(rows), Divergence("warning", silent[0], True, where, (SILENT,)))
        rows.append(_logits(new, params, wanted_plain))
    first = None if rows[-1].passed else Divergence("logits", "model", True, "logits differ", HINTS)
    return Report(tuple(rows), first)


def _fitted(cfg: ModelConfig, new: ModelConfig, source: Any) -> tuple[dict[str, np.ndarray], str]:
    """What `--init-from` makes of the weights, and what it warns of."""
    config = dataclasses.replace(presets.preset("tiny"), model=cfg)
    run = Run(Path("source"), config, build_model(cfg), source, CharTokenizer("abcdefghijklm"), 0, None)
    extend = cfg.has_position_table and new.max_seq_len > cfg.max_seq_len
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        params = fitting_params(run, new, extend)
    found = {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    return found, " ".join(str(warning.message) for warning in caught)


def _resized(leaves: dict[str, np.ndarray], new: ModelConfig) -> dict[str, np.ndarray]:
    if TABLE not in leaves:
        return leaves
    table = leaves[TABLE][: new.max_seq_len]
    return {**leaves, TABLE: np.pad(table, ((0, new.max_seq_len - len(table)), (0, 0)))}


def _stacked(cfg: ModelConfig, leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The leaves of the scanned model: entry k of layers/block_j is block_{k * period + j}."""
    period = len(cfg.window_period)
    found = {path: leaf for path, leaf in leaves.items() if not path.startswith("block_")}
    for path in leaves:
        block, _, rest = path.partition("/")
        if block.startswith("block_") and (j := int(block[6:])) < period:
            layers = range(j, cfg.num_layers, period)
            found[f"layers/block_{j}/{rest}"] = np.stack([leaves[f"block_{i}/{rest}"] for i in layers])
    return found


def _nested(leaves: dict[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jnp.asarray(leaf)
    return tree


def _tried(found: np.ndarray, wanted: np.ndarray, leaves: dict[str, np.ndarray], path: str) -> list[str]:
    """Wrong ways that give the numbers found."""
    traps: dict[str, Any] = {"rounded to bfloat16": _rounded(wanted, torch.bfloat16)}
    traps["rounded to float32"] = _rounded(wanted, torch.float32)
    if path == TABLE:
        old = leaves[TABLE]
        new = len(wanted) - len(old)
        traps["a shorter table keeps the last places"] = old[-len(wanted) :]
        if new > 0:
            zeros = np.zeros((new, old.shape[1]))
            stretched = torch.nn.functional.interpolate(
                to_tensor(old.T[None]), len(wanted), mode="linear", align_corners=True
            )
            traps |= {
                "new places in front of the old ones": np.concatenate([zeros, old]),
                "new places that repeat the last one": np.concatenate([old, np.repeat(old[-1:], new, axis=0)]),
                "new places that repeat the table": np.resize(old, wanted.shape),
                "the table stretched over the new places": to_array(stretched)[0].T,
            }
    elif path.startswith("layers/"):
        block, _, rest = path.removeprefix("layers/").partition("/")
        every = [leaves[f"block_{i}/{rest}"] for i in range(sum(p.endswith(f"/{rest}") for p in leaves))]
        j = int(block[6:])
        traps["layers stacked in reverse"] = wanted[::-1]
        traps["layers stacked in runs, not in turn"] = np.stack(every[j * len(wanted) : (j + 1) * len(wanted)])
    elif path.startswith("block_"):
        block, _, rest = path.partition("/")
        same = [name for name, leaf in leaves.items() if name.endswith(f"/{rest}") and leaf.shape == found.shape]
        traps |= {f"layers in another order: {name.partition('/')[0]} for {block}": leaves[name] for name in same}
    same = [(words, trap) for words, trap in traps.items() if trap.shape == found.shape]
    return [f"{words} (tried)" for words, trap in same if np.allclose(found, trap, rtol=1e-12, atol=1e-14)]


def _rounded(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return to_array(to_tensor(x).to(dtype).double())


def _logits(new: ModelConfig, params: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> Row:
    """The logits of the new model as it is used, and those of torchref with the weights that it should have."""
    plain = dataclasses.replace(new, scan_layers=False)
    network = torchref.build_model(plain).eval()
    network.load_state_dict(to_torchref(plain, _nested(wanted)))
    tokens = np.random.default_rng(0).integers(0, new.vocab_size, (2, new.max_seq_len))
    with torch.no_grad():
        expected = to_array(network(to_tensor(tokens)))
    found = build_model(new).apply({"params": _nested(params)}, jnp.asarray(tokens))[0]
    return measure("logits", "", [Results(np.asarray(found), expected)], "float64")
