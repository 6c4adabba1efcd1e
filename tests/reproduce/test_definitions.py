"""The rows are those of the published comparisons: settings, published numbers and targets, written out here."""

import dataclasses

import pytest

from jaxlm.reproduce.catalog import experiment
from jaxlm.reproduce.records import folder_of, settings_of, write_record
from jaxlm.reproduce.side_by_side import _is_ready

# row: optimizer, rate, b2, decay, warm-up, published and wanted validation loss
OPTIMIZERS = {
    "adamw-1e-3": ("adamw", 1e-3, 0.99, 0.1, 100, 1.9353, 1.91),
    "adamw-0.006": ("adamw", 6e-3, 0.99, 0.1, 100, None, 1.76),
    "adam-1e-3": ("adam", 1e-3, 0.999, 0.0, 100, 1.9353, 1.9353),
    "adamsn-same-rate": ("adamsn", 1e-2, 0.99, 0.1, 100, 2.3416, 1.93),
    "adamsn-same-rate-smaller": ("adamsn", 1e-2, 0.99, 0.1, 100, 2.3416, 1.93),
    "adamsn-0.1": ("adamsn", 1e-1, 0.99, 0.1, 100, None, None),
    "adafactor-1e-3": ("adafactor", 1e-3, 0.99, 0.1, 100, 1.9338, 1.9338),
    "adafactor-0.003": ("adafactor", 3e-3, 0.99, 0.1, 100, None, 1.79),
    "mean-pooled-2": ("adamw", 1e-3, 0.99, 0.1, 100, 1.9180, 1.90),
}
# row: steps, rate, decay, published training and validation loss, wanted validation loss
STATS305 = {
    "bigram": (1000, 1e-2, 0.01, 2.4728, 2.5016, 2.50),
    "embedding-bigram": (1000, 1e-2, 0.01, 2.4584, 2.4927, 2.49),
    "single-head": (1000, 6e-4, 0.01, 2.3517, 2.3903, 2.39),
    "multi-head": (1000, 6e-4, 0.01, 1.9331, 2.0736, 2.07),
    "relu-transformer": (2000, 1e-4, 0.0, 1.4201, 1.6275, 1.63),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_optimizers_are_compared_as_published(name):
    row = experiment("nanogpt-optimizers").row(name)
    optim, model, train = row.config.optim, row.config.model, row.config.train
    found = (optim.name, optim.learning_rate, optim.b2, optim.weight_decay, optim.warmup_steps)
    assert (*found, row.published.get("val_loss"), row.targets.get("val_loss")) == OPTIMIZERS[name]
    assert (optim.schedule, optim.min_lr_ratio, optim.clip_norm) == ("cosine", 0.1, 1.0)
    assert (model.num_layers, model.num_heads, model.embed_dim, model.max_seq_len) == (4, 4, 128, 64)
    assert (train.steps, train.batch_size, row.seeds) == (2000, 12, (0, 1, 2))


def test_the_reports_rule_and_the_rest_of_adamsn():
    exp = experiment("nanogpt-optimizers")
    optim = {name: exp.row(name).config.optim for name in OPTIMIZERS if name.startswith("adamsn")}
    assert [o.subset for o in optim.values()] == ["per_output", "smaller", "per_output"]
    assert [o.adam_lr_ratio for o in optim.values()] == [1.0, 1.0, pytest.approx(0.06)]
    pooled = exp.row("mean-pooled-2")
    assert (pooled.config.model.num_kv_heads, pooled.config.model.kv_sharing) == (2, "mean_pooled")
    assert pooled.published["train_loss"] == 1.7875


@pytest.mark.parametrize("name", list(STATS305))
def test_the_ladder_is_trained_as_published(name):
    row = experiment("stats305").row(name)
    optim, train = row.config.optim, row.config.train
    found = (train.steps, optim.learning_rate, optim.weight_decay)
    assert (*found, row.published["train_loss"], row.published["val_loss"], row.targets["val_loss"]) == STATS305[name]
    assert (optim.name, optim.schedule, train.batch_size, row.config.model.max_seq_len) == (
        "adamw",
        "constant",
        32,
        256,
    )
    assert "ROMEO:" in row.prompts


def test_chargpt_goes_from_128_to_256():
    exp = experiment("cmu10423")
    for name, position in (("rope", "rope"), ("learned", "learned")):
        first, second = exp.row(name), exp.row(f"{name}-256")
        assert (first.config.model.position, first.config.model.max_seq_len, first.config.train.steps) == (
            position,
            128,
            600,
        )
        assert second.config.model == dataclasses.replace(first.config.model, max_seq_len=256)
        assert (second.init_from, second.config.train.steps) == (name, 200)
        assert second.extend_positions == (name == "learned")
        assert (first.config.train.batch_size, first.config.model.dropout) == (64, 0.1)
    assert exp.row("rope").below == ("learned", 0.0)


def test_one_epoch_is_an_epoch():
    rows = experiment("cmu15780").rows[:3]
    for row in rows:
        train, optim = row.config.train, row.config.optim
        assert train.steps == 1_003_854 // (train.batch_size * 64)
        assert (optim.schedule, optim.warmup_steps, optim.weight_decay, optim.clip_norm) == ("constant", 0, 0.0, None)
    assert [(row.config.optim.name, row.config.optim.learning_rate) for row in rows] == [
        ("adam", 1e-3),
        ("sgd", 1e-3),
        ("sgd", 0.1),
    ]


def test_the_gpu_setting_and_the_transcripts():
    row = experiment("nanogpt-gpu").row("shakespeare-char")
    assert (row.published["best_val_loss"], row.config.train.steps, row.config.train.batch_size) == (1.4697, 5000, 64)
    row = experiment("cmu11785").row("transcripts")
    assert dict(row.targets) == {"val_loss": 1.6, "prediction_nll": 3.2, "calibrated_prediction_nll": 3.2}
    assert "prediction_temperature" in row.quantities
    assert row.needs == ("oracle",)


def test_a_row_waits_for_the_row_whose_weights_it_needs(tmp_path):
    exp = experiment("cmu10423")
    job, source = (exp.row("rope-256"), 0), exp.row("rope")
    assert not _is_ready(exp, job, tmp_path, True)
    losses = dict.fromkeys(("val_loss", "train_loss", "last_loss", "best_val_loss", "perplexity", "wall_s"), 1.0)
    made = {
        "row": "rope",
        "seed": 0,
        "versions": {},
        "date": "",
        "device": "",
        "threads": 1,
        "curve": [],
        "samples": {},
    }
    for quick in (False, True):  # a full version is none of a quick one
        settings = settings_of(exp, source, 0, quick)
        record = {**made, **losses, "parameters": 1, "state_bytes": 1, "settings": settings}
        write_record(folder_of(tmp_path, "rope", 0), record)
        assert _is_ready(exp, job, tmp_path, True) == quick
