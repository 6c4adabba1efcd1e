"""Held-out transcripts that the tests of evals share, and a run's log-probabilities row by row."""

import numpy as np
from support import apply

LINES = [
    "THE SEA WAS CALM AND THE OLD MAN SLEPT",  # too short for every task but likelihood
    "NO ONE COULD SAY WHERE THE ROAD HAD BEEN",  # 40 characters: nothing follows the longer prompt
    "THE SHIP CAME IN AT DAWN WITH ITS SAILS TORN AND NOT A SOUL ON BOARD TO TELL OF THE NIGHT",
    "IT WAS THE SAME ROAD THAT THEY HAD TAKEN THE YEAR BEFORE AND",
    "WHO HAD LEFT THE DOOR OPEN SHE ASKED AND NOBODY SPOKE A WORD TO HER THAT EVENING OR THE NEXT",
    "",
    "THEN THE RAIN BEGAN TO FALL ON THE ROOFS OF",
]


def row_of(line, tokenizer):
    return [28, *tokenizer.encode(line).tolist()]


def logits_of(trained, row):
    """[len(row), V] after each token: one program, whatever the length, as the model is causal."""
    padded = np.array([[*row, *[0] * (96 - len(row))]])
    return np.asarray(apply(trained.model, trained.params, padded)[0][0], np.float64)[: len(row)]


def log_probs_of(trained, row):
    """The log-probability of each of row[1:], in numpy."""
    logits = logits_of(trained, row[:-1])
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(log_probs, np.array(row[1:])[:, None], axis=-1)[:, 0]
