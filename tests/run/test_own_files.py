"""A run writes in its own folder only: links and pipes under the names that it writes are refused first."""

import os
import shutil

import fuzz_targets
import pytest
from support import refused

from jaxlm.config.presets import preset
from jaxlm.data.files import staged
from jaxlm.data.tokenizer import TranscriptTokenizer
from jaxlm.errors import UserError
from jaxlm.run.folder import load_run, new_folder, read_config
from jaxlm.run.metrics import check_log
from jaxlm.run.own_files import FILES, FOLDERS
from jaxlm.run.samples import keep
from jaxlm.run.training import train

ROWS = '{"step": 9, "elapsed_s": 1}\n'


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    fuzz_targets._make_run(folder)
    return folder / "run"


@pytest.fixture
def run(sound, tmp_path):
    """A run whose folder is itself a link, which is sound."""
    shutil.copytree(sound, tmp_path / "there")
    (tmp_path / "run").symlink_to("there")
    return tmp_path / "run"


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuses(run, words):
    with pytest.raises(UserError, match=words):
        train(read_config(run), run, resume=True)


def test_a_sound_run_is_not_refused_for_its_files(run):
    refuses(run, "was imported, not trained")
    assert not (run / ".lock").exists()


@pytest.mark.parametrize("name", FILES)
def test_a_link_to_a_file_is_refused_and_the_file_stays(run, tmp_path, name):
    victim, own = tmp_path / "victim", run / name
    victim.write_bytes(own.read_bytes() if own.exists() else ROWS.encode())
    own.unlink(missing_ok=True)
    own.symlink_to(victim)
    before = victim.read_bytes()
    refuses(run, rf"{name} is a link, and a run writes in its own folder only")
    assert own.is_symlink()
    assert victim.read_bytes() == before


@pytest.mark.parametrize("name", [*FOLDERS, "checkpoints/0"])
def test_a_link_to_a_folder_is_refused_and_the_folder_stays(run, tmp_path, name):
    victim, own = tmp_path / "victim", run / name
    if own.exists():
        own.rename(victim)
    victim.mkdir(exist_ok=True)
    (victim / ".a.txt.7.partial").write_text("mine")
    own.symlink_to(victim)
    before = content(victim)
    refuses(run, rf"{name} is a link, and a run writes in its own folder only")
    assert content(victim) == before


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_a_pipe_is_refused_and_nobody_waits(run, name):
    if (run / name).exists():
        (run / name).rename(run / "before")
    os.mkfifo(run / name)
    refuses(run, "is not a run" if name == "config.json" else f"{name} is not a (file|folder): move it away")


def test_a_new_run_overwrites_no_file_by_a_link_in_an_empty_folder(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "victim")
    begun = new_folder(tmp_path / "run", preset("tiny"), TranscriptTokenizer(), None)
    with pytest.raises(UserError, match=r"\.lock is a link"), begun:
        pass
    assert (tmp_path / "victim").read_text() == "mine"


def test_samples_are_not_kept_elsewhere(run, tmp_path):
    (run / "samples").rmdir()
    (tmp_path / "victim").mkdir()
    (run / "samples").symlink_to(tmp_path / "victim")
    with pytest.warns(UserWarning, match="the samples are not kept: .*samples is a link"):
        assert keep(load_run(run), 0, {}) is None
    assert not content(tmp_path / "victim")


def test_a_staged_file_replaces_a_link_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "way").symlink_to("folder")
    (tmp_path / "folder" / "a").symlink_to(tmp_path / "victim")
    with staged(tmp_path / "way" / "a") as aside:
        aside.write_text("new")
    assert (tmp_path / "victim").read_text() == "mine"
    assert not (tmp_path / "folder" / "a").is_symlink()
    assert (tmp_path / "folder" / "a").read_text() == "new"


def test_a_log_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="cannot be read .it is a pipe"):
        check_log(tmp_path / "metrics.jsonl", {"bytes": 3, "sha256": "x"})


def test_a_picture_of_attention_is_not_drawn_elsewhere(run, tmp_path):
    (run / "attention.png").symlink_to(tmp_path / "victim")
    assert "attention.png is a link" in refused("attend", run, "--text", "A")
    assert not (tmp_path / "victim").exists()
