"""Damages a run folder in many ways, and shows what opening and resuming it say.

    python scripts/damage.py [--flips 50] [--truncations 50] [--seed 0] [--report FILE]

Each damage is done to a fresh copy. Then the run is opened as `jaxlm sample` opens it, each of its checkpoints too, and
its training is resumed to twice its steps. A damage is found if one of them refuses or warns; it is harmless if none
does, and all parameters and the end of the training are bitwise those of the sound run. Anything else is missed.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before jax is imported

import jax

from jaxlm.config import DataConfig, ExperimentConfig
from jaxlm.config.presets import preset
from jaxlm.data.files import sealed
from jaxlm.errors import CheckError, UserError
from jaxlm.run import checkpoint
from jaxlm.run.folder import load_run
from jaxlm.run.metrics import OF_CLOCKS
from jaxlm.run.training import train

STEPS = 12
Damage = Callable[[Path], Any]

WHY = {
    "loss.png": "a picture of metrics.jsonl, drawn anew when training ends",
    "samples": "a sample that was printed; nothing reads it",
    "formatted anew": "spaces are not content",
    "row after the last": "written again from the last checkpoint on",
    "half-written save": "swept when training is resumed",
    "lock file": "a file without a lock on it is taken over",
    "empty folder": "a folder without files is no checkpoint",
    "another program": "nothing reads it",
}
"""Why some damages are harmless, by a part of the name of the file or of the damage."""


def experiment(text: Path) -> ExperimentConfig:
    """A model that trains in a moment."""
    tiny = preset("tiny")
    model = dataclasses.replace(tiny.model, num_layers=1, embed_dim=16, num_heads=2, max_seq_len=16, dropout=0.1)
    rhythm = dataclasses.replace(
        tiny.train, steps=STEPS, log_every=2, eval_every=4, checkpoint_every=4, keep=3, batch_size=8
    )
    optim = dataclasses.replace(tiny.optim, warmup_steps=2, schedule="constant")
    return dataclasses.replace(tiny, model=model, train=rhythm, optim=optim, data=DataConfig(path=str(text)))


def flip(random_numbers: random.Random, file: Path) -> str:
    """Flips one bit of a file; returns which."""
    content = bytearray(file.read_bytes())
    at, bit = random_numbers.randrange(len(content)), random_numbers.randrange(8)
    content[at] ^= 1 << bit
    file.write_bytes(content)
    return f"bit {bit} of byte {at}"


def _to_file(harm: Callable[..., str], numbers: random.Random, file: Path, run: Path) -> str:
    return harm(numbers, run / file)


def truncate(random_numbers: random.Random, file: Path) -> str:
    """Cuts the end off a file; returns how much stays."""
    size = file.stat().st_size
    kept = random_numbers.randrange(size)
    os.truncate(file, kept)
    return f"{kept} of {size} bytes"


def edit(name: str, change: Callable[[Any], Any], again: bool = False) -> Damage:
    """Changes a file of JSON as somebody does by hand; `again` seals it anew."""

    def damage(run: Path) -> None:
        content = json.loads((run / name).read_text())
        change(content)
        (run / name).write_text(json.dumps(sealed(content) if again else content, indent=1))

    return damage


def rows(change: Callable[[list[str]], list[str]]) -> Damage:
    """Changes the lines of metrics.jsonl."""

    def damage(run: Path) -> None:
        file = run / "metrics.jsonl"
        file.write_text("".join(f"{line}\n" for line in change(file.read_text().splitlines())))

    return damage


def removed(name: str) -> Damage:
    """Removes a file or folder."""
    return lambda run: shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()


def replaced(name: str, content: bytes | Path | None) -> Damage:
    """Puts other bytes in the place of a file, or a folder (None), or a link to a path."""

    def damage(run: Path) -> None:
        removed(name)(run)
        if content is None:
            (run / name).mkdir()
        elif isinstance(content, Path):
            (run / name).symlink_to(content)
        else:
            (run / name).write_bytes(content)

    return damage


def swapped(one: str, other: str) -> Damage:
    """Swaps two files or folders."""

    def damage(run: Path) -> None:
        (run / one).rename(run / "aside")
        (run / other).rename(run / one)
        (run / "aside").rename(run / other)

    return damage


def added(name: str, content: bytes = b"x") -> Damage:
    """Adds a file."""

    def damage(run: Path) -> None:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(content)

    return damage


def largest(run: Path) -> Path:
    """The largest file of the parameters of the latest checkpoint."""
    files = (path for path in (run / f"checkpoints/{STEPS}/params").rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


LAST, BEFORE = f"checkpoints/{STEPS}", f"checkpoints/{STEPS - 4}"
OTHERS: dict[str, Damage] = {
    "config.json removed": removed("config.json"),
    "config.json emptied": replaced("config.json", b""),
    "config.json is a folder": replaced("config.json", None),
    "config.json: learning rate edited": edit("config.json", lambda c: c["config"]["optim"].update(learning_rate=0.5)),
    "config.json: dropout edited": edit("config.json", lambda c: c["config"]["model"].update(dropout=0.0)),
    "config.json: seed edited, sha256 too": edit("config.json", lambda c: c["config"]["train"].update(seed=9), True),
    "config.json: unknown field, sha256 too": edit("config.json", lambda c: c["config"].update(depth=3), True),
    "config.json: formatted anew": edit("config.json", lambda c: None),
    "tokenizer.json removed": removed("tokenizer.json"),
    "tokenizer.json: two characters swapped": edit(
        "tokenizer.json", lambda c: c.update(chars=c["chars"][1] + c["chars"][0] + c["chars"][2:])
    ),
    "tokenizer.json of zeros": lambda run: (run / "tokenizer.json").write_bytes(bytes(300)),
    "metrics.jsonl removed": removed("metrics.jsonl"),
    "metrics.jsonl is a folder": replaced("metrics.jsonl", None),
    "metrics.jsonl: a row dropped": rows(lambda lines: lines[:2] + lines[3:]),
    "metrics.jsonl: a row doubled": rows(lambda lines: lines[:3] + lines[2:]),
    "metrics.jsonl: a loss edited": rows(lambda lines: [re.sub(r'"loss": \d', '"loss": 1', line) for line in lines]),
    "metrics.jsonl: a row after the last checkpoint": rows(lambda lines: [*lines, '{"step": 13, "elapsed_s": 1.0}']),
    "metrics.jsonl: a last line cut short": lambda run: os.truncate(
        run / "metrics.jsonl", (run / "metrics.jsonl").stat().st_size - 5
    ),
    "all checkpoints removed": removed("checkpoints"),
    "latest checkpoint removed": removed(LAST),
    "its manifest removed": removed(f"{LAST}/manifest.json"),
    "its manifest nested 100,000 deep": replaced(f"{LAST}/manifest.json", b"[" * 100_000),
    "its manifest: val_loss edited": edit(f"{LAST}/manifest.json", lambda c: c.update(val_loss=0.1)),
    "its parameters removed": removed(f"{LAST}/params"),
    "its optimizer state removed": removed(f"{LAST}/opt_state"),
    "a file of zeros in it": lambda run: largest(run).write_bytes(bytes(largest(run).stat().st_size)),
    "a file too many in it": added(f"{LAST}/params/stray"),
    "a link that leads nowhere in it": lambda run: replaced(str(largest(run).relative_to(run)), Path("nowhere"))(run),
    "two checkpoints swapped": swapped(LAST, BEFORE),
    "parameters of the one before in it": swapped(f"{LAST}/params", f"{BEFORE}/params"),
    "a checkpoint under a later number": lambda run: (run / LAST).rename(run / "checkpoints/20"),
    "an empty folder as a later checkpoint": lambda run: (run / "checkpoints/20").mkdir(),
    "a half-written save": added("checkpoints/.16.7.partial/params/d/x"),
    "a lock file of nobody": added(".lock", b"{"),
    "a file of another program": added("notes.txt"),
}


class Subject:
    """The sound run, and what its parameters and the end of its training are."""

    def __init__(self, work: Path) -> None:
        self._work, self.sound = work, work / "sound"
        letters = random.Random(0)
        text = work / "text.txt"
        text.write_text(" ".join("".join(letters.choice("abcdefg") for _ in range(5)) for _ in range(400)))
        self._config = experiment(text)
        train(self._config, self.sound)
        (self.sound / "samples/step-12.txt").write_text("a sample")
        self._sound: dict[str, Any] = {}
        for step in (STEPS - 8, STEPS - 4, STEPS):
            yields, said = self._used(self._copy(), step)
            assert not said, said
            self._sound |= yields

    def _copy(self) -> Path:
        copy = self._work / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        return shutil.copytree(self.sound, copy, symlinks=True)

    def _used(self, run: Path, step: int | None) -> tuple[dict[str, Any], list[str]]:
        """What each use of a run yields, and what it says; `step` is a checkpoint to open besides."""
        said: list[str] = []
        yields: dict[str, Any] = {"opened": self._try(lambda: _digest(load_run(run).params), said)}
        if step is not None:
            yields[f"step {step}"] = self._try(lambda: _digest(load_run(run, step).params), said)
        rhythm = dataclasses.replace(self._config.train, steps=2 * STEPS)
        longer = dataclasses.replace(self._config, train=rhythm)
        yields["resumed"] = self._try(lambda: _end(train(longer, run, resume=True).path), said)
        return yields, said

    def _try(self, use: Callable[[], Any], said: list[str]) -> Any:
        with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("always")
            try:
                result = use()
            except (UserError, CheckError) as error:
                said.append(str(error))
                result = None  # refused
        said += [str(warning.message) for warning in caught]
        return result

    def suffer(self, name: str, damage: Damage) -> dict[str, Any]:
        """The entry of one damage."""
        run = self._copy()
        detail = damage(run)
        entry = {"damage": f"{name}, {detail}" if isinstance(detail, str) else name, "outcome": "missed", "message": ""}
        step = re.match(r"checkpoints/(\d+)/", name)
        try:
            yields, said = self._used(run, int(step[1]) if step else STEPS)
        except Exception as error:
            return entry | {"outcome": "traceback", "message": f"{type(error).__name__}: {error}"}
        if said:  # the sound run says nothing
            message = said[0].replace(f"{run}/", "").replace(str(run), "the run")
            return entry | {"outcome": "found", "message": " ".join(message.split())}
        wrong = [use for use, result in yields.items() if result != self._sound[use]]
        if wrong:
            return entry | {"message": f"not as in the sound run: {', '.join(wrong)}"}
        why = next((text for part, text in WHY.items() if part in name), "the same content to its reader")
        return entry | {"outcome": "harmless", "message": why}


def _digest(tree: Any) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(tree)):
        digest.update(leaf.tobytes())
    return digest.hexdigest()


def _end(run: Path) -> list[Any]:
    """The parameters of the last step and the rows, without what a clock decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: row[key] for key in row if key not in OF_CLOCKS} for row in lines]
    last = checkpoint.steps(run / "checkpoints")[-1]
    return [last, _digest(load_run(run, last).params), kept]


def damages(subject: Subject, flips: int, truncations: int, others: int, seed: int) -> list[dict[str, Any]]:
    """One entry for each damage. Flips and truncations take each kind of file in turn."""
    numbers, entries = random.Random(seed), []
    paths = sorted(path.relative_to(subject.sound) for path in subject.sound.rglob("*") if path.is_file())
    kinds: dict[str, list[Path]] = {}
    for path in paths:
        kinds.setdefault(re.sub(r"^checkpoints/\d+/(params|opt_state)/.*", r"\1", str(path)), []).append(path)
    files = [path for path in paths if (subject.sound / path).stat().st_size]
    by_kind = [[path for path in kind if path in files] for kind in kinds.values()]
    harms: tuple[tuple[str, int, Callable[..., str]], ...] = (
        ("a flipped bit", flips, flip),
        ("cut off", truncations, truncate),
    )
    for kind, count, harm in harms:
        for number in range(count):
            file = numbers.choice(by_kind[number % len(by_kind)])
            hurt = functools.partial(_to_file, harm, numbers, file)
            entries.append({"kind": kind} | subject.suffer(str(file), hurt))
            print(f"{kind}: {entries[-1]['damage']}: {entries[-1]['outcome']}", file=sys.stderr, flush=True)
    for name, damage in list(OTHERS.items())[:others]:
        entries.append({"kind": "other"} | subject.suffer(name, damage))
        print(f"{name}: {entries[-1]['outcome']}: {entries[-1]['message'][:100]}", file=sys.stderr, flush=True)
    return entries


def table(entries: list[dict[str, Any]]) -> str:
    """Counts by kind, then each of the other damages with its message."""
    lines = ["| damage | found | harmless | missed |", "| --- | --- | --- | --- |"]
    for kind in dict.fromkeys(entry["kind"] for entry in entries):
        count = Counter(entry["outcome"] for entry in entries if entry["kind"] == kind)
        missed = sum(count.values()) - count["found"] - count["harmless"]
        lines.append(f"| {kind} | {count['found']} | {count['harmless']} | {missed} |")
    lines += ["", "| damage | outcome | message |", "| --- | --- | --- |"]
    for entry in entries:
        lines.append(f"| {entry['damage']} | {entry['outcome']} | {entry['message'].replace('|', '&#124;')} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if a damage was missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--flips", type=int, default=50)
    parser.add_argument("--truncations", type=int, default=50)
    parser.add_argument("--others", type=int, default=len(OTHERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="file for the entries as JSON")
    options = parser.parse_args(arguments)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # the same programs again and again
    with tempfile.TemporaryDirectory() as work:
        jax.config.update("jax_compilation_cache_dir", f"{work}/programs")
        subject = Subject(Path(work))
        entries = damages(subject, options.flips, options.truncations, options.others, options.seed)
    if options.report:
        options.report.write_text(json.dumps(entries, indent=1) + "\n")
    print(table(entries))
    return 0 if all(entry["outcome"] in ("found", "harmless") for entry in entries) else 1


if __name__ == "__main__":
    raise SystemExit(main())
