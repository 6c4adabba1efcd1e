"""Which optimizer reads which field, and where data are."""

import dataclasses
from pathlib import Path

import pytest

from jaxlm.config import DataConfig, MeshConfig, OptimConfig
from jaxlm.config.base import difference, from_dict, to_dict
from jaxlm.config.optim import idle_optim_fields, optimizer_fields
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


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"data": 0}, r"mesh.data = 0 is out of range: give at least 1, or -1 for the rest of the devices"),
        ({"fsdp": -2}, r"mesh.fsdp = -2 is out of range"),
        ({"data": -1, "tensor": -1}, r"mesh.data = -1 and mesh.tensor = -1: only one axis"),
        ({"process_id": 0}, r"mesh.process_id = 0 with mesh.coordinator = None: give mesh.coordinator too"),
        ({"coordinator": "auto", "processes": 2}, r"mesh.processes = 2 with mesh.coordinator = auto: leave it out"),
        ({"coordinator": "node1"}, r"mesh.coordinator = 'node1' is not an address: give HOST:PORT"),
        ({"coordinator": ":12"}, r"mesh.coordinator = ':12' is not an address"),
        ({"coordinator": "node1:70000"}, r"mesh.coordinator = 'node1:70000' is not an address"),
        ({"coordinator": "node1:7000", "processes": 2}, r"node1:7000 needs mesh.process_id too: give it"),
        ({"coordinator": "node1:7000", "process_id": 0}, r"node1:7000 needs mesh.processes too: give it"),
        (
            {"coordinator": "node1:7000", "processes": 2, "process_id": 2},
            r"mesh.process_id = 2 of mesh.processes = 2 is out of range: give 0 <= process_id < processes",
        ),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(given, words):
    with pytest.raises(UserError, match=words):
        MeshConfig(**given)


def test_the_processes_of_a_session_are_not_of_the_run():
    mesh = MeshConfig(data=-1, tensor=2, coordinator="[::1]:7000", processes=2, process_id=1)
    assert mesh.without_processes() == MeshConfig(data=-1, tensor=2)
    assert MeshConfig(coordinator="auto").coordinator == "auto"
