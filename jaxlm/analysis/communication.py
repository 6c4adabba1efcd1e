"""What a compiled program sends between devices: its collectives, by the axis of the mesh that each of them runs over.

The text of a compiled program (`jax.jit(f).lower(...).compile().as_text()`) names every collective, the devices of each
group and how often a loop runs where XLA knows it.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

OTHER = "other"
"""Stands for groups of devices that no combination of axes gives."""

_BITS = {"pred": 8, "c64": 64, "c128": 128}
"""Types whose name does not say their bits."""

Groups = list[list[int]]


class Collective(NamedTuple):
    """One collective of a program."""

    kind: str
    """One of KINDS."""
    axes: str
    """The axes that its groups run over, such as "data" or "data+fsdp"."""
    dtype: str
    """The type of its first array, as XLA names it: f32, bf16."""
    sent: int
    """Bytes that a device sends each time, in a ring (`sent_in_a_ring`)."""
    times: int
    """How often the program runs it. A loop whose number of rounds XLA does not name counts once."""
    in_unknown_loop: bool
    """Whether it lies in a loop whose number of rounds XLA does not name."""
    operation: str
    """What it belongs to in the program of JAX, such as jit(step)/transpose(jvp())/dot_general; may be empty."""


def collectives(program: str, mesh: Mapping[str, int]) -> list[Collective]:
    """The collectives of a compiled program, in the order of its text.

    Groups of one device send nothing and are left out. Of a conditional every branch counts.

    Args:
      program: the text of the compiled program. Its devices are numbered in the order of the mesh.
      mesh: the size of each axis, in the order of the mesh.

    Raises:
      ValueError: a collective is written in a way that this function does not know.
    """
    bodies = _computations(program)
    found, spread = [], set()
    for name, times, unknown, fused in _called(bodies):
        for line in bodies[name]:
            operation = _OPERATION.search(line)
            kind = operation["opcode"].removesuffix("-start") if operation else ""
            if operation is None or kind not in KINDS:
                continue
            if fused:  # on a TPU several fusions share the work of one collective, and each of them names it
                channel = re.search(r"channel_id=\d+", line)
                key = kind, re.sub(r"\{.*?\}", "", operation["shape"]), channel[0] if channel else line
                if key in spread:
                    continue
                spread.add(key)
            groups = _pairs(line) if kind == "collective-permute" else _groups(line, math.prod(mesh.values()))
            axes = _axes_of_pairs(groups, mesh) if kind == "collective-permute" else _axes_of_groups(groups, mesh)
            shapes = _result_shapes(operation["shape"], operation["opcode"])
            size = sum(size for _, size in shapes)
            if name.startswith("all-reduce-scatter"):  # a TPU's reduce-scatter: an all-reduce, then each takes its part
                kind, size = "reduce-scatter", size // len(groups[0])
            sent = sent_in_a_ring(kind, size, len(groups[0]))
            if sent:
                label = re.search(r'op_name="([^"]*)"', line)
                found.append(Collective(kind, axes, shapes[0][0], sent, times, unknown, label[1] if label else ""))
    return found


def sent_in_a_ring(kind: str, size: int, devices: int) -> int:
    """Bytes that each of n devices in a ring sends.

    Of an all-reduce of `size` bytes 2 (n-1)/n size, of an all-gather and an all-to-all (n-1)/n of the `size` of the
    result, of a reduce-scatter (n-1) times the `size` of the part that a device keeps, of a collective-permute `size`.
    Source: Thakur et al. 2005, https://doi.org/10.1177/1094342005051521.
    """
    if devices == 1:
        return 0
    rounds = {"all-reduce": 2 * (devices - 1), "reduce-scatter": devices * (devices - 1), "collective-permute": devices}
    return size * rounds.get(kind, devices - 1) // devices


def sent_by_axis(found: Iterable[Collective]) -> dict[str, int]:
    """Bytes that a device sends in a run of the program, by axes."""
    total: Counter[str] = Counter()
    for one in found:
        total[one.axes] += one.sent * one.times
    return dict(total)


_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (?P<shape>\(.*?\)|\S+) (?P<opcode>[a-z-]+)\(")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_CALLEES = re.compile(r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def _computations(program: str) -> dict[str, list[str]]:
    """The lines of each computation by its name; the entry's name is "" here."""
    bodies: dict[str, list[str]] = {}
    body: list[str] = []
    for line in program.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            body = bodies.setdefault("" if head["entry"] else head["name"], [])
        else:
            body.append(line)
    if "" not in bodies:
        raise ValueError("the text has no ENTRY: give that of a compiled program, compiled.as_text()")
    return bodies


def _called(bodies: dict[str, list[str]]) -> list[tuple[str, int, bool, bool]]:
    """(computation, how often it runs, whether in a loop of unknown length, in a fusion) for each call, in order."""
    found: list[tuple[str, int, bool, bool]] = []

    def visit(name: str, times: int, unknown: bool, fused: bool) -> None:
        found.append((name, times, unknown, fused))
        for line in bodies[name]:
            operation = _OPERATION.search(line)
            if operation is None or operation["opcode"] in ("async-update", "async-done"):
                continue  # these name the computation that async-start has called
            callees = _CALLEES.findall(line)
            for branches in _BRANCHES.findall(line):
                callees += [branch.strip().lstrip("%") for branch in branches.split(",")]
            rounds, loop = _TRIPS.search(line), operation["opcode"] == "while"
            for callee in callees:
                if callee in bodies:
                    often = times * int(rounds[1]) if rounds else times
                    visit(callee, often, unknown or (loop and not rounds), fused or operation["opcode"] == "fusion")

    visit("", 1, False, False)
    return found


def _result_shapes(shape: str, opcode: str) -> list[tuple[str, int]]:
    """(type, bytes) of each array in the result of an operation.

    The result of all-gather-start holds its operands first, that of collective-permute-start its operand first and
    perhaps two numbers last.
    """
    shapes = []
    for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", shape):
        bits = _BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])  # type: ignore[index]
        shapes.append((dtype, math.prod(int(n.lstrip("<=")) for n in dims.split(",") if n) * bits // 8))
    if opcode == "all-gather-start":
        return shapes[len(shapes) // 2 :]
    return shapes[1:2] if opcode == "collective-permute-start" else shapes


def _groups(line: str, devices: int) -> Groups:
    """The groups of devices of a collective, in any of XLA's three notations."""
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", line)
    if listed:  # {{0,1},{2,3}}; {} = all devices together
        groups = [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
        return groups or [list(range(devices))]
    iota = re.search(rf"replica_groups=\[(\d+),(\d+)\]<={_IOTA}", line)
    if iota:  # [4,2]<=[2,2,2]T(2,1,0): 0 to 7 as 2 x 2 x 2, its axes turned round, then as 4 groups of 2
        return _device_ids(iota[3], iota[4], devices).reshape(int(iota[1]), int(iota[2])).tolist()
    named = re.search(
        rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((?:{_IOTA}|([\d,]+))\))? ?\{{([^}}]*)\}}", line
    )
    if named and re.fullmatch(r"('[^']*'=\d+,? ?)+", named[1]) and ":" not in named[5]:
        # mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}: devices that differ along a
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", named[1])}
        places = np.array(_groups_of(re.findall(r"'([^']*)'", named[5]), sizes))
        ids = np.array(_numbers(named[4])) if named[4] else _device_ids(named[2] or str(devices), named[3], devices)
        return ids.ravel()[places].tolist()
    raise ValueError(f"the groups of this collective are written in an unknown way: {line.strip()[:300]}")


def _pairs(line: str) -> Groups:
    """The pairs (from, to) of a collective-permute."""
    listed = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", line)
    if listed is None:
        raise ValueError(f"the pairs of this collective are written in an unknown way: {line.strip()[:300]}")
    return [_numbers(pair) for pair in re.findall(r"\{(\d+,\d+)\}", listed[1])]


def _device_ids(shape: str, order: str | None, devices: int) -> np.ndarray:
    """The numbers of all devices in the order of an iota of this shape, its axes turned round."""
    ids = np.arange(devices).reshape(_numbers(shape))
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _groups_of(axes: Iterable[str], mesh: Mapping[str, int]) -> Groups:
    """The groups of devices that differ only in their coordinates along `axes`."""
    names, within = list(mesh), list(axes)
    order = [names.index(name) for name in names if name not in within] + [names.index(name) for name in within]
    ids = np.arange(math.prod(mesh.values())).reshape(list(mesh.values())).transpose(order)
    return ids.reshape(-1, math.prod(mesh[name] for name in within)).tolist()


def _axes_of_groups(groups: Groups, mesh: Mapping[str, int]) -> str:
    """The combination of axes whose groups these are."""
    given = {frozenset(group) for group in groups}
    long = [name for name, size in mesh.items() if size > 1]
    for count in range(len(long) + 1):
        for axes in itertools.combinations(long, count):
            if given == {frozenset(group) for group in _groups_of(axes, mesh)}:
                return "+".join(axes)
    return OTHER


def _axes_of_pairs(pairs: Groups, mesh: Mapping[str, int]) -> str:
    """The axes along which a sender and its receiver differ."""
    places = [np.unravel_index(pair, tuple(mesh.values())) for pair in pairs]
    return "+".join(name for i, name in enumerate(mesh) if any(place[i][0] != place[i][1] for place in places))
