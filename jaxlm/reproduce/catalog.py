"""The experiments by name. Each is built when it is asked for, so that refusals and --help come at once."""

import importlib

from jaxlm.errors import UserError
from jaxlm.reproduce.rows import Experiment

EXPERIMENTS = {
    "nanogpt-optimizers": "A report on nanoGPT's optimizers: AdamW, AdamSN, Adafactor, SGD, mean-pooled groups",
    "stats305": "Stanford STATS 305: from a bigram to a transformer of six blocks",
    "cmu10423": "CMU 10-423: RoPE, grouped queries, sliding windows",
    "cmu15780": "CMU 15-780: Adam against SGD, cached against naive sampling",
    "cmu11785": "CMU 11-785: characters of LibriSpeech transcripts",
    "nanogpt-gpu": "nanoGPT's GPU configuration: shakespeare-char",
}
"""Name -> what it is; nanogpt-optimizers is in jaxlm/reproduce/nanogpt_optimizers.py, and so on."""


def experiment(name: str) -> Experiment:
    """The experiment called `name`.

    Raises:
      UserError: there is none.
    """
    if name not in EXPERIMENTS:
        raise UserError(f"experiment {name!r} is unknown: choose one of {', '.join(EXPERIMENTS)}")
    return importlib.import_module(f"jaxlm.reproduce.{name.replace('-', '_')}").EXPERIMENT
