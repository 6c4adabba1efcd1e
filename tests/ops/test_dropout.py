"""What dropout keeps is random, as frequent as asked, and saved where a backward pass recomputes the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops.dropout import KEPT, draw_kept


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.25, 0.9])
def test_as_many_are_kept_as_asked_and_neighbours_are_independent(rate):
    kept = np.asarray(draw_kept(jax.random.key(0), rate, (201, 1001)), float)
    spread = np.sqrt(rate * (1 - rate) / kept.size)
    assert abs(kept.mean() - (1 - rate)) <= 5 * spread + 2**-17
    other = np.asarray(draw_kept(jax.random.key(1), rate, (201, 1001)), float)
    halves = kept.reshape(-1)[: kept.size // 2], kept.reshape(-1)[-(kept.size // 2) :]
    for a, b in ((kept[:, 1:], kept[:, :-1]), (kept[1:], kept[:-1]), halves, (kept, other)):
        covariance = np.mean((a - a.mean()) * (b - b.mean()))
        assert abs(covariance) <= 5 * rate * (1 - rate) / np.sqrt(a.size)


def test_the_mask_is_saved_by_name():
    def dropped(x):
        return jnp.where(draw_kept(jax.random.key(0), 0.5, x.shape), jnp.sin(x), 0).sum()

    saving = jax.checkpoint(dropped, policy=jax.checkpoint_policies.save_only_these_names(KEPT))
    forgetful = jax.checkpoint(dropped)
    draws = [str(jax.make_jaxpr(jax.grad(f))(jnp.ones(8))).count("random_bits") for f in (saving, forgetful)]
    assert draws == [1, 2]
