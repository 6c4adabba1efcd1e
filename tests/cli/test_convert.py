"""`jaxlm convert` on Hugging Face folders: the runs it makes, their tokenizers, and bad input."""

import json

import jax
import numpy as np
import pytest
import tokenizers
from foreign_folders import GPT2, LLAMA, weights, word_tokenizer, write
from foreign_tokenizers import gpt2_tokenizer, llama2_tokenizer
from support import command

from jaxlm import convert
from jaxlm.convert.stop_tokens import stop_tokens
from jaxlm.errors import UserError
from jaxlm.run.folder import load_run
from jaxlm.run.import_weights import import_run

WORD_PIECE = {"type": "WordPiece", "prefix": "##", "cleanup": True}


@pytest.fixture
def gpt2(tmp_path):
    return write(tmp_path / "gpt2", GPT2)


# The command and the runs it makes


@pytest.mark.parametrize("config", [GPT2, pytest.param(LLAMA, marks=pytest.mark.slow)], ids=["gpt2", "llama"])
def test_a_folder_becomes_a_run_that_every_command_opens(tmp_path, config):
    source, out = write(tmp_path / "source", config), tmp_path / "runs" / "new"
    code, stdout, stderr = command("convert", "--from", "hf", source, out, "--json")
    assert (code, stderr) == (0, "")
    cfg, params = convert.from_hf(source)
    loaded = load_run(out)
    assert loaded.config.model == cfg
    assert (loaded.config.preset, loaded.step, loaded.corpus_sha256) == ("imported", 0, None)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    record = json.loads((out / "config.json").read_text())
    assert record["source"] == {"format": "Hugging Face", "name": "source"}
    assert str(tmp_path) not in (out / "config.json").read_text()
    found = json.loads(stdout)
    assert found["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert (found["tokenizer"], found["tokens"], found["model"]["vocab_size"]) == ("ids", 37, 37)

    code, stdout, _ = command("sample", out, "--prompt", "3 5", "--max-new-tokens", 4, "--json")
    assert code == 0
    text = json.loads(stdout)["texts"][0]
    assert text.startswith("3 5 ")
    assert len(text.split()) == 6
    code, stdout, _ = command("sample", out, "--max-new-tokens", 2)
    assert (code, stdout.split()[0]) == (0, "0")
    assert command("info", out, "--json")[0] == 0
    assert command("attend", out, "--text", "3 5")[0] == 0


def test_the_table_names_what_was_brought_in(tmp_path, gpt2):
    code, stdout, _ = command("convert", gpt2, tmp_path / "new", "--from", "hf")
    assert code == 0
    for words in ("2 layers, width 15, 3 heads, context 23", "6,720 of float32", "37", "token ids"):
        assert words in stdout


def test_an_imported_run_has_no_data_but_those_it_is_given(tmp_path, gpt2):
    out, text = tmp_path / "new", tmp_path / "text.txt"
    words = " ".join(str(i * 7 % 37) for i in range(900))
    text.write_text(words)
    assert command("convert", gpt2, out, "--from", "hf")[0] == 0
    for task in ("loss", "prediction"):
        code, _, stderr = command("eval", out, "--task", task)
        assert (code, stderr.count("\n")) == (2, 1)
        assert "was imported and has no data of its own: name a text by --data.path" in stderr
    code, stdout, _ = command("eval", out, "--data.path", text, "--json")
    assert code == 0
    found = json.loads(stdout)
    assert (found["data"], found["split"], found["targets"]) == (str(text), "all", 899)
    assert "bits_per_byte" not in found  # what text an id stands for is not known
    code, _, stderr = command("train", "--resume", "--out", out)
    assert code == 2
    assert "was imported, not trained" in stderr


@pytest.mark.parametrize("place", ["folder", "file", "link"])
def test_what_is_there_is_left_alone(tmp_path, gpt2, place):
    out = tmp_path / "out"
    if place == "folder":
        out.mkdir()
        (out / "note").write_text("mine")
    elif place == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    code, _, stderr = command("convert", gpt2, out, "--from", "hf")
    assert (code, stderr) == (2, f"jaxlm: error: {out} already holds something: choose another folder\n")
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_left_of_a_conversion_that_fails(tmp_path, gpt2, monkeypatch):
    (gpt2 / "model.safetensors").write_bytes((gpt2 / "model.safetensors").read_bytes()[:-4])
    code, _, stderr = command("convert", gpt2, tmp_path / "new", "--from", "hf")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "model.safetensors cannot be read" in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["gpt2"]

    def full(*arguments, **more):
        raise OSError(28, "No space left on device")

    write(gpt2, GPT2)
    monkeypatch.setattr("jaxlm.run.checkpoint.save", full)
    code, _, stderr = command("convert", gpt2, tmp_path / "new", "--from", "hf")
    assert code == 2
    assert "cannot be written (No space left on device)" in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["gpt2"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--from", "torchref"], "has no torchref: give a folder that convert --to torchref wrote"),
        (["--from", "jaxlm"], "--from is needed: give another format than --to jaxlm"),
        (["--from", "hf", "--to", "hf"], "--from is needed: give another format than --to hf"),
        (["--from", "keras"], "invalid choice 'keras'"),
        ([], "--from"),
        (["--from", "hf", "--tokenizer", "nowhere.json"], "nowhere.json is not a tokenizer"),
        (["--from", "nanogpt"], "ckpt.pt is not a file"),
        (
            ["--from", "hf", "--activation", "gelu"],
            "--activation gelu is for --from nanogpt; hf says it: leave it out",
        ),
    ],
)
def test_wrong_options_are_named(tmp_path, gpt2, arguments, words):
    code, _, stderr = command("convert", gpt2, tmp_path / "new", *arguments)
    assert (code, stderr.count("\n")) == (2, 1)
    assert words in stderr
    assert not (tmp_path / "new").exists()


# Tokenizers


def test_a_tokenizer_beside_the_model_is_taken_and_never_left(tmp_path):
    source = write(tmp_path / "source", LLAMA)
    (source / "tokenizer.json").write_text(json.dumps(word_tokenizer()))
    assert command("convert", source, tmp_path / "new", "--from", "hf")[0] == 0
    loaded = load_run(tmp_path / "new")
    assert (loaded.tokenizer.vocab_size, loaded.config.model.vocab_size) == (10, 37)
    assert len(loaded.tokenizer.encode("abcdeabcdeabcde")) > 3  # truncation is off
    assert len(loaded.tokenizer.encode("abc")) < 20  # so is padding
    assert len(loaded.tokenizer.encode(loaded.config.sample.prompt)) > 0
    settings = ("--prompt", "abc", "--max-new-tokens", 40, "--temperature", 100, "--num-samples", 3, "--json")
    code, stdout, _ = command("sample", tmp_path / "new", *settings, "--capacity", 64)
    assert code == 0
    drawn = {token for sample in json.loads(stdout)["samples"] for token in sample["tokens"]}
    assert drawn == set(range(10))  # of 37 rows


def test_a_tokenizer_of_jaxlm_may_be_named(tmp_path, gpt2):
    (tmp_path / "mine.json").write_text('{"type": "char", "chars": "abc"}')
    named = ("--tokenizer", tmp_path / "mine.json")
    assert command("convert", gpt2, tmp_path / "new", "--from", "hf", *named)[0] == 0
    assert load_run(tmp_path / "new").tokenizer.decode([2]) == "c"
    assert load_run(tmp_path / "new").config.sample.prompt == "a"  # the usual newline is no character of it


def test_ids_are_taken_where_they_are_asked_for(tmp_path, gpt2):
    (gpt2 / "tokenizer.json").write_text("{}")
    code, _, stderr = command("convert", gpt2, tmp_path / "new", "--from", "hf")
    assert code == 2
    assert "its model is of type None, only 'BPE' is supported" in stderr
    assert command("convert", gpt2, tmp_path / "new", "--from", "hf", "--tokenizer", "ids")[0] == 0
    assert load_run(tmp_path / "new").tokenizer.to_dict() == {"type": "ids", "vocab_size": 37}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({**word_tokenizer(), "decoder": WORD_PIECE}, "decoder is of type 'WordPiece', which cannot give a text piece"),
        ({**word_tokenizer(), "decoder": None}, "decoder is of type None"),
        ({**word_tokenizer(), "model": {"type": "Unigram"}}, "model is of type 'Unigram', only 'BPE'"),
        ({"type": "ids", "vocab_size": 38}, "has ids up to 37, the model up to 36"),
        ([], "is not a tokenizer"),
    ],
)
def test_an_unfit_tokenizer_is_refused(tmp_path, gpt2, content, words):
    (gpt2 / "tokenizer.json").write_text(json.dumps(content))
    code, _, stderr = command("convert", gpt2, tmp_path / "new", "--from", "hf")
    assert (code, stderr.count("\n")) == (2, 1)
    assert words in stderr
    assert not (tmp_path / "new").exists()


def test_a_trained_run_keeps_to_its_tokenizer(tmp_path, gpt2):
    out = tmp_path / "new"
    assert command("convert", gpt2, out, "--from", "hf")[0] == 0
    (out / "tokenizer.json").write_text('{"type": "ids", "vocab_size": 36}')
    assert load_run(out).tokenizer.vocab_size == 36
    (out / "tokenizer.json").write_text('{"type": "ids", "vocab_size": 38}')
    with pytest.raises(UserError, match="has 38 entries, the model 37"):
        load_run(out)
    record = json.loads((out / "config.json").read_text())
    del record["sha256"]  # an edit that is meant
    (out / "config.json").write_text(json.dumps({**record, "corpus_sha256": "0" * 64}))
    (out / "tokenizer.json").write_text('{"type": "ids", "vocab_size": 36}')
    with pytest.raises(UserError, match="has 36 entries, the model 37"):
        load_run(out)


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [(gpt2_tokenizer(), "naïve café\n"), (llama2_tokenizer(), "the cat 🦜")],
    ids=["gpt2", "llama2"],
)
def test_published_tokenizers_are_read_and_their_special_tokens_are_ids(tmp_path, tokenizer, text):
    larger = {"transformer.wte.weight": np.random.default_rng(1).standard_normal((340, 15), np.float32)}
    source = write(tmp_path / "source", {**GPT2, "vocab_size": 340}, weights(GPT2) | larger)
    out = tmp_path / "new"
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, stdout, stderr = command("convert", source, out, "--from", "hf", "--json")
    assert (code, stderr, json.loads(stdout)["tokenizer"]) == (0, "", "bpe")
    loaded, library = load_run(out).tokenizer, tokenizers.Tokenizer.from_str(json.dumps(tokenizer))
    name = tokenizer["added_tokens"][-1]["content"]
    ids = loaded.encode(text + name).tolist()
    assert ids == library.encode(text + name).ids[: len(ids)]
    assert ids[-1] == library.token_to_id(name)
    arguments = ("sample", out, "--prompt", name, "--max-new-tokens", 1, "--json", "--repetition-penalty", 1.5)
    for special_tokens in ("id", "text"):
        code, stdout, _ = command(*arguments, "--special-tokens", special_tokens)
        assert (code, json.loads(stdout)["sample"]["special_tokens"]) == (0, special_tokens)
        assert json.loads(stdout)["texts"][0].startswith(name)


def test_an_imported_run_is_measured_on_a_text_and_its_special_tokens(tmp_path):
    larger = {"transformer.wte.weight": np.random.default_rng(1).standard_normal((340, 15), np.float32)}
    source = write(tmp_path / "source", {**GPT2, "vocab_size": 340}, weights(GPT2) | larger)
    (source / "tokenizer.json").write_text(json.dumps(llama2_tokenizer()))
    assert command("convert", source, tmp_path / "new", "--from", "hf")[0] == 0
    text = tmp_path / "text.txt"
    text.write_text("the cat sat</s>" * 40 + ".")
    arguments = ("eval", tmp_path / "new", "--data.path", text, "--json")
    for special_tokens in ("text", "id"):
        code, stdout, _ = command(*arguments, "--data.special-tokens", special_tokens)
        found, ids = json.loads(stdout), load_run(tmp_path / "new").tokenizer.encode(text.read_text(), special_tokens)
        assert (code, found["targets"]) == (0, len(ids))  # without <s>, with </s>
        assert (ids == 2).sum() == (40 if special_tokens == "id" else 0)
        # Of all bytes of the text, whatever stands around it; <s> is no target, and </s> at the end is no text.
        nats = found["bits_per_byte"] * np.log(2) * (15 * 40 + 1)
        np.testing.assert_allclose(nats, found["loss"] * found["targets"], rtol=1e-9)
    assert json.loads(command(*arguments)[1])["targets"] > found["targets"]  # text, unless told otherwise
    said = command(*arguments[:2], "--task", "prediction", "--prompts", text, "--data.special-tokens", "id")[2]
    assert "--data.special-tokens id is not read beside --prompts" in said


# Stop tokens


@pytest.mark.parametrize(
    ("config", "generation", "stops"),
    [
        (5, None, 5),
        ([5, 7], None, (5, 7)),
        (None, [7, 5, 7], (7, 5)),
        (3, {"eos_token_id": [5, 7]}, (5, 7)),
        (3, {"max_length": 20}, 3),
        (3, {"eos_token_id": None}, 3),
        (None, None, None),
    ],
)
def test_a_run_remembers_the_tokens_that_end_its_models_texts(tmp_path, config, generation, stops):
    source, out = write(tmp_path / "source", {**GPT2, "eos_token_id": config}), tmp_path / "new"
    if generation is not None:
        content = generation if isinstance(generation, dict) else {"eos_token_id": generation}
        (source / "generation_config.json").write_text(json.dumps(content))
    assert command("convert", source, out, "--from", "hf")[0] == 0
    sample = load_run(out).config.sample
    assert sample.stop_token == stops
    assert stop_tokens(source) == sample.stop_tokens


def test_a_sample_ends_before_each_stop_token(tmp_path):
    source, out = write(tmp_path / "source", GPT2), tmp_path / "out"
    assert command("convert", source, out, "--from", "hf")[0] == 0
    asked = ("--prompt", "3 5", "--temperature", 3, "--num-samples", 6, "--max-new-tokens", 12, "--json")
    free = [one["tokens"] for one in json.loads(command("sample", out, *asked)[1])["samples"]]
    stops = [free[0][2], free[1][4]]
    write(source, {**GPT2, "eos_token_id": stops})
    assert command("convert", source, tmp_path / "stops", "--from", "hf")[0] == 0
    samples = json.loads(command("sample", tmp_path / "stops", *asked)[1])["samples"]
    for one, tokens in zip(samples, free, strict=True):
        length = next((place for place, token in enumerate(tokens) if token in stops), 12)
        assert one["tokens"] == tokens[:length]
        assert one["text"] == "".join(f" {token}" for token in tokens[:length])
        assert one["finished"] == ("length" if length == 12 else "stop_token")
    assert {one["finished"] for one in samples[:2]} == {"stop_token"}
    off = command("sample", tmp_path / "stops", *asked, "--stop-token", "None")
    assert [one["tokens"] for one in json.loads(off[1])["samples"]] == free


def test_an_end_outside_the_vocabulary_is_told_and_a_wrong_one_refused(tmp_path):
    source = write(tmp_path / "source", {**GPT2, "eos_token_id": [50256, 3]})
    words = r"eos_token_id = \[50256, 3\] names ids outside the vocabulary of 37, which never end a text"
    with pytest.warns(UserWarning, match=words):
        import_run("hf", source, tmp_path / "new")
    assert load_run(tmp_path / "new").config.sample.stop_token == 3
    (source / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    code, _, stderr = command("convert", source, tmp_path / "other", "--from", "hf")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "generation_config.json: eos_token_id = '</s>' is neither an id nor a list of ids" in stderr
