"""The Transformer in float32: shapes, causality by gradient, options, initialisation, refusals."""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import BASE, VARIANTS, variant
from support import apply, built, random_tokens
from tolerances import FLOAT32, assert_close

from jaxlm.config import ModelConfig
from jaxlm.config.presets import preset
from jaxlm.data.corpus import load_corpus
from jaxlm.model import attention, build, transformer
from jaxlm.model.build import build_model, init_params
from jaxlm.model.transformer import Transformer
from jaxlm.ops.attention import cudnn_attend, cudnn_available
from jaxlm.ops.loss import cross_entropy


def logits_of(cfg, tokens, **kwargs):
    model, params = built(cfg)
    return apply(model, params, tokens, **kwargs)[0]


def receptive_field(cfg, length):
    """[T, T]: whether the logits at t depend on the token at s, by the gradient through the embeddings."""
    _, params = built(cfg)
    tokens = jnp.arange(length)[None] % cfg.vocab_size

    def summed(table, t):  # every token has a table row of its own, so a row's gradient is that position's
        wide = {**params, "embedding": table}
        cfg_wide = dataclasses.replace(cfg, vocab_size=length)
        return jnp.abs(build_model(cfg_wide).apply({"params": wide}, jnp.arange(length)[None])[0][0, t]).sum()

    assert not cfg.tie_embeddings
    table = params["embedding"][tokens[0]]
    head = {"kernel": jnp.resize(params["head"]["kernel"], (cfg.embed_dim, length))}
    params = {**params, "head": head}
    grads = jax.jit(jax.vmap(jax.grad(summed), (None, 0)))(table, jnp.arange(length))
    return np.asarray(jnp.abs(grads).max(axis=-1) > 0).astype(int)


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_causality_by_gradient(position):
    cfg = variant(tie_embeddings=False, position=position)
    np.testing.assert_array_equal(receptive_field(cfg, 7), np.tril(np.ones((7, 7), int)))


@pytest.mark.parametrize(
    ("impl", "window", "layers", "reach"),
    [
        ("reference", 1, 2, 0),
        ("local", 3, 1, 2),
        ("reference", 3, 2, 4),
        ("local", (3, 2), 2, 3),
        pytest.param("reference", (2, 1, 3), 3, 3, marks=pytest.mark.slow),
        pytest.param("local", (2, 1, 3), 3, 3, marks=pytest.mark.slow),
        ("reference", (2, None), 2, 8),
    ],
)
def test_layers_see_as_far_back_as_their_windows_together(impl, window, layers, reach):
    cfg = variant(tie_embeddings=False, window=window, num_layers=layers, attention_impl=impl)
    past = np.tril(np.ones((9, 9), int))
    np.testing.assert_array_equal(receptive_field(cfg, 9), past - np.tril(past, -reach - 1))


def test_rope_sees_the_order_of_the_past_and_no_position_does_not():
    tokens = random_tokens(BASE, 1, 7)
    swapped = tokens[:, jnp.array([1, 0, 2, 3, 4, 5, 6])]
    for cfg, differs in ((BASE, True), (variant(position="none"), False)):
        one = dataclasses.replace(cfg, num_layers=1)
        change = np.abs(np.asarray(logits_of(one, tokens) - logits_of(one, swapped)))[:, 2:].max()
        assert (change > 1e-3) == differs


def test_lengths_keep_padding_out():
    tokens = random_tokens(BASE, 2, 7)
    lengths = jnp.array([7, 4])
    padded = logits_of(BASE, tokens, lengths=lengths)
    changed = tokens.at[1, 4:].set((tokens[1, 4:] + 1) % 11)
    np.testing.assert_array_equal(padded[1, :4], logits_of(BASE, changed, lengths=lengths)[1, :4])
    assert_close(padded[1, :4], logits_of(BASE, tokens[1:, :4])[0], FLOAT32)


def test_initial_loss_is_that_of_a_uniform_guess(shakespeare):
    model = build_model(preset("nanogpt-cpu").model)
    tokens = load_corpus(preset("nanogpt-cpu").data, 64).train.tokens[: 20 * 65].reshape(20, 65).astype(np.int32)

    @jax.jit
    @jax.vmap
    def loss(key):
        return cross_entropy(
            model.apply({"params": init_params(model, key)}, tokens[:, :-1])[0], jnp.array(tokens[:, 1:])
        )

    losses = loss(jax.random.split(jax.random.key(0), 8))  # one seed to another: 0.02
    assert float(losses.mean()) == pytest.approx(math.log(65), abs=0.05)


def flat(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.parametrize(
    ("init", "std_up", "std_down", "std_embedding"),
    [
        ("gpt2", 0.02, 0.02 / math.sqrt(6), 0.02),
        ("normal", 0.02, 0.02, 0.02),
        ("torch", 1 / math.sqrt(3 * 60), 1 / math.sqrt(3 * 240), 1.0),
    ],
)
def test_initialisation(init, std_up, std_down, std_embedding):
    cfg = ModelConfig(vocab_size=97, max_seq_len=50, num_layers=3, embed_dim=60, num_heads=3, init=init)
    params = flat(init_params(build_model(cfg), jax.random.key(0)))
    assert params["block_1/mlp/up/kernel"].std() == pytest.approx(std_up, rel=0.05)
    assert params["block_1/attention/query/kernel"].std() == pytest.approx(std_up, rel=0.05)
    assert params["block_1/mlp/down/kernel"].std() == pytest.approx(std_down, rel=0.05)
    assert params["block_1/attention/out/kernel"].std() == pytest.approx(
        std_down if init == "gpt2" else std_up, rel=0.05
    )
    for table in ("embedding", "position_embedding"):
        assert params[table].std() == pytest.approx(std_embedding, rel=0.05)
    biases = np.concatenate([leaf for name, leaf in params.items() if name.endswith("up/bias")])
    assert biases.std() == pytest.approx(1 / math.sqrt(3 * 60) if init == "torch" else 0, rel=0.1)


def test_parameter_counts_known_from_elsewhere():
    def count(name):
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: init(name))))

    def init(name):
        return init_params(build_model(preset(name).model), jax.random.key(0))

    assert count("gpt2-124m") == 124_439_808  # Hugging Face's gpt2
    assert count("shakespeare-char") - 256 * 384 == 10_646_784  # nanoGPT prints 10.65M, positions left out
    assert count("nanogpt-cpu") - 64 * 128 == 795_904  # nanoGPT prints 0.80M
    embeddings_and_head = 65 * 384 + 256 * 384 + 384 * 65 + 65
    assert count("bigram") == 65 * 65
    assert count("embedding-bigram") == 65 * 32 + 32 * 65 + 65
    assert count("single-head") == embeddings_and_head + 3 * 384 * 384
    values_of_full_width = 2 * 384 * 384 + 384 * 6 * 384 + 6 * 384 * 384 + 384
    assert count("multi-head") == embeddings_and_head + values_of_full_width
    mlp, norms = 2 * 4 * 384 * 384 + 5 * 384, 4 * 384
    assert count("relu-transformer") == embeddings_and_head + 6 * (values_of_full_width + mlp + norms) + 2 * 384


@pytest.mark.parametrize(
    ("base", "kind"),
    [
        (BASE, "dropout"),
        (BASE, "attention_dropout"),
        (BASE, "embedding_dropout"),
        (VARIANTS["local"], "attention_dropout"),
    ],
)
def test_dropout_acts_in_training_only(base, kind):
    cfg = dataclasses.replace(base, **{kind: 0.5})
    tokens = random_tokens(cfg, 2, 7)
    np.testing.assert_array_equal(logits_of(cfg, tokens), logits_of(base, tokens))
    one, same, other = (logits_of(cfg, tokens, train=True, key=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-2
    assert np.abs(one - logits_of(cfg, tokens)).max() > 1e-2


def test_dropout_keeps_the_mean_of_what_it_drops():
    cfg = variant(num_layers=1, mlp_dim=0, residual=False, norm="none", attention_dropout=0.3, position="none")
    model, params = built(cfg)
    tokens = random_tokens(cfg, 1, 5)
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = jax.jit(jax.vmap(lambda key: model.apply({"params": params}, tokens, train=True, rngs={"dropout": key})[0]))
    logits = np.asarray(draw(keys), np.float64)  # linear in the dropped attention weights, so the mean is exact
    deviation = logits.mean(0) - np.asarray(logits_of(cfg, tokens))
    assert (np.abs(deviation) <= 5 * logits.std(0) / math.sqrt(len(keys)) + 1e-6).all()
    assert logits.std(0).max() > 0.1


def silent(**fields):
    """(config, model, parameters) whose one block writes nothing: logits are the residual stream times the head."""
    cfg = variant(num_layers=1, mlp_dim=0, norm="none", position="none", **fields)
    model, params = built(cfg)
    return cfg, model, {**params, "block_0": jax.tree.map(jnp.zeros_like, params["block_0"])}


def test_dropout_acts_on_the_embeddings_before_the_first_block():
    _, model, params = silent(dropout=0.5, tie_embeddings=False)
    params["head"] = {"kernel": jnp.eye(24)[:, :11]}
    tokens = jnp.array([[3, 4, 3, 5]])
    out = np.asarray(
        apply(model, params, tokens, train=True, key=jax.random.key(1))[0] / params["embedding"][tokens][..., :11]
    )
    assert set(np.round(out.ravel(), 4)) == {0.0, 2.0}


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_dropout_drops_every_occurrence_of_a_word(tied):
    _, model, params = silent(embedding_dropout=0.5, tie_embeddings=tied)
    tokens = jnp.array([[3, 4, 3, 5, 3, 6, 7]])
    out, _ = apply(model, params, tokens, train=True, key=jax.random.key(1))
    words = params["embedding"][tokens] @ (params["embedding"].T if tied else params["head"]["kernel"])
    ratio = np.asarray((out / words)[0]).mean(axis=-1)  # the head's own table drops nothing
    assert set(np.round(ratio, 3)) == {0.0, 2.0}
    assert ratio[0] == ratio[2] == ratio[4]


def test_types_of_parameters_activations_and_logits():
    cfg = variant(dtype="bfloat16")
    model, params = built(cfg)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    tokens = random_tokens(cfg, 2, 7)
    logits = logits_of(cfg, tokens)
    assert logits.dtype == jnp.float32
    cache = model.init_cache(2, 7)
    assert cache.layers[0].keys.dtype == jnp.bfloat16
    exact, _ = apply(build_model(BASE), params, tokens)
    error = float(np.abs(logits - exact).max() / np.abs(exact).max())
    assert 1e-5 < error < 0.05
    half = init_params(build_model(variant(param_dtype="bfloat16")), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}


def test_a_token_outside_the_vocabulary_gives_nan_not_a_neighbour():
    logits = np.asarray(logits_of(BASE, jnp.array([[1, 2, 11], [1, 2, 10], [1, 2, -1]])))
    assert np.isnan(logits[[0, 2], 2]).all()
    assert np.isfinite(logits[1]).all()


def test_rope_angles_stay_wide_under_bfloat16():
    wide = variant(num_layers=1, residual=False, mlp_dim=0, window=4)
    cfg = dataclasses.replace(wide, dtype="bfloat16")
    tokens = random_tokens(cfg, 1, 700)
    model, params = built(wide)
    exact = np.asarray(apply(model, params, tokens)[0])[0, -100:]
    half = np.asarray(apply(build_model(cfg), params, tokens)[0])[0, -100:]
    # Rounded to bfloat16, positions past 512 fall on every fourth: neighbours would share their angles.
    error = np.sqrt(((half - exact) ** 2).mean() / (exact**2).mean())
    assert error < 0.02, error


def test_cudnn_is_called_with_the_layers_window(monkeypatch):
    """The same call through XLA's implementation: bfloat16 on both sides, so they agree to its rounding."""
    cfg = variant(window=(2, None), dtype="bfloat16", head_dim=8)
    _, params = built(cfg)
    fused = Transformer(dataclasses.replace(cfg, attention_impl="cudnn"))
    monkeypatch.setattr(attention, "cudnn_attend", functools.partial(cudnn_attend, implementation="xla"))
    tokens = random_tokens(cfg, 2, 7)
    logits = np.asarray(logits_of(cfg, tokens))
    ours = np.asarray(fused.apply({"params": params}, tokens)[0])
    assert np.sqrt(((ours - logits) ** 2).mean() / (logits**2).mean()) < 0.02


def test_what_the_machine_cannot_do_is_refused():
    with pytest.raises(ValueError, match=r"dtype = 'float64' .*set JAX_ENABLE_X64=1"):
        build_model(variant(dtype="float64"))
    if jax.default_backend() != "gpu":
        with pytest.raises(ValueError, match=r"attention_impl = 'cudnn' needs an NVIDIA GPU .*, and JAX runs on cpu"):
            build_model(variant(attention_impl="cudnn", dtype="bfloat16", head_dim=8))


@pytest.mark.parametrize(
    ("fields", "on_gpu"),
    [
        ({}, "cudnn"),
        ({"window": (2, None)}, "cudnn"),
        ({"attention_impl": "reference"}, "reference"),
        ({"dtype": "float32"}, "auto"),
        ({"attention_dropout": 0.1}, "auto"),
        ({"head_dim": 12}, "auto"),
        ({"attention_softcap": 3.0}, "auto"),
    ],
    ids=str,
)
def test_auto_is_cudnn_on_a_gpu_that_can_compute_it_and_only_there(monkeypatch, fields, on_gpu):
    cfg = variant(**{"dtype": "bfloat16", "head_dim": 8, "attention_impl": "auto", **fields})
    monkeypatch.setattr(build, "cudnn_available", lambda: True)
    model = build_model(cfg)
    assert model.cfg.attention_impl == on_gpu
    used = transformer.attention_implementations(model, 7)
    assert len(used) == cfg.num_layers
    assert {name == "cudnn" for name in used} == {on_gpu == "cudnn"}
    assert "cudnn" not in transformer.attention_implementations(model, 1)
    monkeypatch.setattr(build, "cudnn_available", lambda: False)
    assert build_model(cfg).cfg == cfg


@pytest.mark.parametrize(
    ("platform", "version", "capability", "expected"),
    [
        ("gpu", "PJRT C API\ncuda 13000", "9.0", True),
        ("gpu", "PJRT C API\ncuda 13000", "7.5", False),
        ("gpu", "rocm 60300", "gfx90a", False),
        ("cpu", "<unknown>", None, False),
    ],
)
def test_cudnn_needs_a_recent_nvidia_gpu(monkeypatch, platform, version, capability, expected):
    client = types.SimpleNamespace(platform_version=version)
    device = types.SimpleNamespace(platform=platform, client=client, compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert cudnn_available() is expected


def test_more_tokens_than_a_learned_table_has_are_refused():
    cfg = variant(position="learned")
    with pytest.raises(ValueError, match=r"8 tokens are beyond .* max_seq_len = 7"):
        logits_of(cfg, random_tokens(cfg, 1, 8))
    assert logits_of(BASE, random_tokens(BASE, 1, 8)).shape == (1, 8, 11)
