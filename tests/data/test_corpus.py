import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import DataConfig
from jaxlm.data.batches import batch_starts, count_targets, eval_batches, host_windows
from jaxlm.data.corpus import check_lengths, load_corpus
from jaxlm.data.tokenizer import TranscriptTokenizer


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
    return load_corpus(DataConfig(path=str(path), **fields))


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
    monkeypatch.setattr("jaxlm.data.corpus.BLOCK_CHARS", 7)
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
    monkeypatch.setattr("jaxlm.data.corpus.BLOCK_CHARS", block)
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
        check_lengths(corpus_of(text_file(content)), 7)


def test_a_validation_split_without_a_target_is_refused(text_file):
    with pytest.raises(ValueError, match="validation split has 1 tokens"):
        check_lengths(corpus_of(text_file("abcdefghij")), 3)


def test_a_missing_file_and_an_unknown_dataset_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"corpus .*nothing.txt is not a file"):
        corpus_of(tmp_path / "nothing.txt")
    with pytest.raises(ValueError, match="dataset 'wikitext' is unknown: choose one of librispeech, tinyshakespeare"):
        load_corpus(DataConfig(dataset="wikitext"))


# Transcripts ---------------------------------------------------------------------------------------------------------


def transcript_file(path, *texts):
    path.write_text("id,transcript\n" + "".join(f"{i},{text}\n" for i, text in enumerate(texts)))
    return path


def texts_of(rows):
    return [TranscriptTokenizer().decode(row).replace("<pad>", "").replace("<eos>", "|") for row in rows]


def transcripts_of(path, seq_len=6, **fields):
    return load_corpus(DataConfig(path=str(path), tokenizer="transcript", **fields), seq_len=seq_len)


def test_the_last_utterances_are_held_out_whole(tmp_path):
    path = transcript_file(tmp_path / "a.csv", "ONE", "TWO", "THREE", "FOUR AND MORE")
    corpus = transcripts_of(path, val_fraction=0.3)
    assert texts_of(corpus.train) == ["|ONE|", "|TWO|"]
    assert texts_of(corpus.val) == ["|THREE|", "|FOUR A", "AND MOR", "RE|"]
    assert corpus.train.dtype == corpus.val.dtype == np.uint8
    assert [count_targets(rows, 29) for rows in (corpus.train, corpus.val)] == [8, 20]
    assert corpus.tokenizer.to_dict() == {"type": "transcript"}


def test_a_val_path_holds_out_its_rows_and_no_other(tmp_path):
    train = transcript_file(tmp_path / "a.csv", "ONE", "TWO")
    val = transcript_file(tmp_path / "b.csv", "THREE")
    corpus = transcripts_of(train, val_path=str(val))
    assert (texts_of(corpus.train), texts_of(corpus.val)) == (["|ONE|", "|TWO|"], ["|THREE|"])


def test_transcripts_are_known_by_the_contents_and_the_split_of_their_files(tmp_path):
    train = transcript_file(tmp_path / "a.csv", "ONE", "TWO")
    val = transcript_file(tmp_path / "b.csv", "THREE")
    first = transcripts_of(train, val_path=str(val)).sha256
    assert transcripts_of(train.rename(tmp_path / "c.csv"), val_path=str(val)).sha256 == first
    others = [transcripts_of(val, val_path=str(tmp_path / "c.csv")).sha256, transcripts_of(tmp_path).sha256]
    transcript_file(val, "TREE")
    others.append(transcripts_of(tmp_path / "c.csv", val_path=str(val)).sha256)
    assert len({first, *others}) == 4


@pytest.mark.parametrize(("texts", "split"), [([], "training"), (["ONE"], "training")])
def test_a_split_without_a_row_is_refused(tmp_path, texts, split):
    corpus = transcripts_of(transcript_file(tmp_path / "a.csv", *texts))
    with pytest.raises(ValueError, match=f"the {split} split has no row"):
        check_lengths(corpus, 6)


def test_a_held_out_file_without_a_row_is_refused(tmp_path):
    paths = transcript_file(tmp_path / "a.csv", "ONE"), transcript_file(tmp_path / "b.csv")
    with pytest.raises(ValueError, match="the validation split has no row"):
        check_lengths(transcripts_of(paths[0], val_path=str(paths[1])), 6)


@pytest.mark.parametrize(
    ("dataset", "tokenizer", "words"),
    [
        ("librispeech", "char", "dataset 'librispeech' is transcripts, which tokenizer = 'char' does not read"),
        ("librispeech", "bpe", "use --data.tokenizer transcript"),
        ("tinyshakespeare", "transcript", "dataset 'tinyshakespeare' is a text, .* use --data.tokenizer char or bpe"),
    ],
)
def test_a_tokenizer_that_is_not_for_the_dataset_is_refused_before_anything_is_fetched(
    monkeypatch, dataset, tokenizer, words
):
    monkeypatch.setattr("jaxlm.data.sources.fetch", None)
    with pytest.raises(ValueError, match=words):
        load_corpus(DataConfig(dataset=dataset, tokenizer=tokenizer), seq_len=6)


def test_the_real_transcripts(librispeech, monkeypatch):
    monkeypatch.setattr("jaxlm.data.sources.fetch", lambda name: librispeech)
    corpus = load_corpus(DataConfig(dataset="librispeech", tokenizer="transcript"), seq_len=256)
    assert [count_targets(rows, 29) for rows in (corpus.train, corpus.val)] == [291_159 + 275_697, 284_150]
    assert [int((rows[:, 0] == 28).sum()) for rows in (corpus.train, corpus.val)] == [2703 + 2939, 2620]


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
@pytest.mark.parametrize("groups", [1, 64])
def test_evaluation_takes_every_row_once_and_counts_no_padding(count, groups):
    rows = np.full((count, 8), 29, np.uint8)
    for i, row in enumerate(rows):
        row[: 2 + i % 7] = i
    seen = []
    for batch in eval_batches(rows, seq_len=7, batch_size=2, groups=groups, pad_token=29):
        assert batch.windows.shape[1:] == (2, 8)
        assert batch.windows.dtype == np.uint8
        for window, weights in zip(batch.windows.reshape(-1, 8), batch.weights.reshape(-1, 7), strict=True):
            np.testing.assert_array_equal(weights, window[1:] != 29)
            seen += window[1:][weights > 0].tolist()
    assert seen == [i for i in range(count) for _ in range(1 + i % 7)]
    assert len(seen) == count_targets(rows, 29)


# Batches -------------------------------------------------------------------------------------------------------------


def test_a_batch_is_a_function_of_seed_and_step_alone():
    draw = [np.asarray(batch_starts(seed, step, 50, 97)) for seed, step in ((1, 5), (1, 5), (1, 6), (2, 5))]
    np.testing.assert_array_equal(draw[0], draw[1])
    assert (draw[0] != draw[2]).any()
    assert (draw[0] != draw[3]).any()


@pytest.mark.parametrize("places", [1, 97, 65_536, 1_003_790, 2**31 - 1])
def test_windows_begin_where_the_recurrence_says_to_the_last_bit(places):
    offset = int(jax.random.bits(jax.random.key(5), (), jnp.uint32))
    for step in (0, 3, 2_000_000):
        exact = [((step * 13 + b) * 0x9E3779B9 + offset) % 2**32 * places >> 32 for b in range(13)]
        assert batch_starts(5, step, 13, places).tolist() == exact


def test_every_stretch_of_the_text_is_read_about_as_often():
    starts = np.asarray(jax.vmap(lambda step: batch_starts(0, step, 12, 10_000))(jnp.arange(500))).ravel()
    counts = np.bincount(starts // 100, minlength=100)
    assert counts.min() >= 57  # 60 each; independent draws spread by 8
    assert counts.max() <= 63
    assert len(np.unique(starts[:12] // 1000)) >= 8  # and so within a batch


def test_windows_read_from_a_file_are_those_the_device_cuts():
    tokens = np.random.default_rng(0).integers(0, 200, 300).astype(np.uint8)
    windows = host_windows(tokens, seed=3, first=7, count=2, size=5, seq_len=11)
    for i, step in enumerate((7, 8)):
        starts = np.asarray(batch_starts(3, step, 5, 300 - 11))
        np.testing.assert_array_equal(windows[i], [tokens[s : s + 12] for s in starts])


@pytest.mark.parametrize("length", [2, 6, 7, 8, 29, 36, 37])
@pytest.mark.parametrize("groups", [1, 64])
def test_evaluation_counts_every_target_once_with_its_own_past(length, groups):
    tokens = np.arange(1, length + 1, dtype=np.uint8)
    seen = []
    for batch in eval_batches(tokens, seq_len=7, batch_size=2, groups=groups):
        assert batch.windows.shape[1:] == (2, 8)
        for window, weights in zip(batch.windows.reshape(-1, 8), batch.weights.reshape(-1, 7), strict=True):
            real = int(weights.sum())
            assert weights.tolist() == [1] * real + [0] * (7 - real)
            assert (np.diff(window[: real + 1].astype(int)) == 1).all()
            seen += window[1 : real + 1].tolist()
    assert seen == list(range(2, length + 1))
