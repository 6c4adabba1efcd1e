"""The fingerprint: the same in every process with any number of threads, and another if anything computes otherwise."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from support import command

from jaxlm.run import fingerprint

ORDER = ["text", "first_parameters", "losses", "parameters", "optimizer_state", "greedy", "sample"]


def shown():
    code, out, _ = command("info", "--fingerprint", "--json")
    assert code == 0
    return json.loads(out)


def test_it_repeats_and_every_number_counts(monkeypatch):
    first = shown()
    assert list(first["parts"]) == ORDER
    assert first["values"]["last_loss"] < first["values"]["first_loss"]
    assert first == shown()
    tokens = fingerprint.synthetic_tokens(65)
    tokens[7] += 1  # one of 4,096
    monkeypatch.setattr(fingerprint, "synthetic_tokens", lambda vocab_size: tokens)
    other = shown()
    assert [name for name in ORDER if other["parts"][name] == first["parts"][name]] == ["first_parameters"]
    assert other["fingerprint"] != first["fingerprint"]


def test_the_text_is_the_same_everywhere():
    tokens = fingerprint.synthetic_tokens(65)
    assert tokens.shape == (4096,)
    assert set(tokens.tolist()) == set(range(65))
    assert tokens[:12].tolist() == [1, 2, 3, 43, 46, 24, 15, 39, 54, 10, 64, 9]


def test_it_is_of_the_machine_alone():
    for more, word in ((["tiny"], "tiny"), (["--memory"], "--memory"), (["--on", "a100"], "--on")):
        code, out, err = command("info", "--fingerprint", *more)
        assert (code, out) == (2, "")
        assert f"--fingerprint is of this machine, not of {word}" in err


def test_a_table_shows_the_parts_and_the_last_line_the_whole(monkeypatch):
    parts = {name: f"{number}" * 64 for number, name in enumerate(ORDER)}
    values = {"first_loss": 4.25, "last_loss": 3.5, "greedy": [1, 2], "sample": [3]}
    versions = dict.fromkeys(("jaxlm", "jax", "jaxlib", "flax", "optax"), "1")
    device = {"count": 1, "kind": "cpu", "platform": "cpu"}
    settings = {
        "versions": versions,
        "device": device,
        "processor": "P",
        "xla_flags": "",
        "matmul_precision": "default",
    }
    found = {"fingerprint": "f" * 64, "parts": parts, "values": values, "settings": settings}
    monkeypatch.setattr(fingerprint, "fingerprint", lambda: found)
    code, out, _ = command("info", "--fingerprint")
    assert code == 0
    assert all(f"{name} " in out and value[:16] in out for name, value in parts.items())
    assert "4.25 to 3.5" in out
    assert out.endswith(f"fingerprint: {'f' * 64}\n")


@pytest.mark.slow
def test_processes_threads_and_the_cache_of_programs_change_nothing(tmp_path):
    """One core and all, compiled and loaded, XLA's products in one thread: the same bits."""
    cores = sorted(os.sched_getaffinity(0))
    flags = os.environ.get("XLA_FLAGS", "")
    single = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    cases = [(cores, "", flags), (cores, tmp_path, flags), (cores[:1], tmp_path, flags), (cores[-1:], "", flags)]
    found = []
    for allowed, cache, xla in [*cases, (cores, "", single)]:
        few = f"import os, sys; os.sched_setaffinity(0, {set(allowed)})"
        child = f"{few}; from jaxlm.cli.main import main; sys.exit(main())"
        done = subprocess.run(
            [sys.executable, "-c", child, "info", "--fingerprint", "--json"],
            env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache), "XLA_FLAGS": xla},
            capture_output=True,
            check=True,
        )
        found.append(json.loads(done.stdout))
    assert len({one["fingerprint"] for one in found}) == 1, [one["parts"] for one in found]
    assert np.isfinite(found[0]["values"]["last_loss"])
