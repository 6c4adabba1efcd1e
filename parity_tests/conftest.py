"""Shape checks as in tests/."""

import os

import checking

os.environ.pop("JAX_NUM_CPU_DEVICES", None)  # tests that need several devices ask for them
checking.install()


def pytest_ignore_collect(collection_path, config):
    return checking.is_left_out(collection_path, config.option.markexpr) or None
