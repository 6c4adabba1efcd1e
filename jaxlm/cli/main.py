"""The `jaxlm` command. JAX is imported only by what computes, so help and refusals come at once.

Exit codes: 0 done; 1 a check failed; 2 bad usage or input (one line on stderr); 128 + n after signal n.
"""

import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence

from jaxlm.cli.attend import attend
from jaxlm.cli.convert import convert
from jaxlm.cli.eval import evaluate
from jaxlm.cli.info import info
from jaxlm.cli.parity import parity
from jaxlm.cli.prepare import prepare
from jaxlm.cli.presets import presets
from jaxlm.cli.reproduce import reproduce
from jaxlm.cli.runs import runs
from jaxlm.cli.sample import sample
from jaxlm.cli.streams import OutputError, drop_output, safe_streams
from jaxlm.cli.train import train
from jaxlm.errors import CheckError, UserError
from jaxlm.run.printing import outlived
from jaxlm.terminal import one_line

COMMANDS: dict[str, tuple[Callable[[list[str]], int], str, str]] = {
    "train": (train, "[PRESET]", "Train a model, or continue a run"),
    "sample": (sample, "RUN", "Sample text from a run"),
    "eval": (evaluate, "RUN...", "Measure runs on held-out data: the exact loss, or a task"),
    "runs": (runs, "[FOLDER]", "List the runs in a folder: steps, losses, the settings that differ"),
    "attend": (attend, "RUN", "Draw the attention maps of every layer and head over a text"),
    "parity": (parity, "[RUN|DIR]", "Compare a model with PyTorch, layer by layer, and name the first difference"),
    "convert": (convert, "SRC DST", "Make a run of a model of Hugging Face, nanoGPT, Meta or llama2.c"),
    "prepare": (prepare, "[DATASET]", "Download a dataset, or write a large corpus as token shards"),
    "presets": (presets, "", "List the named configurations"),
    "reproduce": (reproduce, "NAME", "Repeat an experiment of the course hand-outs, beside the published numbers"),
    "info": (
        info,
        "[PRESET|RUN]",
        "Cost of a model in parameters, FLOPs, memory; without one: versions, devices, compiler",
    ),
}
"""Each command: what runs it, its positional arguments, and what it does."""

NOT_YET_COMMANDS = ("compare",)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # jaxlib 0.10.1 logs an error of 3 KB for each program that it loads from the compilation cache, because tuning
    # flags of the compiler such as prefer-no-gather are not features of a processor. It loads the program nevertheless.
    # With other processes, its last words when one of them is gone are a stack trace: ours take their place.
    with_others = any(argument.startswith("--mesh.coordinator") for argument in arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "4" if with_others else "3")
    with safe_streams(), outlived(), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code = _code(arguments)
            sys.stdout.flush()
            return code
        except OutputError as error:
            drop_output()
            return _fail(error, 1)
        except BrokenPipeError:  # nobody reads stdout any more: no message
            drop_output()
            return 128 + signal.SIGPIPE


def _code(arguments: list[str]) -> int:
    """The exit code of a command, whose refusal is printed."""
    try:
        return _run(arguments)
    except UserError as error:
        return _fail(error, 2)
    except CheckError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return 130
    except (AssertionError, RuntimeError):
        # Where JAX has no device, whatever asks first fails, and not in words for a user.
        if "jax" not in sys.modules or (refusal := _no_devices()) is None:
            raise
        return _fail(refusal, 2)


def _no_devices() -> UserError | None:
    """What says that JAX finds no devices; None if it has some."""
    from jaxlm.sharding.mesh import find_devices

    try:
        find_devices()
    except UserError as error:
        return error
    return None


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        import importlib.metadata

        print(f"jaxlm {importlib.metadata.version('jaxlm')}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        why = "is not there yet" if name in NOT_YET_COMMANDS else "is unknown"
        raise UserError(f"command {name!r} {why}: choose one of {', '.join(COMMANDS)}")
    number = os.environ.get("JAX_NUM_CPU_DEVICES", "1")
    if not number.isdecimal() or int(number) < 1:  # JAX would end in a traceback
        raise UserError(f"JAX_NUM_CPU_DEVICES={number} is not a number of devices: give at least 1, or unset it")
    try:
        return COMMANDS[name][0](rest)
    except SystemExit as end:  # --help
        return int(end.code or 0)


def _usage() -> str:
    lines = "\n".join(f"  {name + ' ' + word:18} {summary}" for name, (_, word, summary) in COMMANDS.items())
    return (
        "usage: jaxlm COMMAND ...\n\nTrain, sample and check small language models in JAX.\n\n"
        f"{lines}\n\n`jaxlm COMMAND --help` lists the options of a command."
    )


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"jaxlm: warning: {one_line(str(message))}", file=sys.stderr)


def _fail(error: Exception, code: int) -> int:
    print(f"jaxlm: error: {one_line(str(error))}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
