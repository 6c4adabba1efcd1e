"""Which optimizer reads which field, and where data are."""

import dataclasses
from pathlib import Path

import pytest

from jaxlm.config import DataConfig, OptimConfig
from jaxlm.config.experiment import idle_optim_fields, optimizer_fields
from jaxlm.config.presets import preset


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
