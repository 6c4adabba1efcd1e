"""Every test runs with jaxtyping's shape checks on, without rank promotion, and on real text where it reads text."""

import os

import checking

os.environ.pop("JAX_NUM_CPU_DEVICES", None)  # tests that need several devices ask for them
checking.install()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from jaxlm.compilation_cache import prune  # noqa: E402
from jaxlm.data import sources as recipes  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("any machine", deadline=None)  # a time limit fails on a busy one
hypothesis.settings.load_profile("any machine")


def pytest_ignore_collect(collection_path, config):
    return checking.is_left_out(collection_path, config.option.markexpr) or None


def pytest_sessionfinish(session):
    """Bounds the folder of compiled programs, once all processes are done with it."""
    if not hasattr(session.config, "workerinput"):
        prune(checking.PROGRAMS, 2**30)


@pytest.fixture(scope="session")
def shakespeare():
    """The path of the real corpus, fetched once."""
    return recipes.fetch("tinyshakespeare").train[0]


@pytest.fixture(scope="session")
def librispeech():
    """The files of the real transcripts, where the cache has them: the archives they come from are 1 GB."""
    if not (recipes.data_dir() / "librispeech").is_dir():
        pytest.skip("the data cache has no librispeech: `jaxlm prepare librispeech` fetches it (1 GB)")
    return recipes.fetch("librispeech")
