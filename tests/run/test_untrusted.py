"""Runs that others made: links, pipes and odd names in their folders, arrays that Orbax cannot read."""

import dataclasses
import json
import os
import sys
import types

import fuzz_targets
import pytest

from jaxlm.cli.main import main
from jaxlm.config import DataConfig
from jaxlm.data.files import json_digest, sealed
from jaxlm.errors import CheckError, UserError
from jaxlm.run import checkpoint, folder, manifest, session, sinks
from jaxlm.run.folder import load_run, read_record
from jaxlm.run.metrics import check_log, read_rows


@pytest.fixture
def run(tmp_path):
    fuzz_targets._make_run(tmp_path)
    return tmp_path / "run"


def sign(step):
    """Writes the sums of a checkpoint anew, as whoever changes it on purpose would."""
    content = json.loads((step / "manifest.json").read_text())
    content["sha256"] = manifest.digests(step)
    content["sha256"]["manifest.json"] = json_digest(content)
    (step / "manifest.json").write_text(json.dumps(content))


def test_a_link_in_a_checkpoint_is_refused(run):
    """A link to a folder would hide its files from the sums, and what it leads to can change."""
    assert load_run(run).step == 0
    step = run / "checkpoints" / "0"
    (step / "params").rename(run / "elsewhere")
    (step / "params").symlink_to(run / "elsewhere")
    sign(step)
    with pytest.raises(CheckError, match="params is a link"):
        load_run(run)


def test_a_pipe_in_a_checkpoint_does_not_wait(run):
    os.mkfifo(run / "checkpoints" / "0" / "params" / "extra")
    with pytest.raises(CheckError, match="params/extra is not in the manifest"):
        load_run(run)


def test_arrays_that_orbax_cannot_read_are_damaged_even_with_sound_sums(run):
    step = run / "checkpoints" / "0"
    (step / "params" / "_METADATA").write_text("{}")
    sign(step)
    with pytest.raises(CheckError, match="params cannot be read"):
        load_run(run)


@pytest.mark.parametrize("metadata", [None, "{}", "[]", "cut"])
def test_more_layers_than_a_checkpoint_has_are_refused_before_they_are_built(run, monkeypatch, capsys, metadata):
    """9,999 layers take more than 40 s to trace."""
    step, content = run / "checkpoints" / "0", json.loads((run / "config.json").read_text())
    content["config"]["model"]["num_layers"] = 9999
    content["corpus_sha256"] = "0" * 64
    (run / "config.json").write_text(json.dumps(sealed(content)))
    if metadata is not None:
        (step / "params" / "_METADATA").write_text(metadata)
        sign(step)
    monkeypatch.setattr(folder, "build_model", None)
    monkeypatch.setattr(session, "build_model", None)
    config = read_record(run).config
    error = UserError if metadata is None else CheckError
    words = "the arrays of 1 layers, and config.json needs 9999" if metadata is None else "params cannot be read"
    with pytest.raises(error, match=words):
        load_run(run)
    with pytest.raises(error, match=words):
        session.resumed_session(dataclasses.replace(config, data=DataConfig(path=str(run / "config.json"))), run)
    if metadata is None:
        assert main(["info", str(run)]) == 2
        assert words in capsys.readouterr().err


def test_only_plain_numbers_are_steps(run):
    for name in ("²", "٣", "007", "9" * 30, "-1"):
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / "manifest.json").write_text("{}")
    assert checkpoint.steps(run / "checkpoints") == [0]


@pytest.mark.parametrize(
    "line",
    ['{"step": 1e999, "elapsed_s": 0}', "[" * 100_000, '{"step": 1, "elapsed_s": 0, "val_loss": "low"}', "7", "[1]"],
)
def test_a_line_that_is_no_row_of_numbers_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(line + '\n{"step": 2, "elapsed_s": 1}\n')
    with pytest.raises(ValueError, match="line 1 is not a row of metrics"):
        read_rows(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("name", ["*", "../x", "", "x" * 200])
def test_the_id_of_a_run_elsewhere_is_no_pattern_of_folders_to_remove(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "id").write_text(name)
    with pytest.raises(UserError, match="(no id of a run|more than 100).*delete it"):
        sinks.WeightsAndBiases(tmp_path, {}, [])


@pytest.mark.parametrize(
    "entry", ["x", [], 7, {}, {"bytes": -5, "sha256": "x"}, {"bytes": "5", "sha256": "x"}, {"bytes": 5, "sha256": 7}]
)
def test_an_entry_of_the_log_that_is_no_size_and_digest_is_damage(run, entry):
    step = run / "checkpoints" / "0"
    content = json.loads((step / "manifest.json").read_text())
    (step / "manifest.json").write_text(json.dumps({**content, "metrics": entry}))
    sign(step)
    with pytest.raises(CheckError, match=r"0 is damaged: the entry metrics of its manifest.json is not a size"):
        checkpoint.log_entry(step)


def test_a_log_that_would_be_of_terabytes_is_a_changed_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "elapsed_s": 0}\n')
    with pytest.raises(UserError, match="was changed after it was written"):
        check_log(tmp_path / "metrics.jsonl", {"bytes": 10**18, "sha256": "x"})
