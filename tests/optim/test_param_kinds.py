"""What kind each parameter is, and that optimizers see kernels by meaning: stacked, fused or of many axes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from models import VARIANTS, variant
from optimizers import PAPER, assert_trees_close, compiled, numbers, trajectory
from tolerances import FLOAT32, assert_close

from jaxlm.errors import UserError
from jaxlm.model.layer_stack import stack_params
from jaxlm.optim import ParamKind, adafactor, adam, adamsn, adamw, param_kinds, sgd
from jaxlm.optim.param_kinds import kinds_like

# Literal kinds: "i>o" are the input and the output axes of linear maps, L* a leading axis of layers.

NORM = {"bias": "bias", "scale": "norm"}
DENSE = {"bias": "bias", "kernel": "-2>-1"}
BLOCK = {
    "attention": {"query": DENSE, "key": DENSE, "value": DENSE, "out": DENSE},
    "attention_norm": NORM,
    "mlp": {"up": DENSE, "down": DENSE},
    "mlp_norm": NORM,
}
TOP = {"embedding": "embedding", "final_norm": NORM}


def blocks(**more):
    """The expected kinds of two blocks whose attention has more parameters."""
    block = {**BLOCK, "attention": {**BLOCK["attention"], **more}}
    return {**TOP, "block_0": block, "block_1": block}


def cells(first, *cell):
    return {first: "embedding", **{f"block_{i}": {"cell": dict(cell)} for i in range(2)}}


def layers(tree):
    return jax.tree.map(lambda kind: f"L*{kind}", tree)


IN, OUT = {"kernel": "-2>-1"}, DENSE
LSTM = [(f"i{gate}", IN) for gate in "ifgo"] + [(f"h{gate}", DENSE) for gate in "ifgo"]
GRU = [(f"i{gate}", DENSE) for gate in "rzn"] + [("hr", IN), ("hz", IN), ("hn", DENSE)]
EXPECTED = {
    "rope": blocks(),
    "learned": {**blocks(), "position_embedding": "embedding"},
    "head_bias_untied": {**blocks(), "head": DENSE},
    "qk_norm": blocks(query_norm={"scale": "norm"}, key_norm={"scale": "norm"}),
    "multiplicative": blocks(score_weight="-1>-2"),
    "concat": blocks(score_query="-1>", score_key="-1>"),
    "additive": blocks(score_query="-2>-1", score_key="-2>-1", score_out="-1>"),
    "scan_layers": {**TOP, "layers": layers({"block_0": BLOCK, "block_1": BLOCK})},
    "bigram": {"table": "embedding"},
    "embedding_bigram": {"embedding": "embedding"},
    "elman_tanh": cells("embedding", ("i", DENSE), ("h", IN)),
    "elman_slide": {**cells("embedding", ("i", DENSE), ("h", IN)), "head": IN},
    "lstm": cells("embedding", *LSTM),
    "gru_scanned": {"embedding": "embedding", "layers": layers({"block_0": {"cell": dict(GRU)}})},
}


def text(kind):
    axes = [",".join(map(str, part)) for part in (kind.inputs, kind.outputs)]
    return "L*" * kind.stacked + (">".join(axes) if kind.name == "linear" else kind.name)


@pytest.mark.parametrize("name", list(EXPECTED))
def test_the_kind_of_every_parameter(name):
    assert jax.tree.map(text, param_kinds(VARIANTS[name])) == EXPECTED[name]


def test_only_linear_maps_and_tables_decay():
    assert [ParamKind(name, (-2,), (-1,)).decays for name in ("linear", "embedding", "norm", "bias")] == [1, 1, 0, 0]


# Stacked layers

OPTIMIZERS = {
    "adamw": adamw(0.1, weight_decay=0.1),
    "adamsn_per_output": adamsn(0.1, weight_decay=0.1, subset="per_output"),
    "adamsn_per_input": adamsn(0.1, subset="per_input"),
    "adamsn_auto": adamsn(0.1, subset="auto"),
    "adamsn_smaller": adamsn(0.1, subset="smaller"),
    "adafactor": adafactor(0.1, weight_decay=0.1, multiply_by_parameter_scale=True, clipping_threshold=0.5),
    "adafactor_last": adafactor(0.1, factors="last"),
    "adafactor_largest": adafactor(0.1, factors="largest"),
}


def test_stacked_layers_have_the_updates_of_layers_one_by_one():
    """Parameters and gradients of another size in each layer; more layers than a kernel is wide."""
    cfg = variant(num_layers=7, window=None)
    up = {"kernel": (3, 5), "bias": (5,)}
    shapes = {"norm": {"scale": (5,)}, "up": up, "score_key": (2, 3, 5), "score_out": (2, 5)}

    def tree(seed):
        made = {f"block_{i}": numbers(seed + i, shapes=shapes) for i in range(7)}
        made = {name: jax.tree.map(lambda x, i=i: 2.0**i * x, block) for i, (name, block) in enumerate(made.items())}
        return {**made, "embedding": numbers(seed, shapes=(11, 3))}

    def updates(params, grads):
        return {name: tx.update(grads, tx.init(params), params)[0] for name, tx in OPTIMIZERS.items()}

    plain = tree(10), tree(20)
    stacked = [stack_params(cfg, made) for made in plain]
    one_by_one, at_once = compiled(lambda: (updates(*plain), updates(*stacked)))()
    for name in OPTIMIZERS:
        assert_trees_close(at_once[name], stack_params(cfg, one_by_one[name]))


# Kernels of many axes

OF_MATRICES = {
    "adamsn_per_output": lambda kinds: adamsn(0.1, weight_decay=0.1, subset="per_output", kinds=kinds),
    "adamsn_per_input": lambda kinds: adamsn(0.1, subset="per_input", kinds=kinds),
    "adamsn_auto": lambda kinds: adamsn(0.1, subset="auto", kinds=kinds),
    "adamsn_smaller": lambda kinds: adamsn(0.1, subset="smaller", kinds=kinds),
    "adafactor": lambda kinds: adafactor(0.1, weight_decay=0.1, kinds=kinds),
    "adafactor_paper": lambda kinds: adafactor(0.1, kinds=kinds, **PAPER),
}
MATRIX = ParamKind("linear", (-2,), (-1,))


def updates_of(kinds, params, grads):
    """Each optimizer's updates of two steps."""
    return {name: trajectory(make_one(kinds), params, grads)[2] for name, make_one in OF_MATRICES.items()}


@pytest.mark.parametrize(
    ("shape", "kind", "matrix"),
    [
        ((3, 2, 5), ParamKind("linear", (-3,), (-2, -1)), (3, 10)),  # of DenseGeneral: to heads
        ((2, 5, 3), ParamKind("linear", (-3, -2), (-1,)), (10, 3)),  # and back
        ((2, 5, 3), None, (10, 3)),  # by its name
        ((3, 3, 2, 5), ParamKind("linear", (-4,), (-3, -2, -1)), (3, 30)),  # queries, keys and values at once
    ],
)
def test_a_kernel_of_many_axes_has_the_updates_of_its_matrix(shape, kind, matrix):
    params, grads = {"kernel": numbers(0, shapes=shape)}, {"kernel": numbers(1, 2, shapes=shape)}
    flat = {"kernel": params["kernel"].reshape(matrix)}, {"kernel": grads["kernel"].reshape(2, *matrix)}
    kinds = None if kind is None else {"kernel": kind}
    ours, theirs = compiled(lambda: (updates_of(kinds, params, grads), updates_of({"kernel": MATRIX}, *flat)))()
    for name, update in ours.items():
        assert_close(update["kernel"].reshape(2, *matrix), theirs[name]["kernel"], FLOAT32)


def test_an_axis_that_is_neither_input_nor_output_counts_maps():
    """Queries, keys and values [D, 3, H] against three kernels; clipping and scaling are of a parameter as a whole."""
    params, grads = {"kernel": numbers(0, shapes=(7, 3, 5))}, {"kernel": numbers(1, 2, shapes=(7, 3, 5))}
    apart = [{name: tree["kernel"][..., i, :] for i, name in enumerate("qkv")} for tree in (params, grads)]
    fused, matrices = {"kernel": ParamKind("linear", (-3,), (-1,))}, dict.fromkeys("qkv", MATRIX)
    ours, theirs = compiled(lambda: (updates_of(fused, params, grads), updates_of(matrices, *apart)))()
    for name in set(ours) - {"adafactor_paper"}:
        for i, part in enumerate("qkv"):
            assert_close(ours[name]["kernel"][..., i, :], theirs[name][part], FLOAT32)


def test_stacked_layers_may_be_told_by_kinds():
    params, grads = {"kernel": numbers(0, shapes=(4, 3, 5))}, {"kernel": numbers(1, 2, shapes=(4, 3, 5))}
    scales = jnp.array([1.0, 3.0, 9.0, 27.0]).reshape(4, 1, 1)
    params = {"kernel": scales * params["kernel"]}
    apart = [{name: tree["kernel"][..., i, :, :] for i, name in enumerate("abcd")} for tree in (params, grads)]
    stacked, matrices = {"kernel": ParamKind("linear", (-2,), (-1,), stacked=True)}, dict.fromkeys("abcd", MATRIX)
    ours, theirs = compiled(lambda: (updates_of(stacked, params, grads), updates_of(matrices, *apart)))()
    for name, update in ours.items():
        for i, layer in enumerate("abcd"):
            assert_close(update["kernel"][:, i], theirs[name][layer], FLOAT32)


# Refusals


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({}, r"kinds has None for \['kernel'\]: give a ParamKind"),
        ({"kernel": "linear"}, r"kinds has 'linear' for \['kernel'\]"),
        (
            {"kernel": ParamKind("linear", (0,), (1,))},
            r"does not fit \['kernel'\] of shape \(3, 5\): count axes from the end",
        ),
        ({"kernel": ParamKind("linear", (-3,), (-1,))}, r"does not fit .* of shape \(3, 5\)"),
        ({"kernel": ParamKind("linear", (-2,), (-1,), stacked=True)}, r"stacked=True\) does not fit"),
    ],
)
def test_kinds_that_do_not_fit_are_refused(kinds, message):
    params = {"kernel": jnp.ones((3, 5))}
    for tx in (adamsn(0.1, kinds=kinds), adafactor(0.1, kinds=kinds)):
        with pytest.raises(UserError, match=message):
            tx.init(params)


@pytest.mark.parametrize(("inputs", "outputs"), [((-1,), (-1,)), ((-2, -2), (-1,)), ((), (-1,))])
def test_a_kind_without_a_meaning_is_refused(inputs, outputs):
    with pytest.raises(
        UserError, match="is not a valid kind: give a linear map its input axes, and name no axis twice"
    ):
        ParamKind("linear", inputs, outputs)


@pytest.mark.parametrize("make", [adamw, adamsn, adafactor])
def test_decay_falls_on_what_the_given_kinds_call_a_matrix(make):
    params = {"blocks": {"kernel": jnp.ones((4, 3, 5)), "scale": jnp.ones((4, 5)), "lone": jnp.ones(2)}}
    kernel = ParamKind("linear", (-2,), (-1,), stacked=True)
    kinds = {"blocks": {"kernel": kernel, "scale": ParamKind("norm", stacked=True), "lone": ParamKind("embedding")}}
    tx = make(1.0, weight_decay=0.1, kinds=kinds)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    decayed = {name: bool((update != 0).all()) for name, update in updates["blocks"].items()}
    assert decayed == {"kernel": True, "scale": False, "lone": True}


def test_names_of_other_modules():
    boxed = nn.Partitioned(jnp.ones((3, 5)), ("in", "out"))
    tree = {
        "attention": {"query": {"kernel": jnp.ones((7, 2, 3)), "bias": jnp.ones((2, 3))}},
        "layers": [{"kernel": jnp.ones((3, 5)), "scale": jnp.ones((2, 5)), "score_bias": jnp.ones(3)}],
        "boxed": {"kernel": boxed},
    }
    found = kinds_like(tree)
    assert found["attention"]["query"] == {"kernel": ParamKind("linear", (-3, -2), (-1,)), "bias": ParamKind("bias")}
    plain = ParamKind("linear", (-2,), (-1,))
    assert found["layers"][0] == {"kernel": plain, "scale": ParamKind("norm"), "score_bias": ParamKind("bias")}
    assert found["boxed"]["kernel"].value == plain


@pytest.mark.parametrize("make", [sgd, adam, adamsn, adafactor])
def test_without_decay_no_parameters_are_needed(make):
    grads = {"kernel": jnp.ones((3, 5))}
    tx = make(0.1)
    updates, _ = tx.update(grads, tx.init(grads))
    assert (updates["kernel"] < 0).all()
