"""Long contexts in `jaxlm.parity.check`: bugs that show only at late positions, and what is read."""

import dataclasses

import pytest
from foreign import gpt2, llama
from planted.bugs import edit, planted

from jaxlm import parity
from jaxlm.config import ModelConfig
from jaxlm.ops.positions import rope_angles
from jaxlm.parity import positions

SMALL = {"vocab_size": 13, "num_layers": 1, "embed_dim": 8, "num_heads": 2, "mlp_dim": 12}
ROPE = ModelConfig(**SMALL, position="rope", max_seq_len=600)


def check(cfg, *edits):
    with planted(edits):
        return parity.check(cfg, parity.random_params(cfg), draws=1, parts=("positions",))


def lengths(report):
    return [row.name for row in report.rows if row.quantity == "logits" and row.name]


@pytest.mark.parametrize(
    ("edit", "position"),
    [
        (edit(rope_angles, "positions.astype(dtype)", "positions.astype(jnp.bfloat16).astype(dtype)"), 257),
        pytest.param(
            edit(rope_angles, "positions.astype(dtype)", "(positions % 512).astype(dtype)"),
            512,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            edit(rope_angles, "positions.astype(dtype)", "jnp.minimum(positions, 489).astype(dtype)"),
            490,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["angles in bfloat16", "positions modulo 512", "positions cut at 489"],
)
def test_a_bug_at_late_positions_is_caught_and_its_layer_named(edit, position):
    """131 tokens, all that the other parts read, do not show it."""
    report = check(ROPE, edit)
    assert not any(row.verdict == "DIFFERS" for row in report.rows if row.quantity == "activation")
    first = report.first
    assert (first.quantity, first.layer, first.verdict) == ("logits", "block_0/attention", "DIFFERS")
    assert f"differ first at position {position}" in first.where
    assert "positions taken modulo a length, or cut at one" in first.causes


@pytest.mark.slow
def test_a_bug_at_the_last_positions_of_a_long_context_is_caught():
    """Beyond 2,048 tokens the last positions alone are read."""
    cfg = dataclasses.replace(ROPE, max_seq_len=5000)
    late = edit(rope_angles, "positions.astype(dtype)", "jnp.minimum(positions, 4950).astype(dtype)")
    report = check(cfg, late)
    failed = [row.name for row in report.rows if row.verdict == "DIFFERS"]
    assert failed == ["at the last 64 of 5000 positions"]
    assert "differ first at position 4951" in report.first.where
    assert lengths(report) == ["of 512 tokens", "of 2048 tokens", *failed]


@pytest.mark.slow
@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_source_is_read_at_its_last_positions(tmp_path, monkeypatch, make):
    changes = {"n_positions": 700} if make is gpt2 else {"max_position_embeddings": 700}
    make(**changes).save_pretrained(tmp_path)
    monkeypatch.setattr(positions, "LENGTHS", (150,))
    assert lengths(parity.check_import(tmp_path, draws=1, parts=("positions",))) == [
        "of 150 tokens",
        "at the last 64 of 700 positions",
    ]


@pytest.mark.slow
def test_what_is_read():
    assert lengths(check(ROPE)) == ["of 512 tokens", "of 600 tokens"]
    assert lengths(check(dataclasses.replace(ROPE, position="learned", max_seq_len=200))) == ["of 200 tokens"]
    assert lengths(check(dataclasses.replace(ROPE, max_seq_len=131))) == []
    recurrent = ModelConfig(family="recurrent", vocab_size=13, max_seq_len=600, num_layers=1, embed_dim=8)
    assert lengths(check(recurrent)) == []
