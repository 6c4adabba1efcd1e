"""Shape checks as in tests/."""

import checking

checking.install()


def pytest_ignore_collect(collection_path, config):
    return checking.is_left_out(collection_path, config.option.markexpr) or None
