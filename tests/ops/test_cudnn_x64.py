"""cuDNN's attention against masked attention in float64. Only a GPU has it; XLA's form of the call runs everywhere."""

import functools

import jax
import jax.numpy as jnp
import pytest
from gradients import assert_same_attention, normal, value_and_grads

from jaxlm.ops.attention import attend, cudnn_attend, cudnn_available
from jaxlm.ops.masks import attention_mask

pytestmark = pytest.mark.x64

no_cudnn = pytest.mark.skipif(not cudnn_available(), reason="cuDNN is an NVIDIA GPU's")
every_implementation = pytest.mark.parametrize("implementation", ["xla", pytest.param("cudnn", marks=no_cudnn)])


@every_implementation
@pytest.mark.parametrize("window", [None, 1, 32])
@pytest.mark.parametrize(("length", "width"), [(128, 64), (192, 128), (77, 24)])
def test_value_and_gradients_in_bfloat16(implementation, length, width, window):
    """Lengths that are 64 mod 128 and odd are those that other versions got wrong."""
    queries, keys, values = (normal(i, 2, length, n, width).astype(jnp.bfloat16) for i, n in enumerate((4, 2, 2)))
    positions = jnp.arange(length)[None]
    masked = functools.partial(attend, mask=attention_mask(positions, positions, window))
    exact = value_and_grads(masked, *(x.astype(jnp.float64) for x in (queries, keys, values)))

    def fused(*inputs):
        return cudnn_attend(*inputs, window, implementation).astype(jnp.float64)

    ours = value_and_grads(fused, queries, keys, values)
    assert_same_attention(ours, exact, 0.02, one_key=window == 1, zero=0.02)


@every_implementation
def test_the_future_and_what_lies_beyond_the_window_have_no_gradient(implementation):
    queries, keys, values = (normal(i, 1, 64, 2, 8).astype(jnp.bfloat16) for i in range(3))

    def row(values):
        return cudnn_attend(queries, keys, values, 5, implementation)[0, 40].astype(jnp.float32).sum()

    seen = (jnp.abs(jax.grad(row)(values)[0]).max(axis=(1, 2)) > 0).tolist()
    assert [i for i, sees in enumerate(seen) if sees] == [36, 37, 38, 39, 40]


@pytest.mark.parametrize(("length", "asked"), [(8, 8), (7, 8), (1, 2)])
def test_odd_lengths_are_padded_whose_gradient_jax_refuses_on_a_gpu(monkeypatch, length, asked):
    lengths, call = set(), jax.nn.dot_product_attention

    def noted(queries, keys, values, **options):
        lengths.update((queries.shape[1], keys.shape[1], values.shape[1]))
        return call(queries, keys, values, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", noted)
    inputs = [normal(i, 1, length, 2, 8).astype(jnp.bfloat16) for i in range(3)]
    assert cudnn_attend(*inputs, None, "xla").shape == (1, length, 2, 8)
    assert lengths == {asked}
