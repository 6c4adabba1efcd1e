"""Compiled programs on disk: where, that they are written, and that JAX is left as it was."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxlm.compilation_cache import cache_folder, kept_programs


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

    with pytest.warns(UserWarning, match="compiled programs are not kept: .*programs cannot be written"):
        compile_inside()
    assert settings() == before
