"""Compiled programs on disk: where, how many, by which commands, and what happens to those that are damaged."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import command, refused

from jaxlm.compilation_cache import MAX_BYTES, cache_folder, kept, kept_programs
from jaxlm.config import DataConfig, ModelConfig
from jaxlm.config.presets import preset
from jaxlm.errors import CheckError, UserError
from jaxlm.reproduce import one
from jaxlm.run.folder import load_run
from jaxlm.run.training import train


def settings():
    return jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs


def compile_something(size):
    return jax.jit(lambda x: jnp.tanh(x) * size)(jnp.ones(size))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"JAX_COMPILATION_CACHE_DIR": "mine", "XDG_CACHE_HOME": "/caches"}, "mine"),
        ({"XDG_CACHE_HOME": "/caches"}, "/caches/jaxlm/xla"),
        ({"XDG_CACHE_HOME": "", "HOME": "/home/one"}, "/home/one/.cache/jaxlm/xla"),
        ({"XDG_CACHE_HOME": "caches", "HOME": "/home/one"}, "/home/one/.cache/jaxlm/xla"),
        ({"XDG_CACHE_HOME": ".", "HOME": "/home/one"}, "/home/one/.cache/jaxlm/xla"),
        ({"HOME": "/home/one"}, "/home/one/.cache/jaxlm/xla"),
    ],
)
def test_the_folder_is_the_users_choice_or_in_the_users_cache(monkeypatch, environment, expected):
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Path(cache_folder()) == Path(expected)


def test_programs_are_kept_and_settings_are_given_back(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "new" / "programs"))
    before = settings()
    with kept_programs():
        compile_something(3)
        kept = sorted((tmp_path / "new" / "programs").iterdir())
    assert any(path.name.startswith("jit__lambda") for path in kept)
    assert settings() == before
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "other"))
    with kept_programs():
        compile_something(5)
    assert any(path.name.startswith("jit__lambda") for path in (tmp_path / "other").iterdir())
    assert sorted((tmp_path / "new" / "programs").iterdir()) == kept


def test_no_cache_is_made_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with kept_programs():
        compile_something(9)
    assert any((tmp_path / "home/.cache/jaxlm/xla").iterdir())
    monkeypatch.setenv("HOME", ".")
    with pytest.warns(UserWarning, match="compiled programs are not kept: .* is not an absolute path"), kept_programs():
        compile_something(11)
    assert list((tmp_path / "work").iterdir()) == []


def test_an_empty_choice_keeps_nothing(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    with kept_programs():
        assert settings()[0] is None


def test_a_folder_that_cannot_be_made_is_one_warning(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file" / "programs"))
    before = settings()

    def compile_inside():
        with kept_programs():
            assert settings()[0] is None
            compile_something(7)  # without another warning, which would be an error

    with pytest.warns(UserWarning, match="compiled programs are not kept: .*programs cannot be used"):
        compile_inside()
    assert settings() == before


def compile_kept(*sizes):
    """As a command does: a warning is no error."""
    with kept_programs():
        warnings.simplefilter("always")
        return [np.asarray(compile_something(size)) for size in sizes]


def sized(folder, **bytes_of_entries):
    """A cache folder with entries of these sizes, the one used longest ago first."""
    folder.mkdir()
    for age, (name, size) in enumerate(reversed(bytes_of_entries.items())):
        path = folder / f"{name}-cache"
        path.write_bytes(bytes(size))
        os.utime(path, (1e9 - age, 1e9 - age))
    (folder / "other").write_bytes(bytes(10_000))
    return folder


@pytest.mark.parametrize(("limit", "left"), [("100", "abc"), ("99", "bc"), ("60", "bc"), ("59", "c"), ("-1", "abc")])
def test_the_programs_used_longest_ago_are_deleted(tmp_path, monkeypatch, limit, left):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(sized(tmp_path / "programs", a=40, b=10, c=50)))
    monkeypatch.setenv("JAXLM_CACHE_MAX_BYTES", limit)
    assert kept()[1:3] == (3, 100)
    with kept_programs():
        assert len(list((tmp_path / "programs").iterdir())) == 4  # a command under way loses nothing
    assert {path.name for path in (tmp_path / "programs").iterdir()} == {*(f"{name}-cache" for name in left), "other"}
    sizes = {"a": 40, "b": 10, "c": 50}
    expected = str(tmp_path / "programs"), len(left), sum(sizes[name] for name in left)
    assert kept() == (*expected, None if limit == "-1" else int(limit))


def test_a_program_that_was_read_counts_as_used(tmp_path, monkeypatch):
    folder = sized(tmp_path / "programs", a=40, b=10)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
    monkeypatch.setenv("JAXLM_CACHE_MAX_BYTES", "40")
    os.utime(folder / "a-cache", (2e9, 1e9))  # as the system notes a reading
    with kept_programs():
        pass
    assert sorted(path.name for path in folder.iterdir()) == ["a-cache", "other"]


def test_the_limit_must_be_a_number_of_bytes(monkeypatch):
    monkeypatch.delenv("JAXLM_CACHE_MAX_BYTES", raising=False)
    assert kept().max_bytes == MAX_BYTES
    for wrong in ("1GB", "", "-2", "1.5"):
        monkeypatch.setenv("JAXLM_CACHE_MAX_BYTES", wrong)
        with pytest.raises(UserError, match=f"JAXLM_CACHE_MAX_BYTES = '{wrong}' is not a number of bytes"):
            kept()
    assert "JAXLM_CACHE_MAX_BYTES = '1.5' is not a number of bytes: give one, or -1" in refused("info")


def test_info_says_where_programs_are_kept_and_how_many(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(sized(tmp_path / "programs", a=1_200_000)))
    monkeypatch.setenv("JAXLM_CACHE_MAX_BYTES", "50000000")
    monkeypatch.setattr("jaxlm.ops.canary.run_programs", lambda: ())
    out = command("info")[1]
    assert "1 in 1.2 MB (at most 50.0 MB)" in out
    assert str(tmp_path / "programs") in out
    assert json.loads(command("info", "--json")[1])["compiled_programs"] == {
        "folder": str(tmp_path / "programs"),
        "programs": 1,
        "bytes": 1_200_000,
        "max_bytes": 50_000_000,
    }
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    assert "not kept" in command("info")[1]
    assert json.loads(command("info", "--json")[1])["compiled_programs"]["folder"] is None


@pytest.mark.parametrize("damage", [lambda content: content[:100], lambda content: b"", lambda content: content[::-1]])
def test_a_damaged_program_is_one_warning_and_is_written_anew(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    with kept_programs():
        expected = np.asarray(compile_something(13))
    (entry,) = tmp_path.glob("jit__lambda-*")
    content = entry.read_bytes()
    entry.write_bytes(damage(content))
    told = "the compiled program jit__lambda in .* is damaged: it is compiled anew"
    with pytest.warns(UserWarning, match=told):
        np.testing.assert_array_equal(compile_kept(13)[0], expected)
    assert len(entry.read_bytes()) == pytest.approx(len(content), rel=0.1)
    with kept_programs():  # without a warning, which would be an error
        np.testing.assert_array_equal(compile_something(13), expected)


def test_a_full_disk_is_one_warning(tmp_path, monkeypatch):
    def full(self, key, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("jax._src.lru_cache.LRUCache.put", full)
    with pytest.warns(UserWarning, match="cannot be written") as warned:
        compile_kept(15, 17)
    told = f"compiled programs are not all kept: {tmp_path} cannot be written (OSError: [Errno 28] No space left on"
    assert [str(one.message) for one in warned] == [f"{told} device)"]


def test_resumed_with_new_or_kept_programs_a_run_is_bitwise_the_one_without(tmp_path, monkeypatch, shakespeare):
    tiny = preset("tiny")
    (tmp_path / "text.txt").write_text(shakespeare.read_text()[:20_000])
    config = dataclasses.replace(
        tiny,
        model=ModelConfig(family="embedding_bigram", vocab_size=65, max_seq_len=32, embed_dim=24, dropout=0.1),
        data=DataConfig(path=str(tmp_path / "text.txt")),
        optim=dataclasses.replace(tiny.optim, warmup_steps=2),
        train=dataclasses.replace(tiny.train, steps=8, log_every=2, eval_every=8, checkpoint_every=4),
    )
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    with kept_programs():
        train(config, tmp_path / "whole")
    whole = load_run(tmp_path / "whole", 8)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "programs"))
    programs = []
    for name in ("cold", "warm"):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "8")
        with kept_programs():
            assert train(config, tmp_path / name, resume=True).step == 8
        jax.tree.map(np.testing.assert_array_equal, load_run(tmp_path / name, 8).params, whole.params)
        programs.append({path.name: path.stat().st_mtime_ns for path in (tmp_path / "programs").iterdir()})
    assert any(name.startswith("jit_chunk-") for name in programs[0])
    assert programs[1] == programs[0]  # the second took every program from the first


def test_two_processes_may_write_and_prune_the_same_folder(tmp_path):
    code = """
import jax, jax.numpy as jnp
from jaxlm.compilation_cache import kept_programs
for _ in range(3):
    with kept_programs():
        print([float(jax.jit(lambda x: jnp.tanh(x) * size)(1.0)) for size in range(1, 12)])
"""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAXLM_CACHE_MAX_BYTES": "9000"}
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0].splitlines())) == 1
    assert 0 < sum(path.stat().st_size for path in tmp_path.glob("*-cache")) <= 9000


def test_a_row_in_a_process_of_its_own_keeps_its_programs(tmp_path, monkeypatch, capsys):
    def reached():
        raise CheckError("kept")

    monkeypatch.setattr(one, "kept_programs", reached)
    assert one.main(["stats305", "bigram", "0", str(tmp_path)]) == 1
    assert "kept" in capsys.readouterr().err
