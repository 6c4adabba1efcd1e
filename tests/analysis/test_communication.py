"""The bytes that compiled programs send: counted in programs of eight devices whose answer is known."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.analysis.communication import Collective, collectives, sent_by_axis

MESH = {"data": 2, "fsdp": 2, "tensor": 2}

HEAD = "HloModule f, num_partitions=8\n\n"
ENTRY = "ENTRY %main_spmd (p: f32[3]) -> f32[3] {\n"

PROGRAMS = """
import json
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxlm.analysis.communication import collectives

sizes = {"data": 2, "fsdp": 2, "tensor": 2}
mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 3)

def on(spec, f, out=None):
    return jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec if out is None else out, check_vma=False)

both, a = ("data", "fsdp"), (("data", "fsdp"), "tensor")
programs = {
    "sum": on(P(*a), lambda x: jax.lax.psum(x, "tensor")),
    "sum of a pair of axes": on(P(*a), lambda x: jax.lax.psum(x, ("data", "tensor"))),
    "sum of two arrays": on(P(*a), lambda x: jax.lax.psum((x, x[:2] * x[:2]), "data"), (P(*a), P(*a))),
    "gather": on(P(*a), lambda x: jax.lax.all_gather(x, "fsdp", tiled=True), P("data", "tensor")),
    "scatter": on(P("data", "tensor"), lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True), P(*a)),
    "to all": on(P(both, None), lambda x: jax.lax.all_to_all(x, both, 1, 0, tiled=True), P(None, both)),
    "shift": on(P(*a), lambda x: jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)])),
    "loop": on(P(*a), lambda x: jax.lax.scan(lambda c, _: (jnp.tanh(jax.lax.psum(c, "fsdp")), None), x, length=5)[0]),
    "loop in a loop": on(P(*a), lambda x: jax.lax.fori_loop(
        0, 3, lambda i, c: jax.lax.fori_loop(0, 5, lambda j, c: jnp.tanh(jax.lax.psum(c, "data")), c), x)),
    "until": on(P(*a), lambda x: jax.lax.while_loop(
        lambda c: jax.lax.psum(c.sum(), tuple(sizes)) < 9, lambda c: jax.lax.psum(c, "fsdp"), x)),
    "nothing": on(P(*a), jnp.sin),
}
x = jax.ShapeDtypeStruct((16, 8), jnp.float32)
found = {name: collectives(jax.jit(f).lower(x).compile().as_text(), sizes) for name, f in programs.items()}
batch, weight = (NamedSharding(mesh, spec) for spec in (P(both, None), P("fsdp", "tensor")))
step = jax.jit(lambda x, w: jax.grad(lambda w: (x @ w).sum())(w), in_shardings=(batch, weight), out_shardings=weight)
found["gradient"] = collectives(step.lower(x, jax.ShapeDtypeStruct((8, 6), jnp.float32)).compile().as_text(), sizes)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    """The collectives of each program, compiled for eight devices in a process of its own."""
    root = str(Path(__file__).parent.parent.parent)
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", PROGRAMS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # A device holds [4, 4] float32, 64 bytes; where the rows are over "data" alone, [8, 4].
        ("sum", [("all-reduce", "tensor", 64, 1)]),  # 2 (2-1)/2 of 64
        ("sum of a pair of axes", [("all-reduce", "data+tensor", 96, 1)]),  # 2 (4-1)/4 of 64
        ("sum of two arrays", [("all-reduce", "data", 96, 1)]),  # 64 and 32, in one or two operations
        ("gather", [("all-gather", "fsdp", 64, 1)]),  # (2-1)/2 of 128
        ("scatter", [("reduce-scatter", "fsdp", 64, 1)]),  # half of 128
        ("to all", [("all-to-all", "data+fsdp", 96, 1)]),  # 3/4 of [4, 8]
        ("shift", [("collective-permute", "tensor", 64, 1)]),
        ("loop", [("all-reduce", "fsdp", 64, 5)]),
        ("loop in a loop", [("all-reduce", "data", 64, 15)]),
        ("nothing", []),
    ],
)
def test_what_a_program_sends_is_counted_by_the_axis(found, name, expected):
    kinds = {kind for kind, *_ in expected}
    assert {kind for kind, *_ in found[name]} == kinds
    assert {(axes, times, unknown) for _, axes, _, _, times, unknown, _ in found[name]} == {
        (axes, times, False) for _, axes, _, times in expected
    }
    assert sum(sent for _, _, _, sent, *_ in found[name]) == sum(sent for _, _, sent, _ in expected)


def test_a_loop_without_a_known_length_counts_once_and_says_so(found):
    assert sorted((axes, sent, times, unknown) for _, axes, _, sent, times, unknown, _ in found["until"]) == [
        ("data+fsdp+tensor", 7, 1, True),  # 2 (8-1)/8 of one number, in the condition
        ("fsdp", 64, 1, True),
    ]


def test_the_gradient_of_a_weight_is_summed_over_the_rows(found):
    """A device holds [8, 3] of the weight's columns whole over "fsdp", 96 bytes, and 48 of its own half.

    XLA:CPU sums all 96 over fsdp, keeps its half and sums that over data.
    """
    assert sent_by_axis(Collective(*row) for row in found["gradient"]) == {"fsdp": 96, "data": 48}
    assert all(row[-1].startswith("jit(") for row in found["gradient"])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("f32[10] all-reduce(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add", ("tensor", "f32", 40)),
        ("f32[10] all-reduce(%p), replica_groups=[4,2]<=[8], to_apply=%add", ("tensor", "f32", 40)),
        ("f32[10] all-reduce(%p), replica_groups=[4,2]<=[4,2]T(1,0), to_apply=%add", ("fsdp", "f32", 40)),
        ("f32[10] all-reduce(%p), replica_groups=[4,2]<=[2,2,2]T(2,1,0), to_apply=%add", ("data", "f32", 40)),
        ("f32[10] all-reduce(%p), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add", ("data+fsdp", "f32", 60)),
        ("f32[10] all-reduce(%p), replica_groups={}, to_apply=%add", ("data+fsdp+tensor", "f32", 70)),
        ("f32[10] all-reduce(%p), replica_groups=mesh['a'=4,'b'=1,'c'=2] {'a'}", ("data+fsdp", "f32", 60)),
        (
            "f32[6] all-reduce(%p), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}",
            ("data+fsdp", "f32", 36),
        ),
        (
            "f32[6] all-reduce(%p), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}",
            ("tensor", "f32", 24),
        ),
        (
            "f32[6] all-reduce(%p), replica_groups=mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'b'}",
            ("data+fsdp", "f32", 36),
        ),
        ("f32[10] all-reduce(%p), replica_groups={{0,1,2},{3,4,5},{6,7}}", ("other", "f32", 53)),
        ("f32[10] all-reduce(%p), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}", None),
        ("(bf16[4,5]{1,0}, f32[2]) all-reduce(%p, %q), replica_groups=[4,2]<=[8]", ("tensor", "bf16", 48)),
        ("(bf16[4,5]{1,0}, bf16[8,5]{1,0}) all-gather-start(%p), replica_groups=[4,2]<=[8]", ("tensor", "bf16", 40)),
        ("bf16[8,5]{1,0} all-gather-done(%x)", None),
        ("f32[10] all-reduce-start(%p), replica_groups=[4,2]<=[8], to_apply=%add", ("tensor", "f32", 40)),
        (
            "(f32[10], f32[10], u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,4},{4,0}}",
            ("data", "f32", 40),
        ),
        ("pred[16]{0} all-to-all(%p), replica_groups=[4,2]<=[8], dimensions={0}", ("tensor", "pred", 8)),
    ],
)
def test_every_notation_of_groups_and_results_is_read(line, expected):
    program = f"{HEAD}{ENTRY}  %p = f32[3] parameter(0)\n  ROOT %x = {line}\n}}\n"
    rows = collectives(program, MESH)
    assert [(row.axes, row.dtype, row.sent) for row in rows] == ([] if expected is None else [expected])


def test_a_branch_and_an_operation_that_runs_aside_are_followed():
    reduce = "replica_groups=[4,2]<=[8], to_apply=%add"
    program = (
        f"{HEAD}%aside (q: f32[4]) -> f32[2] {{\n  ROOT %r = f32[2] reduce-scatter(%q), {reduce}\n}}\n\n"
        f"%left (q: f32[3]) -> f32[3] {{\n  ROOT %r = f32[3] all-reduce(%q), {reduce}\n}}\n\n"
        f"{ENTRY}  %s = ((f32[4]), f32[2], u32[]) async-start(%p), calls=%aside\n"
        "  %d = f32[2] async-done(%s), calls=%aside\n"
        "  ROOT %c = f32[3] conditional(%i, %p, %p), branch_computations={%left, %left}\n}\n"
    )
    assert sent_by_axis(collectives(program, MESH)) == {"tensor": 8 + 12 + 12}
    assert [row.kind for row in collectives(program, MESH)] == ["reduce-scatter", "all-reduce", "all-reduce"]


def test_what_a_tpu_spreads_over_fusions_counts_once_and_an_all_reduce_of_parts_is_a_reduce_scatter():
    groups = "replica_groups=[4,2]<=[8]"
    program = (
        f"{HEAD}%a (q: f32[2]) -> f32[4] {{\n  ROOT %r = f32[4]{{0:T(8)}} all-gather(%q), channel_id=5, {groups}\n}}\n"
        f"%b (q: f32[2]) -> f32[4] {{\n  ROOT %r = f32[4]{{0:T(8)S(1)}} all-gather(%q), channel_id=5, {groups}\n}}\n"
        f"%c (q: f32[2]) -> f32[4] {{\n  ROOT %r = f32[4]{{0:T(8)}} all-gather(%q), channel_id=6, {groups}\n}}\n\n"
        f"%all-reduce-scatter.1 (q: f32[6]) -> f32[3] {{\n  %r = f32[6] all-reduce(%q), channel_id=1, {groups}\n}}\n\n"
        f"{ENTRY}"
        + "".join(f"  %{name}1 = f32[4] fusion(%p), calls=%{name}\n" for name in "abc")
        + "  ROOT %d = f32[3] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1\n}\n"
    )
    found = collectives(program, MESH)
    assert [(row.kind, row.sent) for row in found] == [("all-gather", 8), ("all-gather", 8), ("reduce-scatter", 12)]


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("HloModule f\n", "no ENTRY"),
        (f"{ENTRY}  %x = f32[3] all-reduce(%p), replica_groups=else\n}}\n", "written in an unknown way.*=else"),
        (f"{ENTRY}  %x = f32[3] all-reduce(%p), replica_groups=mesh['a'=8] {{'a':(1)2}}\n}}\n", "unknown way"),
        (f"{ENTRY}  %x = f32[3] collective-permute(%p), pairs=7\n}}\n", "pairs of this collective"),
    ],
)
def test_what_cannot_be_read_is_refused(program, words):
    with pytest.raises(ValueError, match=words):
        collectives(program, MESH)
