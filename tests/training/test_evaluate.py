"""Exact evaluation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import apply, built

from jaxlm.config import ExperimentConfig, ModelConfig, TrainConfig
from jaxlm.config.presets import preset
from jaxlm.data.batches import PaddedRows, TokenStream
from jaxlm.data.corpus import Corpus
from jaxlm.data.tokenizer import CharTokenizer, IdTokenizer, TranscriptTokenizer
from jaxlm.errors import CheckError
from jaxlm.training.evaluate import (
    Evaluation,
    count_bytes,
    eval_batch_size,
    eval_groups,
    make_evaluate,
    text_measures,
)

CFG = ModelConfig(vocab_size=65, max_seq_len=7, num_layers=1, embed_dim=24, num_heads=3, mlp_dim=20)
CONFIG = ExperimentConfig(preset="test", model=CFG, train=TrainConfig(batch_size=2, grad_accum=2))
TOKENS = np.random.default_rng(0).integers(0, 65, 500).astype(np.uint8)
CHARACTERS = CharTokenizer(map(chr, [*range(65, 65 + 60), *range(0x3B1, 0x3B1 + 5)]))  # five of them take two bytes


def test_evaluation_is_the_mean_over_every_target():
    model, params = built(CFG)
    tokens = TOKENS[:38]
    loss = make_evaluate(model)(params, TokenStream(tokens, 7).eval_batches(2, groups=2))
    losses = []
    for start in range(0, 37, 7):
        window = tokens[start : start + 8].astype(np.int32)
        logits = np.asarray(apply(model, params, jnp.asarray(window[None, :-1]))[0][0], np.float64)
        losses += list(np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(window) - 1), window[1:]])
    assert len(losses) == 37
    assert loss == pytest.approx(np.mean(losses), rel=1e-5)


def evaluation(train, val, tokenizer=CHARACTERS, eval_batches=None):
    model, params = built(CFG)
    corpus = Corpus(tokenizer, TokenStream(train, 7), TokenStream(val, 7), "")
    return Evaluation(model, corpus, CONFIG, eval_batches), params


def test_an_evaluation_is_of_the_validation_split_and_of_as_long_a_start_of_the_training_split():
    evaluate, params = evaluation(TOKENS[:300], TOKENS[300:])
    losses = evaluate(params)
    mean = make_evaluate(built(CFG)[0])
    for name, tokens in (("val_loss", TOKENS[300:]), ("train_loss", TOKENS[:200])):
        assert losses[name] == mean(params, TokenStream(tokens, 7).eval_batches(4))
    assert losses["perplexity"] == math.exp(losses["val_loss"])
    text = CHARACTERS.decode(TOKENS[301:]).encode()
    assert len(text) > 199
    assert losses["bits_per_byte"] == pytest.approx(losses["val_loss"] * 199 / math.log(2) / len(text), rel=1e-12)


def test_bits_per_byte_needs_text():
    evaluate, params = evaluation(TOKENS[:300], TOKENS[300:], IdTokenizer(65))
    assert evaluate(params).keys() == {"val_loss", "train_loss", "perplexity"}
    rows = PaddedRows(np.array([[28, 28, 29]], np.uint8), 29)  # an empty transcript
    assert count_bytes(rows, TranscriptTokenizer()) is None
    assert text_measures(1.0, 5, None) == {"perplexity": math.e}


def test_an_evaluation_reports_how_far_it_is():
    evaluate, params = evaluation(np.tile(TOKENS, 20), np.tile(TOKENS, 20))  # more than one call of the program
    reports = []
    evaluate(params, lambda done, total: reports.append((done, total)))
    assert len(reports) > 2
    assert [done for done, _ in reports] == sorted({done for done, _ in reports})
    assert {total for _, total in reports} == {2 * 9_999}
    assert reports[-1] == (2 * 9_999, 2 * 9_999)


def test_an_estimate_is_the_mean_over_windows_spread_over_the_split_and_says_so():
    evaluate, params = evaluation(TOKENS[:300], TOKENS[300:], eval_batches=3)  # 6 of 29 windows
    reports = []
    losses = evaluate(params, lambda done, total: reports.append((done, total)))
    assert losses["eval_batches"] == 3
    assert reports[-1] == (2 * 6 * 7, 2 * 6 * 7)
    val, mean = TOKENS[300:], make_evaluate(built(CFG)[0])
    starts = [7 * (29 * i // 6) for i in range(6)]
    windows = [TokenStream(val[start : start + 8], 7) for start in starts]
    of_windows = [mean(params, window.eval_batches(1)) for window in windows]
    assert losses["val_loss"] == pytest.approx(np.mean(of_windows), rel=1e-6)
    assert losses["val_loss"] != evaluation(TOKENS[:300], val)[0](params)["val_loss"]
    exact = evaluation(TOKENS[:300], val, eval_batches=15)[0](params)  # 30 windows are all
    assert exact == evaluation(TOKENS[:300], val)[0](params)
    rows = PaddedRows(np.arange(40, dtype=np.uint8).reshape(10, 4), 99)
    (batch,) = rows.eval_batches(2, most=5)
    np.testing.assert_array_equal(batch.windows.reshape(-1, 4)[:5, 0], [0, 8, 16, 24, 32])
    assert batch.weights.sum() == 15


@pytest.mark.parametrize("value", [math.nan, 1e6])
def test_a_diverged_model_is_named(value):
    evaluate, params = evaluation(TOKENS[:300], TOKENS[300:])
    params = {**params, "final_norm": {**params["final_norm"], "scale": jnp.full(24, value)}}
    with pytest.raises(CheckError, match=r"the model has diverged: .*lower --optim.learning-rate"):
        evaluate(params)


@pytest.mark.parametrize(
    ("name", "rows"), [("gpt2-124m", 12), ("llama-7b", 64), ("nanogpt-cpu", 4 * 12), ("shakespeare-char", 4 * 64)]
)
def test_as_many_windows_at_once_as_need_less_memory_than_training(name, rows):
    """The logits of a large vocabulary are most of it, so there they are those of one micro-batch."""
    assert eval_batch_size(preset(name)) == rows


def test_a_call_of_the_compiled_evaluation_is_short():
    def most(name, numbers):
        return eval_groups(preset(name), {"w": jax.ShapeDtypeStruct((numbers,), np.float32)})

    assert most("nanogpt-cpu", 800_000) == 64
    assert most("gpt2-124m", 124_000_000) == 1
    assert most("llama-7b", 7_000_000_000) == 1
    assert most("shakespeare-char", 10_700_000) == 1 < most("shakespeare-char", 1_070_000)
