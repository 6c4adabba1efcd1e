"""Where a run leaves the finite numbers: the layer, gradient or update, and the step, are named."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import DataConfig, ExperimentConfig, ModelConfig, OptimConfig, TrainConfig
from jaxlm.data.batches import TokenStream, WindowBlock
from jaxlm.errors import CheckError
from jaxlm.model.layer_stack import stack_params, unstack_params
from jaxlm.run import hooks, nonfinite
from jaxlm.run.saving import Saver
from jaxlm.run.session import new_session
from jaxlm.run.training import train
from jaxlm.sharding.layout import put
from jaxlm.training.step import TrainState, batch_loss


@pytest.fixture
def config(tmp_path, shakespeare):
    (tmp_path / "text.txt").write_text(shakespeare.read_text()[:30_000])
    return ExperimentConfig(
        preset="test",
        model=ModelConfig(family="embedding_bigram", vocab_size=58, max_seq_len=8, embed_dim=8, tie_embeddings=False),
        data=DataConfig(path=str(tmp_path / "text.txt")),
        optim=OptimConfig(warmup_steps=0, schedule="constant", clip_norm=None),
        train=TrainConfig(steps=20, batch_size=4, grad_accum=2, log_every=4, eval_every=20, checkpoint_every=4),
    )


def diverged(config, out):
    """The line of a run that diverges."""
    with pytest.raises(CheckError) as error:
        train(config, out)
    return str(error.value)


def test_an_update_that_is_not_finite_is_named_with_its_step(config, tmp_path):
    optim = dataclasses.replace(config.optim, learning_rate=1e10, weight_decay=1e30)
    line = diverged(dataclasses.replace(config, optim=optim), tmp_path / "run")
    assert line.startswith("step 2: loss nan, gradient norm nan; the first that is not finite is the update of ")
    assert " is the update of embedding (and 1 other) in step 1; " in line
    assert line.endswith("keeps its last checkpoint (none); lower --optim.learning-rate, and go on with --resume")


def spoiled(step):
    """A feed whose batch of one step has a token that is not in the vocabulary, whose embedding is NaN."""

    def feed(stream, seed, batch_size, num_steps, put):
        on_device = TokenStream(jax.numpy.asarray(stream.tokens), stream.seq_len)

        def read(first):
            block = np.stack([on_device.windows(seed, first + i, batch_size) for i in range(num_steps)])
            if first < step <= first + num_steps:
                block[step - 1 - first, 0, 0] = 999
            return WindowBlock(jax.numpy.asarray(block), jax.numpy.int32(first))

        return read

    return feed


def test_the_steps_are_taken_again_from_the_last_checkpoint(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(TokenStream, "feed", spoiled(7))
    line = diverged(config, tmp_path / "run")
    assert line.startswith("step 7: loss nan, gradient norm nan; the first that is not finite is the input of ")
    assert " in step 7; " in line
    assert line.endswith("keeps its last checkpoint (step 4); lower --optim.learning-rate, and go on with --resume")
    assert "step 7 is not finite: looking for where that begins, from step 4 on" in capsys.readouterr().err

    def exhausted(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(nonfinite, "_within", exhausted)
    line = diverged(config, tmp_path / "full")
    assert "; where it began could not be looked for (RESOURCE_EXHAUSTED: Out of memory); " in line
    monkeypatch.setattr(nonfinite, "SECONDS", 0.0)
    line = diverged(config, tmp_path / "another")
    assert "; where it begins was looked for up to step 4, and not found; " in line


@pytest.fixture
def session(config, tmp_path):
    return new_session(config, tmp_path / "run")


def within(session, params):
    source = session.corpus.train.feed(0, 4, 1, put)(0)
    return nonfinite._within(session, session.state._replace(params=params), source, None)


def test_a_gradient_is_named_where_the_forward_pass_is_finite(session, monkeypatch):
    """The derivative of a square root at 0 is infinite, and times 0 not a number."""

    def spoiled(params, *args):
        return batch_loss(params, *args) + jnp.sqrt(jnp.abs(params["head"]["kernel"]) * 0).sum()

    assert within(session, session.state.params).startswith("no layer and no gradient")
    monkeypatch.setattr(nonfinite, "batch_loss", spoiled)
    assert within(session, session.state.params) == "the gradient of head/kernel"


@pytest.mark.slow
def test_of_several_gradients_that_of_the_last_layer_is_named(config, tmp_path, monkeypatch):
    """The backward pass comes there first."""
    model = ModelConfig(vocab_size=58, max_seq_len=8, num_layers=2, embed_dim=8, num_heads=2)
    session = new_session(dataclasses.replace(config, model=model), tmp_path / "run")

    def spoiled(params, *args):
        bad = params["embedding"], params["block_0"]["mlp"]["up"]["kernel"], params["block_1"]["mlp"]["up"]["bias"]
        return batch_loss(params, *args) + sum(jnp.sqrt(jnp.abs(leaf) * 0).sum() for leaf in bad)

    monkeypatch.setattr(nonfinite, "batch_loss", spoiled)
    found = within(session, session.state.params)
    assert found == "the gradient of block_1/mlp/up/bias (and 2 others)"


def test_a_norm_beyond_float32_and_a_loss_are_named(session, monkeypatch):
    params = jax.tree.map(jnp.copy, session.state.params)
    params["embedding"] = jnp.full_like(params["embedding"], 1e25)
    assert within(session, params).startswith("the norm of the gradient, whose numbers reach ")
    monkeypatch.setattr(nonfinite, "batch_loss", lambda *args: batch_loss(*args) * jnp.nan)
    assert within(session, session.state.params) == "the loss, of finite logits"


@pytest.mark.parametrize("changes", [{}, {"scan_layers": True, "remat": True}])
def test_the_first_layer_of_the_forward_pass_is_named(config, tmp_path, changes):
    model = ModelConfig(vocab_size=58, max_seq_len=8, num_layers=2, embed_dim=8, num_heads=2, **changes)
    session = new_session(dataclasses.replace(config, model=model), tmp_path / "run")
    sound = session.state.params
    params = jax.tree.map(jnp.copy, unstack_params(model, sound) if changes else sound)
    params["block_1"]["mlp"]["up"]["kernel"] = params["block_1"]["mlp"]["up"]["kernel"].at[0].set(jnp.inf)
    params = stack_params(model, params) if changes else params
    arguments = jnp.zeros((2, 9), jnp.int32), jax.random.key(0), None, None
    found, layers = nonfinite._in_forward_pass(session, params, *arguments)
    assert found.startswith("the output of block_1/mlp/up (before it, numbers up to ")
    assert layers.index("block_0") < layers.index("block_1") < layers.index("final_norm")
    assert nonfinite._in_forward_pass(session, sound, *arguments)[0] is None
    assert nonfinite._bad_parameters(session, params) == ["block_1/mlp/up/kernel"]


def test_a_state_that_is_not_finite_is_not_saved(config, tmp_path):
    save = hooks.SaveCheckpoints(Saver(tmp_path / "run/checkpoints", 2), config.train, None)
    state = TrainState({"w": jnp.array([1.0, jnp.nan])}, (), jnp.int32(4))
    with pytest.raises(CheckError, match=r"step 4: parameters are not finite; .* checkpoint \(none\)"):
        save.on_boundary(state, 4)
    assert not (tmp_path / "run").exists()


def test_where_no_rate_helps_an_earlier_checkpoint_is_named(config, tmp_path, monkeypatch):
    monkeypatch.setattr(TokenStream, "feed", spoiled(9))
    out = tmp_path / "run"
    line = diverged(config, out)
    assert f"no rate helps from step 8 on: move {out}/checkpoints/8 away, and go on from step 4 with --resume" in line
    (advised,) = nonfinite.DivergedError(5, "loss nan", "lower it").at(nonfinite.Place("here", 4), out).args
    assert advised == (
        "loss nan; here; no rate helps from step 4 on: start a new --out with a lower --optim.learning-rate"
    )
