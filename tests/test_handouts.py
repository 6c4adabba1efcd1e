"""docs/handouts.md: settings do what the page says, functions run, Python prints what is shown."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import command

import jaxlm
from jaxlm.run.folder import load_run, read_config

PAGE = (Path(jaxlm.__file__).parent.parent / "docs" / "handouts.md").read_text(encoding="utf-8")
TRAIN = [
    *("train", "tiny", "--model.num-layers", "1", "--optim.warmup-steps", "0"),
    *("--sample.max-new-tokens", "3", "--data.path", "text.txt"),
]

MEANINGS = {
    "data.block_size": [("model", "max_seq_len", 16)],
    "model.n_query_head": [("model", "num_heads", 4)],
    "model.n_kv_head": [("model", "num_kv_heads", 1)],
    "model.rope": [("model", "position", "rope")],
    "trainer.max_iters": [("train", "steps", 3)],
    "system.work_dir": [],
    "optimizer_variant": [("optim", "name", "adamsn")],
    "--model.window 3": [("model", "window", 3)],
    "--optim.subset per_output": [("optim", "subset", "per_output")],
    "--model.attention-impl local": [("model", "attention_impl", "local")],
    "n_headgroup": [("model", "num_kv_heads", 1), ("model", "kv_sharing", "mean_pooled")],
    "--model.attention-impl reference": [("model", "attention_impl", "reference")],
}
"""What each setting of a hand-out, and each other option of the page, becomes in the configuration of a run."""
OTHER = {"trainer.device", "model.pretrained_folder"}
"""Settings that are no field of the configuration."""


def settings():
    """The first two cells of each row of the page's table of settings: what stands there in backticks."""
    rows = PAGE.split("\n## Settings\n")[1].split("\n## ")[0].splitlines()
    return dict(match.groups() for row in rows if (match := re.match(r"\| `([^`]+)` \| `([^`]+)` \|", row)))


SETTINGS = settings()
SPANS = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", PAGE, flags=re.DOTALL | re.MULTILINE))
SETTINGS |= {span: span for span in SPANS if span.startswith("--") and span not in SETTINGS.values()}
CALLS = [span for span in SPANS if re.match(r"jaxlm\.[\w.]+\(", span)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a short text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 30)
    return tmp_path


def test_every_setting_of_the_page_is_tried():
    assert set(SETTINGS) == set(MEANINGS) | OTHER


@pytest.mark.parametrize("names", [list(MEANINGS)[:-2], list(MEANINGS)[-2:]])
def test_the_settings_are_the_options_that_the_page_names(folder, names):
    """The last two in a run of their own: others set the same options."""
    few = [] if "trainer.max_iters" in names else ["--train.steps", "2"]
    code, _, err = command(*TRAIN, *few, *(word for name in names for word in shlex.split(SETTINGS[name])))
    assert code == 0, err
    (run,) = (path.parent for path in folder.glob("runs/*/config.json"))
    assert run.name == ("mine" if "system.work_dir" in names else "tiny-1")
    config, default = read_config(run), jaxlm.preset("tiny")
    for part, field, value in (place for name in names for place in MEANINGS[name]):
        assert getattr(getattr(config, part), field) == value != getattr(getattr(default, part), field), field


def test_the_device_is_a_variable_of_the_environment(tmp_path):
    variable, device = SETTINGS["trainer.device"].split("=")
    code = "import jax; print(jax.default_backend())"

    def shown(device):
        environment = {**os.environ, variable: device}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path
        )

    assert shown(device).stdout.strip() == device
    assert "nothing" in shown("nothing").stderr


@pytest.mark.parametrize("call", CALLS)
def test_a_function_of_the_page_runs(call):
    cfg = jaxlm.ModelConfig(vocab_size=7, max_seq_len=48, num_layers=1, embed_dim=8, num_heads=2)
    model = jaxlm.build_model(cfg)
    scope = {"jax": jax, "jaxlm": jaxlm, "model": model, "params": jaxlm.init_params(model, jax.random.key(0))}
    scope |= {"prompt": np.ones((2, 5), int), "X": jnp.ones((5, 8)), "dLdXnew": jnp.ones((5, 3))}
    scope |= {name: jnp.ones((8, width)) for name, width in {"W_k": 4, "W_q": 4, "W_v": 3}.items()}
    result = eval(call, scope)
    name = re.match(r"[\w.]+", call)[0].split(".")[-1]
    if name == "adafactor":
        assert result.init(scope["params"])
    elif name == "preset":
        assert jax.eval_shape(lambda: jaxlm.init_params(jaxlm.build_model(result.model), jax.random.key(0)))
    elif name in ("generate", "generate_naive"):
        assert result.tokens.shape == (2, int(re.search(r"max_new_tokens=(\d+)", call)[1]))
    elif name == "predict":
        assert result.shape == (2, 10, 7)
    else:
        assert result[-1].shape == {"self_attention_values": (5, 3), "self_attention_grads": (5, 8)}[name]


BLOCKS = re.findall(r"^```python\n(.*?)^```\n\n```\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_every_block_of_python_prints_what_the_page_shows(capsys):
    assert len(BLOCKS) == PAGE.count("```python") > 4
    scope = {}
    for code, shown in BLOCKS:
        exec(compile(code, "docs/handouts.md", "exec"), scope)
        assert capsys.readouterr().out == shown


@pytest.mark.slow
def test_a_pretrained_folder_is_the_run_that_another_begins_from(folder):
    """At a rate of 0 the new run keeps the weights of the old one, whatever its seed."""
    start = shlex.split(SETTINGS["model.pretrained_folder"].replace("RUN", "runs/tiny-1"))
    for more in ([], [*start, "--optim.learning-rate", "0", "--train.seed", "1"]):
        code, _, err = command(*TRAIN, "--train.steps", "2", *more)
        assert code == 0, err
    first, second = (load_run(f"runs/tiny-{number}").params for number in (1, 2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
