"""`jaxlm train` by several processes, as a user starts it: equal losses, kills, signals, other meshes, refusals."""

import dataclasses
import json
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from process_child import digest
from process_group import ended, launch, train
from support import command, snapshot

from jaxlm.config import MeshConfig
from jaxlm.data.batches import TokenStream
from jaxlm.run import checkpoint, manifest, training
from jaxlm.run.folder import load_run, read_config
from jaxlm.run.metrics import OF_CLOCKS
from jaxlm.run.session import resumed_session

STEPS = 20
MODEL = (
    *("--model.num-layers", 1, "--model.embed-dim", 16, "--model.num-heads", 4, "--model.max-seq-len", 16),
    *("--model.dropout", 0.1, "--optim.warmup-steps", 2, "--train.steps", STEPS, "--train.log-every", 5),
    *("--train.batch-size", 8, "--train.grad-accum", 2, "--train.eval-every", 10, "--train.checkpoint-every", 10),
)
FLOAT64 = ("--model.dtype", "float64", "--model.param-dtype", "float64")


@pytest.fixture(scope="module")
def root(tmp_path_factory, shakespeare):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "text.txt").write_text(shakespeare.read_text()[:20_000])
    (folder / "other.txt").write_text(shakespeare.read_text()[:20_000].replace("the", "teh"))
    return folder


@pytest.fixture(scope="module")
def new(root):
    """Options of a new run."""

    def options(out, *more):
        return ("tiny", *MODEL, "--data.path", root / "text.txt", "--out", out, *more)

    return options


def done(children, code=0):
    ends = [ended(child, seconds=300) for child in children]
    assert [end.code for end in ends] == [code] * len(ends), ends
    return ends


@pytest.fixture(scope="module")
def alone(root, new):
    """The run of one process on one device, by float64 or not."""
    made = {}

    def run(x64=False):
        if x64 not in made:
            made[x64] = root / f"alone-{x64}"
            done(train(*new(made[x64], *(FLOAT64 if x64 else ())), x64=x64))
        return made[x64]

    return run


@pytest.fixture(scope="module")
def two(root, new):
    """The uninterrupted run of two processes."""
    out = root / "two"
    done(train(*new(out, "--mesh.data", 2, "--train.keep", 5), count=2))
    return out


def rows(out):
    """metrics.jsonl without what a clock decides."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in OF_CLOCKS} for row in lines]


def apart(out, other):
    """The largest difference of all losses and gradient norms of two runs, which have the same rows otherwise."""
    ours, theirs = rows(out), rows(other)
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    names = ("loss", "grad_norm", "val_loss", "train_loss")
    pairs = zip(ours, theirs, strict=True)
    return max(abs(a[name] - b[name]) for a, b in pairs for name in names if name in a)


def test_two_processes_train_as_one_and_one_resumes_what_they_saved(new, tmp_path):
    one, both = tmp_path / "one", tmp_path / "both"
    ends = done(train(*new(both, "--mesh.data", 2), count=2))
    assert f"run: {both} (step {STEPS}" in "\n".join(ends[0].err)
    assert ends[1].out == ends[1].err == []
    config = dataclasses.replace(read_config(both), mesh=MeshConfig())
    training.train(config, one)
    assert apart(both, one) < 1e-5
    shutil.rmtree(both / "checkpoints" / str(STEPS))
    training.train(config, both, resume=True)
    assert apart(both, one) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
@pytest.mark.parametrize(("count", "devices"), [(2, 1), (4, 1), (2, 2)])
def test_losses_are_those_of_one_process(count, devices, axis, x64, new, alone, tmp_path):
    out, options = tmp_path / "out", FLOAT64 if x64 else ()
    done(train(*new(out, *options, f"--mesh.{axis}", -1), count=count, devices=devices, x64=x64))
    assert apart(out, alone(x64)) < (1e-10 if x64 else 1e-5)


def wait_for(children, condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert all(child.poll() is None for child in children), [ended(child) for child in children]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def has_row(out, step):
    file = out / "metrics.jsonl"
    return file.exists() and f'"step": {step},' in file.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_and_resumed_a_run_is_that_of_no_interruption(victim, saving, new, two, alone, tmp_path):
    out = tmp_path / "out"
    children = train(*new(out, "--mesh.data", 2, "--train.keep", 5), count=2)
    saves = out / "checkpoints"
    if saving:
        wait_for(children, lambda: any(saves.glob(f".{STEPS}.*.partial")))
    else:
        wait_for(children, lambda: checkpoint.steps(saves) and has_row(out, 15))
    children[victim].kill()
    (line,) = [line for line in ended(children[1 - victim], seconds=60).err if "error" in line]
    ended(children[victim])
    assert f"process {victim} of 2 (" in line
    assert line.endswith(f"{out} keeps its checkpoint of step 10: start all again with --resume --out {out}")
    assert children[1 - victim].returncode == 1
    assert checkpoint.steps(saves) == [10]
    if victim == 0:  # process 0 tidies up if it can
        assert bool(list(saves.glob(".*.partial"))) == saving
    assert command("sample", out)[0] == 0
    copies = {name: tmp_path / name for name in ("one", "mesh")}
    for copy in copies.values():
        shutil.copytree(out, copy)
    done(train("--resume", "--out", out, count=2))
    assert rows(out) == rows(two)
    assert not list(out.rglob("*.partial"))
    if victim == 0:
        done(train("--resume", "--out", copies["one"], "--mesh.data", 1))
        done(train("--resume", "--out", copies["mesh"], "--mesh.data", 1, "--mesh.fsdp", 2, devices=2))
        assert all(apart(copy, two) < 1e-5 for copy in copies.values())


LONG = (
    *("--train.steps", 150, "--train.eval-every", 50, "--train.checkpoint-every", 50, "--train.grad-accum", 1),
    *("--mesh.data", 2, "--train.keep", 5),
)


@pytest.mark.slow
def test_sigterm_to_one_saves_the_same_step_in_both_and_the_run_goes_on(new, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    done(train(*new(whole, *LONG), count=2))
    children = train(*new(out, *LONG), count=2)
    wait_for(children, lambda: has_row(out, 70))
    children[1].send_signal(signal.SIGTERM)
    ends = done(children, 128 + signal.SIGTERM)
    stopped = checkpoint.steps(out / "checkpoints")[-1]
    assert 70 <= stopped < 150
    assert f"stopped by SIGTERM at step {stopped}; saved; continue with --resume --out {out}" in ends[0].err[-1]
    manifest.verify(out / "checkpoints" / str(stopped))
    done(train("--resume", "--out", out, count=2))
    assert rows(out) == rows(whole)


@pytest.mark.slow
def test_a_mesh_of_one_process_is_restored_bitwise_by_two(new, tmp_path):
    out, mesh = tmp_path / "out", ("--mesh.data", 2, "--mesh.fsdp", 2, "--mesh.tensor", 2)
    done(train(*new(out, *mesh, "--train.keep", 5), devices=8))
    expected = digest(jax.device_get(resumed_session(read_config(out), out).state))
    for shape in ((2, 2, 2), (1, 8, 1)):
        for end in done(launch("restore", out, list(shape), devices=4)):
            assert end.out == [f"{STEPS} {expected}"]
    shorter = tmp_path / "shorter"
    shutil.copytree(out, shorter)
    shutil.rmtree(shorter / "checkpoints" / str(STEPS))
    done(train("--resume", "--out", shorter, count=2, devices=4))
    assert apart(shorter, out) < 1e-5


DIFFERENT = [
    (
        ("--optim.learning-rate", 0.01),
        "optim.learning_rate is 0.003 in process 0 of 2 (",
        "and 0.01 in process 1 of 2 (",
    ),
    (("--data.path", "other.txt"), "sha256 of the data is", "start all with the same"),
    (("--mesh.data", 1, "--mesh.fsdp", 2), "mesh.data is 2 in process 0 of 2 (", "and 1 in process 1 of 2 ("),
    (("--data.path", "none.txt"), "none.txt does not exist", "give an existing UTF-8 text or prepared corpus"),
]
IN_BOTH = [
    (("--mesh.data", 4), "mesh.data = 4 needs 4 devices and JAX has 2 (cpu)", "JAX_NUM_CPU_DEVICES=2"),
    (("--mesh.data", 1), "a mesh of one device leaves out devices of 2 processes", "give mesh.data = -1"),
    (
        ("--train.batch-size", 6),
        "2 x 1 = 2 does not divide the 3 rows",
        "that is a multiple of 4",
    ),
]
CASES = [(1, *case) for case in DIFFERENT] + [(None, *case) for case in IN_BOTH]


@pytest.mark.slow
@pytest.mark.parametrize(("only", "options", "words", "more"), CASES)
def test_what_does_not_fit_is_refused_by_both_and_nothing_is_written(
    only, options, words, more, root, new, tmp_path, monkeypatch
):
    monkeypatch.chdir(root)
    out = tmp_path / "out"
    both = () if only else options
    ends = done(train(*new(out, "--mesh.data", 2, *both), count=2, own={only: options}), 2)
    for end in ends:
        (line,) = end.err
        assert line.startswith("jaxlm: error: ")
        assert words in line
        assert more in line
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_folder_that_only_process_0_has_is_refused_before_a_step(root, tmp_path):
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
    shutil.copy(root / "text.txt", tmp_path)
    for end in done(launch("train_on_own_disk", tmp_path), 2):
        assert end.out == []
        (line,) = end.err
        assert line.startswith("jaxlm: error: process 1 does not find what process 0 writes in ")
        assert line.endswith(": give an --out on a disk that all processes share")
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["0", "1", "text.txt"]


@pytest.mark.slow
def test_a_process_that_does_not_come_is_named(new, tmp_path):
    out = tmp_path / "out"
    no_first, no_second = (train(*new(out, "--mesh.data", 2), count=2) for _ in range(2))
    no_first[0].kill()
    no_second[1].kill()
    (line,) = ended(no_first[1]).err
    assert "process 0 cannot be reached at 127.0.0.1:" in line
    (line,) = ended(no_second[0]).err
    assert "process 1 of 2 did not come to 127.0.0.1:" in line
    assert [no_first[1].returncode, no_second[0].returncode] == [2, 2]
    for killed in (no_first[0], no_second[1]):
        ended(killed)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_refuse_another_model_and_go_back_behind_damage(two, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(two, out)
    before = snapshot(out)
    for end in done(train("--resume", "--out", out, "--model.embed-dim", 32, count=2), 2):
        assert end.err == [
            f"jaxlm: error: {out} was trained with model.embed_dim = 16, not 32: drop that change, or start a new --out"
        ]
    assert snapshot(out) == before
    file = max((out / "checkpoints" / str(STEPS)).rglob("*"), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for end in done(train("--resume", "--out", out, count=2)):
        (line,) = [line for line in end.err if "warning" in line]
        assert line.endswith("has changed; resuming from step 10")
        assert str(out / "checkpoints" / str(STEPS)) in line
    assert rows(out) == rows(two)
    assert (out / "checkpoints" / f".{STEPS}.damaged").is_dir()


@pytest.mark.slow
def test_two_processes_begin_with_the_weights_of_a_run(new, alone, tmp_path):
    one, both = tmp_path / "one", tmp_path / "both"
    done(train(*new(one, "--init-from", alone(), "--train.keep", 5)))
    done(train(*new(both, "--init-from", alone(), "--train.keep", 5, "--mesh.fsdp", 2), count=2))
    assert apart(both, one) < 1e-5
    assert rows(one)[0]["loss"] < rows(alone())[0]["loss"] - 0.1
    first = [digest(load_run(out, 0).params) for out in (one, both)]
    assert first[0] == first[1] == digest(load_run(alone(), STEPS).params)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mapped", "prepared"])
def test_two_processes_train_on_memory_mapped_tokens_as_one(kind, root, new, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLM_DATA_DIR", str(tmp_path / "data"))  # where tokens of a text are kept
    options = ("--data.resident-mb", 0)
    if kind == "prepared":
        documents, tokens = tmp_path / "documents", tmp_path / "tokens"
        documents.mkdir()
        for i, text in enumerate((root / "text.txt").read_text().split("\n\n")):
            (documents / f"{i:03}.txt").write_text(text)
        more = ("--data.bpe-vocab-size", 300, "--shard-tokens", 1000)
        assert command("prepare", "--data.path", documents, "--out", tokens, *more)[0] == 0
        options = ("--data.path", tokens)
    one, both = tmp_path / "one", tmp_path / "both"
    done(train(*new(one, *options)))
    done(train(*new(both, *options, "--mesh.data", 2), count=2))
    assert apart(both, one) < 1e-5
    kept = list((tmp_path / "data").rglob("*.bin"))
    assert len(kept) == (2 if kind == "mapped" else 0), "both splits of a text, written once"


@pytest.mark.slow
@pytest.mark.parametrize("files", [1, 3])
def test_no_two_processes_read_the_same_window_and_every_mesh_gets_the_same_batches(files, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 256, 30_000).astype(np.uint8)
    for i, part in enumerate(np.split(tokens, files)):
        part.tofile(tmp_path / f"{i}.bin")
    names = [str(tmp_path / f"{i}.bin") for i in range(files)]
    windows = 8 * 5
    whole = TokenStream(tokens, 16).feed(3, 8, 5)(10)
    expected = digest([np.asarray(whole.windows(3, step, 8)) for step in range(10, 15)])
    split, shared = ([4, 1, 1], [1, 4, 1], [2, 2, 1], [2, 1, 2]), [1, 1, 4]
    ends = done(launch("read_windows", json.dumps(names), json.dumps([*split, shared]), devices=2))
    for shape, *lines in zip([*split, shared], *(end.out for end in ends), strict=True):
        (ours, batches), (theirs, their_batches) = map(json.loads, lines)
        assert batches == their_batches == expected, shape
        if shape == shared:  # each device has some features of every row
            assert ours == theirs
            assert len(ours) == windows
        else:
            assert len(ours) == len(theirs) == windows / 2
            assert len({tuple(window) for window in ours + theirs}) == windows, shape
        assert all(stop - start == 17 for start, stop in ours)
