"""Cross entropy in nats."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_losses(logits: Float[Array, "*batch V"], targets: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """-log softmax(logits)[target] of each token, in nats, computed in at least float32."""
    logits = logits.astype(jnp.result_type(logits, jnp.float32))
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


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
