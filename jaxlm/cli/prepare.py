"""`jaxlm prepare`: fetches a dataset, or turns a large corpus into token shards."""

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jaxlm.cli.options import Given, JsonOption, parse_options
from jaxlm.cli.output import print_json, say
from jaxlm.config.prepare import PrepareConfig
from jaxlm.errors import UserError
from jaxlm.terminal import for_stdout

if TYPE_CHECKING:
    from jaxlm.data.prepare import Progress

LINE_SECONDS = 5.0
"""Without a terminal, so many seconds lie between two lines of progress."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _DataOptions:
    """What is read, and how it becomes tokens."""

    path: str | None = None
    """A .txt, .jsonl or .parquet file, a folder that holds such files at any depth, or a pattern ('*.jsonl'). The first
    two may be compressed (.gz, .bz2, .xz)."""
    tokenizer: Literal["bpe"] = "bpe"
    """bpe: byte-level BPE that is learned from a sample of the documents. --tokenizer-from takes an existing one."""
    bpe_vocab_size: int = PrepareConfig.bpe_vocab_size
    """Most entries of the new byte-level BPE, its 256 bytes and <|endoftext|> included."""
    val_fraction: float = PrepareConfig.val_fraction
    """The new BPE learns nothing from the last val_fraction of the bytes, which training may hold out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PrepareOptions(JsonOption):
    """Download a dataset into the local cache, or write the documents of --data.path as token shards into --out."""

    dataset: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[DATASET]")] = None
    """Dataset to download: librispeech (1 GB) or tinyshakespeare."""
    data: _DataOptions = _DataOptions()
    out: Path | None = None
    """Folder of the shards. The same command again goes on with one that was interrupted."""
    tokenizer_from: Path | None = None
    """Use the tokenizer of this run, prepared corpus or Hugging Face folder instead of learning one."""
    field: str = PrepareConfig.field
    """Field of a .jsonl line, or column of a .parquet file, that holds the text of a document."""
    separator: str | None = None
    """Line between two documents of a .txt file, '' = an empty line; None = each .txt file is one document."""
    shard_tokens: int = PrepareConfig.shard_tokens
    """Tokens of each shard."""
    workers: int | None = None
    """Processes that tokenize; None = one for each core. The shards do not depend on it."""
    check: Path | None = None
    """Read a prepared folder and check the sha256 of each of its files, and do nothing else."""


def prepare(arguments: list[str]) -> int:
    """`jaxlm prepare DATASET`, `jaxlm prepare --data.path PATH --out DIR` or `jaxlm prepare --check DIR`."""
    given: set[str] = set()

    def defaults(options: Given) -> _PrepareOptions:
        given.update(options.keys() - {"data", "json"}, (f"data.{name}" for name in options.get("data", {})))
        return _PrepareOptions()

    options = parse_options(_PrepareOptions, arguments, "prepare", defaults)
    _check_together(given)
    if options.dataset is not None:
        return _fetch(options.dataset, options.json)
    try:
        result = _check(options.check) if options.check is not None else _prepare(options)
    except _StoppedError as stopped:
        say("stopped: the same command goes on; finished shards are kept")
        return 128 + stopped.signum
    if options.json:
        print_json(result)
    else:
        line = (
            f"{result['out']}: {result['tokens']:,} tokens of {result['documents']:,} documents in "
            f"{result['shards']} {'shard' if result['shards'] == 1 else 'shards'} ({result['dtype']}), vocabulary "
            f"{result['vocab_size']:,}{'' if options.check is None else ', every sha256 as in the manifest'}"
        )
        print(for_stdout(line))
        if options.check is None:
            say(f"train: jaxlm train --data.path {result['out']}")
    return 0


def _check_together(given: set[str]) -> None:
    """Refuses options that the work would not read."""
    works = [name for name in ("dataset", "check", "data.path") if name in given]
    if not works:
        raise UserError("DATASET is missing (or --data.path, or --check); see jaxlm prepare --help")
    main: str = works[0]
    pairs = [(main, other) for other in sorted(given - {main}) if main != "data.path"]
    if "tokenizer_from" in given:
        pairs += [("tokenizer_from", other) for other in ("data.tokenizer", "data.bpe_vocab_size") if other in given]
    for first, other in pairs:
        shown = "DATASET" if first == "dataset" else f"--{first.replace('_', '-')}"
        raise UserError(f"--{other.replace('_', '-')} does not go together with {shown}: leave it out")


def _fetch(name: str, as_json: bool) -> int:
    from jaxlm.data.sources import fetch

    files = [{"path": str(path), "bytes": path.stat().st_size} for paths in fetch(name) for path in paths]
    if as_json:
        print_json({"dataset": name, "files": files})
    else:
        for file in files:
            print(for_stdout(f"{name}: {file['path']} ({file['bytes']:,} bytes, sha256 as in the recipe)"))
    return 0


def _check(folder: Path) -> dict[str, Any]:
    from jaxlm.data.shards import check_prepared

    return _summary(folder, check_prepared(folder).manifest)


def _prepare(options: _PrepareOptions) -> dict[str, Any]:
    out, path = options.out, options.data.path
    if out is None or path is None:
        raise UserError(f"--data.path {path} needs a folder for the shards: give --out DIR")
    if options.workers is not None and options.workers < 1:
        raise UserError(f"workers = {options.workers} is too small: give at least 1")
    own = {name: getattr(options, name) for name in ("field", "separator", "shard_tokens")}
    data = {name: getattr(options.data, name) for name in ("bpe_vocab_size", "val_fraction")}
    cfg = PrepareConfig(path=path, **own, **data)
    from jaxlm.data.prepare import prepare_corpus

    tokenizer, end_of_text = None, None
    if options.tokenizer_from is not None:
        from jaxlm.run.tokenizer_source import read_tokenizer

        tokenizer, end_of_text = read_tokenizer(options.tokenizer_from)
    with _signals(), _Bar() as bar:
        manifest = prepare_corpus(cfg, out, tokenizer, end_of_text, options.workers, bar.show)
    return _summary(out, manifest)


class _StoppedError(BaseException):
    """A signal came; what is finished is kept."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """In this block the first SIGINT or SIGTERM raises _StoppedError; more are ignored while the work is put away."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def stop(signum: int, frame: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise _StoppedError(signum)

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    # A shell ignores SIGINT for what it starts by &, and None is a handler that Python cannot put back.
    before = {signum: handler for signum, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    for signum in before:
        signal.signal(signum, stop)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _summary(out: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    names = "tokens", "documents", "dtype", "vocab_size"
    return {"out": str(out), "shards": len(manifest["shards"]), **{name: manifest[name] for name in names}}


class _Bar:
    """A bar on a terminal, plain lines elsewhere, on stderr."""

    def __init__(self) -> None:
        import rich.console
        import rich.progress

        self._bar, self._last = None, time.perf_counter()
        console = rich.console.Console(stderr=True)
        if console.is_terminal and not console.is_dumb_terminal:
            columns = rich.progress.BarColumn(24), "{task.percentage:.0f}%", "{task.fields[text]}"
            remaining = rich.progress.TimeRemainingColumn()
            self._bar = rich.progress.Progress(*columns, remaining, console=console)
            self._task = self._bar.add_task("prepare", total=None, text="learning the tokenizer")

    def __enter__(self) -> "_Bar":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, progress: "Progress") -> None:
        """Work has come so far."""
        text = f"{progress.tokens:,} tokens, {progress.shards} shards"
        if self._bar:
            self._bar.update(self._task, total=progress.total_bytes, completed=progress.bytes, text=text)
        elif time.perf_counter() - self._last > LINE_SECONDS:
            self._last = time.perf_counter()
            share = progress.bytes / max(progress.total_bytes, 1)
            say(f"{share:.0%}  {text}")
