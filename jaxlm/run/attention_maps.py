"""The attention weights of a model, as arrays and as a picture."""

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxlm.data.tokenizer import prompt_ids
from jaxlm.errors import CheckError, UserError
from jaxlm.finite import first_not_finite
from jaxlm.model.build import build_model
from jaxlm.model.layer_stack import unstack_params
from jaxlm.model.layers import LanguageModel
from jaxlm.ops.partition import mesh_shape
from jaxlm.run import plots
from jaxlm.run.folder import Run
from jaxlm.sharding.mesh import find_devices
from jaxlm.types import Params, Tokens


def attention_maps(model: LanguageModel, params: Params, tokens: Tokens) -> list[Float[np.ndarray, "B maps T T"]]:
    """Each layer's attention weights, [b, map, query, key]; a query's row sums to 1.

    A layer has N maps, or K with kv_sharing "summed_scores". They are computed over the whole T x T mask, whichever
    implementation the config names.

    Raises:
      UserError: a family without attention, more tokens than a learned position table has, a mesh in context, or no
        device.
      CheckError: weights that are not finite, as with a parameter that is not.
    """
    find_devices()
    cfg = model.cfg
    if cfg.family != "transformer":
        raise UserError(f"family = {cfg.family!r} has no attention maps: give a transformer")
    if mesh_shape():
        raise UserError("attention maps are computed on one device: leave `jaxlm.use_mesh` out")
    plain = dataclasses.replace(cfg, attention_impl="reference", scan_layers=False, remat=False)
    if cfg.scan_layers:  # intermediates do not leave a scan
        params = unstack_params(cfg, params)
    _, state = build_model(plain).apply({"params": params}, tokens, mutable=["intermediates"])
    blocks = (state["intermediates"][f"block_{i}"] for i in range(cfg.num_layers))
    maps = [np.asarray(block["attention"]["attention_weights"][0]) for block in blocks]
    for layer, weights in enumerate(maps):
        if not np.isfinite(weights).all():
            found = first_not_finite(params) or "every parameter is finite, so a sum overflowed"
            raise CheckError(f"the attention weights of layer {layer} are not finite: {found}")
    return [weights.reshape(weights.shape[0], -1, *weights.shape[3:]) for weights in maps]


def draw_attention(run: Run, text: str, path: Path) -> list[Float[np.ndarray, "maps T T"]]:
    """Writes the picture of each layer's attention weights over a text, and returns them.

    Raises:
      UserError: the text is empty, outside the vocabulary or too long; the model has no attention; the file cannot be
        written.
    """
    ids = prompt_ids(text, run.tokenizer, "text")
    maps = [layer[0] for layer in attention_maps(run.model, run.params, ids[None])]
    labels = [run.tokenizer.decode([token]).replace("\n", "\\n").replace(" ", "␣") for token in ids.tolist()]
    if path.suffix == "" or path.is_dir():  # matplotlib would write another file
        raise UserError(f"{path} cannot be written: give --out a file with a suffix, such as .png")
    try:
        plots.plot_attention_maps(maps, labels, path, f"{run.path.name}, step {run.step}")
    except (OSError, ValueError) as error:  # matplotlib refuses an unknown suffix by ValueError
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be written ({reason}): give another --out") from None
    return maps
