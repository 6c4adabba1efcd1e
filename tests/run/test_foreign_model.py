"""Training goes on from a Hugging Face folder, with its tokenizer, its rows and its stop tokens."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from foreign_folders import GPT2, weights, write
from foreign_tokenizers import llama2_tokenizer
from support import command, refused, snapshot

from jaxlm import convert
from jaxlm.config import DataConfig, SampleConfig
from jaxlm.config.presets import preset
from jaxlm.data.corpus import load_corpus
from jaxlm.data.hugging_face import from_hugging_face
from jaxlm.errors import UserError
from jaxlm.run import checkpoint
from jaxlm.run.folder import load_run
from jaxlm.run.foreign_model import read_model
from jaxlm.run.import_weights import import_run
from jaxlm.run.init_from import default_config, open_source
from jaxlm.run.session import new_session

ROWS = 340
TEXT = "the cat sat on the café</s> 你好\n" * 60
TRAINED = ("--train.steps", 2, "--train.batch-size", 2, "--train.eval-every", 2, "--optim.warmup-steps", 0)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "new.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def source(tmp_path):
    """A Hugging Face folder with a tokenizer as of Llama 2, and two ends."""
    table = {"transformer.wte.weight": np.random.default_rng(1).standard_normal((ROWS, 15), np.float32)}
    config = {**GPT2, "vocab_size": ROWS, "eos_token_id": [2, 9]}
    folder = write(tmp_path / "gpt2", config, weights(GPT2) | table)
    (folder / "tokenizer.json").write_text(json.dumps(llama2_tokenizer()))
    return folder


def settings(source, text, **data):
    base = default_config(source, None)
    return dataclasses.replace(base, data=DataConfig(path=str(text), tokenizer="source", **data))


def test_the_command_trains_a_hugging_face_folder_on_a_new_text(source, text, tmp_path):
    out = tmp_path / "trained"
    asked = ("--data.path", text, "--data.tokenizer", "source", "--sample.max-new-tokens", 3)
    code, _, stderr = command("train", "--init-from", source, *asked, *TRAINED, "--out", out)
    assert code == 0, stderr
    run, record = load_run(out, 0), json.loads((out / "config.json").read_text())
    cfg, params = convert.from_hf(source)
    assert (run.config.model, run.config.data.tokenizer) == (cfg, "bpe")
    jax.tree.map(np.testing.assert_array_equal, run.params, params)
    assert record["init_from"]["run"] == str(source)
    assert run.config.sample.stop_token == (2, 9)
    assert run.tokenizer.to_dict() == from_hugging_face(llama2_tokenizer()).to_dict()
    assert command("train", "--resume", "--out", out, "--train.steps", 3, "--optim.keep-schedule")[0] == 0
    assert load_run(out, 3).config.sample.stop_token == (2, 9)


@pytest.mark.parametrize("imported", [False, True])
@pytest.mark.parametrize("name", [None, "tiny"])
def test_the_sources_tokenizer_encodes_the_new_text(source, text, tmp_path, imported, name):
    opened = import_run("hf", source, tmp_path / "run") if imported else read_model("hf", source)
    where = tmp_path / "run" if imported else source
    config = dataclasses.replace(
        default_config(opened, name), data=DataConfig(path=str(text), tokenizer="source", special_tokens="id")
    )
    session = new_session(config, tmp_path / "new", init_from=where)
    expected = load_corpus(session.config.data, 23, from_hugging_face(llama2_tokenizer()))
    np.testing.assert_array_equal(session.corpus.train.tokens, expected.train.tokens)
    assert session.corpus.train.tokens[0] == 1
    assert (session.corpus.train.tokens == 2).sum() == TEXT[: int(0.9 * len(TEXT))].count("</s>") + 1
    assert session.config.sample.stop_token == (2, 9)
    assert session.config.preset == (name or "imported")
    assert session.config.train.steps == (preset("tiny") if name else session.config).train.steps


def test_a_stop_token_of_the_users_own_stays(source, text, tmp_path):
    config = dataclasses.replace(settings(open_source(source), text), sample=SampleConfig(stop_token=7))
    assert new_session(config, tmp_path / "new", init_from=source).config.sample.stop_token == 7


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_source_is_the_tokenizer_of_any_run(text, tmp_path, kind):
    config = dataclasses.replace(preset("tiny"), data=DataConfig(path=str(text), tokenizer=kind, bpe_vocab_size=300))
    first = new_session(config, tmp_path / "first")
    checkpoint.save(tmp_path / "first/checkpoints", first.state, None, keep=1)
    again = dataclasses.replace(first.config, data=dataclasses.replace(config.data, tokenizer="source"))
    second = new_session(again, tmp_path / "second", init_from=str(tmp_path / "first"))
    assert second.config.data == first.config.data
    assert second.corpus.tokenizer.to_dict() == first.corpus.tokenizer.to_dict()


def test_what_cannot_be_gone_on_with_is_refused_in_one_line(source, text, tmp_path):
    options = ("--data.path", text, "--data.tokenizer", "source", *TRAINED, "--out", tmp_path / "out")
    assert "data.tokenizer = 'source' is the tokenizer of another model: add --init-from" in refused(
        "train", "tiny", *options
    )
    (source / "tokenizer.json").rename(tmp_path / "kept.json")
    before = snapshot(tmp_path)
    said = refused("train", "--init-from", source, *options)
    assert "new.txt: 'the' is not a token id: this tokenizer reads ids from 0 to 339" in said
    assert f"{source} has no tokenizer.json of its own, so its texts are ids" in said
    text.write_text("12 340 7 " * 60)
    assert "'340' is outside the vocabulary" in refused("train", "--init-from", source, *options)
    text.write_text(TEXT)
    (source / "tokenizer.json").write_text('{"type": "ids", "vocab_size": 341}')
    assert "has ids up to 340, the model up to 339" in refused("train", "--init-from", source, *options)
    (source / "tokenizer.json").unlink()
    (source / "model.safetensors").rename(tmp_path / "weights")
    assert "has none of model.safetensors" in refused("train", "--init-from", source, *options)
    (tmp_path / "weights").rename(source / "model.safetensors")
    assert snapshot(tmp_path) == before


def test_a_folder_that_is_neither_is_no_source(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config.json does not hold a JSON object"):
        open_source(tmp_path)
