"""The torch names of docs/handouts.md."""

import re
from pathlib import Path

import jaxlm
import torchref
import torchref.course

PAGE = (Path(jaxlm.__file__).parent.parent / "docs" / "handouts.md").read_text(encoding="utf-8")


def test_the_torch_classes_of_the_page_exist():
    sentence = re.search(r"In PyTorch, `torchref\.Attention.*?\. `jaxlm eval", PAGE, re.DOTALL)[0]
    names = re.findall(r"`([A-Z]\w+)`", sentence)
    assert names == ["SelfAttention", "TransformerBlockPreNorm", "LanguageModel"]
    assert all(isinstance(getattr(torchref.course, name), type) for name in names)
    assert callable(torchref.Attention.forward)
    assert callable(torchref.Attention.backward)
