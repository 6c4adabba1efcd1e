"""`jaxlm presets`: the sizes that each family has."""

import dataclasses
import json

from support import command

from jaxlm.cli.presets import sizes
from jaxlm.config.presets import PRESETS, preset


def test_every_preset_is_listed_with_its_description(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = command("presets")
    assert code == 0
    for name in PRESETS:
        assert f"│ {name} " in out
        assert PRESETS[name].__doc__ in out
    assert "│ L 4, D 128, N 4, T 64, V 65 " in out


def test_only_the_sizes_that_a_family_reads():
    assert sizes(preset("nanogpt-cpu").model) == "L 4, D 128, N 4, T 64, V 65"
    assert sizes(preset("bigram").model) == "T 256, V 65"
    assert sizes(preset("embedding-bigram").model) == "D 32, T 256, V 65"
    recurrent = dataclasses.replace(preset("embedding-bigram").model, family="recurrent", cell="lstm", num_layers=2)
    assert sizes(recurrent) == "L 2, D 32, T 256, V 65"


def test_json_holds_the_whole_configurations():
    found = json.loads(command("presets", "--json")[1])
    assert found.keys() == PRESETS.keys()
    assert found["tiny"]["model"]["embed_dim"] == 32
