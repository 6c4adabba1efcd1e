"""Text samples of a run: what is shown, stop strings, what ends a sample, the file that is kept."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from foreign_tokenizers import llama2_tokenizer
from support import built
from tolerances import FLOAT32

from jaxlm.config import ExperimentConfig, ModelConfig, SampleConfig
from jaxlm.config.base import to_dict
from jaxlm.data.hugging_face import from_hugging_face
from jaxlm.data.tokenizer import BPETokenizer, TranscriptTokenizer
from jaxlm.decode.generate import generate
from jaxlm.decode.text_stream import WINDOW
from jaxlm.run.folder import Run
from jaxlm.run.samples import generate_samples, keep, sample

BPE = BPETokenizer.train(["naïve café: the other thé there, then this 🦜 " * 20], 290)


def untrained_run(tokenizer, path=Path("runs/none")):
    """A run that was never trained, with parameters large enough to tell tokens apart."""
    cfg = ModelConfig(
        vocab_size=tokenizer.vocab_size, max_seq_len=64, num_layers=1, embed_dim=12, num_heads=2, position="rope"
    )
    model, params = built(cfg)
    return Run(path, ExperimentConfig(preset="test", model=cfg), model, params, tokenizer, 7, "")


SAME = {"key": jax.random.key(3), "temperature": 1.5}
FREE = SampleConfig(prompt="the thé", max_new_tokens=24, temperature=1.5, seed=3)


def test_what_is_shown_is_the_sample_and_the_sample_is_what_generate_returns():
    run, shown = untrained_run(BPE), []
    (only,) = generate_samples(run, FREE, shown.append)
    assert shown[0] == "the thé"
    assert len(shown) > 8
    assert "".join(shown) == "the thé" + only.text == sample(run, FREE)[0]
    prompt = BPE.encode("the thé")[None]
    out = generate(run.model, run.params, prompt, max_new_tokens=24, key=jax.random.key(3), temperature=1.5)
    assert only.tokens == out.tokens[0].tolist()
    np.testing.assert_allclose(only.log_probs, out.log_probs[0], atol=10 * FLOAT32)
    assert only.text == BPE.decode(only.tokens)
    assert only.finished == "length"


def test_a_stop_string_that_spans_tokens_ends_only_the_samples_that_spell_it():
    run = untrained_run(BPE)
    several = dataclasses.replace(FREE, num_samples=3)
    free = generate_samples(run, several)
    tokens = free[0].tokens
    ends = [len(BPE.decode(tokens[:count])) for count in range(len(tokens))]
    place = next(end for end in ends[8:] if "\ufffd" not in free[0].text[end - 1 : end + 1])
    stop = free[0].text[place - 1 : place + 1]
    shown = []
    samples = generate_samples(run, dataclasses.replace(several, stop=(stop, "never generated")), shown.append)
    assert "".join(shown) == FREE.prompt + samples[0].text
    for one, unstopped in zip(samples, free, strict=True):
        text, separator, _ = unstopped.text.partition(stop)
        assert (one.text, one.finished) == (text, "stop_string" if separator else "length")
        assert one.tokens == unstopped.tokens[: len(one.tokens)]
        assert len(one.log_probs) == len(one.tokens)
        assert (stop in BPE.decode(one.tokens)) == bool(separator)
    assert samples[0].finished == "stop_string"
    assert len(samples[0].tokens) < len(tokens)


def test_a_sample_may_end_before_bytes_that_spell_nothing():
    run, several = untrained_run(BPE), dataclasses.replace(FREE, num_samples=3)
    free = generate_samples(run, several)
    samples = generate_samples(run, dataclasses.replace(several, stop=("\ufffd",)))
    assert [one.text for one in samples] == [one.text.partition("\ufffd")[0] for one in free]
    assert any(one.finished == "stop_string" for one in samples)
    assert min(min(one.tokens) for one in samples) >= 0


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("special_tokens", ["id", "text"])
def test_a_tokenizer_with_spaces_in_front_continues_the_text_of_its_prompt(special_tokens, words):
    tokenizer, shown = from_hugging_face(llama2_tokenizer()), []
    run = untrained_run(tokenizer)
    spelled = [tokenizer._tokenizer.id_to_token(i) for i in range(tokenizer.vocab_size)]
    forbidden = tuple(i for i, token in enumerate(spelled) if words and not token.startswith("▁"))
    cfg = dataclasses.replace(FREE, prompt="the café</s>", special_tokens=special_tokens, num_samples=3)
    cfg = dataclasses.replace(cfg, forbidden_tokens=forbidden)
    samples = generate_samples(run, cfg, shown.append)
    assert "".join(shown) == cfg.prompt + samples[0].text
    prompt = tokenizer.encode(cfg.prompt, special_tokens).tolist()
    assert (2 in prompt) == (special_tokens == "id")
    out = generate(
        run.model, run.params, np.array([prompt]), max_new_tokens=24, **SAME, num_samples=3, forbidden_tokens=forbidden
    )
    assert all(one.text.startswith(" ") for one in samples) or not words
    for one, tokens in zip(samples, out.tokens.tolist(), strict=True):
        assert one.tokens == tokens
        assert one.text == tokenizer.decode(prompt + tokens)[len(tokenizer.decode(prompt)) :]


def test_transcripts_begin_after_an_eos_end_before_the_next_and_hold_no_padding():
    run = untrained_run(TranscriptTokenizer())
    cfg = SampleConfig(prompt="", max_new_tokens=40, temperature=3.0, num_samples=16)
    samples = generate_samples(run, cfg)
    assert {one.finished for one in samples} == {"stop_token", "length"}
    for one in samples:
        assert {28, 29}.isdisjoint(one.tokens)
        assert one.text == run.tokenizer.decode(one.tokens)
        assert len(one.tokens) == len(one.log_probs)
        assert (len(one.tokens) < 40) == (one.finished == "stop_token")


def test_every_option_reaches_the_sampler(monkeypatch):
    asked = {}

    def request(cfg, prompt, sampling, *, key, num_samples, capacity):
        asked.update(
            to_dict(sampling),
            capacity=capacity,
            ids=prompt.tolist(),
            key=jax.random.key_data(key).tolist(),
            rows=num_samples,
        )
        raise InterruptedError

    monkeypatch.setattr("jaxlm.run.samples.make_request", request)
    values = {"top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.5, "temperature": 0.7}
    own = {"prompt": "AB", "seed": 9, "max_new_tokens": 11, "num_samples": 4, "stop": ("C",), "special_tokens": "text"}
    cfg = SampleConfig(forbidden_tokens=(3, 4), **values, **own)
    with pytest.raises(InterruptedError):
        generate_samples(untrained_run(TranscriptTokenizer()), cfg, capacity=33)
    special = {"forbidden_tokens": (3, 4, 29), "stop_token": (28,), "capacity": 33}
    assert asked == {**values, **own, **special, "ids": [[28, 0, 1]], "key": [0, 9], "rows": 4}
    with pytest.raises(InterruptedError):
        generate_samples(untrained_run(TranscriptTokenizer()), dataclasses.replace(cfg, stop_token=27))
    assert asked["stop_token"] == (27,)  # in place of <eos>


def test_the_work_for_a_token_does_not_grow_with_the_sample(monkeypatch):
    lengths, decode = [], BPETokenizer.decode

    def counted(self, ids):
        lengths.append(len(ids))
        return decode(self, ids)

    monkeypatch.setattr(BPETokenizer, "decode", counted)
    (only,) = generate_samples(untrained_run(BPE), dataclasses.replace(FREE, max_new_tokens=56, stop=("never there",)))
    assert len(only.tokens) == 56
    assert len(lengths) < 1.3 * 56
    assert max(lengths) <= WINDOW


def test_samples_are_kept_in_new_files(tmp_path):
    run = untrained_run(BPE, tmp_path)
    names = [keep(run, 3, {"number": number}).name for number in range(3)]
    assert names == ["step-7-seed-3.json", "step-7-seed-3-2.json", "step-7-seed-3-3.json"]
    assert [json.loads((tmp_path / "samples" / name).read_text()) for name in names] == [
        {"number": n} for n in range(3)
    ]


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "samples").write_text("no folder")
    with pytest.warns(UserWarning, match=r"the samples are not kept: .*samples is not a folder: move it away"):
        assert keep(untrained_run(BPE, tmp_path), 0, {}) is None
