"""Presets by name."""

import pytest

from jaxlm.config import (
    presets,
)


def test_an_unknown_preset_lists_those_there_are():
    with pytest.raises(ValueError, match=r"preset 'gpt5' is unknown: choose one of nanogpt-cpu"):
        presets.preset("gpt5")
