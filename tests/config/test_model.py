import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    TrainConfig,
)
from jaxlm.config.base import from_dict, to_dict

SIZES = {"vocab_size": 11, "max_seq_len": 7}


@given(
    window=st.none() | st.integers(1, 9) | st.lists(st.none() | st.integers(1, 9), min_size=1).map(tuple),
    dropout=st.floats(0, 1, exclude_max=True),
    mlp_dim=st.none() | st.integers(0, 100),
)
def test_any_valid_model_config_survives_json(window, dropout, mlp_dim):
    cfg = ModelConfig(**SIZES, window=window, dropout=dropout, mlp_dim=mlp_dim)
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(cfg)))) == cfg


def test_what_differs_by_layer_cycles_over_a_common_period():
    cfg = ModelConfig(**SIZES, num_layers=7, window=(3, None), rope_theta=(10.0, 20.0, 30.0), rope_factor=2.0)
    assert len(cfg.layer_period) == 6
    assert [tuple(layer) for layer in cfg.layer_settings[:4]] == [
        (3, 10.0, 2.0), (None, 20.0, 2.0), (3, 30.0, 2.0), (None, 10.0, 2.0)
    ]  # fmt: skip
    assert cfg.layer_settings[6] == cfg.layer_settings[0]
    assert ModelConfig(**SIZES).layer_period == ((None, 10000.0, 1.0),)


def test_derived_widths():
    cfg = ModelConfig(**SIZES, num_layers=5, embed_dim=12, num_heads=6, num_kv_heads=2, window=(3, None))
    assert cfg.resolved == (2, 2, 2, 48)
    assert cfg.layer_windows == (3, None, 3, None, 3)
    cfg = ModelConfig(**SIZES, embed_dim=13, num_heads=3, head_dim=4, value_head_dim=5, mlp_dim=0)
    assert cfg.resolved == (3, 4, 5, 0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"vocab_size": 0}, "vocab_size = 0"),
        ({"num_layers": 2.5}, "num_layers = 2.5"),
        ({"num_layers": "2"}, "num_layers = '2'"),
        ({"num_layers": True}, "num_layers = True"),
        ({"activation": "swish"}, "'swish' is unknown: choose one of gelu, gelu_tanh"),
        ({"embed_dim": 10, "num_heads": 3}, "num_heads = 3 does not divide embed_dim = 10"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads = 3 does not divide num_heads = 4"),
        ({"embed_dim": 12, "num_heads": 4, "position": "rope"}, "head_dim = 3 is odd"),
        ({"embed_dim": 9, "num_heads": 3, "position": "sinusoidal"}, "embed_dim = 9 is odd"),
        ({"window": 0}, "window = 0"),
        ({"window": (3, -1)}, "window = (3, -1)"),
        ({"window": ()}, "window = ()"),
        ({"window": (3, "x")}, "window = (3, 'x')"),
        ({"window": (3, True)}, "window = (3, True)"),
        ({"num_kv_heads": True}, "num_kv_heads = True"),
        ({"head_dim": 8, "attention_out_proj": False}, "the heads' 32 features"),
        ({"param_dtype": "float16"}, "'float16' is unknown"),
        ({"window": (1, 2, 3), "scan_layers": True}, "num_layers = 4 is not a multiple of the period 3"),
        ({"dropout": 1.0}, "dropout = 1.0"),
        ({"rope_theta": 0.0}, "rope_theta = 0.0"),
        ({"rope_theta": ()}, "rope_theta and rope_factor need a number for each layer"),
        ({"rope_theta": (1e4, -1.0)}, "rope_theta = (10000.0, -1.0)"),
        (
            {"rope_theta": (1e4, 1e6), "window": (1, 2, 3), "num_layers": 3, "scan_layers": True},
            "the period 6 of window",
        ),
        ({"position": "rope", "rotary_dim": 5}, "rotary_dim = 5 must be even and at most the head width"),
        ({"position": "rope", "head_dim": 8, "rotary_dim": 10}, "rotary_dim = 10 must be even"),
        ({"position": "rope", "rope_factor": 2.0}, "rope_factor = 2.0 needs a rope_scaling"),
        ({"position": "rope", "rope_scaling": "llama3", "rope_ramp": (4.0, 1.0)}, "rope_ramp = (4.0, 1.0)"),
        ({"position": "rope", "rope_scaling": "yarn", "rope_theta": 1.0}, "rope_theta = 1.0 is too small"),
        ({"block_layout": "parallel", "norm_order": "post"}, "block_layout = 'parallel' needs norm_order = 'pre'"),
        ({"block_layout": "parallel", "mlp_dim": 0}, "and mlp_dim = 0"),
        ({"attention_scale": 0.0}, "attention_scale = 0.0"),
        ({"attention_scale": 0.5, "attention_score": "concat"}, "attention_scale = 0.5 is for dot and multiplicative"),
        ({"qk_norm_over": "projection"}, "qk_norm_over = 'projection' needs qk_norm"),
        ({"residual_scale": float("inf")}, "residual_scale = inf"),
        ({"norm_eps": -1e-5}, "norm_eps = -1e-05"),
    ],
)
def test_a_bad_model_field_is_named_with_its_value(fields, words):
    with pytest.raises(ValueError, match="give|change|choose") as error:
        ModelConfig(**{**SIZES, **fields})
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DataConfig(val_fraction=0.0), "val_fraction = 0.0"),
        (lambda: DataConfig(bpe_vocab_size=255), "bpe_vocab_size = 255"),
        (lambda: DataConfig(val_path="b"), "val_path = 'b' needs a path"),
        (lambda: DataConfig(path=("a", "")), "data.path = ('a', '') names nothing"),
        (lambda: DataConfig(path="-", val_path="-"), "name stdin (-) twice: it is read once, give files"),
        (lambda: DataConfig(field=""), "data.field = '' names nothing"),
        (lambda: DataConfig(tokenizer="word"), "tokenizer = 'word' is unknown: choose one of char, bpe, transcript,"),
        (lambda: DataConfig(tokenizer="transcript", val_path="b"), "val_path = 'b' needs a path"),
        (lambda: OptimConfig(b2=1.0), "b2 = 1.0"),
        (lambda: OptimConfig(clip_norm=0.0), "clip_norm = 0.0"),
        (lambda: OptimConfig(min_lr_ratio=2.0), "min_lr_ratio = 2.0"),
        (lambda: OptimConfig(max_nonfinite=-1), "max_nonfinite = -1"),
        (lambda: OptimConfig(learning_rate=float("nan")), "learning_rate = nan"),
        (lambda: TrainConfig(batch_size=12, grad_accum=5), "grad_accum = 5 does not divide batch_size = 12"),
        (lambda: TrainConfig(steps=0), "steps = 0"),
        (lambda: TrainConfig(seed=2**31), "seed = 2147483648"),
        (lambda: SampleConfig(top_p=0.0), "top_p = 0.0"),
        (lambda: SampleConfig(temperature=-1.0), "temperature = -1.0"),
    ],
)
def test_a_bad_companion_field_is_named_with_its_value(make, words):
    with pytest.raises(ValueError, match="give|change|leave") as error:
        make()
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"family": "bigram", "window": 3, "num_layers": 2},
            "family = 'bigram' does not read num_layers = 2, window = 3",
        ),
        ({"family": "embedding_bigram", "scan_layers": True}, "does not read scan_layers = True"),
        ({"family": "recurrent", "use_bias": False}, "family = 'recurrent' does not read use_bias = False"),
        ({"cell": "gru"}, "family = 'transformer' does not read cell = 'gru'"),
        ({"family": "recurrent", "cell": "gru", "cell_activation": "slide"}, "cell_activation = 'slide' is for cell"),
        ({"score_dim": 8}, "score_dim = 8 is the width of additive scores, but attention_score = 'dot'"),
        ({"attention_impl": "cudnn"}, "'cudnn' cannot compute dtype = 'float32': give 'bfloat16'"),
        (
            {"attention_impl": "cudnn", "dtype": "bfloat16", "attention_softcap": 3.0},
            "cannot compute attention_softcap = 3.0",
        ),
        ({"attention_impl": "cudnn", "dtype": "bfloat16", "head_dim": 12}, "multiple of 8 up to 128, not 12"),
        (
            {"kv_sharing": "summed_scores", "num_kv_heads": 2, "attention_out_proj": False},
            "leaves the heads' 64 features",
        ),
    ],
)
def test_fields_that_do_not_fit_together_are_refused(fields, words):
    with pytest.raises(ValueError, match="leave|give|change|make") as error:
        ModelConfig(**SIZES, **fields)
    assert words in str(error.value)


def test_a_family_without_heads_may_have_any_width():
    assert ModelConfig(**SIZES, family="embedding_bigram", embed_dim=5).embed_dim == 5
    assert ModelConfig(**SIZES, family="recurrent", embed_dim=7).embed_dim == 7
