"""Fuzzes every reader of files that others wrote: damaged files must be read or refused, in bounded time and memory.

python scripts/fuzz.py [--minutes 10] [--targets config npy ...] [--engine random|atheris] [--out DIR]

`random` damages valid files (tests/fuzz_mutations.py) round the targets. `atheris` (pip install atheris) also follows
which lines of jaxlm an input reaches; it takes one target. Each finding is kept once, with the file that causes it; the
exit code is 1 if there are any. Counts are printed as JSON.
"""

import argparse
import collections
import contextlib
import faulthandler
import json
import os
import random
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")


class Findings:
    """Counts, and the findings by where they come from."""

    def __init__(self, out: Path) -> None:
        self.out, self.executions, self.by_place = out, collections.Counter(), {}
        self.outcomes = collections.Counter()
        self.started = time.monotonic()

    def run(self, name: str, file: str, content: bytes) -> None:
        """Tries one input; keeps it if it is a finding of a new place."""
        from fuzzing import try_bytes

        (self.out / "current").write_bytes(f"{name} {file}\n".encode() + content)  # if the process dies of it
        self.executions[name] += 1
        try:
            outcome = try_bytes(name, file, content)
            self.outcomes["read" if outcome == "read" else "refused"] += 1
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self.outcomes["finding"] += 1
            frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}jaxlm{os.sep}" in f.filename]
            place = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else str(error)[:60]
            key = f"{name} {type(error).__name__} {place}"
            if key not in self.by_place:
                number = len(self.by_place)
                self.by_place[key] = {"file": file, "message": str(error)[:300], "times": 0, "input": f"case-{number}"}
                (self.out / f"case-{number}").write_bytes(content)
                (self.out / f"case-{number}.txt").write_text(f"{key}\n{''.join(traceback.format_exception(error))}")
                print(f"finding {number}: {key}: {str(error)[:200]!r}", file=sys.stderr, flush=True)
            self.by_place[key]["times"] += 1

    def report(self) -> dict:
        """What is printed at the end."""
        minutes = (time.monotonic() - self.started) / 60
        return {
            "executions": sum(self.executions.values()),
            "minutes": round(minutes, 1),
            "outcomes": dict(self.outcomes),
            "by_target": dict(self.executions),
            "findings": self.by_place,
        }

    def save(self) -> None:
        """Writes the report so far: libFuzzer ends the process without a word."""
        (self.out / "report.json").write_text(json.dumps(self.report(), indent=1))


def main() -> int:
    """Fuzzes until the time is over."""
    if "atheris" in sys.argv:
        import atheris

        instrumented = atheris.instrument_imports(include=["jaxlm"])
    else:
        instrumented = contextlib.nullcontext()
    with instrumented:
        import fuzz_targets

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument(
        "--targets", nargs="+", choices=sorted(fuzz_targets.TARGETS), default=list(fuzz_targets.TARGETS)
    )
    parser.add_argument("--engine", choices=("random", "atheris"), default="random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    findings = Findings(options.out)
    (_random if options.engine == "random" else _atheris)(options, findings)
    report = findings.report()
    print(json.dumps(report))
    return 1 if findings.by_place else 0


def _random(options: argparse.Namespace, findings: Findings) -> None:
    from fuzz_mutations import mutate
    from fuzzing import WAIT, seeds

    rng = random.Random(options.seed)
    end = time.monotonic() + 60 * options.minutes
    while time.monotonic() < end:
        for name in options.targets:
            folder, files = seeds(name)
            budget = time.monotonic() + 2  # slow readers take no more time than fast ones
            while time.monotonic() < min(budget, end):
                file = rng.choice(files)
                faulthandler.dump_traceback_later(2 * WAIT, exit=True)  # code of C that no signal interrupts
                findings.run(name, file, mutate((folder / file).read_bytes(), rng))
                faulthandler.cancel_dump_traceback_later()
        findings.save()


def _atheris(options: argparse.Namespace, findings: Findings) -> None:
    import atheris
    from fuzz_mutations import mutate
    from fuzzing import seeds

    (name,) = options.targets
    with atheris.instrument_imports(include=["jaxlm"]):
        folder, files = seeds(name)  # it reads them, which imports what the reader needs
    corpus = options.out / f"corpus-{name}"
    corpus.mkdir(exist_ok=True)
    for number, file in enumerate(files):
        (corpus / str(number)).write_bytes(bytes([number]) + (folder / file).read_bytes())

    def one(data: bytes) -> None:
        if data:
            findings.run(name, files[data[0] % len(files)], data[1:])
            if findings.executions[name] % 50 == 0:
                findings.save()

    def changed(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            return atheris.Mutate(data, most)
        return (data[:1] + mutate(data[1:], rng))[:most]

    arguments = [sys.argv[0], str(corpus), f"-max_total_time={round(60 * options.minutes)}", "-max_len=262144"]
    arguments += ["-timeout=120", f"-rss_limit_mb={6000}", "-verbosity=0"]
    atheris.Setup(arguments, one, custom_mutator=changed, internal_libfuzzer=True)
    atheris.Fuzz()  # ends the process


if __name__ == "__main__":
    sys.exit(main())
