"""Kills training again and again by SIGKILL, resumes it, and compares its end bit by bit with a run left alone.

    python scripts/soak.py [--kills 50] [--optimizers adamw sgd] [--seed 0] [--work DIR] [--report FILE]

Each optimizer trains a small model with dropout and accumulated gradients, in turn on one device and on a mesh of four
virtual ones. Kills wait for a phase (compiling, stepping, evaluating, saving, pruning) and fall at a random moment of
it. The child notes its phase in a mapped file, which outlives it, so the report says where each kill fell.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

OPTIMIZERS = ("adamw", "sgd", "adamsn", "adafactor", "adam", "lion", "muon", "adagrad", "rmsprop", "lamb")
ARGUMENTS = {"sgd": ["--optim.arguments", "momentum=0.9"]}
BESIDE = "in the background"
PHASES = ["starting", "compiling", "stepping", "evaluating", "saving", "pruning", "ending"]
PHASES += [f"saving {BESIDE}", f"pruning {BESIDE}"]
TARGETS = ("compiling", "stepping", "evaluating", "saving", "pruning")
MESH = {"JAX_NUM_CPU_DEVICES": "4"}, ["--mesh.data", "2", "--mesh.fsdp", "2"]
TRAINING = (
    *("--model.num-layers", "2", "--model.dropout", "0.1", "--train.grad-accum", "2", "--train.batch-size", "64"),
    *("--train.steps", "100", "--train.log-every", "5", "--train.eval-every", "14", "--train.checkpoint-every", "20"),
    *("--train.keep", "1", "--optim.warmup-steps", "4", "--optim.learning-rate", "1e-3"),
    *("--sample.max-new-tokens", "1"),
)


def child(phases: Path, arguments: list[str]) -> int:
    """`jaxlm train` that notes its phase: byte 0 is what the main thread does, byte 1 what is being saved."""
    from jaxlm.cli.main import main as command
    from jaxlm.run import checkpoint, training

    with phases.open("r+b") as file:
        note = mmap.mmap(file.fileno(), 2)

    @contextlib.contextmanager
    def during(phase: str, slot: int) -> Iterator[None]:
        if slot and threading.current_thread() is not threading.main_thread():
            phase = f"{phase} {BESIDE}"
        before, note[slot] = note[slot], PHASES.index(phase)
        yield
        note[slot] = before

    make_chunk, evaluation, save, remove = training.make_chunk, training.Evaluation, checkpoint.save, checkpoint.remove

    def noting_chunk(*args: Any) -> Any:
        chunk, calls = make_chunk(*args), itertools.count()

        def call(*inputs: Any) -> Any:
            if next(calls):
                return chunk(*inputs)
            with during("compiling", 0):
                return chunk(*inputs)

        note[0] = PHASES.index("stepping")
        return call

    class NotingEvaluation(evaluation):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any) -> Any:
            with during("evaluating", 0):
                return super().__call__(*args)

    def noting_save(*args: Any) -> Any:
        with during("saving", 1):
            return save(*args)

    def noting_remove(path: Path) -> None:
        with during("pruning", 1):
            remove(path)

    noting: dict[str, Any] = {"make_chunk": noting_chunk, "Evaluation": NotingEvaluation}
    with (
        mock.patch.multiple(training, **noting),
        mock.patch.multiple(checkpoint, save=noting_save, remove=noting_remove),
    ):
        code = command(arguments)
    note[0] = PHASES.index("ending")
    return code


class Case:
    """One optimizer on one device or on a mesh."""

    def __init__(self, optimizer: str, mesh: bool, work: Path, text: Path) -> None:
        self.name = f"{optimizer}, {'mesh of 4' if mesh else 'one device'}"
        self._folder, self._env = work / f"{optimizer}-{'mesh' if mesh else 'one'}", dict(os.environ)
        self._folder.mkdir(parents=True)
        options = ["train", "tiny", "--data.path", str(text), *TRAINING, "--optim.name", optimizer]
        self._new = [*options, *ARGUMENTS.get(optimizer, [])]
        self._more = MESH[1] if mesh else []
        self._env |= MESH[0] if mesh else {}

    def start(self, name: str) -> tuple[subprocess.Popen[str], mmap.mmap]:
        """The run `name`, new or resumed, and what it notes."""
        out, phases = self._folder / name, self._folder / "phases"
        phases.write_bytes(b"\0\0")
        begin = ["train", "--resume"] if (out / "config.json").exists() else self._new
        arguments = [*begin, *self._more, "--out", str(out)]
        command = [sys.executable, __file__, "--child", str(phases), *arguments]
        with phases.open("r+b") as file, (self._folder / f"{name}.log").open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, text=True, env=self._env)
            return process, mmap.mmap(file.fileno(), 2)

    def finish(self, name: str) -> None:
        """Lets a run go on to its end."""
        process, _ = self.start(name)
        self._expect(process.wait(), name, 0)

    def _expect(self, code: int, name: str, *codes: int) -> None:
        if code not in codes:
            log = (self._folder / f"{name}.log").read_text()[-2000:]
            raise SystemExit(f"{self.name}: {name} ended with exit code {code}:\n{log}")

    def kill(self, target: str, moments: random.Random) -> str | None:
        """Kills the run in a phase, the moment at random; returns where it fell, None if the run was done before."""
        process, note = self.start("killed")
        wanted = {index for index, phase in enumerate(PHASES) if phase.startswith(target)}
        times = moments.randint(1, 3 if target != "compiling" else 1)
        while times and process.poll() is None:
            if wanted & {note[0], note[1]}:
                times -= 1
                while times and wanted & {note[0], note[1]} and process.poll() is None:
                    time.sleep(2e-4)
            time.sleep(2e-4)
        time.sleep(moments.choice((0, moments.random() * 0.02, moments.random() * 0.3)))
        process.send_signal(signal.SIGKILL)
        self._expect(process.wait(), "killed", 0, -signal.SIGKILL)
        if process.returncode == 0:
            return None
        main, saving = PHASES[note[0]], PHASES[note[1]]
        if not note[1]:
            return main
        return f"{saving}, while {main}" if BESIDE in saving else saving

    def compare(self, entries: list[dict[str, Any]]) -> None:
        """Notes in the entries of a killed run, which is at its end, whether that is the one of the whole run."""
        whole, killed = self.end("whole"), self.end("killed")
        differ = sorted(name for name in whole.keys() | killed.keys() if whole.get(name) != killed.get(name))
        print(f"{self.name}: {'differs: ' + ', '.join(differ) if differ else 'bitwise the same'}", file=sys.stderr)
        for entry in entries:
            entry |= {"same": not differ, "differ": differ, "arrays": len(whole) - 3}
        shutil.rmtree(self._folder / "killed")

    def end(self, name: str) -> dict[str, str]:
        """sha256 of each array of the last state, of the rows, and the names of files that should not be there."""
        from jaxlm.run.metrics import OF_CLOCKS

        out = self._folder / name
        ends = _arrays(out)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        kept = [{key: value for key, value in row.items() if key not in OF_CLOCKS} for row in rows]
        ends["metrics.jsonl"] = hashlib.sha256(json.dumps(kept).encode()).hexdigest()
        names = {str(path.relative_to(out)) for path in out.rglob("*") if path.name.startswith(".")}
        return ends | {
            "left over": " ".join(sorted(names)),
            "checkpoints": str(sorted(os.listdir(out / "checkpoints"))),
        }


def _arrays(out: Path) -> dict[str, str]:
    """sha256 of each array of a run's last state, read on one device."""
    import jax

    from jaxlm.model.build import build_model
    from jaxlm.optim import build_optimizer
    from jaxlm.run import arrays, checkpoint
    from jaxlm.run.folder import read_config
    from jaxlm.sharding.layout import abstract_params

    config, step = read_config(out), checkpoint.steps(out / "checkpoints")[-1]
    assert step == config.train.steps
    params = abstract_params(build_model(config.model))
    tx = build_optimizer(config.optim, config.train.steps, params)
    like = {"params": params, "opt_state": jax.eval_shape(tx.init, params)}
    state = {name: arrays.read(out / "checkpoints" / str(step) / name, part) for name, part in like.items()}
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state))
    return {jax.tree_util.keystr(path): hashlib.sha256(leaf.tobytes()).hexdigest() for path, leaf in leaves}


def soak(kills: int, optimizers: list[str], seed: int, work: Path) -> list[dict[str, Any]]:
    """One entry for each kill: its case, the phase it waited for, where it fell, and whether the end was the same."""
    text = work / "text.txt"
    letters = random.Random(seed)
    words = ["".join(letters.choice("abcdefgh") for _ in range(letters.randint(2, 6))) for _ in range(400)]
    text.write_text(" ".join(letters.choice(words) for _ in range(6000)))
    entries: list[dict[str, Any]] = []
    moments, targets = random.Random(seed), itertools.cycle(TARGETS)
    cases = [Case(name, index % 2 == 1, work, text) for index, name in enumerate(optimizers)]
    for index, case in enumerate(cases):
        left, since = kills // len(cases) + (index < kills % len(cases)), len(entries)
        case.finish("whole")
        while left:
            where = case.kill(target := next(targets), moments)
            if where is None:  # the run came to its end before
                case.compare(entries[since:])
                since = len(entries)
                continue
            left -= 1
            entries.append({"case": case.name, "waited for": target, "fell": where})
            print(f"{case.name}: {where}", file=sys.stderr, flush=True)
        case.finish("killed")
        case.compare(entries[since:])
    return entries


def table(entries: list[dict[str, Any]]) -> str:
    """Kills by where they fell, and the cases."""
    fell = Counter(entry["fell"] for entry in entries)
    lines = ["| the kill fell | kills | bitwise the same end |", "| --- | --- | --- |"]
    for where, count in fell.most_common():
        same = sum(entry["same"] for entry in entries if entry["fell"] == where)
        lines.append(f"| {where} | {count} | {same} |")
    return "\n".join([*lines, f"| all | {len(entries)} | {sum(entry['same'] for entry in entries)} |"])


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if an end differs."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["--child"]:
        return child(Path(given[1]), given[2:])
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--optimizers", nargs="+", default=OPTIMIZERS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder for the runs; default: a temporary one")
    parser.add_argument("--report", type=Path, help="file for the entries as JSON")
    options = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        entries = soak(options.kills, list(options.optimizers), options.seed, work)
    if options.report:
        options.report.write_text(json.dumps(entries, indent=1) + "\n")
    print(table(entries))
    return 0 if all(entry["same"] for entry in entries) else 1


if __name__ == "__main__":
    raise SystemExit(main())
