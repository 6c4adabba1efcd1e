"""Steps of optimizers: moments, decay, clipping."""

import optax

from jaxlm.optim import build_optimizer
from jaxlm.optim.adafactor import scale_by_factored_rms
from jaxlm.optim.adam import adamw, scale_by_moments
from jaxlm.optim.adamsn import _summed_axes
from jaxlm.optim.param_kinds import ParamKind
from jaxlm.optim.transforms import decay_parameters
from planted.bugs import edit, of_optimizer

BUGS = [
    of_optimizer(
        "adam", "Adam without bias correction",
        "Adam's moments are not divided by 1 - b^t.",
        "*", "no bias correction!",
        edit(scale_by_moments, "(correction(b, count, mu.dtype) if bias_correction else 1)", "1"),
    ),
    of_optimizer(
        "adam", "Adam with eps inside the root",
        "Adam divides by root(v + eps), not by root(v) + eps.",
        "*", "eps inside the root!",
        edit(scale_by_moments, "(jnp.sqrt(nu / nu_correction) + eps)", "jnp.sqrt(nu / nu_correction + eps)"),
    ),
    of_optimizer(
        "adamw", "decay added to the gradient (L2)",
        "AdamW's decay is added to the gradient and goes through the moments.",
        "*", "L2",
        edit(adamw, "        add_decay(weight_decay, mask, kinds),\n", "",
             "optax.chain(\n", "optax.chain(\n        add_decay(weight_decay, mask, kinds),\n"),
    ),
    of_optimizer(
        "adamw", "decay of norms too",
        "Norm scales and biases decay as matrices do.",
        "*norm", "decay of vectors",
        edit(ParamKind.decays.fget, 'self.name in ("linear", "embedding")', "True"),
    ),
    of_optimizer(
        "sgd", "decay not times the rate",
        "Decay is not multiplied by the learning rate.",
        "*", "times which rate",
        edit(decay_parameters, "now * weight_decay", "weight_decay"),
    ),
    of_optimizer(
        "sgd", "decay after the step",
        "Decay is taken of the parameter after the step, not before it.",
        "*", "before or after the step",
        edit(decay_parameters, "scale * param)", "scale * (param + update))"),
    ),
    of_optimizer(
        "adamsn", "AdamSN with the mean for the sum",
        "The second moment of a subset is the mean of its squares, not their sum.",
        "block_?/*/*", "mean instead of the sum",
        edit(scale_by_moments, "squares.sum(subsets.axes", "squares.mean(subsets.axes"),
    ),
    of_optimizer(
        "adamsn", "AdamSN along the other axis",
        "AdamSN keeps one second moment for each input instead of each output.",
        "block_?/*/*", "one number per!",
        edit(_summed_axes, "outputs >= inputs", "outputs < inputs"),
    ),
    of_optimizer(
        "adamsn", "AdamSN along the other axis of square matrices",
        "The same, but only where a matrix is square.",
        "block_?/attention/*", "one number per input!",
        edit(_summed_axes, "outputs >= inputs", "outputs > inputs"),
    ),
    of_optimizer(
        "adafactor", "Adafactor not divided by the mean",
        "Adafactor's factors are multiplied without division by their mean.",
        "*", "not divided by their mean",
        edit(scale_by_factored_rms, "nu.rows / mean, nu.columns", "nu.rows, nu.columns"),
    ),
    of_optimizer(
        "sgd", "gradients clipped by value",
        "Each number of the gradient is clipped, not the norm of all.",
        "*", "clipped",
        edit(build_optimizer, "optax.clip_by_global_norm(cfg", "optax.clip(cfg"),
    ),
    of_optimizer(
        "sgd", "clipping by norm + 1e-6, as torch has it",
        "Clipping divides by the norm plus 1e-6, as torch does.",
        "*", "clipped",
        edit(optax.clip_by_global_norm, "t / g_norm.astype", "t / (g_norm + 1e-6).astype"),
    ),
]  # fmt: skip
