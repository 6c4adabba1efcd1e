"""Prompts from an .npz file: ids in another order of the vocabulary, and what is refused."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from held_out import LINES

import jaxlm
from jaxlm.errors import UserError
from jaxlm.evals.rows import read_rows, symbols
from jaxlm.evals.tasks import prediction

OWN = [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ' ", "<eos>", "<pad>"]
OTHERS = ["<pad>", "<sos>", "<eos>", *reversed(OWN[:28]), "<unk>"]
"""Another order of the same symbols, with two that the run does not have."""
TEXTS = [line[:40] for line in LINES if len(line) >= 40]


def ids_of(texts, vocabulary):
    return np.array([[vocabulary.index(symbol) for symbol in text] for text in texts], np.int64)


def saved(tmp_path, **arrays):
    path = tmp_path / "prompts.npz"
    np.savez(path, **arrays)
    return path


def texts_of(rows):
    return ["".join(OWN[i] for i in row) for row in rows]


def test_ids_are_converted_by_their_symbols(trained, tmp_path):
    inp, tgt = ([text[cut] for text in TEXTS] for cut in (slice(30), slice(30, 40)))
    path = saved(tmp_path, inp=ids_of(inp, OTHERS), tgt=ids_of(tgt, OTHERS), vocabulary=np.array(OTHERS))
    rows = read_rows(path, trained, None)
    assert texts_of(rows.prompts) == [f"<eos>{text}" for text in inp]
    assert texts_of(rows.truths) == tgt
    assert (rows.prompts.dtype, rows.prompts.shape) == (np.int32, (5, 31))
    some = read_rows(path, trained, 2)
    assert (len(some.prompts), len(some.truths)) == (2, 2)


@pytest.mark.parametrize("start", ["<sos>", "<eos>"])
def test_prompts_that_begin_with_eos_get_no_other(trained, tmp_path, start):
    inp = ids_of([[start, *text[:30]] for text in TEXTS], OTHERS)
    rows = read_rows(saved(tmp_path, inp=inp, vocabulary=np.array(OTHERS)), trained, None)
    assert texts_of(rows.prompts) == [f"<eos>{text[:30]}" for text in TEXTS]
    assert rows.truths is None


def test_without_a_vocabulary_ids_are_the_runs_own_and_a_warning_says_so(trained, tmp_path):
    path = saved(tmp_path, inp=ids_of(TEXTS, OWN).astype(np.uint8))
    with pytest.warns(UserWarning, match="ids are read as the run's own, from 0 = 'A' to 29 = '<pad>'"):
        rows = read_rows(path, trained, None)
    assert texts_of(rows.prompts) == [f"<eos>{text}" for text in TEXTS]


def test_a_run_on_text_puts_no_eos_before_its_prompts(text_run, tmp_path):
    vocabulary = symbols(text_run.tokenizer)[::-1]
    path = saved(tmp_path, inp=ids_of(TEXTS, vocabulary), vocabulary=np.array(vocabulary))
    np.testing.assert_array_equal(
        read_rows(path, text_run, None).prompts, [text_run.tokenizer.encode(text) for text in TEXTS]
    )


GOOD = {"inp": [[0, 1], [2, 3]], "tgt": [[4], [5]], "vocabulary": OWN}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inp": None}, "has no array 'inp': save it with np.savez"),
        ({"out": [[1]]}, "has an array 'out': save it with np.savez"),
        ({"inp": [0, 1]}, r"inp is int64 of shape \(2,\): give integers"),
        ({"inp": [[0.5, 1]]}, r"inp is float64 of shape \(1, 2\)"),
        ({"inp": np.zeros((0, 3), int)}, r"inp is int64 of shape \(0, 3\)"),
        ({"tgt": [[4]]}, "inp has 2 rows, tgt 1"),
        ({"inp": [[0, 1], [2, 30]]}, "row 1 of inp holds id 30: the vocabulary has 0 to 29"),
        ({"inp": [[-1, 1], [2, 3]]}, "row 0 of inp holds id -1"),
        ({"inp": [[28, 1], [2, 3]]}, "row 0 of inp begins with <eos>, row 1 does not"),
        ({"tgt": [[4], [29]]}, "row 1 of tgt holds '<pad>': give rows of one length without padding"),
        ({"vocabulary": ["a", *OWN[1:]]}, "row 0 of inp holds 'a', which the vocabulary of the run has not"),
        ({"vocabulary": [OWN[1], *OWN[1:]]}, "vocabulary holds 'B' more than once"),
        ({"vocabulary": [1, 2]}, r"vocabulary is int64 of shape \(2,\): give the symbol of each id"),
        (
            {"vocabulary": np.array(OWN, object)},
            r"holds values of type object.*: save it with np.savez.*no array of",
        ),
    ],
)
def test_a_file_that_does_not_hold_prompts_is_named(trained, tmp_path, change, words):
    arrays = {name: np.array(value) for name, value in (GOOD | change).items() if value is not None}
    with pytest.raises(UserError, match=words) as error:
        read_rows(saved(tmp_path, **arrays), trained, None)
    assert "prompts.npz" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "do not exist"), (b"PK\x03\x04 torn", "does not hold prompts"), (b"", "does not hold prompts")],
)
def test_a_file_that_is_no_archive_is_named(trained, tmp_path, content, words):
    path = tmp_path / "prompts.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_rows(path, trained, None)


def test_one_array_is_not_an_archive(trained, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 3), int))
    with pytest.raises(UserError, match="not an archive of arrays"):
        read_rows(tmp_path / "a.npy", trained, None)


def test_ids_without_symbols_take_no_vocabulary(trained, tmp_path):
    """Two ids of one spelling, as the parts of characters in byte-level BPE."""

    class Doubled(type(trained.tokenizer)):
        def decode(self, ids):
            return super().decode(min(i, 1) for i in ids)

    doubled = dataclasses.replace(trained, tokenizer=Doubled())
    assert symbols(doubled.tokenizer) is None
    with pytest.raises(UserError, match="ids of the run have no symbols: give its own ids without one"):
        read_rows(saved(tmp_path, **{name: np.array(value) for name, value in GOOD.items()}), doubled, None)


def test_the_python_of_the_page_converts_both_ways(trained, tmp_path, monkeypatch):
    """Prompts in the page's order of ids give the logits of the same prompts in the run's own, columns reordered."""
    monkeypatch.chdir(tmp_path)
    page = (Path(jaxlm.__file__).parent.parent / "docs" / "evaluate.md").read_text(encoding="utf-8")
    there, back = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    order = ["<pad>", "<eos>", *OWN[:28]]
    ids = ids_of(TEXTS, order)
    np.savez("theirs.npz", inp=ids[:, :30], tgt=ids[:, 30:])
    scope = {}
    exec(there, scope)
    nll = prediction(trained, prompts=Path("prompts.npz"), save=Path("predicted.npz"))["nll"]
    assert nll == pytest.approx(prediction(trained)["nll"], rel=1e-6)
    exec(back, scope)
    with np.load("predicted.npz") as file:
        np.testing.assert_array_equal(scope["logits"][..., order.index("A")], file["logits"][..., 0])
        np.testing.assert_array_equal(scope["logits"][..., 0], file["logits"][..., 29])
