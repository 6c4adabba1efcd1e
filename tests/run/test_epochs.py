"""Epochs become steps once the data are known; both are kept, and a resumed run may have more of either."""

import dataclasses

import numpy as np
import pytest
from support import refused

from jaxlm.cli.options import parse_options
from jaxlm.cli.train import _defaults, _TrainOptions
from jaxlm.config import DataConfig, ModelConfig, TrainConfig
from jaxlm.config.presets import preset
from jaxlm.data.batches import PaddedRows, TokenStream
from jaxlm.data.corpus import Corpus
from jaxlm.data.tokenizer import IdTokenizer
from jaxlm.errors import UserError
from jaxlm.run.epochs import batches_per_epoch, with_steps
from jaxlm.run.folder import read_config
from jaxlm.run.metrics import OF_CLOCKS, read_rows
from jaxlm.run.training import train

ROWS = np.array([[9, 1, 2, 9], [9, 3, 9, 9], [9, 4, 9, 9]], np.uint8)  # 4 targets (the first <eos> of padding is none)


def config(epochs=None, batch_size=8):
    tiny = preset("tiny")
    return dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, epochs=epochs, batch_size=batch_size))


def corpus(split):
    return Corpus(IdTokenizer(65), split, split, "")


def test_an_epoch_is_as_many_targets_as_the_training_split_has():
    text = corpus(TokenStream(np.zeros(8 * 32 * 10 + 1, np.uint8), 32))
    assert batches_per_epoch(config(), text.train) == 10.0
    for epochs, steps in ((1, 10), (2.5, 25), (0.01, 1), (1.01, 11)):
        assert with_steps(config(epochs), text).train.steps == steps
    assert with_steps(config(), text) == config()
    rows = corpus(PaddedRows(ROWS, 9))
    assert batches_per_epoch(config(batch_size=2), rows.train) == 1.5  # three rows, two a batch
    assert with_steps(config(2, batch_size=2), rows).train.steps == 3


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_epochs_out_of_range_are_refused(value):
    with pytest.raises(UserError, match=r"epochs = .* is out of range: give a (number above 0|finite number)"):
        TrainConfig(epochs=value)


def rows(out):
    logged = read_rows(out / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in OF_CLOCKS} for row in logged]


def test_a_run_of_epochs_gets_more_of_them_and_keeps_its_rows(tmp_path, shakespeare, capsys):
    (tmp_path / "text.txt").write_text(shakespeare.read_text()[:5_000])
    out, start = tmp_path / "run", config(0.5)
    start = dataclasses.replace(
        start,
        data=DataConfig(path=str(tmp_path / "text.txt")),
        model=ModelConfig(family="embedding_bigram", vocab_size=65, max_seq_len=32, embed_dim=8),
        optim=dataclasses.replace(start.optim, warmup_steps=0, schedule="constant"),
    )
    train(start, out)
    line, *_ = capsys.readouterr().err.splitlines()
    steps = 9  # of 256 targets: 2,250 of 4,499
    assert line.startswith(f"{out}: 1 x cpu (")
    assert " 4,500 training tokens, 18 batches an epoch, 0.51 epochs in 9 steps, about 0." in line
    assert (read_config(out).train.epochs, read_config(out).train.steps) == (0.5, steps)
    before = rows(out)
    train(dataclasses.replace(start, train=dataclasses.replace(start.train, epochs=0.6)), out, resume=True)
    assert " 0.63 epochs in 11 steps from step 9, about 0." in capsys.readouterr().err
    assert rows(out)[: len(before)] == before
    assert (read_config(out).train.epochs, read_config(out).train.steps) == (0.6, 11)
    # An option of the command for the steps takes the place of the epochs that the run had.
    options = parse_options(_TrainOptions, ["--resume", "--out", str(out), "--train.steps", "12"], "train", _defaults)
    assert (options.train.epochs, options.train.steps) == (None, 12)
    both = refused("train", "--resume", "--out", out, "--train.epochs", "1", "--train.steps", "20")
    assert "--train.steps 20 and --train.epochs 1.0 both say how long the run is: leave one out" in both
