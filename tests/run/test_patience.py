"""Early stopping: when it stops, what a resumed run remembers, and what it says."""

import dataclasses

import pytest

from jaxlm.config import DataConfig, ModelConfig, TrainConfig
from jaxlm.config.presets import preset
from jaxlm.errors import UserError
from jaxlm.run.metrics import read_rows
from jaxlm.run.patience import StopWithoutBest
from jaxlm.run.training import train


def rows(*losses, **fields):
    return [{"step": 10 * (i + 1), "val_loss": loss, **fields} for i, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "stops"),
    [
        ([3.0, 2.0, 2.0, 1.9, 2.5], False),
        ([3.0, 2.0, 2.0, 2.5], True),  # an equal loss is no new best
        ([1.0, 2.0], False),
    ],
)
def test_it_stops_after_so_many_evaluations_without_a_new_best(losses, stops):
    assert StopWithoutBest(2, None, rows(*losses)).should_stop() == stops
    assert not StopWithoutBest(None, None, rows(*losses)).should_stop()
    live = StopWithoutBest(2, None, rows(losses[0]))
    for row in rows(*losses)[1:]:
        live.note(row)
        live.note({"step": 1, "loss": 9.0})
    assert live.should_stop() == stops


def test_estimates_are_compared_among_themselves():
    mixed = [*rows(1.0, 1.1), *rows(2.0, 1.5, eval_batches=4), *rows(0.5, 0.6, eval_batches=8)]
    stop = StopWithoutBest(1, 4, mixed)
    assert not stop.should_stop()
    stop.note({"step": 60, "val_loss": 1.7, "eval_batches": 4})
    assert stop.should_stop()
    assert stop.reason == "1 evaluations without a new best (val_loss 1.5000 at step 20; train.patience)"


@pytest.mark.parametrize("value", [0, -1])
def test_a_patience_out_of_range_is_refused(value):
    with pytest.raises(UserError, match=f"patience = {value} is too small: give at least 1"):
        TrainConfig(patience=value)


def test_a_run_without_progress_stops_saves_and_stays_stopped_until_it_gets_more(tmp_path, shakespeare, capsys):
    (tmp_path / "text.txt").write_text(shakespeare.read_text()[:5_000])
    tiny, out = preset("tiny"), tmp_path / "run"
    config = dataclasses.replace(
        tiny,
        data=DataConfig(path=str(tmp_path / "text.txt")),
        model=ModelConfig(family="embedding_bigram", vocab_size=65, max_seq_len=32, embed_dim=8),
        optim=dataclasses.replace(tiny.optim, warmup_steps=0, learning_rate=0.0),  # no evaluation is a new best
        train=dataclasses.replace(tiny.train, steps=20, eval_every=2, checkpoint_every=20, patience=2),
    )
    outcome = train(config, out)
    assert (outcome.step, outcome.signum) == (6, None)
    assert "stopped by 2 evaluations without a new best" in capsys.readouterr().err
    assert train(config, out, resume=True).step == 6
    more = dataclasses.replace(config, train=dataclasses.replace(config.train, patience=4))
    assert train(more, out, resume=True).step == 10
    assert [row["step"] for row in read_rows(out / "metrics.jsonl") if "val_loss" in row] == [2, 4, 6, 8, 10]
