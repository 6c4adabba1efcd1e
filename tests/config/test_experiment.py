"""Which optimizer reads which field, and where data are."""

import dataclasses
from pathlib import Path

import pytest

from jaxlm.config import DataConfig, OptimConfig
from jaxlm.config.base import difference, from_dict, to_dict
from jaxlm.config.experiment import idle_optim_fields, optimizer_fields
from jaxlm.config.presets import preset
from jaxlm.errors import UserError


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("sgd", set()),
        ("adam", {"b1", "b2", "eps"}),
        ("adamw", {"b1", "b2", "eps"}),
        ("adamsn", {"b1", "b2", "eps", "subset", "adam_lr_ratio"}),
        ("adafactor", {"b2", "eps"}),
        ("lion", set()),  # an optimizer of Optax takes them as arguments
    ],
)
def test_an_optimizer_reads_its_fields_and_refuses_the_others(name, fields):
    assert {*optimizer_fields(name)} == fields
    idle = idle_optim_fields(name)
    assert idle.keys() == {"b1", "b2", "eps", "subset", "adam_lr_ratio"} - fields
    others = {"b1": 0.5, "b2": 0.5, "eps": 0.5, "subset": "per_input", "adam_lr_ratio": 0.5}
    for field, value in others.items():
        if field in fields:
            assert getattr(OptimConfig(name=name, **{field: value}), field) == value
        else:
            with pytest.raises(ValueError, match=rf"{field} = {value!r} is not read by {name}: leave it out"):
                OptimConfig(name=name, **{field: value})
            assert idle[field] == getattr(OptimConfig(), field)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adamsn", "adafactor", "lion"])
def test_adam_alone_decays_nothing_unless_asked(name):
    usual = 0.0 if name == "adam" else 0.1
    assert OptimConfig(name=name).weight_decay == OptimConfig(name=name, weight_decay=None).weight_decay == usual
    assert OptimConfig(name=name, weight_decay=0.1).weight_decay == 0.1
    assert dataclasses.replace(OptimConfig(weight_decay=0.2), name=name, weight_decay=None).weight_decay == usual
    with pytest.raises(UserError, match=r"weight_decay = -0.1 is too small: give at least 0"):
        OptimConfig(name=name, weight_decay=-0.1)


def test_a_stored_config_keeps_its_decay_and_is_equal_to_one_without():
    stored = to_dict(OptimConfig(name="adam", weight_decay=0.1))
    assert from_dict(OptimConfig, stored).weight_decay == stored["weight_decay"] == 0.1
    assert to_dict(OptimConfig())["weight_decay"] == 0.1
    assert difference(OptimConfig(), OptimConfig(weight_decay=0.1)) == []


def test_a_field_without_readers_is_read_by_all():
    fields = {field.name: field.metadata.get("read_by") for field in dataclasses.fields(OptimConfig)}
    assert fields["learning_rate"] is fields["clip_norm"] is None
    assert fields["subset"] == ("adamsn",)


def test_data_that_have_moved_are_absolute_paths(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = preset("tiny")
    assert config.with_data_at(None, None) == config
    assert config.with_data_at(Path("a.txt"), None).data == DataConfig(path=str(tmp_path / "a.txt"))
    speech = dataclasses.replace(config, data=DataConfig(tokenizer="transcript", path="a", val_path="b"))
    moved = speech.with_data_at(None, "c").data
    assert (moved.path, moved.val_path) == ("a", str(tmp_path / "c"))
