import hashlib
import http.client
import subprocess
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import data, recipes
from jaxlm.config import DataConfig


@pytest.fixture
def text_file(tmp_path):
    def write(content):
        path = tmp_path / "text.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A data cache of the test's own."""
    monkeypatch.setenv("JAXLM_DATA_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def corpus_of(path, **fields):
    return data.load_corpus(DataConfig(path=str(path), **fields))


def test_the_real_corpus(shakespeare, monkeypatch):
    corpus = corpus_of(shakespeare)
    assert (len(corpus.train), len(corpus.val), corpus.tokenizer.vocab_size) == (1_003_854, 111_540, 65)
    assert corpus.train.dtype == np.uint8
    assert corpus.tokenizer.decode(corpus.train[:14]) == "First Citizen:"


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_splits_join_to_the_text_with_its_newlines(text_file, tokenizer):
    text = "Zwölf Boxkämpfer\r\njagen Viktor\n" * 9
    corpus = corpus_of(text_file(text), tokenizer=tokenizer, val_fraction=0.3, bpe_vocab_size=260)
    train, val = (corpus.tokenizer.decode(part) for part in (corpus.train, corpus.val))
    assert train + val == text
    assert len(train) == int(0.7 * len(text))


def test_bpe_merges_come_from_the_training_split_alone(text_file):
    corpus = corpus_of(text_file("ab" * 500 + "xy" * 500), tokenizer="bpe", val_fraction=0.5, bpe_vocab_size=300)
    assert len(corpus.train) < 20
    assert len(corpus.val) == 1000


def test_a_mapped_token_file_holds_what_memory_would(text_file, monkeypatch, cache):
    path = text_file("Zwölf Boxkämpfer jagen Viktor\n" * 9)
    resident = corpus_of(path)
    monkeypatch.setattr(data, "BLOCK_CHARS", 7)
    mapped = corpus_of(path, resident_mb=0)
    assert isinstance(mapped.train, np.memmap)
    for name in ("train", "val"):
        np.testing.assert_array_equal(getattr(mapped, name), getattr(resident, name))
    made = {file: file.stat().st_mtime_ns for file in (cache / "tokens").iterdir()}
    assert len(made) == 2
    corpus_of(path, resident_mb=0)
    assert {file: file.stat().st_mtime_ns for file in (cache / "tokens").iterdir()} == made


@pytest.mark.parametrize("block", [3, 7, 1 << 24])
def test_bytes_that_are_not_utf8_are_named_with_their_offset(text_file, monkeypatch, block):
    monkeypatch.setattr(data, "BLOCK_CHARS", block)
    with pytest.raises(ValueError, match="byte 0xff at offset 12"):
        corpus_of(text_file("zwölf Äpfel".encode()[:12] + b"\xff rest"))


def test_a_text_cut_in_the_middle_of_a_character_is_named(text_file):
    with pytest.raises(ValueError, match="byte 0xc3 at offset 2"):
        corpus_of(text_file("abö".encode()[:3]))


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "is empty"), (b"abcdefgh", "7 tokens, shorter than one context of max_seq_len = 7")]
)
def test_a_text_too_short_is_refused(text_file, content, words):
    with pytest.raises(ValueError, match=words):
        data.check_lengths(corpus_of(text_file(content)), 7)


def test_a_validation_split_without_a_target_is_refused(text_file):
    with pytest.raises(ValueError, match="validation split has 1 tokens"):
        data.check_lengths(corpus_of(text_file("abcdefghij")), 3)


def test_a_missing_file_and_an_unknown_dataset_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"corpus .*nothing.txt is not a file"):
        corpus_of(tmp_path / "nothing.txt")
    with pytest.raises(ValueError, match="dataset 'wikitext' is unknown: choose one of tinyshakespeare"):
        data.load_corpus(DataConfig(dataset="wikitext"))


# Recipes -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Two sources for the bytes b"hello": https, then a wheel of two members."""
    digest = hashlib.sha256(b"hello").hexdigest()
    (tmp_path / "greeting.toml").write_text(
        f'file = "a.txt"\nsha256 = "{digest}"\n'
        '[[sources]]\nkind = "https"\nurl = "https://example.invalid/a"\ntimeout_s = 1\n'
        '[[sources]]\nkind = "wheel"\nrequirement = "pkg==1"\nmembers = ["x", "y"]\ntimeout_s = 1\n'
    )
    monkeypatch.setattr(recipes, "RECIPES", tmp_path)


def serve(monkeypatch, https=None, wheel=None):
    def source(content):
        def read(source):
            if content is None:
                raise OSError("no route")
            return content

        return read

    monkeypatch.setattr(recipes, "_SOURCES", {"https": source(https), "wheel": source(wheel)})


def test_the_first_source_with_the_right_sha256_is_cached(recipe, monkeypatch, cache):
    serve(monkeypatch, https=b"tampered", wheel=b"hello")
    path = recipes.fetch("greeting")
    assert path == cache / "greeting" / "a.txt"
    assert path.read_bytes() == b"hello"
    serve(monkeypatch)  # the cache needs no source
    assert recipes.fetch("greeting") == path


def test_a_download_cut_short_falls_through_to_the_next_source(recipe, monkeypatch):
    serve(monkeypatch, wheel=b"hello")

    def cut(source):
        raise http.client.IncompleteRead(b"hel")

    monkeypatch.setitem(recipes._SOURCES, "https", cut)
    assert recipes.fetch("greeting").read_bytes() == b"hello"


def test_a_cache_that_cannot_be_written_is_named(recipe, monkeypatch, tmp_path):
    serve(monkeypatch, wheel=b"hello")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXLM_DATA_DIR", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot be written .*set JAXLM_DATA_DIR"):
        recipes.fetch("greeting")


def test_a_damaged_cache_is_kept_aside_and_fetched_anew(recipe, monkeypatch, cache):
    serve(monkeypatch, https=b"hello")
    path = recipes.fetch("greeting")
    path.write_bytes(b"edited")
    assert recipes.fetch("greeting").read_bytes() == b"hello"
    assert (path.parent / "a.txt.damaged").read_bytes() == b"edited"


def test_when_nothing_works_the_message_lists_what_was_tried(recipe, monkeypatch, cache):
    serve(monkeypatch, wheel=b"tampered")
    with pytest.raises(ValueError, match="could not be fetched") as error:
        recipes.fetch("greeting")
    for words in (
        "https https://example.invalid/a: no route",
        "wheel pkg==1: sha256",
        str(cache / "greeting" / "a.txt"),
    ):
        assert words in str(error.value)
    assert not list(cache.rglob("a.txt*"))


def test_a_wheel_is_downloaded_not_installed_and_its_members_joined(recipe, monkeypatch):
    commands = []

    def pip(command, **kwargs):
        commands.append(command)
        with zipfile.ZipFile(command[command.index("--dest") + 1] + "/pkg-1-py3-none-any.whl", "w") as archive:
            archive.writestr("y", "lo")
            archive.writestr("x", "hel")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(recipes.subprocess, "run", pip)
    monkeypatch.setattr(recipes, "_SOURCES", {**recipes._SOURCES, "https": recipes._from_wheel})
    assert recipes.fetch("greeting").read_bytes() == b"hello"
    assert all("download" in command and "--no-deps" in command for command in commands)


# Batches -------------------------------------------------------------------------------------------------------------


def test_a_batch_is_a_function_of_seed_and_step_alone():
    draw = [np.asarray(data.batch_starts(seed, step, 50, 97)) for seed, step in ((1, 5), (1, 5), (1, 6), (2, 5))]
    np.testing.assert_array_equal(draw[0], draw[1])
    assert (draw[0] != draw[2]).any()
    assert (draw[0] != draw[3]).any()


@pytest.mark.parametrize("places", [1, 97, 65_536, 1_003_790, 2**31 - 1])
def test_windows_begin_where_the_recurrence_says_to_the_last_bit(places):
    offset = int(jax.random.bits(jax.random.key(5), (), jnp.uint32))
    for step in (0, 3, 2_000_000):
        exact = [((step * 13 + b) * 0x9E3779B9 + offset) % 2**32 * places >> 32 for b in range(13)]
        assert data.batch_starts(5, step, 13, places).tolist() == exact


def test_every_stretch_of_the_text_is_read_about_as_often():
    starts = np.asarray(jax.vmap(lambda step: data.batch_starts(0, step, 12, 10_000))(jnp.arange(500))).ravel()
    counts = np.bincount(starts // 100, minlength=100)
    assert counts.min() >= 57  # 60 each; independent draws spread by 8
    assert counts.max() <= 63
    assert len(np.unique(starts[:12] // 1000)) >= 8  # and so within a batch


def test_windows_read_from_a_file_are_those_the_device_cuts():
    tokens = np.random.default_rng(0).integers(0, 200, 300).astype(np.uint8)
    windows = data.host_windows(tokens, seed=3, first=7, count=2, size=5, seq_len=11)
    for i, step in enumerate((7, 8)):
        starts = np.asarray(data.batch_starts(3, step, 5, 300 - 11))
        np.testing.assert_array_equal(windows[i], [tokens[s : s + 12] for s in starts])


@pytest.mark.parametrize("length", [2, 6, 7, 8, 29, 36, 37])
@pytest.mark.parametrize("groups", [1, 64])
def test_evaluation_counts_every_target_once_with_its_own_past(length, groups):
    tokens = np.arange(1, length + 1, dtype=np.uint8)
    seen = []
    for batch in data.eval_batches(tokens, seq_len=7, batch_size=2, groups=groups):
        assert batch.windows.shape[1:] == (2, 8)
        for window, weights in zip(batch.windows.reshape(-1, 8), batch.weights.reshape(-1, 7), strict=True):
            real = int(weights.sum())
            assert weights.tolist() == [1] * real + [0] * (7 - real)
            assert (np.diff(window[: real + 1].astype(int)) == 1).all()
            seen += window[1 : real + 1].tolist()
    assert seen == list(range(2, length + 1))
