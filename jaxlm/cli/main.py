"""The `jaxlm` command. JAX is imported only by what computes, so help and refusals come at once.

Exit codes: 0 done; 1 a check failed; 2 bad usage or input (one line on stderr); 128 + n after signal n.
"""

import dataclasses
import itertools
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxlm.cli import convert as cli_convert
from jaxlm.cli import parity as cli_parity
from jaxlm.cli import sample as cli_decode
from jaxlm.cli.options import (
    CheckpointOptions,
    JsonOption,
    asks_help,
    first_word,
    of_kinds,
    parse_options,
    print_json,
    print_table,
    run_word,
)
from jaxlm.config import (
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    TrainConfig,
    presets,
)
from jaxlm.config.base import to_dict
from jaxlm.errors import CheckError, UserError

NOT_YET_COMMANDS = ("compare",)
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
class _AttendOptions(CheckpointOptions):
    text: str
    """The text whose tokens attend to one another."""
    out: Path | None = None
    """PNG to write; default: attention.png in the run's folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _InfoOptions(JsonOption):
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
        except BrokenPipeError:  # who read stdout has gone: what is still buffered goes nowhere, in silence
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE


def _train(arguments: list[str]) -> int:
    first, rest = first_word(arguments)
    base = presets.preset(first or "nanogpt-cpu")
    if "--resume" in rest and not asks_help(rest):  # the run's own configuration is what the options change
        from jaxlm.run.training import read_config

        out = parse_options(_OutOption, rest, "train [PRESET]", _OutOption(), others=True).out
        if out is None:
            raise UserError("--resume needs the run to go on with: give --out DIR")
        stored = read_config(out)
        if first and first != stored.preset:
            raise UserError(f"{out} was made with preset {stored.preset!r}, not {first!r}: drop the preset")
        base = stored
    base = of_kinds(base, rest, "train [PRESET]")
    options = parse_options(_TrainOptions, rest, "train [PRESET]", _train_defaults(base))
    parts = {name: getattr(options, name) for name in _PARTS}
    config = ExperimentConfig(preset=base.preset, **parts)
    config = config.with_data_at(config.data.path, config.data.val_path)
    out = options.out or next(p for n in itertools.count(1) if not (p := RUNS / f"{base.preset}-{n}").exists())

    from jaxlm.run import samples as texts
    from jaxlm.run import training as run

    outcome = run.train(config, out, options.resume)
    if outcome.signum is not None:
        return 128 + outcome.signum
    trained = run.load_run(out)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "prompt .* pass the learned position table")  # long samples are expected here
        text = "\n---\n".join(texts.sample(trained, trained.config.sample))
    (out / "samples").mkdir(exist_ok=True)
    (out / "samples" / f"step-{trained.step}.txt").write_text(text, encoding="utf-8")
    print(text)
    loss = "" if outcome.val_loss is None else f", val_loss {outcome.val_loss:.4f}"
    print(f"\nrun: {out} (step {outcome.step}{loss}; curve in loss.png)", file=sys.stderr)
    print(f"more: jaxlm sample {out} --num-samples 3 --seed 1", file=sys.stderr)
    return 0


def _prepare(arguments: list[str]) -> int:
    from jaxlm.data import sources as recipes

    name, rest = first_word(arguments)
    options = parse_options(JsonOption, rest, "prepare DATASET", JsonOption())
    if name is None:
        raise UserError(f"no dataset given: choose one of {', '.join(recipes.names())}")
    files = [{"path": str(path), "bytes": path.stat().st_size} for paths in recipes.fetch(name) for path in paths]
    if options.json:
        print_json({"dataset": name, "files": files})
    else:
        for file in files:
            print(f"{name}: {file['path']} ({file['bytes']:,} bytes, sha256 as in the recipe)")
    return 0


def _presets(arguments: list[str]) -> int:
    options = parse_options(JsonOption, arguments, "presets", JsonOption())
    made = {name: presets.preset(name) for name in presets.PRESETS}
    if options.json:
        print_json({name: to_dict(config) for name, config in made.items()})
    else:
        rows = [
            [name, f"L {c.num_layers}, D {c.embed_dim}, N {c.num_heads}, T {c.max_seq_len}", presets.describe(name)]
            for name, c in ((name, config.model) for name, config in made.items())
        ]
        print_table("presets", ["name", "size", "what it is"], rows)
    return 0


def _info(arguments: list[str]) -> int:
    name, rest = first_word(arguments)
    if name is None:
        options = parse_options(JsonOption, rest, "info", JsonOption())
        from jaxlm.run.training import provenance

        found = provenance()
        if options.json:
            print_json(found)
        else:
            versions = [[package, version] for package, version in found["versions"].items()]
            device = " ".join(f"{key} {value}" for key, value in found["device"].items())
            print_table("jaxlm", ["what", "value"], [*versions, ["device", device]])
        return 0
    if name in presets.PRESETS:
        config = presets.preset(name)
    else:
        from jaxlm.run.training import read_config

        if not Path(name).exists():
            raise UserError(
                f"{name!r} is neither a preset nor a run: choose one of {', '.join(presets.PRESETS)}, or a folder"
            )
        config = read_config(Path(name))
    model = of_kinds(config, rest, "info PRESET").model
    chosen = parse_options(_InfoOptions, rest, "info PRESET", _InfoOptions(model=model))
    from jaxlm.analysis import costs as estimates

    model = chosen.model
    rows_by_name = estimates.parameter_table(model)
    costs = {
        "parameters": sum(row[-1] for row in rows_by_name),
        "forward_flops_per_token": round(estimates.forward_flops_per_token(model)),
        "cache_bytes_per_token": estimates.cache_bytes_per_token(model),
        "cache_bytes": estimates.cache_bytes(model, model.max_seq_len),
        "activation_bytes_per_sequence": estimates.activation_bytes_per_sequence(model),
    }
    states = estimates.optimizer_bytes(model)
    if chosen.json:
        shapes = {path: list(shape) for path, shape, _ in rows_by_name}
        print_json({"name": name, "model": to_dict(model), **costs, "optimizer_state_bytes": states, "shapes": shapes})
    else:
        rows = [[path, " x ".join(map(str, shape)), f"{count:,}"] for path, shape, count in rows_by_name]
        print_table(name, ["parameter", "shape", "count"], rows)
        context = f"{model.max_seq_len} tokens"
        meanings = {
            "parameters": "in all",
            "forward_flops_per_token": "matrix products of a forward pass; training takes about 3 times as many",
            "cache_bytes_per_token": "by which a row's cache grows until its windows are full",
            "cache_bytes": f"a row's cache for {context}",
            "activation_bytes_per_sequence": f"kept for the backward pass for each {context} (estimate)",
        }
        print_table(name, ["cost", "", "what"], [[k, f"{v:,}", meanings[k]] for k, v in costs.items()])
        rows = [[k, f"{v:,}", f"{v / states['adamw']:.1%}"] for k, v in states.items()]
        print_table(name, ["optimizer", "bytes of its state", "of AdamW's"], rows)
    return 0


def _attend(arguments: list[str]) -> int:
    path, rest = run_word(arguments, "attend")
    options = parse_options(_AttendOptions, rest, "attend RUN")
    from jaxlm.run import training as run

    loaded = run.load_run(path, options.step)
    out = options.out or path / "attention.png"
    maps = run.draw_attention(loaded, options.text, out)
    if options.json:
        print_json({"run": str(path), "step": loaded.step, "out": str(out), "maps": [list(m.shape) for m in maps]})
    else:
        print(f"{out}: {len(maps)} layers of {len(maps[0])} maps, step {loaded.step}")
    return 0


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str, str]] = {
    "train": (_train, "[PRESET]", "Train a model: --model.* --optim.* --data.* --train.* --sample.* --out --resume"),
    "sample": (
        cli_decode.sample,
        "RUN",
        "Draw text: --prompt --prompt-file --num-samples --temperature --top-p --stop --seed",
    ),
    "eval": (
        cli_decode.evaluate,
        "RUN",
        "Exact validation loss; --task prediction, generation or likelihood",
    ),
    "attend": (_attend, "RUN", "Draw the attention maps of every layer and head: --text --out"),
    "parity": (
        cli_parity.parity,
        "[RUN]",
        "Compare with PyTorch, layer by layer: --preset --model.* --text --prompt; names the first difference",
    ),
    "convert": (
        cli_convert.convert,
        "SRC DST",
        "Bring in a model as a run: --from hf (a GPT-2 or Llama folder) or nanogpt --tokenizer",
    ),
    "prepare": (_prepare, "DATASET", "Fetch a dataset into the local cache and check it"),
    "presets": (_presets, "", "The named configurations"),
    "info": (
        _info,
        "[PRESET|RUN]",
        "Parameters, FLOPs, cache, memory of a model and its optimizers; alone: versions and devices",
    ),
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


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"jaxlm: warning: {message}", file=sys.stderr)


def _fail(error: Exception, code: int) -> int:
    print(f"jaxlm: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
