"""Layers outside attention: norms, MLP, embedding, residual sums, head, recurrent cells."""

import flax.linen as nn

from jaxlm.model import transformer
from jaxlm.model.layer_stack import unstack_params
from jaxlm.model.layers import Dense, LanguageModel, Norm
from jaxlm.ops.positions import sinusoids
from planted.bugs import BARE, GRU, LSTM, ROPE, bug, edit, later
from torchref import layers as torch_layers

MLP = "block_0/mlp"

BUGS = [
    bug(
        "tanh GELU for erf",
        "The MLP approximates GELU with tanh where the exact (erf) form is meant.",
        MLP, "activation = 'gelu_tanh'!",
        edit(transformer._gelu, "0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))", "jax.nn.gelu(wide)"),
    ),
    bug(
        "norm eps 1e-6 for 1e-5",
        "A norm adds Linen's default eps, not that of the config.",
        "block_0/attention_norm", "norm_eps = 1e-06!",
        edit(Norm.__call__, "cfg.norm_eps", "1e-6"),
    ),
    bug(
        "eps outside the root of a layer norm",
        "A layer norm divides by root(variance) + eps, not by root(variance + eps).",
        "block_0/attention_norm", "eps outside the root",
        edit(nn.normalization._normalize, "lax.rsqrt(var + epsilon)", "1 / (jnp.sqrt(var) + epsilon)"),
    ),
    bug(
        "RMS norm that subtracts the mean",
        "An RMS norm subtracts the mean, as a layer norm does.",
        "block_0/attention_norm", "mean subtracted",
        edit(Norm.__call__, "nn.RMSNorm if", "functools.partial(nn.LayerNorm, use_bias=False) if"), **BARE,
    ),
    bug(
        "learned positions one late",
        "Every token gets the position vector of the token before.",
        "embedding", "positions shifted by one!",
        edit(transformer.Transformer.__call__, "places[None, :length]", "jnp.roll(places, 1, 0)[None, :length]"),
    ),
    bug(
        "sines and cosines in halves, not in turn",
        "Sinusoids hold all sines, then all cosines, instead of alternating.",
        "embedding", "sines and cosines",
        edit(sinusoids, "(half pair)", "(pair half)"), position="sinusoidal",
    ),
    bug(
        "embeddings multiplied by sqrt D",
        "Embedding vectors are multiplied by the root of their width, as in other models.",
        "embedding", "embedding_scale!",
        edit(LanguageModel._embed, "wide_gradients.look_up(looked_up, tokens)",
             "(cfg.embed_dim**0.5 * wide_gradients.look_up(looked_up, tokens))"), **ROPE,
    ),
    bug(
        "residual sums forgotten",
        "No sublayer adds its input to its output.",
        "block_0", "residual = False!",
        edit(transformer.Block.__call__, "x + out if cfg.residual else out", "out"),
    ),
    bug(
        "residual sum of the MLP forgotten",
        "The MLP's input is not added to its output.",
        "block_0", "residual sum",
        edit(transformer.Block.__call__, "if cfg.residual else", 'if name == "attention" else'),
    ),
    bug(
        "MLP of a parallel block that reads attention's result",
        "A block whose MLP should read the block's own input is computed one sublayer after the other.",
        "block_0", "block_layout = 'sequential'!",
        edit(transformer.Block.__call__, 'y = Norm(cfg, name="mlp_norm")(x)',
             'y = Norm(cfg, name="mlp_norm")(x + of_attention)'), block_layout="parallel", **ROPE,
    ),
    bug(
        "norm after each sublayer, not before",
        "A model with norms before its sublayers is computed with norms after them.",
        "block_0", "norm before or after",
        edit(transformer.Block.__call__, '(out) if order == "post"', '(out) if order == "pre"',
             'if order in ("pre", "sandwich") else x', 'if order == "post" else x'),
    ),
    bug(
        "gate and up of SwiGLU exchanged",
        "The activation is applied to the up projection, not to the gate.",
        MLP, "gate and up exchanged!",
        edit(transformer.MLP.__call__, 'name="gate" if gated else "up"', 'name="up"',
             'axes, name="up")(x)\n        return', 'axes, name="gate")(x)\n        return'),
        activation="swiglu",
    ),
    bug(
        "square kernels applied transposed",
        "A kernel with as many rows as columns is applied transposed: no shape tells.",
        "block_0/attention/query", "kernel transposed!",
        edit(Dense.__call__, "gathered(kernel.astype",
             "gathered((kernel.T if kernel.shape == kernel.T.shape else kernel).astype"),
    ),
    bug(
        "final norm computed, not used",
        "The result of the last norm is thrown away.",
        "model", "final norm",
        edit(transformer.Transformer.__call__, 'x = Norm(cfg, name="final_norm")', 'Norm(cfg, name="final_norm")'),
    ),
    bug(
        "tied head divided by sqrt D",
        "The logits of a tied head are divided by the root of the width.",
        "head", "tied head divided by sqrt D!",
        edit(LanguageModel._logits, "table.T if", "table.T * cfg.embed_dim**-0.5 if"),
    ),
    bug(
        "soft cap of the logits forgotten",
        "Logits are not capped.",
        "model", "final_softcap = None!",
        edit(LanguageModel._logits, "logits / cfg.logit_divisor, cfg.final_softcap)",
             "logits / cfg.logit_divisor, None)"), final_softcap=1.0,
    ),
    bug(
        "GRU that resets the state before the product",
        "The reset gate of a GRU acts on the state, not on its product with the weights.",
        "block_0", "reset gate",
        edit(nn.GRUCell.__call__, "r * dense_h(name='hn', use_bias=True)(h)",
             "dense_h(name='hn', use_bias=True)(r * h)"), **GRU,
    ),
    bug(
        "LSTM with input and forget gates exchanged",
        "The input gate acts on the old cell state, the forget gate on the new one.",
        "block_0", "order of the gates",
        edit(nn.LSTMCell.__call__, "f * c + i * g", "i * c + f * g"), **LSTM,
    ),
    bug(
        "torchref's GELU with tanh",
        "The reference itself has the bug: a comparison sees the difference from either side.",
        MLP, "GELU form",
        edit(torch_layers.gelu, "(widened(x) * 0.5 * (1 + torch.erf(widened(x) / math.sqrt(2)))).to(x.dtype)",
             "gelu_tanh(x)"),
    ),
    later(
        "logits", "scanned layers in reverse",
        "Scanned layers are taken apart in reverse order.",
        "model", "order of stacked layers",
        edit(unstack_params, "i // period)", "-1 - i // period)"), scan_layers=True,
    ),
]  # fmt: skip
