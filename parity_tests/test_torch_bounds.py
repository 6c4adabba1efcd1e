"""Files of torch that unpack or widen to far more than they have, or that would run code, are refused."""

import os
import pickle
import zipfile

import pytest
import torch

from jaxlm import convert
from jaxlm.convert.files import open_tensors
from jaxlm.errors import UserError


def test_a_view_of_few_values_is_not_taken_for_many(tmp_path):
    torch.save({"a": torch.ones(1).expand(10**12)}, tmp_path / "a.bin")
    with pytest.raises(UserError, match=r"tensors of 4,000,000,000,000 bytes in 4: save the values"):
        open_tensors(tmp_path / "a.bin")
    one = torch.ones(1000)
    torch.save({str(i): one for i in range(9)}, tmp_path / "b.bin")
    with pytest.raises(UserError, match="tensors of 36,000 bytes in 4,000"):
        open_tensors(tmp_path / "b.bin")
    torch.save({"head": one, "table": one}, tmp_path / "tied.bin")
    assert open_tensors(tmp_path / "tied.bin").read("head").shape == (1000,)


def test_an_archive_that_unpacks_to_more_is_refused(tmp_path):
    torch.save({"a": torch.zeros(10**5)}, tmp_path / "a.bin")
    with zipfile.ZipFile(tmp_path / "a.bin") as old, zipfile.ZipFile(tmp_path / "b.bin", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="unpacked: save it without compression"):
        open_tensors(tmp_path / "b.bin")


@pytest.mark.parametrize("name", ["data.pkl", "version"])
def test_what_is_no_tensor_must_be_small(tmp_path, name):
    """torch takes six times its size, whatever it says."""
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
        archive.writestr(f"a/{name}", bytes((1 << 24) + 1))
    with pytest.raises(UserError, match="more than 16 MiB"):
        open_tensors(tmp_path / "a.bin")


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("how", ["pickle", "archive", "legacy"])
def test_code_in_a_checkpoint_does_not_run(tmp_path, how):
    path, mark = tmp_path / "a.bin", str(tmp_path / "escaped")
    if how == "pickle":
        path.write_bytes(pickle.dumps(Touch(mark)))
    else:
        torch.save({"a": Touch(mark)}, path, _use_new_zipfile_serialization=how == "archive")
    with pytest.raises(UserError):
        open_tensors(path)
    assert not (tmp_path / "escaped").exists()


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.bin")
    with pytest.raises(UserError, match="pipe or a device"):
        open_tensors(tmp_path / "a.bin")


def nested(kind):
    value = "x"
    for _ in range(40):
        value = kind([value, value])
    return value


@pytest.mark.parametrize("convert_from", [convert.from_nanogpt, convert.from_llama2c])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (nested(list), "n_layer has a value of type list"),  # 2 kB; printed it would have 2^40 items
        (nested(tuple), "n_layer has a value of type tuple"),
        ({"a": nested(list)}, "n_layer has a value of type list"),
        (torch.ones(2), "n_layer has a value of type Tensor"),
        (10**50, "n_layer has a number beyond 64 bits"),
    ],
)
def test_settings_that_grow_when_they_are_printed_are_refused(tmp_path, convert_from, value, words):
    torch.save({"model_args": {"n_layer": value}, "model": {"a": torch.ones(1)}}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=f"ckpt.pt: model_args: {words}: give a number, a text, or a list"):
        convert_from(tmp_path)


def test_settings_have_texts_as_names(tmp_path):
    torch.save({"model_args": {1: 2, "n_layer": 3}, "model": {"a": torch.ones(1)}}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="model_args has a name of type int"):
        convert.from_nanogpt(tmp_path)
