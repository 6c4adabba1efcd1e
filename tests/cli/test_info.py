"""`jaxlm info`: what a model costs, and whether the compiler computes right."""

import dataclasses
import json
import re

import pytest
from support import command, refused

from jaxlm.analysis.accelerators import ACCELERATORS
from jaxlm.cli.info import fold_blocks
from jaxlm.ops import canary


@pytest.mark.slow
def test_a_large_preset_shows_its_summary_first_and_its_blocks_once():
    code, out, _ = command("info", "gpt2-124m")
    assert code == 0
    lines = out.splitlines()
    places = [
        next(i for i, line in enumerate(lines) if text in line)
        for text in ("124,439,808", "656,222,216        │ 65.9%", "block_0 … block_11, each", "│   attention/key/bias")
    ]
    assert places == sorted(places)
    assert len(lines) < 60
    assert "block_1/" not in out


@pytest.mark.slow
def test_json_keeps_every_shape_in_the_order_of_the_blocks():
    found = json.loads(command("info", "gpt2-124m", "--json")[1])
    assert found["parameters"] == 124_439_808
    assert found["optimizer_state_bytes"]["adafactor"] == 1_360_208
    assert len(found["shapes"]) == 12 * 16 + 4
    blocks = [path.split("/")[0] for path in found["shapes"] if path.endswith("mlp_norm/scale")]
    assert blocks == [f"block_{i}" for i in range(12)]


def test_blocks_of_other_shapes_keep_rows_of_their_own():
    table = [(f"block_{i}/up", (2, 3 if i == 4 else 7), 6) for i in range(12)] + [("embedding", (5,), 5)]
    assert fold_blocks(table[:4] + table[5:]) == [
        [", ".join(f"block_{i}" for i in range(12) if i != 4) + ", each", "", ""],
        ["  up", "2 x 7", "6"],
        ["embedding", "5", "5"],
    ]
    assert fold_blocks(table)[2:4] == [["block_4", "", ""], ["  up", "2 x 3", "6"]]
    assert fold_blocks(table[:3]) == [["block_0 … block_2, each", "", ""], ["  up", "2 x 7", "6"]]


def test_a_model_may_be_changed_by_options_before_and_after_its_name(folder):
    for arguments in (["tiny", "--model.family", "bigram"], ["--model.family", "bigram", "tiny"]):
        found = json.loads(command("info", *arguments, "--json")[1])
        assert (found["parameters"], found["cache_bytes"]) == (65 * 65, 0)
    assert json.loads(command("info", "runs/tiny-1", "--json")[1])["model"]["num_layers"] == 1


def test_the_memory_of_training_is_compiled_where_it_is_asked_for():
    options = ("tiny", "--model.num-layers", 1, "--memory")
    found = json.loads(command("info", *options, "--json")[1])["memory_bytes"]
    assert found["step_must_live"] == sum(
        found[part] for part in ("parameters", "gradients", "optimizer_state", "activations")
    )
    assert found["written_in_place"] == found["parameters"] + found["optimizer_state"] + 4
    out = command("info", *options)[1]
    assert f"{found['step_peak']:,}" in out
    assert "memory_bytes" not in json.loads(command("info", "tiny", "--json")[1])
    assert "--memory is of a preset or a run" in refused("info", "--memory")


def test_a_mesh_is_planned_without_devices_of_it():
    options = ("tiny", "--mesh.data", 64, "--mesh.fsdp", 8, "--train.batch-size", 512)
    found = json.loads(command("info", *options, "--on", "h100", "--json")[1])["plan"]
    assert (found["devices"], found["rows_a_device"], found["tokens_a_step"]) == (512, 1, 512 * 32)
    memory, on = found["memory_bytes"], found["on"]
    assert memory["total"] == sum(size for part, size in memory.items() if part != "total")
    assert on["seconds"]["step_apart"] > on["seconds"]["step_overlapped"] >= on["seconds"]["compute"]
    assert 0 < on["mfu_apart"] < on["mfu_overlapped"] < on["efficiency"]
    assert on["fits"]
    assert "what_helps" not in on
    out = command("info", *options, "--on", "h100")[1]
    assert "512 x H100 SXM" in out
    assert f"MFU {on['mfu_apart']:.1%}" in out
    assert "\nfits: " in out
    assert "on" not in json.loads(command("info", *options, "--json")[1])["plan"]


def test_what_does_not_fit_is_said_with_what_would_help(monkeypatch):
    small = dataclasses.replace(ACCELERATORS["v5e"], memory=300_000.0)
    monkeypatch.setitem(ACCELERATORS, "v5e", small)
    out = command("info", "tiny", "--on", "v5e")[1]
    plan = json.loads(command("info", "tiny", "--on", "v5e", "--json")[1])["plan"]
    total, helps = plan["memory_bytes"]["total"], plan["on"]["what_helps"]
    assert f"does not fit: {total / 1e6:,.2f} MB of 300,000 bytes, {(total - 3e5) / 1e6:,.2f} MB too many" in out
    assert re.search(r"^  --train.grad-accum 8: [\d,.]+ ", out, re.MULTILINE)
    assert len(helps) == 4
    for change in helps:  # each is a part of a command, and gives what it promises
        options = change["change"].partition(" (")[0].split()
        found = json.loads(command("info", "tiny", *options, "--on", "v5e", "--json")[1])["plan"]
        assert found["memory_bytes"]["total"] == change["total"] < total


def test_alone_it_says_that_every_program_of_the_canary_is_right():
    code, out, _ = command("info")
    assert code == 0
    count = len(canary.run_programs())
    assert f"compiler: {count} of {count} programs right\n" in out
    assert "│ jaxlib " in out
    found = json.loads(command("info", "--json")[1])
    assert found["compiler"]["right"] is True
    assert len(found["compiler"]["programs"]) == count
    assert found["versions"].keys() >= {"jax", "jaxlib"}


def test_a_wrong_program_is_named_with_its_error_and_fails(monkeypatch):
    outcomes = canary.Outcome("sum of squares", 0.0077, False), canary.Outcome("softmax", 1e-8, True)
    monkeypatch.setattr(canary, "run_programs", lambda: outcomes)
    code, out, _ = command("info")
    assert code == 1
    assert "compiler: 1 of 2 programs right\ncompiler: sum of squares is wrong by 7.7e-03 of its largest value\n" in out
    code, out, _ = command("info", "--json")
    assert code == 1
    assert json.loads(out)["compiler"] == {
        "right": False,
        "programs": [
            {"name": "sum of squares", "error": 0.0077, "right": False},
            {"name": "softmax", "error": 1e-8, "right": True},
        ],
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "'nothing' is neither a preset nor a run: choose one of nanogpt-cpu"),
        (["--model.num-layers", "3"], "--model options change a preset or a run: give one"),
        (["--mesh.data", "2"], "--mesh is of a preset or a run: give one"),
        (["--on", "h100"], "--on is of a preset or a run: give one"),
        (["tiny", "--mesh.data", "3"], "mesh.data x mesh.fsdp = 3 x 1 = 3 does not divide the 8 rows of a micro-batch"),
        (["tiny", "--mesh.fsdp", "-1"], "mesh.fsdp = -1 is the rest of the devices, but a plan has no devices"),
        (["tiny", "--mesh.tensor", "4"], "mesh.tensor = 4 does not divide num_heads = 2"),
        (["tiny", "--on", "b200"], "accelerator 'b200' is unknown: choose one of a100"),
        (["tiny", "--mesh.data", "2", "--memory"], "--memory compiles for this machine"),
        (["tiny", "--mesh.data", "2", "--mesh.coordinator", "auto"], "mesh.coordinator = 'auto' is for training"),
        (["tiny", "--model.num-heads", "5"], "num_heads = 5 does not divide embed_dim = 32"),
    ],
)
def test_bad_input_is_refused(arguments, words):
    assert words in refused("info", *arguments)


def test_the_attention_that_this_machine_would_use_is_named(monkeypatch):
    arguments = ["tiny", "--model.dtype", "bfloat16", "--json"]
    assert "cudnn" not in json.loads(command("info", *arguments)[1])["attention"]
    monkeypatch.setattr("jaxlm.model.build.cudnn_available", lambda: True)
    assert json.loads(command("info", *arguments)[1])["attention"] == ["cudnn", "cudnn"]
    assert "cudnn" in next(line for line in command("info", *arguments[:-1])[1].splitlines() if "attention  " in line)
