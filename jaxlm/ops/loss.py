"""Log-probabilities of targets and cross entropy, in nats."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def target_log_probs(
    logits: Float[Array, "*batch V"], targets: Int[Array | np.ndarray, "*batch"], *, or_nan: bool = False
) -> Float[Array, "*batch"]:
    """log softmax(logits)[target] of each token, in nats, computed in at least float32.

    Args:
      or_nan: NaN where any of a token's logits is not finite. Otherwise -inf is a probability of 0. It is looked at in
        the sum over the vocabulary, so it costs no pass of its own.

    Only the targets are normalised, where a log_softmax would write all V logits once more. The largest logit is taken
    off first: `logits[target] - logsumexp(logits)` loses up to 25 times as much to rounding where logits are large.
    """
    logits = logits.astype(jnp.result_type(logits, jnp.float32))
    largest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1) - largest
    terms = jnp.exp(logits - largest)
    if or_nan:
        terms = jnp.where(jnp.isfinite(logits), terms, jnp.nan)
    return picked[..., 0] - jnp.log(terms.sum(axis=-1))


def token_losses(logits: Float[Array, "*batch V"], targets: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """-log softmax(logits)[target] of each token, in nats, computed in at least float32."""
    return -target_log_probs(logits, targets)


def cross_entropy(
    logits: Float[Array, "*batch V"],
    targets: Int[Array, "*batch"],
    weights: Float[Array, "*batch"] | None = None,
) -> Float[Array, ""]:
    """Mean of `token_losses`, in nats per token; with weights the weighted mean (0 leaves a token out).

    torch.nn.functional.cross_entropy leaves targets of -100 out instead; here only weights do.
    """
    losses = token_losses(logits, targets)
    return losses.mean() if weights is None else (losses * weights).sum() / weights.sum()
