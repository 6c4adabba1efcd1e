"""The attention weights of a model, for looking at."""

import dataclasses

import numpy as np
from jaxtyping import Float

from jaxlm.errors import UserError
from jaxlm.model.build import build_model
from jaxlm.model.layer_stack import unstack_params
from jaxlm.model.layers import LanguageModel
from jaxlm.types import Params, Tokens


def attention_maps(model: LanguageModel, params: Params, tokens: Tokens) -> list[Float[np.ndarray, "B maps T T"]]:
    """Each layer's attention weights, [b, map, query, key]; a query's row sums to 1.

    There are N maps a layer, K with kv_sharing "summed_scores". Whatever the config's implementation, the masked one
    computes them.

    Raises:
      UserError: a family without attention, or more tokens than a learned position table has.
    """
    cfg = model.cfg
    if cfg.family != "transformer":
        raise UserError(f"family = {cfg.family!r} has no attention maps: give a transformer")
    plain = dataclasses.replace(cfg, attention_impl="reference", scan_layers=False, remat=False)
    if cfg.scan_layers:  # intermediates do not leave a scan
        params = unstack_params(cfg, params)
    _, state = build_model(plain).apply({"params": params}, tokens, mutable=["intermediates"])
    blocks = (state["intermediates"][f"block_{i}"] for i in range(cfg.num_layers))
    maps = [np.asarray(block["attention"]["attention_weights"][0]) for block in blocks]
    return [weights.reshape(weights.shape[0], -1, *weights.shape[3:]) for weights in maps]
