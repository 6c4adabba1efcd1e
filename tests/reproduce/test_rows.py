"""The experiments as they stand: names, what rows need and compare with, settings that decide the numbers."""

import dataclasses

import pytest

from jaxlm.config import OptimConfig
from jaxlm.config.presets import preset
from jaxlm.errors import UserError
from jaxlm.reproduce.catalog import EXPERIMENTS, experiment
from jaxlm.reproduce.rows import Training
from jaxlm.reproduce.work import jobs_of


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_rows_name_rows_that_come_before_them(name):
    exp = experiment(name)
    assert exp.name == name
    names = [row.name for row in exp.rows]
    assert len(set(names)) == len(names)
    for i, row in enumerate(exp.rows):
        assert set(row.needs) <= set(names[:i])
        assert row.below is None or row.below[0] in names
        assert row.seeds
        assert " " not in row.name


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_labels_tell_rows_apart(name):
    labels = [row.label for row in experiment(name).rows]
    assert len(set(labels)) == len(labels)


def test_settings_are_what_decides_the_numbers():
    config = dataclasses.replace(preset("tiny"), optim=OptimConfig(learning_rate=0.5))
    row = Training(name="a", label="a", config=config)
    settings = row.settings(3)
    assert settings["optim.learning_rate"] == 0.5
    assert settings["train.seed"] == 3
    assert settings["model.embed_dim"] == 32
    assert not [name for name in settings if name.startswith(("sample", "preset", "train.eval"))]
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_every=7))
    assert Training(name="a", label="a", config=other).settings(3) == settings
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=7))
    assert Training(name="a", label="a", config=longer).settings(3) != settings


def test_jobs_come_after_those_they_need():
    jobs = [(row.name, seed) for row, seed in jobs_of(experiment("cmu10423"), ["rope-256", "learned-256"], [2])]
    assert jobs == [("rope", 2), ("rope-256", 2), ("learned", 2), ("learned-256", 2)]


def test_each_row_has_its_own_seeds():
    jobs = [(row.name, seed) for row, seed in jobs_of(experiment("stats305"), ["bigram", "multi-head"], None)]
    assert jobs == [("bigram", 0), ("bigram", 1), ("bigram", 2), ("multi-head", 0)]


def test_unknown_names_are_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"row 'adam' is unknown in cmu15780: choose one of adam-1e-3, sgd-1e-3"):
        experiment("cmu15780").row("adam")
    with pytest.raises(UserError, match=r"experiment 'cmu' is unknown: choose one of nanogpt-optimizers, stats305"):
        experiment("cmu")
