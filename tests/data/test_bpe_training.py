"""How merges are learned: words of bounded length, bounded work on texts without spaces, and an end when asked."""

import random
import signal
import subprocess
import sys
import time

import pytest

from jaxlm.data import bpe_training
from jaxlm.data.bpe import BPETokenizer
from jaxlm.errors import UserError

LETTERS = "".join(random.Random(0).choices("ACGT", k=6000))


def test_long_words_count_in_pieces_and_short_ones_whole(monkeypatch):
    """ "ab" * 8 is two words of at most 8 bytes: no merge is longer than these."""
    monkeypatch.setattr(bpe_training, "WORD_BYTES", 8)
    in_pieces = BPETokenizer.train(["ab" * 8 + " ab"], 300)
    spelled = [BPETokenizer.decode(in_pieces, [i]) for i in range(256, in_pieces.vocab_size)]
    assert max(map(len, spelled)) == 8
    assert in_pieces.decode(in_pieces.encode("ab" * 40)) == "ab" * 40
    short = "the cat sat on the mat; " * 9
    monkeypatch.setattr(bpe_training, "WORD_BYTES", 1 << 20)
    without_limit = BPETokenizer.train([short], 300)
    monkeypatch.setattr(bpe_training, "WORD_BYTES", 8)
    assert BPETokenizer.train([short], 300).to_dict() == without_limit.to_dict()
    # The limit is no part of the tokenizer, which encodes whole words as GPT-2 does.
    assert without_limit.to_dict()["tokenizer"]["pre_tokenizer"]["type"] == "ByteLevel"


def test_a_text_without_spaces_is_learned_in_pieces_of_bounded_size(monkeypatch):
    monkeypatch.setattr(bpe_training, "HELD_CHARS", 100)
    blocks = [LETTERS[start : start + 50] for start in range(0, len(LETTERS), 50)]
    words = list(bpe_training.whole_words(blocks))
    assert "".join(words) == LETTERS
    assert max(map(len, words)) <= 150
    spaced = ["one two", " three", "four five", " six"]
    assert list(bpe_training.whole_words(spaced)) == ["one", " two", " threefour", " five", " six"]
    long = ["seven eight" * 99]
    assert "".join(bpe_training.whole_words(long)) == long[0]
    assert max(map(len, bpe_training.whole_words(long))) <= 150


def test_what_reading_refuses_is_raised_as_it_is():
    def texts():
        yield "a"
        raise UserError("the text is bad")

    with pytest.raises(UserError, match="^the text is bad$"):
        BPETokenizer.train(texts(), 300)


def test_progress_is_a_line_where_stderr_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(bpe_training, "LINE_SECONDS", 0.05)

    def texts():
        yield "abcde "
        time.sleep(0.5)

    BPETokenizer.train(texts(), 300)
    said = capsys.readouterr().err
    assert "learning 300 BPE tokens: 5 characters read\n" in said
    BPETokenizer.train_on_documents(texts(), 300)  # `jaxlm prepare` has a bar of its own
    assert capsys.readouterr().err == ""


def test_an_interruption_ends_it_while_the_library_computes():
    """Python handles a signal only between its own instructions, and the library computes for seconds."""
    child = (
        "import signal, threading\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell ignores it in the background
        "from jaxlm.data.bpe import BPETokenizer\n"
        "def texts():\n"
        "    text = ' '.join(map(str, range(2_000_000)))\n"
        "    print('reading', flush=True)\n"
        "    yield text\n"
        "try:\n"
        "    BPETokenizer.train_on_documents(texts(), 60_000)\n"
        "except KeyboardInterrupt:\n"
        "    print([thread.name for thread in threading.enumerate() if thread.daemon], flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    time.sleep(0.3)  # until the text has been handed over
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate()
    assert said == "['learning BPE']\n"  # it was still at work
    assert process.returncode == 0
