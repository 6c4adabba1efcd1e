"""Which token ends the texts of a run, of a Hugging Face folder and of a prepared corpus."""

import json

import pytest
from foreign_tokenizers import gpt2_tokenizer, llama2_tokenizer, llama3_tokenizer

from jaxlm.data.hugging_face import from_hugging_face
from jaxlm.data.tokenizer import CharTokenizer
from jaxlm.run.tokenizer_source import read_tokenizer


def folder_of(path, tokenizer, **files):
    for name, content in {"tokenizer": tokenizer, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def run_config(stop):
    return {"config": {"sample": {"stop_token": stop}}}


@pytest.mark.parametrize(
    ("tokenizer", "files", "expected"),
    [
        (gpt2_tokenizer(), {}, 0),
        (llama2_tokenizer(), {}, 2),
        (llama2_tokenizer(), {"config": {"eos_token_id": 1}}, 1),
        (llama3_tokenizer(), {"config": {"eos_token_id": 1}, "generation_config": {"eos_token_id": [0, 2]}}, 2),
        (llama3_tokenizer(), {"config": {"eos_token_id": [1, 0]}}, 1),
        (llama3_tokenizer(), {"config": {"eos_token_id": [299]}}, 2),
        (from_hugging_face(llama3_tokenizer()).to_dict(), {"config": run_config([1, 0])}, 1),
        (from_hugging_face(llama3_tokenizer()).to_dict(), {"config": run_config(None)}, 2),
        (from_hugging_face(llama3_tokenizer()).to_dict(), {"manifest": {"end_of_text": 1}}, 1),
    ],
)
def test_the_end_of_a_text_is_the_one_that_the_files_name(tmp_path, tokenizer, files, expected):
    source = read_tokenizer(folder_of(tmp_path, tokenizer, **files))
    assert source.end_of_text == expected
    data = tokenizer["tokenizer"] if tokenizer.get("type") == "bpe" else tokenizer
    assert source.tokenizer.to_dict() == from_hugging_face(data).to_dict()


def test_folders_without_such_a_token_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer.json cannot be read .*: name a folder with a tokenizer.json"):
        read_tokenizer(tmp_path)
    folder_of(tmp_path, CharTokenizer("ab").to_dict())
    with pytest.raises(ValueError, match="has no end-of-text token, as its type is 'char': give a folder with a byte"):
        read_tokenizer(tmp_path)
    folder_of(tmp_path, gpt2_tokenizer(added_tokens=[]))
    with pytest.raises(ValueError, match="names no special token that ends a text: set eos_token_id in its config"):
        read_tokenizer(tmp_path)
    folder_of(tmp_path, {"type": "bpe", "tokenizer": {}})
    with pytest.raises(ValueError, match="is not a tokenizer that jaxlm can read"):
        read_tokenizer(tmp_path)
    folder_of(tmp_path, [])
    with pytest.raises(ValueError, match="holds no JSON object"):
        read_tokenizer(tmp_path)
