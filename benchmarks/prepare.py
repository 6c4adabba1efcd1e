"""Prepares generated text and measures time and memory; kills the work in the middle, goes on, and compares all bytes.

python benchmarks/prepare.py WORK --megabytes 500
"""

import argparse
import hashlib
import json
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

FILES = 10
VOCABULARY = 50_000
POLL_SECONDS = 0.2


def generate(folder: Path, megabytes: int) -> None:
    """Documents of words by Zipf's law, the same on each call: nine .jsonl files, and a .txt file with empty lines."""
    random = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    likely = 1 / np.arange(1, 27)
    lengths = random.integers(1, 11, VOCABULARY)
    words = ["".join(random.choice(letters, length, p=likely / likely.sum())) for length in lengths]
    steps = (1 / np.arange(1, VOCABULARY + 1)).cumsum()
    folder.mkdir()
    for number in range(FILES):
        is_text, size = number == FILES - 1, 0
        with (folder / f"{number}.{'txt' if is_text else 'jsonl'}").open("w", encoding="utf-8") as file:
            while size < megabytes * 1_000_000 // FILES:
                count = int(random.lognormal(5, 1)) + 1
                chosen = np.searchsorted(steps, random.random(count) * steps[-1])
                text = " ".join([words[i] for i in chosen]) + ".\n"
                size += file.write(f"{text}\n" if is_text else json.dumps({"text": text}) + "\n")


def memory(pid: int) -> int:
    """Bytes of a process and all below it; pages that several share are divided among them (PSS)."""
    total, waiting = 0, [pid]
    while waiting:
        one = Path("/proc", str(waiting.pop()))
        try:
            line = next(line for line in (one / "smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
            waiting += [
                int(child) for task in (one / "task").iterdir() for child in (task / "children").read_text().split()
            ]
        except OSError:  # it has ended
            continue
        total += int(line.split()[1]) * 1024
    return total


def run(work: Path, out: str, options: list[str], kill_at: int | None = None) -> tuple[float, int]:
    """Seconds and peak bytes of one `jaxlm prepare`, killed once there are `kill_at` shards if that is given."""
    data = ["--data.path", str(work / "text"), "--separator", ""]
    command = [sys.executable, "-m", "jaxlm", "prepare", *data, *options, "--out", str(work / out)]
    started, peak = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            if kill_at is not None and len([*(work / out).glob("shard-*")]) >= kill_at:
                process.send_signal(signal.SIGKILL)
                kill_at = None
            time.sleep(POLL_SECONDS)
    if process.returncode not in (0, -signal.SIGKILL):
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - started, peak


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of each file."""
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def main() -> None:
    """Prints one line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="a new folder, which is deleted at the end")
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--shard-tokens", type=int, default=10_000_000)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir()
    generate(work / "text", arguments.megabytes)
    size = sum(path.stat().st_size for path in (work / "text").iterdir())
    machine = f"{platform.processor() or platform.machine()}, Python {platform.python_version()}"
    print(f"{size:,} bytes in {FILES} files; {machine}", flush=True)
    shared = [*("--data.bpe-vocab-size", str(arguments.vocabulary)), *("--shard-tokens", str(arguments.shard_tokens))]
    options = [*shared, "--workers", str(arguments.workers)]
    seconds, peak = run(work, "whole", options)
    manifest = json.loads((work / "whole" / "manifest.json").read_text())
    shards = len(manifest["shards"])
    print(
        f"whole: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens, {shards} shards, "
        f"{seconds:.0f} s ({size / seconds / 1e6:.2f} MB/s), {arguments.workers} workers, peak {peak / 1e6:.0f} MB"
    )
    first, _ = run(work, "killed", options, kill_at=shards // 2)
    print(f"killed by SIGKILL after {first:.0f} s, {len([*(work / 'killed').glob('shard-*')])} shards finished")
    second, peak = run(work, "killed", [*shared, "--workers", "1"])
    print(f"resumed with 1 worker: {second:.0f} s, peak {peak / 1e6:.0f} MB")
    equal = digests(work / "killed") == digests(work / "whole")
    print(f"all {len(digests(work / 'whole'))} files equal to the uninterrupted run's: {equal}")
    shutil.rmtree(work)
    if not equal:
        sys.exit(1)


if __name__ == "__main__":
    main()
