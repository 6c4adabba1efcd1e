import hashlib
import json

import numpy as np
import pytest
import tokenizers
from foreign_tokenizers import llama2_tokenizer

from jaxlm.config import DataConfig
from jaxlm.config.prepare import PrepareConfig
from jaxlm.data.corpus import identity, learn_tokenizer, load_corpus, load_unsplit, with_own_tokenizer
from jaxlm.data.hugging_face import from_hugging_face
from jaxlm.data.prepare import prepare_corpus
from jaxlm.data.shards import ShardedTokens
from jaxlm.data.tokenizer import CharTokenizer, IdTokenizer, TranscriptTokenizer
from jaxlm.training.evaluate import count_bytes


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


def corpus_of(path, seq_len=7, **fields):
    return load_corpus(DataConfig(path=str(path), **fields), seq_len)


def test_the_real_corpus(shakespeare, monkeypatch):
    corpus = corpus_of(shakespeare)
    assert (len(corpus.train), len(corpus.val), corpus.tokenizer.vocab_size) == (1_003_854, 111_540, 65)
    assert corpus.train.tokens.dtype == np.uint8
    assert corpus.tokenizer.decode(corpus.train.tokens[:14]) == "First Citizen:"


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_splits_join_to_the_text_with_its_newlines(text_file, tokenizer):
    text = "Zwölf Boxkämpfer\r\njagen Viktor\n" * 9
    corpus = corpus_of(text_file(text), tokenizer=tokenizer, val_fraction=0.3, bpe_vocab_size=260)
    train, val = (corpus.tokenizer.decode(part.tokens) for part in (corpus.train, corpus.val))
    assert train + val == text
    assert len(train) == int(0.7 * len(text))


def test_bpe_merges_come_from_the_training_split_alone(text_file):
    corpus = corpus_of(text_file("ab" * 500 + "xy" * 500), tokenizer="bpe", val_fraction=0.5, bpe_vocab_size=300)
    assert len(corpus.train) < 20
    assert len(corpus.val) == 1000


def test_a_mapped_token_file_holds_what_memory_would(text_file, monkeypatch, cache):
    path = text_file("Zwölf Boxkämpfer jagen Viktor\n" * 9)
    resident = corpus_of(path)
    monkeypatch.setattr("jaxlm.data.texts.BLOCK_CHARS", 7)
    mapped = corpus_of(path, resident_mb=0)
    assert isinstance(mapped.train.tokens, np.memmap)
    for name in ("train", "val"):
        np.testing.assert_array_equal(getattr(mapped, name).tokens, getattr(resident, name).tokens)
    written = {file: file.stat().st_mtime_ns for file in (cache / "tokens").iterdir()}
    assert len(written) == 2
    corpus_of(path, resident_mb=0)
    assert {file: file.stat().st_mtime_ns for file in (cache / "tokens").iterdir()} == written


@pytest.mark.parametrize("block", [3, 7, 1 << 24])
def test_bytes_that_are_not_utf8_are_named_with_their_offset(text_file, monkeypatch, block):
    monkeypatch.setattr("jaxlm.data.texts.BLOCK_CHARS", block)
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
        corpus_of(text_file(content)).check_lengths()


def test_a_validation_split_without_a_target_is_refused(text_file):
    with pytest.raises(ValueError, match="validation split has 1 tokens"):
        corpus_of(text_file("abcdefghij"), 3).check_lengths()


def test_a_character_outside_a_given_vocabulary_is_named_with_the_file_and_its_block(text_file, monkeypatch):
    monkeypatch.setattr("jaxlm.data.texts.BLOCK_CHARS", 7)
    cfg = DataConfig(path=str(text_file("abababa" + "abßa")))
    words = r"corpus .*text.txt, from character 7 on: characters 'ß' are outside .*first 'ß' at position 2"
    with pytest.raises(ValueError, match=words):
        load_unsplit(cfg, 3, CharTokenizer("ab"))


@pytest.mark.parametrize("resident_mb", [256, 0])
def test_a_text_unsplit_is_all_of_it(text_file, resident_mb):
    cfg = DataConfig(path=str(text_file("abcdefghij")), resident_mb=resident_mb)
    split = load_unsplit(cfg, 3, CharTokenizer("abcdefghijk"))
    assert split.tokens.tolist() == list(range(10))
    assert isinstance(split.tokens, np.memmap) == (resident_mb == 0)
    assert identity(cfg) == load_corpus(cfg, 3).sha256


def test_a_missing_file_and_an_unknown_dataset_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"corpus .*nothing.txt does not exist"):
        corpus_of(tmp_path / "nothing.txt")
    with pytest.raises(ValueError, match="dataset 'wikitext' is unknown: choose one of librispeech, tinyshakespeare"):
        load_corpus(DataConfig(dataset="wikitext"), 7)


@pytest.mark.parametrize("special_tokens", ["text", "id"])
@pytest.mark.parametrize("block", [7, 1 << 24])
@pytest.mark.parametrize("resident_mb", [256, 0])
def test_a_text_is_encoded_as_one_whatever_the_blocks(text_file, monkeypatch, special_tokens, block, resident_mb):
    """Its beginning and its end stand there once, in a text and in each split of it."""
    monkeypatch.setattr("jaxlm.data.texts.BLOCK_CHARS", block)
    monkeypatch.setattr("jaxlm.data.bpe.MARGIN", 40)
    data = llama2_tokenizer()
    library = tokenizers.Tokenizer.from_str(json.dumps(data))
    library.encode_special_tokens = special_tokens == "text"
    text = "the naïve café</s> 你好 cat\n" * 60
    cfg = DataConfig(path=str(text_file(text)), special_tokens=special_tokens, resident_mb=resident_mb)
    whole = load_unsplit(cfg, 7, from_hugging_face(data))
    assert whole.tokens.tolist() == library.encode(text).ids
    corpus = load_corpus(cfg, 7, from_hugging_face(data))
    place = int(0.9 * len(text))
    assert corpus.train.tokens.tolist() == library.encode(text[:place]).ids
    assert corpus.val.tokens.tolist() == library.encode(text[place:]).ids
    assert [(whole.tokens == token).sum() for token in (1, 2)] == [1, 1 if special_tokens == "text" else 61]


@pytest.mark.parametrize("block", [1, 3, 1 << 24])
def test_no_block_cuts_an_id_in_two(text_file, monkeypatch, block):
    monkeypatch.setattr("jaxlm.data.texts.BLOCK_CHARS", block)
    path = text_file("123 45\n6 1000 " * 5 + "1234567")
    split = load_unsplit(DataConfig(path=str(path)), 3, IdTokenizer(2_000_000))
    assert split.tokens.tolist() == [123, 45, 6, 1000] * 5 + [1234567]
    corpus = load_corpus(DataConfig(path=str(path), val_fraction=0.92), 3, IdTokenizer(2_000_000))
    assert (corpus.train.tokens.tolist(), len(corpus.val)) == ([123, 45], 19)


# Transcripts ---------------------------------------------------------------------------------------------------------


def transcript_file(path, *texts):
    path.write_text("id,transcript\n" + "".join(f"{i},{text}\n" for i, text in enumerate(texts)))
    return path


def texts_of(split):
    return [TranscriptTokenizer().decode(row).replace("<pad>", "").replace("<eos>", "|") for row in split.rows]


def transcripts_of(path, seq_len=6, **fields):
    return load_corpus(DataConfig(path=str(path), tokenizer="transcript", **fields), seq_len=seq_len)


def test_the_last_utterances_are_held_out_whole(tmp_path):
    path = transcript_file(tmp_path / "a.csv", "ONE", "TWO", "THREE", "FOUR AND MORE")
    corpus = transcripts_of(path, val_fraction=0.3)
    assert texts_of(corpus.train) == ["|ONE|", "|TWO|"]
    assert texts_of(corpus.val) == ["|THREE|", "|FOUR A", "AND MOR", "RE|"]
    assert corpus.train.rows.dtype == corpus.val.rows.dtype == np.uint8
    assert [split.num_targets for split in (corpus.train, corpus.val)] == [8, 20]
    assert corpus.tokenizer.to_dict() == {"type": "transcript"}


def test_transcripts_unsplit_are_all_of_their_rows(tmp_path):
    path = transcript_file(tmp_path / "a.csv", "ONE", "TWO", "THREE", "FOUR AND MORE")
    cfg = DataConfig(path=str(path), tokenizer="transcript", val_fraction=0.3)
    split = load_unsplit(cfg, 6, TranscriptTokenizer())
    assert texts_of(split) == ["|ONE|", "|TWO|", "|THREE|", "|FOUR A", "AND MOR", "RE|"]
    assert identity(cfg) == load_corpus(cfg, 6).sha256


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
        corpus.check_lengths()


def test_a_held_out_file_without_a_row_is_refused(tmp_path):
    paths = transcript_file(tmp_path / "a.csv", "ONE"), transcript_file(tmp_path / "b.csv")
    with pytest.raises(ValueError, match="the validation split has no row"):
        transcripts_of(paths[0], val_path=str(paths[1])).check_lengths()


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
    assert [split.num_targets for split in (corpus.train, corpus.val)] == [291_159 + 275_697, 284_150]
    assert [int((split.rows[:, 0] == 28).sum()) for split in (corpus.train, corpus.val)] == [2703 + 2939, 2620]


# Prepared corpora ----------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path):
    texts = [f"document {i}: {'to be ' * (i % 4)}<|endoftext|>\n" for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    cfg = PrepareConfig(path=str(tmp_path / "a.jsonl"), bpe_vocab_size=300, shard_tokens=50)
    prepare_corpus(cfg, tmp_path / "out", workers=1)
    return tmp_path / "out", texts


def test_a_prepared_corpus_is_split_by_documents_and_never_in_memory(prepared):
    folder, texts = prepared
    corpus = corpus_of(folder, val_fraction=0.2)
    assert isinstance(corpus.train.tokens, ShardedTokens)
    assert [split.document_end for split in (corpus.train, corpus.val)] == [0, 0]
    spelled = [corpus.tokenizer.decode(split.tokens[: len(split)]) for split in (corpus.train, corpus.val)]
    assert spelled == ["".join(f"{text}<|endoftext|>" for text in part) for part in (texts[:24], texts[24:])]
    cfg = DataConfig(path=str(folder))
    assert identity(cfg) == corpus.sha256 == hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    assert len(load_unsplit(cfg, 7, corpus.tokenizer)) == len(corpus.train) + len(corpus.val)
    assert learn_tokenizer(cfg).to_dict() == corpus.tokenizer.to_dict()
    assert with_own_tokenizer(cfg).tokenizer == "bpe"
    assert with_own_tokenizer(DataConfig(path=str(folder.parent))) == DataConfig(path=str(folder.parent))
    with pytest.raises(ValueError, match="out was prepared with another tokenizer than the model's: prepare"):
        load_corpus(cfg, 7, CharTokenizer("abc"))


def test_the_bytes_of_documents_are_those_of_their_text_alone(prepared):
    folder, texts = prepared
    corpus = corpus_of(folder, val_fraction=0.2)
    first = corpus.tokenizer.decode(corpus.val.tokens[:1])
    assert count_bytes(corpus.val, corpus.tokenizer) == len("".join(texts[24:])) - len(first)


def test_a_byte_order_mark_is_left_out_with_a_word(text_file):
    path = text_file(b"\xef\xbb\xbfabcabcabca")
    with pytest.warns(UserWarning, match=r"text.txt begins with a byte-order mark, which is left out"):
        corpus = corpus_of(path, val_fraction=0.5)
    assert corpus.tokenizer.chars == "abc"
    assert (len(corpus.train), len(corpus.val)) == (5, 5)
    assert corpus.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("resident_mb", [0, 256])
def test_a_run_that_knows_the_mark_of_its_text_goes_on_with_it(text_file, resident_mb):
    """Runs of earlier versions have it in their vocabulary; their batches must stay."""
    path = text_file(b"\xef\xbb\xbfabcabcab")
    cfg = DataConfig(path=str(path), val_fraction=0.5, resident_mb=resident_mb)
    with pytest.warns(UserWarning, match="byte-order mark"):
        load_corpus(cfg, 3, CharTokenizer("abc"))  # its token file is another
    corpus = load_corpus(cfg, 3, CharTokenizer("\ufeffabc"))
    assert [corpus.train.tokens.tolist(), corpus.val.tokens.tolist()] == [[3, 0, 1, 2], [0, 1, 2, 0, 1]]
    assert load_unsplit(cfg, 3, CharTokenizer("\ufeffabc")).tokens.tolist()[:2] == [3, 0]


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
@pytest.mark.parametrize("resident_mb", [0, 256])
def test_a_val_path_of_a_text_holds_out_that_text_and_no_other(tmp_path, tokenizer, resident_mb):
    (tmp_path / "a.txt").write_text("ab" * 300)
    (tmp_path / "b.txt").write_text("xyz" * 300)
    where = {"path": (str(tmp_path / "a.txt"), str(tmp_path / "a.txt")), "val_path": str(tmp_path / "b.txt")}
    cfg = DataConfig(**where, tokenizer=tokenizer, bpe_vocab_size=300, resident_mb=resident_mb)
    corpus = load_corpus(cfg, 7)
    read = [corpus.tokenizer.decode(split.tokens) for split in (corpus.train, corpus.val)]
    assert read == ["ab" * 300 + "\n" + "ab" * 300, "xyz" * 300]
    assert (len(corpus.train) < 20) == (tokenizer == "bpe")  # merges come from the text for training
    assert len(corpus.val) == 900
    assert corpus.sha256 == identity(cfg)
    swapped = DataConfig(path=where["val_path"], val_path=where["path"])
    alone = DataConfig(path=where["path"])
    assert len({identity(swapped), identity(alone), corpus.sha256}) == 3
    assert len(load_unsplit(cfg, 7, corpus.tokenizer)) == len(corpus.train)


def test_what_has_splits_of_its_own_stands_alone(tmp_path, text_file):
    folder = tmp_path / "prepared"
    folder.mkdir()
    (folder / "manifest.json").write_text('{"format": "jaxlm-tokens-1"}')
    text = str(text_file("abc"))
    for paths in ({"path": (str(folder), text)}, {"path": text, "val_path": str(folder)}):
        with pytest.raises(ValueError, match="prepared is a prepared corpus, which has splits of its own: give"):
            load_corpus(DataConfig(**paths), 7)
