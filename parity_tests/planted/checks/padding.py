"""Rows of several lengths in one batch against each row alone in torchref: `jaxlm.parity.padding`."""

from jaxlm.config import ModelConfig
from jaxlm.parity import Report, random_params
from jaxlm.parity.comparison import Comparison
from jaxlm.parity.inputs import Batches
from jaxlm.parity.padding import compare_padding
from jaxlm.parity.report import joined


def check_padding(cfg: ModelConfig) -> Report:
    """Reads a padded batch without a cache, through the cache, and as prompts."""
    return joined([compare_padding(Comparison(cfg, random_params(cfg), Batches(cfg, None, 0, 1), with_grads=False))])
