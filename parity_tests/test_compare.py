"""`jaxlm.parity.compare` on arbitrary modules: ports that agree, planted bugs, and what cannot be compared."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.modeling_outputs import CausalLMOutput

from jaxlm import parity
from jaxlm.errors import UserError
from jaxlm.ops.attention import attend
from jaxlm.ops.masks import attention_mask
from jaxlm.ops.positions import apply_rope, rope_angles
from jaxlm.parity.capture import Event, traced

GUIDE = Path(__file__).parent.parent / "docs" / "porting.md"


def test_the_guide_finds_both_planted_bugs(capsys):
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL):
        exec(compile(block, str(GUIDE), "exec"), scope)
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    said = [line for line in printed if line.startswith(("first", "equal")) or "(tried" in line]
    assert said[0].startswith("first divergence, activation: norm1; its inputs agree")
    assert said[1] == "likely cause: eps = 1e-06 in JAX, 1e-05 in torch (tried)"
    assert "activation: between the layers; its inputs agree; the input of linear2 differs, the output" in said[2]
    assert said[3] == "likely cause: tanh GELU in JAX, erf GELU in torch (tried on the layer before)"
    assert said[4:] == ["equal up to rounding: 7 quantities"]
    for line in said:
        assert line in GUIDE.read_text(), f"{GUIDE} does not show {line!r}"


class Port(nn.Module):
    """Two linear layers, the second perhaps transposed."""

    turned: bool = False
    between: object = jnp.tanh

    @nn.compact
    def __call__(self, x):
        x = self.between(nn.Dense(5, name="first")(x))
        return nn.Dense(5, name="second")(x)


def two_layers():
    """(torch module, parameters of the port, inputs)."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Tanh(), torch.nn.Linear(5, 5))
    state = {name: tensor.detach().numpy().copy() for name, tensor in module.state_dict().items()}
    params = {
        name: {"kernel": state[f"{i}.weight"].T, "bias": state[f"{i}.bias"]}
        for name, i in (("first", 0), ("second", 2))
    }
    return module, params, [np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)]


def apply(params, **fields):
    return lambda x: Port(**fields).apply({"params": params}, x)


def test_innermost_layers_are_paired_by_order():
    module, params, inputs = two_layers()
    report = parity.compare(apply(params), module, inputs)
    assert report.passed
    assert report.first is None
    assert [(row.quantity, row.name, row.shape) for row in report.rows] == [
        ("activation", "first", (3, 5)),
        ("activation", "second", (3, 5)),
        ("result", "", (3, 5)),
        ("gradient", "of input 0", (3, 5)),
    ]
    assert report.to_dict()["passed"] is True


def test_the_first_layer_to_differ_is_named_and_not_those_after_it():
    module, params, inputs = two_layers()
    wrong = {**params, "first": {**params["first"], "kernel": params["first"]["kernel"].T}}
    report = parity.compare(apply(wrong), module, inputs)
    assert [row.name for row in report.rows if not row.passed] == ["first", "second", "", "of input 0"]
    assert (report.first.layer, report.first.inputs_agree) == ("first", True)
    assert any("transposed" in cause for cause in report.first.causes)
    assert report.to_dict()["first_divergence"]["layer"] == "first"


def test_what_lies_between_two_layers_is_named():
    module, params, inputs = two_layers()
    first = parity.compare(apply(params, between=jax.nn.relu), module, inputs).first
    assert "the input of second differs, the output of first agrees" in first.where
    assert first.causes[0].startswith("ReLU in JAX, tanh in torch")


def test_a_wrong_derivative_is_found_where_all_values_agree():
    module, params, inputs = two_layers()
    wrong = jax.custom_vjp(jnp.tanh)
    wrong.defvjp(lambda x: (jnp.tanh(x), x), lambda x, dy: (dy * (1 - jnp.tanh(x)),))
    report = parity.compare(apply(params, between=wrong), module, inputs)
    assert [row.name for row in report.rows if not row.passed] == ["of input 0"]
    assert report.first.quantity == "gradient"


def test_functions_of_any_kind_and_several_inputs():
    rng = np.random.default_rng(0)
    inputs = [rng.integers(0, 5, (2, 3)), rng.standard_normal((5, 4)).astype(np.float32)]
    report = parity.compare(lambda ids, table: table[ids], lambda ids, table: table[ids], inputs)
    assert report.passed
    assert [row.name for row in report.rows] == ["", "of input 1"]
    assert not parity.compare(lambda ids, table: table[ids], lambda ids, table: 1.0001 * table[ids], inputs).passed
    assert not parity.compare(lambda ids, table: table[ids] * jnp.nan, lambda ids, table: table[ids], inputs).passed
    other = parity.compare(
        lambda ids, table: table[ids].sum(-1), lambda ids, table: table[ids], inputs[:1] + inputs[1:]
    )
    assert other.rows[0].verdict == "DIFFERS"
    assert "(2, 3)" in other.rows[0].name


def test_names_of_no_layer_and_layers_that_cannot_be_paired():
    module, params, inputs = two_layers()
    with pytest.raises(
        UserError, match=r"names has 'third', a layer that was not called: those called are first, second"
    ):
        parity.compare(apply(params), module, inputs, names={"third": "0"})
    with pytest.raises(UserError, match=r"names has '7', a layer that was not called: those called are 0, 1, 2"):
        parity.compare(apply(params), module, inputs, names={"first": "7"})
    with pytest.raises(UserError, match=r"2 layers in JAX \(first, second\) cannot be paired with 1 in torch \(0\)"):
        parity.compare(apply(params), torch.nn.Sequential(module[0]), inputs)


def test_results_that_are_no_arrays():
    x = [np.ones(3, np.float32)]
    with pytest.raises(
        UserError, match="jax_fn returns tuple, which cannot be compared: return one floating-point array"
    ):
        parity.compare(lambda x: (x, x), lambda x: x, x)
    with pytest.raises(UserError, match="torch_fn returns dict, which"):
        parity.compare(lambda x: x, lambda x: {"x": x}, x)
    with pytest.raises(UserError, match="complex64, which"):
        parity.compare(lambda x: x * 1j, lambda x: x * 1j, x)
    with pytest.raises(UserError, match="int32, which"):
        parity.compare(lambda x: x.astype(int), lambda x: x.int(), x)


class Counting(torch.nn.Module):
    """A module whose result grows with every call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * self.calls


def test_modules_with_a_state_of_their_own():
    module, x = Counting(), [np.ones((2, 3), np.float32)]
    assert parity.compare(lambda x: x, module, x).passed
    assert not parity.compare(lambda x: 1.5 * x, module, x).passed
    assert module.calls == 0
    for layer in (torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(3)):
        with pytest.raises(
            UserError, match=f"in training mode with {type(layer).__name__}.* at '0': call torch_fn.eval"
        ):
            parity.compare(lambda x: x, torch.nn.Sequential(layer), x)
        parity.compare(lambda x: x, torch.nn.Sequential(layer).eval(), x)


def test_what_torch_itself_computes_roughly_proves_nothing():
    class Rough(torch.nn.Module):
        def forward(self, x):
            return (x.bfloat16() if x.dtype == torch.float32 else x).to(x.dtype)

    x = [np.random.default_rng(0).standard_normal((50, 50)).astype(np.float32)]
    assert not parity.compare(lambda x: 1.001 * x, Rough(), x).passed
    narrow = parity.compare(lambda x: x.astype(jnp.bfloat16), torch.nn.Identity(), x)
    assert not narrow.passed
    assert "bfloat16, not float32" in narrow.rows[0].name


def test_one_wrong_value_among_a_million():
    x = [np.random.default_rng(0).standard_normal((1000, 1000)).astype(np.float32)]
    assert not parity.compare(lambda x: x.at[7, 7].multiply(1.001), torch.nn.Identity(), x).passed
    assert parity.compare(lambda x: x, torch.nn.Identity(), x).passed


def test_float64_arrays_are_computed_with_as_jax_takes_them():
    module, params, inputs = two_layers()
    assert parity.compare(apply(params), module, [inputs[0].astype(np.float64)]).passed


def test_what_is_done_outside_of_the_modules():
    module, params, inputs = two_layers()
    whole = torch.nn.Sequential(module, torch.nn.Softmax(dim=-1))
    names = {"first": "0.0", "second": "0.2"}
    assert parity.compare(lambda x: jax.nn.softmax(apply(params)(x)), whole, inputs, names=names).passed
    wrong = parity.compare(lambda x: jax.nn.sigmoid(apply(params)(x)), whole, inputs, names=names).first
    assert (wrong.quantity, wrong.layer, wrong.where) == (
        "result",
        "between the layers",
        "every layer that was captured agrees",
    )


def test_the_torch_module_is_left_as_it_was():
    module, params, inputs = two_layers()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    parity.compare(apply(params), module, inputs)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert all(not layer._forward_hooks and not layer._forward_pre_hooks for layer in module.modules())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_what_a_transformation_hides_is_not_seen():
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            step = nn.scan(
                lambda cell, c, _: (cell(c), None), variable_broadcast="params", split_rngs={"params": False}, length=2
            )
            x, _ = step(nn.Dense(5, name="inner"), x, None)
            return nn.Dense(5, name="outer")(x)

    x = jnp.ones((2, 5))
    variables = Scanned().init(jax.random.key(0), x)
    _, trace = jax.jit(traced(Scanned().apply))(variables, x)
    assert trace.events == (Event("", "in"), Event("outer", "in"), Event("outer", "out"), Event("", "out"))
    assert trace.owners == ("outer",)


def test_bad_luck_with_a_few_numbers_is_settled_by_inputs_nearby():
    x = np.array([[0.3, -0.7, 1.1]], np.float32)
    off = 1 + 10 * np.finfo(np.float32).eps

    def unlucky(y):
        return jnp.where((y == x).all(), off * y, y)

    assert parity.compare(unlucky, torch.nn.Identity(), [x]).passed
    always = parity.compare(lambda y: off * y, torch.nn.Identity(), [x])
    assert always.first.quantity == "result"
    assert not parity.compare(
        lambda y: unlucky(y) * jnp.where((y == x).all(), 1.001, 1), torch.nn.Identity(), [x]
    ).passed


# Attention, and what a port of it gets wrong


class TorchAttention(torch.nn.Module):
    """Grouped attention with RoPE as Llama has it, written out."""

    def __init__(self, heads=4, shared=2, width=6):
        super().__init__()
        self.heads, self.shared, self.width = heads, shared, width
        self.q_proj = torch.nn.Linear(10, heads * width)
        self.k_proj = torch.nn.Linear(10, shared * width)
        self.v_proj = torch.nn.Linear(10, shared * width)
        self.o_proj = torch.nn.Linear(heads * width, 10)

    def forward(self, x):
        q, k, v = (
            layer(x).unflatten(2, (-1, self.width)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        half = self.width // 2
        angles = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(half) / half)

        def turned(z):
            a, b = z[..., :half], z[..., half:]
            return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)

        k, v = (z.repeat_interleave(self.heads // self.shared, dim=1) for z in (turned(k), v))
        out = torch.nn.functional.scaled_dot_product_attention(turned(q), k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class PortedAttention(nn.Module):
    """The same on jaxlm's operations, with fields that a port may get wrong."""

    layout: str = "half"
    theta: float = 10000.0
    window: int | None = None
    rotated: bool = True
    width: int = 6

    @nn.compact
    def __call__(self, x):
        q, k, v = (
            nn.Dense(features, name=name)(x).reshape(*x.shape[:2], -1, self.width)
            for name, features in (("query", 24), ("key", 12), ("value", 12))
        )
        positions = jnp.arange(x.shape[1])[None]
        if self.rotated:
            angles = rope_angles(positions, self.width, self.theta)
            q, k = (apply_rope(z, angles, self.layout) for z in (q, k))
        out = attend(q, k, v, attention_mask(positions, positions, self.window))
        return nn.Dense(10, name="out")(out.reshape(*x.shape[:2], -1))


NAMES = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}


def compare_attention(names=NAMES, **fields):
    torch.manual_seed(0)
    module = TorchAttention()
    state = {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}
    params = {n: {"kernel": state[f"{t}.weight"].T, "bias": state[f"{t}.bias"]} for n, t in NAMES.items()}
    x = np.random.default_rng(0).standard_normal((2, 9, 10)).astype(np.float32)
    return parity.compare(lambda x: PortedAttention(**fields).apply({"params": params}, x), module, [x], names)


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"layout": "interleaved"}, "rope_layout = 'interleaved' in JAX, 'half' in torch"),
        ({"theta": 5e5}, "rope_theta = 500000.0 in JAX, 10000.0 in torch"),
        ({"theta": 513.0}, "rope_theta = 513.0 in JAX, 10000.0 in torch"),
        ({"window": 2}, "window = 2 in JAX, None in torch"),
        ({"window": 7}, "window = 7 in JAX, None in torch"),
        ({"rotated": False}, "rope_layout = None in JAX, 'half' in torch"),
        ({"width": 12}, "head_dim = 12 in JAX, 6 in torch"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_wrong_attention_is_tried_by_name(fields, cause):
    report = compare_attention(**fields)
    assert "the input of out differs" in report.first.where
    assert report.first.causes[0] == f"{cause} (tried on the projections of this layer)"
    assert "RoPE layout or theta" in report.first.causes[-6]


def test_a_right_attention_has_no_causes():
    assert compare_attention().passed


def test_an_output_of_transformers_and_a_tuple_are_taken():
    module, params, inputs = two_layers()

    class Wrapped(torch.nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.inner, self.wrap = module, wrap

        def forward(self, x):
            return self.wrap(self.inner(x))

    names = {"first": "inner.0", "second": "inner.2"}
    of_logits = [lambda y: CausalLMOutput(logits=y, loss=y.sum()), lambda y: (y, None), lambda y: (y, y + 1)]
    for wrap in of_logits:
        report = parity.compare(apply(params), Wrapped(wrap), inputs, names)
        assert report.passed, report
        assert not parity.compare(apply(params, between=jax.nn.relu), Wrapped(wrap), inputs, names).passed
    for wrap in (lambda y: (None, y), lambda y: {"last": y}, lambda y: ()):
        with pytest.raises(UserError, match="which cannot be compared: return one floating-point array"):
            parity.compare(apply(params), Wrapped(wrap), inputs, names)
