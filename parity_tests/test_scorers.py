"""Texts scored by a Hugging Face model, against torch row by row."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tokenizers  # noqa: E402
from tolerances import FLOAT32  # noqa: E402

from jaxlm.evals.scorers import load_scorer  # noqa: E402
from jaxlm.evals.tasks import score_continuations  # noqa: E402

STARTS = ["the cat s", "a do", "the dog and the ca"]
TEXTS = ["the cat sat on the mat and then the dog", "a dog", "the dog and the cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GPT-2 with random weights and a tokenizer of words and parts of words."""
    path = tmp_path_factory.mktemp("gpt2")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=30, special_tokens=["<s>"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(path)
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.5}
    cfg = transformers.GPT2Config(vocab_size=30, n_positions=40, n_embd=16, n_layer=2, n_head=2, **special)
    transformers.GPT2LMHeadModel(cfg).save_pretrained(path)
    return path


def scored(folder, text, start):
    """(log-probability, tokens) of a text after the tokens `start`, a token at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = [*start, *tokenizer(text)["input_ids"]]
    total = 0.0
    for count in range(1, len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor([ids[:count]])).logits[0, -1]
        total += float(torch.log_softmax(logits.double(), -1)[ids[count]])
    return total, len(ids)


def test_a_hugging_face_folder_scores_texts_in_batches(folder):
    assert json.loads((folder / "config.json").read_text())["model_type"] == "gpt2"
    log_probs, tokens = load_scorer(folder, batch_size=2)(TEXTS)
    expected = [scored(folder, text, [0]) for text in TEXTS]
    assert len({count for _, count in expected}) == 3
    assert tokens.tolist() == [count for _, count in expected]
    np.testing.assert_allclose(log_probs, [value for value, _ in expected], rtol=100 * FLOAT32)


def test_the_part_a_text_adds_is_the_difference_in_the_oracles_own_tokens(folder):
    results = score_continuations(load_scorer(folder, batch_size=8), STARTS, TEXTS)
    (before, tokens_before), (after, tokens) = (
        np.sum([scored(folder, text, [0]) for text in texts], axis=0) for texts in (STARTS, TEXTS)
    )
    nats, added = before - after, tokens - tokens_before
    characters = len("".join(TEXTS)) - len("".join(STARTS))
    assert added != characters
    assert results["perplexity"] == pytest.approx(np.exp(nats / added), rel=1e-4)
    assert results["nats_per_character"] == pytest.approx(nats / characters, rel=1e-4)


def test_without_a_token_for_the_beginning_the_first_token_is_certain(folder, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path)
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    log_probs, tokens = load_scorer(tmp_path, batch_size=8)(TEXTS[:1])
    expected, count = scored(folder, TEXTS[0], [])
    assert (log_probs[0], tokens[0]) == (pytest.approx(expected), count)


def test_texts_too_long_and_folders_that_do_not_load_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"reads at most 40 tokens, but a text has \d+"):
        load_scorer(folder, batch_size=8)([TEXTS[0] * 5])
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=r"oracle .* cannot be loaded \(.*\): save its model and its tokenizer there"):
        load_scorer(tmp_path, batch_size=8)
