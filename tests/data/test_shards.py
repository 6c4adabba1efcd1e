"""Token shards as one sequence, and what opening a prepared folder refuses."""

import json

import numpy as np
import pytest

from jaxlm.config.prepare import PrepareConfig
from jaxlm.data.prepare import prepare_corpus
from jaxlm.data.shards import ShardedTokens, check_prepared, is_prepared, open_prepared
from jaxlm.errors import CheckError, UserError

LENGTHS = [5, 0, 1, 7, 3]
WHOLE = np.arange(16, dtype=np.uint16)


def sharded():
    return ShardedTokens(np.split(WHOLE, np.cumsum(LENGTHS)[:-1]))


def test_a_stretch_is_that_of_the_whole_and_within_a_shard_a_view():
    tokens = sharded()
    assert (len(tokens), tokens.dtype) == (16, np.uint16)
    for start in range(17):
        for stop in range(start, 18):
            np.testing.assert_array_equal(tokens[start:stop], WHOLE[start:stop])
            assert tokens[start:stop].dtype == np.uint16
            part = tokens.part(start, stop)
            assert len(part) == len(WHOLE[start:stop])
            np.testing.assert_array_equal(part[1:], WHOLE[start:stop][1:])
    np.testing.assert_array_equal(tokens[-4:], WHOLE[-4:])
    assert np.shares_memory(tokens[7:10], WHOLE)
    assert not np.shares_memory(tokens[4:10], WHOLE)
    with pytest.raises(IndexError, match="step 2"):
        tokens[::2]


def test_places_are_read_wherever_they_are():
    places = np.array([[15, 0, 5], [6, 4, 4]])
    np.testing.assert_array_equal(sharded()[places], WHOLE[places])
    assert sharded()[np.zeros((2, 0), int)].shape == (2, 0)


@pytest.fixture
def folder(tmp_path):
    lines = [json.dumps({"text": f"document {i} " * (1 + i % 3)}) for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    prepare_corpus(
        PrepareConfig(path=str(tmp_path / "a.jsonl"), bpe_vocab_size=300, shard_tokens=31), tmp_path / "out", workers=1
    )
    return tmp_path / "out"


@pytest.mark.parametrize(("val_fraction", "documents"), [(0.1, 18), (0.5, 10), (0.99, 0), (0.04, 19)])
def test_the_training_split_ends_with_a_document(folder, monkeypatch, val_fraction, documents):
    monkeypatch.setattr("jaxlm.data.shards.BLOCK", 7)
    corpus = open_prepared(folder)
    boundary = corpus.boundary(val_fraction)
    tokens = corpus.tokens[: len(corpus.tokens)]
    assert (tokens[:boundary] == corpus.end_of_text).sum() == documents
    assert boundary == 0 or tokens[boundary - 1] == corpus.end_of_text
    assert (tokens == corpus.end_of_text).sum() == 20


def change(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_folders_that_are_not_whole_are_named(folder, tmp_path):
    assert is_prepared(folder)
    assert not is_prepared(tmp_path)
    identity = check_prepared(folder).sha256
    shard = folder / "shard-00001.bin"
    content = shard.read_bytes()
    shard.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert open_prepared(folder).sha256 == identity
    with pytest.raises(CheckError, match=r"shard-00001.bin is damaged: its sha256 is \w+..., not \w+..."):
        check_prepared(folder)
    shard.write_bytes(content[:-1])
    with pytest.raises(CheckError, match=r"shard-00001.bin has 61 bytes, not 62: restore it"):
        open_prepared(folder)
    shard.unlink()
    with pytest.raises(CheckError, match=r"shard-00001.bin is missing: restore it"):
        open_prepared(folder)
    shard.write_bytes(content)
    tokenizer = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(tokenizer.replace("bpe", "BPE"))
    with pytest.raises(CheckError, match=r"tokenizer.json is damaged"):
        open_prepared(folder)
    (folder / "tokenizer.json").write_text(tokenizer)
    manifest = (folder / "manifest.json").read_text()
    change(folder / "manifest.json", documents=21)
    assert open_prepared(folder).sha256 != identity
    change(folder / "manifest.json", format="jaxlm-tokens-9")
    assert is_prepared(folder)
    with pytest.raises(UserError, match="has the format 'jaxlm-tokens-9', not 'jaxlm-tokens-1'"):
        open_prepared(folder)
    (folder / "manifest.json").write_text('{"format": "jaxlm-tokens-1"}')
    with pytest.raises(UserError, match=r"manifest.json has no 'tokenizer_sha256'"):
        open_prepared(folder)
    (folder / "manifest.json").unlink()
    (folder / "plan.json").write_text("{}")
    assert is_prepared(folder)
    with pytest.raises(UserError, match="not finished: give its `jaxlm prepare` command again"):
        open_prepared(folder)
    (folder / "manifest.json").write_text(manifest)
    assert open_prepared(folder).sha256 == identity


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]"])
def test_a_manifest_that_cannot_be_read_is_named(folder, content):
    (folder / "manifest.json").write_bytes(content)
    assert is_prepared(folder)
    with pytest.raises(CheckError, match=r"manifest.json cannot be read as JSON: restore it, or prepare the corpus"):
        open_prepared(folder)


@pytest.mark.parametrize("fields", [{"shards": 5}, {"shards": [{}]}, {"dtype": "object"}, {"tokens": "9"}])
def test_a_manifest_with_other_types_is_named(folder, fields):
    change(folder / "manifest.json", **fields)
    with pytest.raises(CheckError, match=r"manifest.json is damaged: restore it, or prepare the corpus again"):
        open_prepared(folder)


def test_an_id_outside_the_vocabulary_is_refused_as_it_is_read(folder):
    tokens = np.fromfile(folder / "shard-00001.bin", np.uint16)
    tokens[5] = 60_000
    tokens.tofile(folder / "shard-00001.bin")
    corpus = open_prepared(folder)
    for read in (slice(30, 40), np.array([2, 36]), slice(0, 70)):
        for whole in (corpus.tokens, corpus.tokens.part(0, 80)):
            with pytest.raises(
                CheckError, match=r"has the id 60000, .* ends with \d+; `jaxlm prepare --check .*out` nam"
            ):
                whole[read]
    assert len(corpus.tokens[:36]) == 36


def test_a_shard_with_fewer_documents_than_the_manifest_says_is_named(folder):
    corpus = open_prepared(folder)
    shards = corpus.manifest["shards"]
    shards[0]["documents"] += 30
    with pytest.raises(CheckError, match=r"shard-00000.bin is damaged: it has fewer than \d+ documents"):
        corpus.boundary(0.1)
