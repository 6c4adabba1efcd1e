"""`jaxlm parity`: on a run, on presets and configs, on real text; what it prints, and how it fails."""

import json
import sys

import pytest
from support import command

from jaxlm import parity
from jaxlm.model import transformer
from jaxlm.ops import canary

SIZES = ["--model.num-layers", "1", "--model.embed-dim", "12", "--model.num-heads", "2", "--model.max-seq-len", "11"]
TINY = [*SIZES, "--draws", 1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps on a text of its own."""
    folder = tmp_path_factory.mktemp("parity")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 30)
    options = ["--train.steps", "2", "--train.batch-size", "2", "--optim.warmup-steps", "0"]
    data = ("--data.val-fraction", 0.3, "--data.path", folder / "text.txt", "--sample.max-new-tokens", 3)
    assert command("train", "tiny", *options, *SIZES, *data, "--out", folder / "run")[0] == 0
    return folder / "run"


def test_a_run_on_its_own_text(trained):
    code, out, err = command("parity", trained, "--text", "the lazy fox", "--prompt", "qu", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["passed"] is True
    assert found["first_divergence"] is None
    assert {"backend": "cpu", "precision": "highest", "dtype": "float32"}.items() <= found.items()
    assert found["model"] == f"{trained}, step 2"
    rows = {(row["quantity"], row["name"]): row for row in found["rows"]}
    assert rows["logits", ""]["shape"] == [1, 11, found["config"]["vocab_size"]]
    assert rows["logits", ""]["float64_rel"] < 1e-12
    assert 0 < rows["logits", ""]["jax_error"] < 1e-5
    assert 0 < rows["logits", ""]["torch_error"] < 1e-5
    assert ("decoding", "9 greedy tokens") in rows  # 11 places, 2 of the prompt
    quantities = [row["quantity"] for row in found["rows"]]
    assert list(dict.fromkeys(quantities)) == [
        "compiler",
        "activation",
        "logits",
        "loss",
        "gradient",
        "update",
        "decoding",
        "padding",
    ]


def test_a_config_prints_its_table():
    sizes = ["--model.embed-dim", "6", "--model.max-seq-len", "11", "--draws", 1]
    code, out, _ = command("parity", "--preset", "tiny", "--model.family", "embedding_bigram", *sizes)
    assert code == 0
    first, heads, *rows = out.splitlines()
    assert first.startswith("tiny: backend cpu, device cpu, torch_device cpu, jax ")
    assert first.endswith("precision highest, dtype float32")
    assert heads.split("  ")[0] == "quantity"
    assert rows[-1] == f"equal up to rounding: {len(rows) - 1} quantities"
    assert any(row.split()[:3] == ["activation", "head", "3x11x65"] for row in rows)


def test_a_wrong_compiler_is_the_first_divergence(monkeypatch):
    outcomes = (canary.Outcome("layer norm", 2e-7, True), canary.Outcome("sums of columns", 0.25, False))
    monkeypatch.setattr(canary, "run_programs", lambda: outcomes)
    model = parity.Report((), parity.Divergence("activation", "block_0/mlp", True, "what follows from it"))
    monkeypatch.setattr(parity, "check", lambda *arguments, **options: model)
    code, out, _ = command("parity", "--preset", "tiny", *TINY, "--json")
    assert code == 1
    report = json.loads(out)
    first = report["first_divergence"]
    assert (first["quantity"], first["layer"], first["verdict"]) == ("compiler", "sums of columns", "DIFFERS")
    assert "off by 2.5e-01 of its largest value from NumPy" in first["where"]
    assert first["causes"][0].startswith("this jaxlib miscompiles")
    rows = [(row["name"], row["max_rel"], row["verdict"]) for row in report["rows"] if row["quantity"] == "compiler"]
    assert rows == [("1 of 2 programs", 2e-7, "same"), ("sums of columns", 0.25, "DIFFERS")]


def test_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    code, _, err = command("parity", "--preset", "tiny")
    assert code == 2
    assert err == "jaxlm: error: parity needs PyTorch, which is missing: pip install 'jaxlm[parity]'\n"


def test_a_difference_is_named_and_exits_with_1(monkeypatch):
    monkeypatch.setitem(transformer.ACTIVATIONS, "gelu", transformer.ACTIVATIONS["gelu_tanh"])
    code, out, _ = command("parity", "--preset", "tiny", *TINY)
    assert code == 1
    lines = out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("first divergence"))
    assert lines[first].startswith("first divergence, activation: block_0/mlp; its inputs agree")
    assert "activation = 'gelu_tanh' where the config has 'gelu' (tried" in lines[first + 1]
    assert "DIFFERS" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere",), "nowhere is not a run"),
        (("--preset", "nope"), "preset 'nope' is unknown"),
        (("--preset", "tiny", "--text", "a"), "--step, --text and --prompt need the weights and tokenizer of a run"),
        (("--model.num-kv-heads", 3), "num_kv_heads = 3 does not divide num_heads = 4"),
        (("--draws", 0), "draws = 0 is too small"),
        (("--seed", -1), "seed = -1 is out of range"),
        (("--model.dtype", "float16"), "float16"),
        (("RUN", "--text", "ÄB"), "characters 'BÄ' are outside the vocabulary"),
        (("RUN", "--text", "a"), "text 'a' has 1 token: give at least 3"),
        (("RUN", "--text", "the quick brown fox"), "18 tokens are beyond the learned position table, max_seq_len = 11"),
        (("RUN", "--prompt", "the lazy dog"), "13 tokens are beyond the learned position table, max_seq_len = 11"),
        (("RUN", "--prompt", ""), "prompt is empty"),
        (("RUN", "--step", 1), "step 1 has no checkpoint"),
        (("RUN", "--model.num-layers", 2), "--model.num-layers"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_bad_input_is_refused_in_one_line(arguments, said, trained):
    code, out, err = command("parity", *(trained if argument == "RUN" else argument for argument in arguments))
    assert code == 2
    assert out == ""
    refusals = [line for line in err.splitlines() if line.startswith("jaxlm: error:")]
    assert len(refusals) == 1
    assert said in refusals[0]
