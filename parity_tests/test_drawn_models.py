"""Models drawn at random, models in bfloat16 and steps of the optimizers against torchref."""

import dataclasses

import cases
import hypothesis
import pytest
from hypothesis import strategies
from test_models import assert_same, named

from jaxlm.config import ModelConfig
from jaxlm.errors import UserError


def test_a_bfloat16_model_rounds_as_torch_does():
    assert_same(cases.NARROW[0], ("gradients",), draws=4)


@pytest.mark.slow
@pytest.mark.parametrize("cfg", cases.NARROW, ids=named)
def test_bfloat16_models_round_as_torch_does(cfg):
    assert_same(cfg, ("gradients", "decoding"))


@pytest.mark.parametrize(
    ("i", "dtype"),
    [
        (2, "float64"),
        pytest.param(2, "float32", marks=pytest.mark.slow),
        pytest.param(3, "float64", marks=pytest.mark.slow),
        pytest.param(4, "float32", marks=pytest.mark.slow),
    ],
)
def test_updates_of_every_optimizer_are_those_of_torch(i, dtype):
    cfg = dataclasses.replace(cases.CASES[i], dtype=dtype, param_dtype=dtype)
    rows = [row for row in assert_same(cfg, ("updates",), draws=1).rows if row.quantity == "update"]
    assert [row.name.split()[0] for row in rows] == ["sgd", "adam", "adamw", "adamsn", "adafactor"]


def one_of(*values):
    return strategies.sampled_from(values)


OF_EVERY = {
    "vocab_size": one_of(5, 13, 19),
    "max_seq_len": one_of(3, 11, 17),
    "init": one_of("gpt2", "normal", "torch"),
    "final_softcap": one_of(None, 3.0),
    "dtype": one_of("float64", "float64", "float32", "bfloat16"),
}
EMBEDDED = {"embed_dim": one_of(6, 12), "tie_embeddings": one_of(True, False), "head_bias": one_of(True, False)}
DEEP = {"num_layers": one_of(1, 2, 2), "scan_layers": one_of(True, False), "remat": one_of(True, False)}
FIELDS = {
    "bigram": OF_EVERY,
    "embedding_bigram": OF_EVERY | EMBEDDED,
    "recurrent": OF_EVERY | EMBEDDED | DEEP | {"cell": one_of("elman", "lstm", "gru")},
    "transformer": OF_EVERY
    | EMBEDDED
    | DEEP
    | {name: one_of(*values) for name, values in cases.PAIRED.items()}
    | {
        "num_heads": one_of(2, 6),
        "num_kv_heads": one_of(None, 1, 2),
        "head_dim": one_of(2, 4),
        "value_head_dim": one_of(None, 3),
        "mlp_dim": one_of(None, 0, 5),
        "activation": one_of("gelu", "gelu_tanh", "relu", "silu", "swiglu", "geglu"),
        "norm": one_of("layernorm", "rmsnorm", "none"),
        "norm_order": one_of("pre", "post"),
        "residual": one_of(True, True, False),
        "use_bias": one_of(True, False),
        "qkv_bias": one_of(None, True, False),
        "rope_layout": one_of("half", "interleaved"),
        "rope_theta": one_of(30.0, 1e4),
        "qk_norm": one_of(True, False),
        "attention_softcap": one_of(None, 2.0),
        "attention_impl": one_of("auto", "reference", "local"),
    },
}


@strategies.composite
def configs(draw):
    """Draws small configs of any family, each field at random, without those that are invalid."""
    family = draw(one_of("transformer", "transformer", "transformer", "recurrent", "embedding_bigram", "bigram"))
    fields = {name: draw(values) for name, values in FIELDS[family].items()}
    try:
        return ModelConfig(
            family=family, param_dtype="float32" if fields["dtype"] == "bfloat16" else fields["dtype"], **fields
        )
    except UserError:
        hypothesis.reject()


def drawn(count, **how):
    """Settings for so many configs. A failure is not shrunk: the models are small already."""
    quiet, only = list(hypothesis.HealthCheck), (hypothesis.Phase.generate,)
    return hypothesis.settings(max_examples=count, deadline=None, phases=only, suppress_health_check=quiet, **how)


@drawn(2, derandomize=True)
@hypothesis.given(configs())
def test_drawn_models_are_those_of_torch(cfg):
    assert_same(cfg, ("gradients",))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_many_drawn_models_are_those_of_torch(seed):
    """Twenty configs for each seed, so that the seeds run in parallel."""

    @hypothesis.seed(seed)
    @drawn(20, database=None)
    @hypothesis.given(configs())
    def compare(cfg):
        assert_same(cfg)

    compare()
