"""Classic bugs, and what the comparison with PyTorch must say about each. Run as a program it plants them all."""

import argparse
from typing import Any

import flax.linen as nn
import optax
from planting import Edit, Mutation, edit, missed, named, run

from jaxlm.convert.torchref import turned
from jaxlm.decode.prefill import start
from jaxlm.model import cache, transformer
from jaxlm.model.layer_stack import apply_layers, unstack_params
from jaxlm.model.layers import Dense, LanguageModel, Norm
from jaxlm.ops import attention, blocked_attention, loss, masks, wide_gradients
from jaxlm.ops.attention_scores import dot_scores, multiplicative_scores
from jaxlm.ops.matmul import _backward, matmul
from jaxlm.ops.positions import apply_rope, rope_angles, sinusoids
from jaxlm.optim import build_optimizer
from jaxlm.optim.adafactor import scale_by_factored_rms
from jaxlm.optim.adam import adamw, scale_by_moments
from jaxlm.optim.adamsn import _summed_axes
from jaxlm.optim.param_kinds import ParamKind
from jaxlm.optim.transforms import decay_parameters
from torchref import layers as torch_layers


def bug(name: str, layer: str, cause: str, *edits: Edit, **fields: Any) -> Mutation:
    """A bug that shows in the forward pass."""
    return Mutation(name, layer, cause, edits, fields)


def later(quantity: str, name: str, layer: str, cause: str, *edits: Edit, **fields: Any) -> Mutation:
    """A bug that the forward pass does not show."""
    return Mutation(name, layer, cause, edits, fields, quantity)


def of_optimizer(optimizer: str, name: str, layer: str, cause: str, *edits: Edit) -> Mutation:
    """A bug in the step of an optimizer."""
    return Mutation(name, layer, cause, edits, ROPE | BARE, "update", optimizer)


def coarse(quantity: str, name: str, layer: str, cause: str, *edits: Edit, **fields: Any) -> Mutation:
    """A formula that is right but computed too coarsely: float64 does not show it."""
    return Mutation(name, layer, cause, edits, fields, quantity, None, "rounding")


ROPE: dict[str, Any] = {"position": "rope"}
BARE: dict[str, Any] = {"norm": "rmsnorm", "use_bias": False}
GROUPED: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2}
GRU, LSTM = ({"family": "recurrent", "cell": cell, "num_heads": 4, "mlp_dim": None} for cell in ("gru", "lstm"))

ATTENTION, MLP = "block_0/attention", "block_0/mlp"

LAYERS = [
    bug(
        "tanh GELU for erf", MLP, "activation = 'gelu_tanh'!",
        edit(transformer._gelu, "0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))", "jax.nn.gelu(wide)"),
    ),
    bug(
        "norm eps 1e-6 for 1e-5", "block_0/attention_norm", "norm_eps = 1e-06!",
        edit(Norm.__call__, "cfg.norm_eps", "1e-6"),
    ),
    bug(
        "eps outside the root of a layer norm", "block_0/attention_norm", "eps outside the root",
        edit(nn.normalization._normalize, "lax.rsqrt(var + epsilon)", "1 / (jnp.sqrt(var) + epsilon)"),
    ),
    bug(
        "RMS norm that subtracts the mean", "block_0/attention_norm", "mean subtracted",
        edit(Norm.__call__, "nn.RMSNorm if", "functools.partial(nn.LayerNorm, use_bias=False) if"), **BARE,
    ),
    bug(
        "RoPE pairs of the other layout", ATTENTION, "rope_layout = 'interleaved'!",
        edit(apply_rope, 'layout == "half"', 'layout != "half"'), head_dim=4, **ROPE,
    ),
    bug(
        "RoPE theta ten times too large", ATTENTION, "rope_theta = 100000.0!",
        edit(rope_angles, "theta**-exponents", "(10 * theta) ** -exponents"), **ROPE,
    ),
    bug(
        "RoPE on the queries only", ATTENTION, "queries and keys",
        edit(transformer.Attention._project, "queries, keys = (apply_rope(a, angles, cfg.rope_layout) for a in "
             "(queries, keys))", "queries = apply_rope(queries, angles, cfg.rope_layout)"), **ROPE,
    ),
    bug(
        "learned positions one late", "embedding", "positions shifted by one!",
        edit(transformer.Transformer.__call__, "places[None, :length]", "jnp.roll(places, 1, 0)[None, :length]"),
    ),
    bug(
        "sines and cosines in halves, not in turn", "embedding", "sines and cosines",
        edit(sinusoids, "(half pair)", "(pair half)"), position="sinusoidal",
    ),
    bug(
        "embeddings multiplied by sqrt D", "embedding", "embedding multiplied by sqrt D!",
        edit(LanguageModel._embed, "wide_gradients.look_up(looked_up, tokens)",
             "(cfg.embed_dim**0.5 * wide_gradients.look_up(looked_up, tokens))"), **ROPE,
    ),
    bug(
        "window one key too wide", ATTENTION, "window = (6,)!",
        edit(masks.attention_mask, "query - key < window", "query - key <= window"), window=5, **ROPE,
    ),
    bug(
        "window one key too narrow", ATTENTION, "window = (4,)!",
        edit(masks.attention_mask, "query - key < window", "query - key < window - 1"), window=5, **ROPE,
    ),
    bug(
        "windows given to the layers in reverse", ATTENTION, "window",
        edit(apply_layers, "cfg, cfg.layer_windows, x", "cfg, cfg.layer_windows[::-1], x"), window=(5, None),
    ),
    bug(
        "mask that lets one future key through", ATTENTION, "future",
        edit(masks.attention_mask, "key <= query", "key <= query + 1"),
    ),
    bug(
        "mask that hides the query's own key", ATTENTION, "future",
        edit(masks.attention_mask, "key <= query", "key < query"),
    ),
    bug(
        "mask after the softmax, not renormalised", ATTENTION, "after the softmax",
        edit(attention.masked_softmax, "jnp.where(mask, scores, jnp.finfo(scores.dtype).min)", "scores"),
    ),
    bug(
        "key/value heads tiled, not grouped", ATTENTION, "tiled instead of grouped!",
        edit(attention._grouped, "b t (kv group) width ->", "b t (group kv) width ->"),
        edit(attention.attend, "-> b t (kv maps) width", "-> b t (maps kv) width"), **GROUPED,
    ),
    bug(
        "block of queries that does not read its last key", ATTENTION, "",
        edit(blocked_attention._causal, "slice(first, seen - length + stop)", "slice(first, seen - length + stop - 1)"),
    ),
    bug(
        "mean pooling over tiled groups", ATTENTION, "tiled instead of grouped",
        edit(transformer.Attention._project, "b t (kv group) width", "b t (group kv) width"),
        kv_sharing="mean_pooled", **GROUPED,
    ),
    bug(
        "scores not divided by sqrt H", ATTENTION, "not divided by the root!",
        edit(dot_scores, "scores * queries.shape[-1] ** -0.5", "scores"),
    ),
    bug(
        "weight of multiplicative scores transposed", ATTENTION, "score_weight transposed!",
        edit(multiplicative_scores, "bkgth,kgjh->bkgtj", "bkgth,kghj->bkgtj"),
        attention_score="multiplicative",
    ),
    bug(
        "soft cap of the scores forgotten", ATTENTION, "attention_softcap = None!",
        edit(attention.attend, "axis=-1), cap)", "axis=-1), None)"), attention_softcap=1.0,
    ),
    bug(
        "queries and keys normalised after RoPE", ATTENTION, "after their norms",
        edit(transformer.Attention._project, "if cfg.qk_norm:", "def normalised():",
             "queries = Norm(", "normed = Norm(", "keys = Norm(", "return normed, Norm(",
             "for a in (queries, keys))", "for a in (queries, keys))\n        queries, keys = normalised()"),
        qk_norm=True, **ROPE,
    ),
    bug(
        "residual sums forgotten", "block_0", "residual = False!",
        edit(transformer.Block.__call__, "x + out if cfg.residual else out", "out"),
    ),
    bug(
        "residual sum of the MLP forgotten", "block_0", "residual sum",
        edit(transformer.Block.__call__, "if cfg.residual", 'if norm_name == "attention_norm"'),
    ),
    bug(
        "norm after each sublayer, not before", "block_0", "norm before or after",
        edit(transformer.Block.__call__, 'cfg.norm_order == "pre"', 'cfg.norm_order == "post"'),
    ),
    bug(
        "gate and up of SwiGLU exchanged", MLP, "gate and up exchanged!",
        edit(transformer.MLP.__call__, 'name="gate" if cfg.activation in GATED else "up"', 'name="up"',
             'use_bias, name="up")(x)\n        return', 'use_bias, name="gate")(x)\n        return'),
        activation="swiglu",
    ),
    bug(
        "square kernels applied transposed", "block_0/attention/query", "kernel transposed!",
        edit(Dense.__call__, "matmul(x.astype(cfg.dtype), kernel",
             "matmul(x.astype(cfg.dtype), (kernel.T if kernel.shape == kernel.T.shape else kernel)"),
    ),
    bug(
        "final norm computed, not used", "model", "final norm",
        edit(transformer.Transformer.__call__, 'x = Norm(cfg, name="final_norm")', 'Norm(cfg, name="final_norm")'),
    ),
    bug(
        "tied head divided by sqrt D", "head", "tied head divided by sqrt D!",
        edit(LanguageModel._logits, "table.T if", "table.T * cfg.embed_dim**-0.5 if"),
    ),
    bug(
        "soft cap of the logits forgotten", "model", "final_softcap = None!",
        edit(LanguageModel._logits, "softcap(head(x, table.T if cfg.tie_embeddings else None), "
             "cfg.final_softcap)", "head(x, table.T if cfg.tie_embeddings else None)"), final_softcap=1.0,
    ),
    bug(
        "GRU that resets the state before the product", "block_0", "reset gate",
        edit(nn.GRUCell.__call__, "r * dense_h(name='hn', use_bias=True)(h)",
             "dense_h(name='hn', use_bias=True)(r * h)"), **GRU,
    ),
    bug(
        "LSTM with input and forget gates exchanged", "block_0", "order of the gates",
        edit(nn.LSTMCell.__call__, "f * c + i * g", "i * c + f * g"), **LSTM,
    ),
    bug(
        "torchref's GELU with tanh", MLP, "GELU form",
        edit(torch_layers.gelu, "(widened(x) * 0.5 * (1 + torch.erf(widened(x) / math.sqrt(2)))).to(x.dtype)",
             "gelu_tanh(x)"),
    ),
    bug(
        "conversion that leaves square kernels as they are", "block_0/attention/query", "kernel transposed!",
        edit(turned, 'if path.endswith("/kernel")',
             'if path.endswith("/kernel") and array.shape != array.shape[::-1]'),
    ),
    coarse(
        "activation", "products of 11 bits (TF32)", "block_0/attention/query", "TF32",
        edit(matmul, "return wide", 'x = jax.lax.reduce_precision(x, 8, 10) if x.dtype == "float32" else x\n'
             "    return wide"),
    ),
]  # fmt: skip

REST = [
    later(
        "loss", "padding counted in the loss", "model", "padding",
        edit(loss.cross_entropy, "losses.mean() if weights is None", "losses.mean() if True"),
    ),
    later(
        "loss", "loss divided by the rows' length, not the weights", "model", "divided",
        edit(loss.cross_entropy, "/ weights.sum()", "/ weights.size"),
    ),
    later(
        "logits", "scanned layers in reverse", "model", "order of stacked layers",
        edit(unstack_params, "i // period)", "-1 - i // period)"), scan_layers=True,
    ),
    later(
        "gradient", "half of a kernel's gradient", "block_1/mlp/down", "by hand",
        edit(_backward, "jnp.matmul(rows.T, dy_rows)", "0.5 * jnp.matmul(rows.T, dy_rows)"),
    ),
    later(
        "gradient", "softmax derivative without its row sum", "block_1/attention/key", "by hand",
        edit(attention._read_backward, "weights * (d_weights - row_sum)", "weights * d_weights"),
    ),
    later(
        "gradient", "bias cut off from the loss", "block_1/mlp/down", "stop_gradient",
        edit(Dense.__call__, "expand_dims(bias,", "expand_dims(jax.lax.stop_gradient(bias),"),
    ),
    later(
        "decoding", "ring of slots one too short", ATTENTION, "a slot of the ring",
        edit(cache.LayerCache.write, "positions % self.slots", "positions % (self.slots - 1)"), **ROPE,
    ),
    later(
        "decoding", "position not advanced by a step", "embedding", "not advanced",
        edit(transformer.Transformer.__call__, "past + added", "past + jnp.where(added == 1, 0, added)"),
    ),
    later(
        "decoding", "a step that does not see its own key", ATTENTION, "before it is written",
        edit(cache.LayerCache.extend, "(written.view(),), written", "(self.view(),), written"), **ROPE,
    ),
    later(
        "decoding", "a later chunk that forgets the old keys", ATTENTION, "old keys",
        edit(transformer.Attention._attend, "[part.positions for part in seen]",
             "[jnp.full_like(part.positions, -1) for part in seen[:-1]] + [own.positions]"), **ROPE,
    ),
    later(
        "decoding", "a chunk that sees the keys it overwrites", ATTENTION, "old keys",
        edit(cache.LayerCache.extend, "self.in_order() if in_order else self.view()",
             "KeyValues(written.keys, written.values, self.positions)"), **ROPE,
    ),
    later(
        "decoding", "sampling that reads the last prompt token twice", "model", "prompt",
        edit(start, "np.clip(fed - begin, 0, width)", "np.clip(fed + 1 - begin, 0, width)"), **ROPE,
    ),
    of_optimizer(
        "adam", "Adam without bias correction", "*", "no bias correction!",
        edit(scale_by_moments, "(correction(b, count, mu.dtype) if bias_correction else 1)", "1"),
    ),
    of_optimizer(
        "adam", "Adam with eps inside the root", "*", "eps inside the root!",
        edit(scale_by_moments, "(jnp.sqrt(nu / nu_correction) + eps)", "jnp.sqrt(nu / nu_correction + eps)"),
    ),
    of_optimizer(
        "adamw", "decay added to the gradient (L2)", "*", "L2",
        edit(adamw, "        add_decay(weight_decay, mask, kinds),\n", "",
             "optax.chain(\n", "optax.chain(\n        add_decay(weight_decay, mask, kinds),\n"),
    ),
    of_optimizer(
        "adamw", "decay of norms too", "*norm", "decay of vectors",
        edit(ParamKind.decays.fget, 'self.name in ("linear", "embedding")', "True"),
    ),
    of_optimizer(
        "sgd", "decay not times the rate", "*", "times which rate",
        edit(decay_parameters, "now * weight_decay", "weight_decay"),
    ),
    of_optimizer(
        "sgd", "decay after the step", "*", "before or after the step",
        edit(decay_parameters, "scale * param)", "scale * (param + update))"),
    ),
    of_optimizer(
        "adamsn", "AdamSN with the mean for the sum", "block_?/*/*", "mean instead of the sum",
        edit(scale_by_moments, "squares.sum(subsets.axes", "squares.mean(subsets.axes"),
    ),
    of_optimizer(
        "adamsn", "AdamSN along the other axis", "block_?/*/*", "one number per!",
        edit(_summed_axes, "outputs >= inputs", "outputs < inputs"),
    ),
    of_optimizer(
        "adamsn", "AdamSN along the other axis of square matrices", "block_?/attention/*", "one number per input!",
        edit(_summed_axes, "outputs >= inputs", "outputs > inputs"),
    ),
    of_optimizer(
        "adafactor", "Adafactor not divided by the mean", "*", "not divided by their mean",
        edit(scale_by_factored_rms, "nu.rows / mean, nu.columns", "nu.rows, nu.columns"),
    ),
    of_optimizer(
        "sgd", "gradients clipped by value", "*", "clipped",
        edit(build_optimizer, "optax.clip_by_global_norm(cfg", "optax.clip(cfg"),
    ),
    of_optimizer(
        "sgd", "clipping by norm + 1e-6, as torch has it", "*", "clipped",
        edit(optax.clip_by_global_norm, "t / g_norm.astype", "t / (g_norm + 1e-6).astype"),
    ),
]  # fmt: skip

COARSE = [
    coarse(
        "activation", "softmax in bfloat16, of a float32 model", ATTENTION, "softmax",
        edit(attention.masked_softmax, "jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min), axis=-1)",
             'jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min).astype(scores.dtype '
             'if scores.dtype == "float64" else "bfloat16"), axis=-1).astype(scores.dtype)'),
    ),
    coarse(
        "activation", "softmax in bfloat16, of a bfloat16 model", ATTENTION, "softmax",
        edit(attention._read_forward, "masked_softmax(scores, mask)",
             "masked_softmax(scores.astype(values[0].dtype), mask).astype(scores.dtype)"),
        dtype="bfloat16", **ROPE,
    ),
    coarse(
        "gradient", "gradients of biases summed in bfloat16", "block_1/attention/value", "long sum",
        edit(wide_gradients.add, "x.dtype == _at_least_float32(x)", "True"), dtype="bfloat16",
    ),
]  # fmt: skip

MUTATIONS = [*LAYERS, *COARSE, *REST]


def main() -> None:
    """Prints a Markdown table of the bugs that were planted and what caught them."""
    parser = argparse.ArgumentParser(
        description="Plant each bug in jaxlm's source, run the comparison with PyTorch on "
        "it, and print a Markdown table of what caught it and which cause was named."
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="plant only the bugs whose names contain one of these")
    words = parser.parse_args().words
    chosen = [mutation for mutation in MUTATIONS if not words or any(word in mutation.name for word in words)]
    if not chosen:
        parser.error(
            f"no bug's name contains {' or '.join(map(repr, words))}: the names are in parity_tests/mutations.py"
        )
    print("| bug | caught by | first divergence | cause named |\n|---|---|---|---|")
    right = 0
    for mutation in chosen:
        report = run(mutation)
        first, wrong = report.first, missed(mutation, report)
        right += not wrong
        layer = "none" if first is None else first.layer
        cause = f"WRONG: {'; '.join(wrong)}" if wrong else named(mutation, report)
        print(f"| {mutation.name} | {mutation.quantity} | {layer} | {cause} |", flush=True)
    print(f"\n{right} of {len(chosen)} caught and named")


if __name__ == "__main__":
    main()
