"""The `jaxlm` command. JAX is imported only by what computes, so help and refusals come at once.

Exit codes: 0 done; 1 a check failed; 2 bad usage or input (one line on stderr); 128 + n after signal n.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from jaxlm import presets
from jaxlm.config import (
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    TrainConfig,
)
from jaxlm.errors import CheckError, UserError
from jaxlm.schema import to_dict

_Options = TypeVar("_Options")

NOT_YET_COMMANDS = ("parity", "compare", "convert")
NOT_YET_OPTIONS = ("--mesh", "--init-from")
RUNS = Path("runs")
_PARTS = tuple(field.name for field in dataclasses.fields(ExperimentConfig) if field.name != "preset")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OutOption:
    out: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TrainOptions:
    model: ModelConfig
    optim: OptimConfig
    data: DataConfig
    train: TrainConfig
    sample: SampleConfig
    out: Path | None = None
    """Run folder to make; default: the next free runs/PRESET-n."""
    resume: bool = False
    """Go on with the run in --out from its latest checkpoint."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _JsonOption:
    json: bool = False
    """Print one JSON object on stdout instead of text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _CheckpointOptions(_JsonOption):
    step: int | None = None
    """Checkpoint to use; default: the one with the lowest validation loss."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _EvalOptions(_CheckpointOptions):
    path: Annotated[Path | None, tyro.conf.arg(name="data.path")] = None
    """Where the run's data lie now, if they have moved."""
    val_path: Annotated[Path | None, tyro.conf.arg(name="data.val-path")] = None
    """Likewise its held-out transcripts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SampleOptions(_CheckpointOptions):
    sample: Annotated[SampleConfig, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _InfoOptions(_JsonOption):
    model: ModelConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        import importlib.metadata

        print(f"jaxlm {importlib.metadata.version('jaxlm')}")
        return 0
    name, rest = arguments[0], arguments[1:]
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            if name not in COMMANDS:
                why = "is not there yet" if name in NOT_YET_COMMANDS else "is unknown"
                raise UserError(f"command {name!r} {why}: choose one of {', '.join(COMMANDS)}")
            for argument in rest:
                if argument.startswith(NOT_YET_OPTIONS):
                    raise UserError(f"option {argument.split('=')[0]} is not there yet: leave it out")
            return COMMANDS[name][0](rest)
        except UserError as error:
            return _fail(error, 2)
        except CheckError as error:
            return _fail(error, 1)
        except KeyboardInterrupt:
            return 130


def _train(arguments: list[str]) -> int:
    first, rest = _first_word(arguments)
    base = presets.preset(first or "nanogpt-cpu")
    if "--resume" in rest and not _asks_help(rest):  # the run's own configuration is what the options change
        from jaxlm.run import read_config

        out = _parse(_OutOption, rest, "train [PRESET]", _OutOption(), others=True).out
        if out is None:
            raise UserError("--resume needs the run to go on with: give --out DIR")
        stored = read_config(out)
        if first and first != stored.preset:
            raise UserError(f"{out} was made with preset {stored.preset!r}, not {first!r}: drop the preset")
        base = stored
    options = _parse(_TrainOptions, rest, "train [PRESET]", _train_defaults(base))
    parts = {name: getattr(options, name) for name in _PARTS}
    config = ExperimentConfig(preset=base.preset, **parts)
    config = _with_paths(config, config.data.path, config.data.val_path)
    out = options.out or next(p for n in itertools.count(1) if not (p := RUNS / f"{base.preset}-{n}").exists())

    from jaxlm import run

    outcome = run.train(config, out, options.resume)
    if outcome.signum is not None:
        return 128 + outcome.signum
    trained = run.load_run(out)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "prompt .* pass the learned position table")  # long samples are expected here
        text = "\n---\n".join(run.sample(trained, trained.config.sample))
    (out / "samples").mkdir(exist_ok=True)
    (out / "samples" / f"step-{trained.step}.txt").write_text(text, encoding="utf-8")
    print(text)
    loss = "" if outcome.val_loss is None else f", val_loss {outcome.val_loss:.4f}"
    print(f"\nrun: {out} (step {outcome.step}{loss}; curve in loss.png)", file=sys.stderr)
    print(f"more: jaxlm sample {out} --num-samples 3 --seed 1", file=sys.stderr)
    return 0


def _sample(arguments: list[str]) -> int:
    path, rest = _run_word(arguments, "sample")
    if _asks_help(rest):
        defaults = SampleConfig()
    else:
        from jaxlm.run import read_config

        defaults = read_config(path).sample
    options = _parse(_SampleOptions, rest, "sample RUN", _SampleOptions(sample=defaults))
    from jaxlm import run

    loaded = run.load_run(path, options.step)
    texts = run.sample(loaded, options.sample)
    if options.json:
        _print_json({"run": str(path), "step": loaded.step, "sample": to_dict(options.sample), "texts": texts})
    else:
        print("\n---\n".join(texts))
    return 0


def _eval(arguments: list[str]) -> int:
    path, rest = _run_word(arguments, "eval")
    options = _parse(_EvalOptions, rest, "eval RUN", _EvalOptions())
    from jaxlm import run

    loaded = run.load_run(path, options.step)
    if options.path or options.val_path:  # the data lie elsewhere; their sha256 must be that of the run
        loaded = dataclasses.replace(loaded, config=_with_paths(loaded.config, options.path, options.val_path))
    found = run.evaluate(loaded)
    if options.json:
        _print_json({"run": str(path), **found})
    else:
        _print_table(f"{path}", ["quantity", "value"], [[name, f"{value:.6g}"] for name, value in found.items()])
    return 0


def _prepare(arguments: list[str]) -> int:
    from jaxlm import recipes

    name, rest = _first_word(arguments)
    options = _parse(_JsonOption, rest, "prepare DATASET", _JsonOption())
    if name is None:
        raise UserError(f"no dataset given: choose one of {', '.join(recipes.names())}")
    files = [{"path": str(path), "bytes": path.stat().st_size} for paths in recipes.fetch(name) for path in paths]
    if options.json:
        _print_json({"dataset": name, "files": files})
    else:
        for file in files:
            print(f"{name}: {file['path']} ({file['bytes']:,} bytes, sha256 as in the recipe)")
    return 0


def _presets(arguments: list[str]) -> int:
    options = _parse(_JsonOption, arguments, "presets", _JsonOption())
    made = {name: presets.preset(name) for name in presets.PRESETS}
    if options.json:
        _print_json({name: to_dict(config) for name, config in made.items()})
    else:
        rows = [
            [name, f"L {c.num_layers}, D {c.embed_dim}, N {c.num_heads}, T {c.max_seq_len}", presets.describe(name)]
            for name, c in ((name, config.model) for name, config in made.items())
        ]
        _print_table("presets", ["name", "size", "what it is"], rows)
    return 0


def _info(arguments: list[str]) -> int:
    name, rest = _first_word(arguments)
    if name is None:
        options = _parse(_JsonOption, rest, "info", _JsonOption())
        from jaxlm.run import provenance

        found = provenance()
        if options.json:
            _print_json(found)
        else:
            versions = [[package, version] for package, version in found["versions"].items()]
            device = " ".join(f"{key} {value}" for key, value in found["device"].items())
            _print_table("jaxlm", ["what", "value"], [*versions, ["device", device]])
        return 0
    if name in presets.PRESETS:
        model = presets.preset(name).model
    else:
        from jaxlm.run import read_config

        if not Path(name).exists():
            raise UserError(
                f"{name!r} is neither a preset nor a run: choose one of {', '.join(presets.PRESETS)}, or a folder"
            )
        model = read_config(Path(name)).model
    chosen = _parse(_InfoOptions, rest, "info PRESET", _InfoOptions(model=model))
    from jaxlm.report import parameter_table

    rows_by_name = parameter_table(chosen.model)
    total = sum(row[-1] for row in rows_by_name)
    if chosen.json:
        shapes = {path: list(shape) for path, shape, _ in rows_by_name}
        _print_json({"name": name, "model": to_dict(chosen.model), "parameters": total, "shapes": shapes})
    else:
        rows = [[path, " x ".join(map(str, shape)), f"{count:,}"] for path, shape, count in rows_by_name]
        _print_table(name, ["parameter", "shape", "count"], [*rows, ["total", "", f"{total:,}"]])
    return 0


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str, str]] = {
    "train": (_train, "[PRESET]", "Train a model: --model.* --optim.* --data.* --train.* --sample.* --out --resume"),
    "sample": (_sample, "RUN", "Draw text: --prompt --num-samples --temperature --top-k --top-p --seed --json"),
    "eval": (_eval, "RUN", "Exact validation loss, perplexity and training-slice loss of a checkpoint"),
    "prepare": (_prepare, "DATASET", "Fetch a dataset into the local cache and check it"),
    "presets": (_presets, "", "The named configurations"),
    "info": (_info, "[PRESET|RUN]", "Parameters of a model; alone: versions and devices"),
}
"""Each command: what runs it, its word, and what it does."""


def _usage() -> str:
    lines = "\n".join(f"  {name + ' ' + word:20} {summary}" for name, (_, word, summary) in COMMANDS.items())
    return (
        "usage: jaxlm COMMAND ...\n\nTrain, sample and check small language models in JAX.\n\n"
        f"{lines}\n\n`jaxlm COMMAND --help` lists the options of a command."
    )


def _train_defaults(config: ExperimentConfig) -> _TrainOptions:
    return _TrainOptions(**{name: getattr(config, name) for name in _PARTS})


def _with_paths(config: ExperimentConfig, path: str | Path | None, val_path: str | Path | None) -> ExperimentConfig:
    """The config with the data at these places, made absolute; None leaves a place as it is."""
    chosen = config.data
    if path is not None:
        chosen = dataclasses.replace(chosen, path=str(Path(path).absolute()))
    if val_path is not None:
        chosen = dataclasses.replace(chosen, val_path=str(Path(val_path).absolute()))
    return dataclasses.replace(config, data=chosen)


def _first_word(arguments: list[str]) -> tuple[str | None, list[str]]:
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    return None, arguments


def _asks_help(arguments: list[str]) -> bool:
    return bool({"-h", "--help"} & set(arguments))


def _run_word(arguments: list[str], command: str) -> tuple[Path, list[str]]:
    word, rest = _first_word(arguments)
    if word is None and not _asks_help(rest):
        raise UserError(f"no run given: jaxlm {command} RUN ..., RUN being a folder that `jaxlm train` made")
    return Path(word or ""), rest


def _parse(cls: type[_Options], arguments: list[str], usage: str, default: _Options, others: bool = False) -> _Options:
    """Tyro's parser, its boxed refusals turned into one line; with `others`, what cls has not is passed over."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            if others:
                return tyro.cli(cls, args=arguments, prog=f"jaxlm {usage}", default=default, return_unknown_args=True)[
                    0
                ]
            return tyro.cli(cls, args=arguments, prog=f"jaxlm {usage}", default=default)
    except SystemExit as end:
        if not end.code:
            raise
    raise UserError(f"{_unboxed(errors.getvalue())}; see jaxlm {usage.split()[0]} --help")


def _unboxed(refusal: str) -> str:
    """What tyro's box says, and its first guess at what was meant, in one line."""
    sections: list[list[str]] = [[]]
    for line in refusal.splitlines():
        content = line.strip("│ ")
        if not content.strip("─-"):
            sections.append([])
        elif not line.startswith(("╭", "╰")):
            sections[-1].append(content)
    if "╭" not in refusal:  # no UTF-8: the title stands in a section of its own
        sections = sections[1:]
    message = re.sub(r"^Error parsing \w+: ", "", " ".join(sections[0]).rstrip("."))
    guesses = [section[1] for section in sections if section and section[0].startswith("Perhaps")]
    return f"{message}; perhaps you meant {guesses[0]}" if guesses else message


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False))


def _print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    import rich.console
    import rich.table

    table = rich.table.Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    rich.console.Console().print(table)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"jaxlm: warning: {message}", file=sys.stderr)


def _fail(error: Exception, code: int) -> int:
    print(f"jaxlm: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
