"""Texts of a run: pieces as they come, stop strings, what ends a sample, the file that is kept."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support import built
from tolerances import FLOAT32

from jaxlm.config import ExperimentConfig, ModelConfig, SampleConfig
from jaxlm.data.tokenizer import BPETokenizer, CharTokenizer, TranscriptTokenizer
from jaxlm.decode.generate import generate
from jaxlm.run.folder import Run
from jaxlm.run.samples import TextStream, draw, keep, sample

BPE = BPETokenizer.train(["naïve café: the other thé there, then this 🦜 " * 20], 290)


def made_run(tokenizer, path=Path("runs/none")):
    """A run that was never trained, with parameters large enough to tell tokens apart."""
    cfg = ModelConfig(
        vocab_size=tokenizer.vocab_size, max_seq_len=64, num_layers=1, embed_dim=12, num_heads=2, position="rope"
    )
    model, params = built(cfg)
    return Run(path, ExperimentConfig(preset="test", model=cfg), model, params, tokenizer, 7, "")


def pieces_of(tokens, tokenizer, stop_strings=()):
    stream = TextStream(tokenizer, stop_strings)
    return [*(stream.push(token) for token in tokens), stream.finish()], stream.stopped


# Pieces --------------------------------------------------------------------------------------------------------------

CHARACTER = BPE.encode("🦜").tolist()


@given(st.lists(st.integers(0, BPE.vocab_size - 1) | st.sampled_from(BPE.encode("🦜é€�").tolist()), max_size=12))
@example(CHARACTER)
@example([*CHARACTER[:2], *CHARACTER])
@example(CHARACTER[:-1])
def test_pieces_join_to_the_text_and_are_never_taken_back(tokens):
    pieces, _ = pieces_of(tokens, BPE)
    whole = BPE.decode(tokens)
    assert "".join(pieces) == whole
    for end in range(len(tokens)):  # what is shown by then stays true, whatever follows
        shown = "".join(pieces[: end + 1])
        assert whole.startswith(shown)
        assert len(BPE.decode(tokens[: end + 1])) - len(shown) <= 1


def test_half_a_character_is_held_back():
    tokens = BPE.encode("a🐙b").tolist()
    assert len(tokens) > 3
    pieces, _ = pieces_of(tokens, BPE)
    assert [piece for piece in pieces if piece] == ["a", "🐙", "b"]


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
@example("aab", ["ab"])
@example("abab", ["abb", "ba"])
@example("baa", ["a", "baa"])
@example("ab", ["b", "ab"])
def test_a_text_ends_before_its_first_stop_string_and_shows_nothing_of_it(text, stop_strings):
    tokenizer = CharTokenizer("ab")
    pieces, stopped = pieces_of(tokenizer.encode(text).tolist(), tokenizer, stop_strings)
    places = [(text.find(string) + len(string), text.find(string)) for string in stop_strings if string in text]
    expected = text[: min(places)[1]] if places else text  # the first to be whole ends it
    assert ("".join(pieces), stopped) == (expected, bool(places))
    for end in range(len(text)):
        seen, shown = text[: end + 1], "".join(pieces[: end + 1])
        if not any(string in seen for string in stop_strings):  # all is shown but what may begin a stop string
            assert (
                shown
                + next(
                    held
                    for start in range(len(seen) + 1)
                    if not (held := seen[start:]) or any(string.startswith(held) for string in stop_strings)
                )
                == seen
            )


def test_a_stop_string_may_end_in_the_middle_of_a_token():
    tokens = BPE.encode("the other there").tolist()
    assert not any(BPE.decode(tokens[:end]).endswith("e oth") for end in range(len(tokens)))
    pieces, stopped = pieces_of(tokens, BPE, ["e oth"])
    assert ("".join(pieces), stopped) == ("th", True)
    pieces, _ = pieces_of(tokens, BPE, ["ther", "oth"])  # both in one token
    assert "".join(pieces) == "the "


# Samples -------------------------------------------------------------------------------------------------------------

FREE = SampleConfig(prompt="the thé", max_new_tokens=24, temperature=1.5, seed=3)


def test_what_is_shown_is_the_sample_and_the_sample_is_what_generate_draws():
    run, shown = made_run(BPE), []
    (drawn,) = draw(run, FREE, shown.append)
    assert shown[0] == "the thé"
    assert len(shown) > 8
    assert "".join(shown) == "the thé" + drawn.text == sample(run, FREE)[0]
    prompt = BPE.encode("the thé")[None]
    out = generate(run.model, run.params, prompt, max_new_tokens=24, key=jax.random.key(3), temperature=1.5)
    assert drawn.tokens == out.tokens[0].tolist()
    np.testing.assert_allclose(drawn.log_probs, out.log_probs[0], atol=10 * FLOAT32)
    assert drawn.text == BPE.decode(drawn.tokens)
    assert drawn.finished == "length"


def test_a_stop_string_that_spans_tokens_ends_only_the_samples_that_spell_it():
    run = made_run(BPE)
    several = dataclasses.replace(FREE, num_samples=3)
    free = draw(run, several)
    tokens = free[0].tokens
    ends = [len(BPE.decode(tokens[:count])) for count in range(len(tokens))]
    place = next(end for end in ends[8:] if "\ufffd" not in free[0].text[end - 1 : end + 1])
    stop = free[0].text[place - 1 : place + 1]
    shown = []
    drawn = draw(run, dataclasses.replace(several, stop=(stop, "never drawn")), shown.append)
    assert "".join(shown) == FREE.prompt + drawn[0].text
    for one, unstopped in zip(drawn, free, strict=True):
        text, found, _ = unstopped.text.partition(stop)
        assert (one.text, one.finished) == (text, "stop_string" if found else "length")
        assert one.tokens == unstopped.tokens[: len(one.tokens)]
        assert len(one.log_probs) == len(one.tokens)
        assert (stop in BPE.decode(one.tokens)) == bool(found)
    assert drawn[0].finished == "stop_string"
    assert len(drawn[0].tokens) < len(tokens)


def test_a_sample_may_end_before_bytes_that_spell_nothing():
    run, several = made_run(BPE), dataclasses.replace(FREE, num_samples=3)
    free = draw(run, several)
    drawn = draw(run, dataclasses.replace(several, stop=("\ufffd",)))
    assert [one.text for one in drawn] == [one.text.partition("\ufffd")[0] for one in free]
    assert any(one.finished == "stop_string" for one in drawn)
    assert min(min(one.tokens) for one in drawn) >= 0


def test_transcripts_begin_after_an_eos_end_before_the_next_and_hold_no_padding():
    run = made_run(TranscriptTokenizer())
    cfg = SampleConfig(prompt="", max_new_tokens=40, temperature=3.0, num_samples=16)
    drawn = draw(run, cfg)
    assert {one.finished for one in drawn} == {"stop_token", "length"}
    for one in drawn:
        assert {28, 29}.isdisjoint(one.tokens)
        assert one.text == run.tokenizer.decode(one.tokens)
        assert len(one.tokens) == len(one.log_probs)
        assert (len(one.tokens) < 40) == (one.finished == "stop_token")


def test_every_option_reaches_the_sampler(monkeypatch):
    asked = {}

    def request(cfg, prompt, *, key, **arguments):
        asked.update(arguments, prompt=prompt.tolist(), key=jax.random.key_data(key).tolist())
        raise InterruptedError

    monkeypatch.setattr("jaxlm.run.samples.Request", request)
    values = {"top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.5, "temperature": 0.7, "num_samples": 4}
    cfg = SampleConfig(prompt="AB", seed=9, max_new_tokens=11, forbidden_tokens=(3, 4), stop=("C",), **values)
    with pytest.raises(InterruptedError):
        draw(made_run(TranscriptTokenizer()), cfg)
    special = {"forbidden_tokens": (3, 4, 29), "stop_token": 28, "prompt": [[28, 0, 1]], "key": [0, 9]}
    assert asked == {**values, "max_new_tokens": 11, **special}


def test_samples_are_kept_in_new_files(tmp_path):
    run = made_run(BPE, tmp_path)
    names = [keep(run, 3, {"number": number}).name for number in range(3)]
    assert names == ["step-7-seed-3.json", "step-7-seed-3-2.json", "step-7-seed-3-3.json"]
    assert [json.loads((tmp_path / "samples" / name).read_text()) for name in names] == [
        {"number": n} for n in range(3)
    ]


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "samples").write_text("no folder")
    with pytest.warns(UserWarning, match=r"the samples are not kept: .*samples cannot be written"):
        assert keep(made_run(BPE, tmp_path), 0, {}) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"min_p": 0.0}, "min_p = 0.0 is out of range"),
        ({"top_p": 1.5}, "top_p = 1.5 is out of range"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0 is out of range"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty = inf is out of range"),
        ({"forbidden_tokens": (3, -1)}, r"forbidden_tokens = \(3, -1\) holds a negative id"),
        ({"forbidden_tokens": ("a",)}, "forbidden_tokens = .* has the wrong type"),
        ({"stop": ("a", "")}, "holds an empty text"),
        ({"stop": ("\udcff",)}, "holds no UTF-8"),
    ],
)
def test_bad_options_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        SampleConfig(**change)
