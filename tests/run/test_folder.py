"""The folder of a run: creating and opening it."""

import dataclasses
import json
import shutil

import jax
import pytest

from jaxlm.config import ModelConfig
from jaxlm.config.presets import preset
from jaxlm.data.files import sealed
from jaxlm.data.tokenizer import CharTokenizer
from jaxlm.errors import UserError
from jaxlm.model.build import build_model, init_params
from jaxlm.run import checkpoint, lock
from jaxlm.run.folder import check_data, check_named, load_run, new_folder, read_config
from jaxlm.run.manifest import Loss
from jaxlm.training.step import TrainState

MODEL = ModelConfig(vocab_size=5, max_seq_len=7, num_layers=1, embed_dim=24, num_heads=3, mlp_dim=0)
CONFIG = dataclasses.replace(preset("tiny"), model=MODEL)


def write_run(path, sha256="0" * 64, config=CONFIG, **more):
    """An untrained run with the checkpoints 1 (the best) and 2."""
    params = init_params(build_model(config.model), jax.random.key(0))
    with new_folder(path, config, CharTokenizer("abcde"), sha256, **more) as folder:
        for step, val_loss in ((1, 1.0), (2, 2.0)):
            checkpoint.save(
                folder / "checkpoints", TrainState(params, (), jax.numpy.int32(step)), Loss(val_loss), keep=2
            )
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "whole")


def test_a_run_opens_as_it_was_written(whole, tmp_path):
    run = load_run(whole)
    assert (run.step, run.config, run.corpus_sha256) == (1, CONFIG, "0" * 64)
    assert load_run(whole, 2).step == 2
    record = json.loads((whole / "config.json").read_text())
    assert record.keys() == {"config", "corpus_sha256", "versions", "git_commit", "device", "sha256"}
    more = write_run(tmp_path / "more", source="elsewhere")
    assert json.loads((more / "config.json").read_text())["source"] == "elsewhere"


def test_a_run_is_there_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "run", CONFIG, CharTokenizer("abcde"), None):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_filled_and_not_replaced(tmp_path):
    """A mount point cannot be replaced, and may hold what a file system keeps there."""
    out = tmp_path / "disk"
    for leftover in ("lost+found", ".new.7.partial/checkpoints"):
        (out / leftover).mkdir(parents=True)
    before = out.stat().st_ino
    write_run(out)
    assert out.stat().st_ino == before
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoints",
        "config.json",
        "lost+found",
        "samples",
        "tokenizer.json",
    ]
    assert load_run(out).step == 1
    with pytest.raises(UserError, match="already holds a run: continue it with --resume"):
        write_run(out)


def test_a_folder_that_is_being_filled_is_not_taken_and_a_failure_leaves_it_empty(tmp_path):
    folder = new_folder(tmp_path, CONFIG, CharTokenizer("abcde"), None)
    folder.__enter__()
    with pytest.raises(UserError, match="is in use: process"):
        write_run(tmp_path)
    folder.__exit__(RuntimeError, RuntimeError(), None)
    assert list(tmp_path.iterdir()) == []


def test_an_edited_config_is_refused_and_the_line_says_how_to_let_it_stand(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "edited")
    record = json.loads((out / "config.json").read_text())
    record["config"]["optim"]["learning_rate"] = 0.5
    (out / "config.json").write_text(json.dumps(record))
    words = 'config.json was changed after .*: put the old one back; .*delete the entry "sha256"'
    with pytest.raises(UserError, match=words):
        load_run(out)
    del record["sha256"]
    (out / "config.json").write_text(json.dumps(record))
    assert load_run(out).config.optim.learning_rate == 0.5


def test_an_edited_tokenizer_is_refused(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "edited")
    text = (out / "tokenizer.json").read_text()
    (out / "tokenizer.json").write_text(text.replace("abcde", "abced"))
    with pytest.raises(UserError, match="tokenizer.json was changed after it was written"):
        load_run(out)


def test_a_run_of_an_older_version_has_no_seals_and_opens(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "old")
    for name in ("config.json", "tokenizer.json"):
        content = json.loads((out / name).read_text())
        del content["sha256"]
        (out / name).write_text(json.dumps(content))
    for file in (out / "checkpoints").glob("*/manifest.json"):
        content = json.loads(file.read_text())
        del content["sha256"]["manifest.json"]
        file.write_text(json.dumps(content))
    assert load_run(out).step == 1


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "is not a run: it has no config.json"),
        ("{", "cannot be read as JSON"),
        ('{"config": {"depth": 3}, "corpus_sha256": null}', "ExperimentConfig has no field depth"),
        ('{"config": []}', "is not a configuration of this version"),
    ],
)
def test_what_is_not_a_run_is_named(tmp_path, config, words):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    for opened in (read_config, load_run):
        with pytest.raises(UserError, match=words):
            opened(tmp_path)


def test_a_checkpoint_that_is_not_there_is_named(whole, tmp_path):
    with pytest.raises(UserError, match="step 7 has no checkpoint in .*: choose one of 1, 2"):
        load_run(whole, 7)
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint yet: continue its training with --resume"):
        load_run(tmp_path / "run")


def test_a_damaged_best_checkpoint_gives_way_to_the_latest_sound_one(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / "1" / "params")
    with pytest.warns(UserWarning, match="checkpoint .*1 is damaged: .* is missing; using step 2"):
        assert load_run(out).step == 2


def test_a_new_run_on_a_read_only_disk_is_told_to_go_elsewhere(tmp_path, monkeypatch):
    def read_only(*args):
        raise OSError(lock.errno.EROFS, "Read-only file system")

    monkeypatch.setattr(lock.os, "open", read_only)
    with (
        pytest.raises(UserError, match=r"cannot be written \(Read-only file system\): choose another --out"),
        new_folder(tmp_path, CONFIG, CharTokenizer("abcde"), None),
    ):
        pass


def test_a_tokenizer_of_another_size_is_refused(whole, tmp_path):
    out = tmp_path / "other"
    shutil.copytree(whole, out)
    (out / "tokenizer.json").write_text('{"type": "char", "chars": "ABC"}')
    with pytest.raises(ValueError, match="has 3 entries, the model 5: put the run's own tokenizer back"):
        load_run(out)
    record = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(sealed({**record, "corpus_sha256": None})))
    assert load_run(out).tokenizer.vocab_size == 3  # an imported model may have more rows
    (out / "tokenizer.json").write_text('{"type": "char", "chars": "ABCDEF"}')
    with pytest.raises(ValueError, match="has 6 entries, the model 5"):
        load_run(out)


def test_data_are_known_by_their_sha256(whole, tmp_path):
    check_data("ab", "ab")
    check_data("ab", None)
    with pytest.raises(UserError, match="their sha256 is ab..., the run's is cd...; put the run's own data back"):
        check_data("ab", "cd")
    check_named(load_run(whole))
    with pytest.raises(UserError, match="was imported and has no data of its own: name a text by --data.path"):
        check_named(dataclasses.replace(load_run(whole), corpus_sha256=None))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there cuDNN is at hand")
def test_a_run_of_a_gpu_opens_elsewhere_with_a_warning(whole, tmp_path):
    out = tmp_path / "moved"
    shutil.copytree(whole, out)
    record = json.loads((out / "config.json").read_text())
    record["config"]["model"] |= {"attention_impl": "cudnn", "dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(sealed(record)))
    with pytest.warns(UserWarning, match="trained with cuDNN's attention, which needs an NVIDIA GPU: using 'auto'"):
        opened = load_run(out)
    assert opened.model.cfg.attention_impl == "auto"
