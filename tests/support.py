"""Models and tokens that tests share, so that each is made once a session."""

import contextlib
import functools
import io
import os
from unittest import mock

import jax
from checking import PROGRAMS
from jaxtyping import Array

from jaxlm.cli.main import main
from jaxlm.config import ModelConfig
from jaxlm.model.build import build_model, init_params


@functools.cache
def built(cfg: ModelConfig, seed: int = 0):
    """(model, params) of a config, made once a session; parameters are large enough for every path to matter."""
    model = build_model(cfg)
    params = init_params(model, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [leaf + 0.3 * jax.random.normal(k, leaf.shape, leaf.dtype) for leaf, k in zip(leaves, keys, strict=True)]
    return model, jax.tree.unflatten(tree, noisy)


def apply(model, params, tokens, cache=None, lengths=None, train=False, key=None):
    """(logits, cache) of a model, compiled; `cache` may be the capacity of a new one, `key` is that of dropout."""
    capacity, cache = (cache, None) if isinstance(cache, int) else (None, cache)
    return _apply(model, params, tokens, cache, lengths, key, train=train, capacity=capacity)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("train", "capacity"))
def _apply(model, params, tokens, cache, lengths, key, train, capacity):
    rngs = None if key is None else {"dropout": key}
    given = cache if capacity is None else capacity
    return model.apply({"params": params}, tokens, cache=given, lengths=lengths, train=train, rngs=rngs)


def random_tokens(cfg: ModelConfig, batch: int, length: int, seed: int = 0) -> Array:
    """[batch, length] int32 ids."""
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, cfg.vocab_size)


def command(*arguments):
    """(exit code, stdout, stderr) of `jaxlm ARGUMENTS`."""
    out, err = io.StringIO(), io.StringIO()
    environment = {"JAX_COMPILATION_CACHE_DIR": PROGRAMS, **os.environ}
    with mock.patch.dict(os.environ, environment), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def refused(*arguments):
    """The one line of a refusal."""
    code, out, err = command(*arguments)
    assert code == 2, f"exit code {code}: {err}"
    assert out == ""
    assert err.startswith("jaxlm: error: ")
    assert err.count("\n") == 1
    return err


def snapshot(root):
    """The content of every file under a folder."""
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


FEW_STEPS = (
    *("train", "tiny", "--train.steps", "30", "--train.eval-every", "15", "--train.checkpoint-every", "15"),
    *("--model.num-layers", "1", "--optim.warmup-steps", "2", "--sample.max-new-tokens", "20"),
)
"""The command that trains the run of the tests."""
