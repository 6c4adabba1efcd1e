"""Prepared corpora that others made: a manifest names files of its own folder, and has the types it should."""

import json

import fuzzing
import pytest

from jaxlm.data.shards import open_prepared
from jaxlm.errors import CheckError


@pytest.fixture
def corpus(tmp_path):
    folder, _ = fuzzing.seeds("prepared")
    for file in (folder / "corpus").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change(corpus, **entries):
    manifest = json.loads((corpus / "manifest.json").read_text())
    shard = {name: entries.pop(name) for name in ("file", "tokens", "documents") if name in entries}
    manifest["shards"][0] |= shard
    (corpus / "manifest.json").write_text(json.dumps(manifest | entries))


@pytest.mark.parametrize(
    "entries",
    [
        *({"file": "../../etc/passwd"}, {"file": "/etc/passwd"}, {"file": "a/b"}, {"tokens": -1}),
        *({"documents": -1}, {"tokens": True}, {"tokenizer_sha256": 7}, {"tokenizer_sha256": None}, {"dtype": "O"}),
        *({"shards": []}, {"shards": [7]}, {"end_of_text": "0"}),
    ],
)
def test_a_manifest_of_other_entries_is_damaged(corpus, entries):
    open_prepared(corpus)
    change(corpus, **entries)
    with pytest.raises(CheckError, match=r"manifest.json is damaged"):
        open_prepared(corpus)
