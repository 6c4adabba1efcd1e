"""`jaxlm convert`: a model from another format, or to one."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from jaxlm.cli.options import CheckpointOptions, parse_options
from jaxlm.cli.output import print_json, print_table
from jaxlm.config.base import to_dict
from jaxlm.errors import UserError

if TYPE_CHECKING:
    from jaxlm.run.folder import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ConvertOptions(CheckpointOptions):
    """Convert a model: from Hugging Face, nanoGPT, Meta or llama2.c to a run, which sample, train, eval and parity then
    read; or from a run (or one of these) to Hugging Face, nanoGPT or torchref.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
    """The model to convert. jaxlm: a run; hf: a folder that save_pretrained wrote, or ORG/NAME on the Hub; nanogpt:
    ckpt.pt or the folder that holds it; meta: a folder with params.json and consolidated.00.pth; llama2c: ckpt.pt or
    exported .bin; torchref: a folder that --to torchref wrote."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """The folder to create; it must not exist or be empty."""
    origin: Annotated[
        Literal["jaxlm", "hf", "nanogpt", "meta", "llama2c", "torchref"] | None, tyro.conf.arg(name="from")
    ] = None
    """Format of SRC. None = jaxlm, where --to is another."""
    to: Literal["jaxlm", "hf", "nanogpt", "torchref"] = "jaxlm"
    """Format of DST. jaxlm: a run; hf: a folder that transformers loads, with tokenizer and model card; nanogpt:
    ckpt.pt; torchref: config.json and model.safetensors for jaxlm's models in PyTorch."""
    shard_size: str = "5GB"
    """For --to hf: weights above this size are cut into files of at most this size."""
    report: bool = False
    """For --to hf: compare DST with transformers' own module (jaxlm parity --reference hf) and put the page into
    DST/parity. Exit code 1: they differ."""
    activation: Literal["gelu", "gelu_tanh"] | None = None
    """For nanogpt, whose checkpoints do not say it: gelu_tanh for models of early 2023 and from GPT-2's weights; None =
    gelu, nanoGPT's own."""
    tokenizer: Path | None = None
    """A tokenizer.json of Hugging Face or jaxlm, or "ids" for texts that are token ids separated by spaces. None = the
    tokenizer.json beside the model, else ids."""


def convert(arguments: list[str]) -> int:
    """Writes the folder DST of `jaxlm convert SRC DST` and prints what it holds."""
    options = parse_options(_ConvertOptions, arguments, "convert")
    origin = options.origin or ("jaxlm" if options.to != "jaxlm" else None)
    if origin is None or origin == options.to:
        given = "which format SRC has" if origin is None else f"another format than --to {options.to}"
        raise UserError(f"--from is needed: give {given}, one of hf, nanogpt, meta, llama2c, torchref, jaxlm")
    if options.activation is not None and origin != "nanogpt":
        raise UserError(f"--activation {options.activation} is for --from nanogpt; {origin} says it: leave it out")
    if origin == "jaxlm" and options.tokenizer is not None:
        raise UserError(f"--tokenizer {options.tokenizer} is for models without one, and a run has one: leave it out")
    if origin != "jaxlm" and options.step is not None:
        raise UserError(f"--step {options.step} is for the checkpoints of a run: leave it out")
    if options.report and options.to != "hf":
        raise UserError(f"--report is for --to hf, not {options.to}: leave it out")
    from jaxlm.compilation_cache import kept_programs
    from jaxlm.run.export_weights import export_run
    from jaxlm.run.folder import load_run
    from jaxlm.run.foreign_model import read_model
    from jaxlm.run.import_weights import import_run

    with kept_programs():
        if origin == "jaxlm":
            run = load_run(options.source, options.step)
        elif options.to == "jaxlm":
            run = import_run(origin, options.source, options.out, options.tokenizer, options.activation)
        else:
            run = read_model(origin, options.source, options.tokenizer, options.activation)
        written = "run"
        if options.to != "jaxlm":
            written = export_run(run, options.to, options.out, options.shard_size)
    _print_summary(options, origin, run, written)
    if not options.report:
        return 0
    from jaxlm.cli.parity import parity

    return parity(["--reference", "hf", str(options.out), "--report", str(options.out / "parity")])


def _print_summary(options: _ConvertOptions, origin: str, run: "Run", written: str) -> None:
    import jax

    model, kind = run.config.model, run.tokenizer.to_dict()["type"]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(run.params))
    if options.json:
        where = {"run" if options.to == "jaxlm" else "out": str(options.out), "from": origin, "to": options.to}
        summary = {**where, "written": written, "parameters": parameters, "tokenizer": kind}
        stops = {"stop_tokens": run.config.sample.stop_tokens}
        print_json({**summary, "tokens": run.tokenizer.vocab_size, **stops, "model": to_dict(model)})
        return
    size = f"{model.num_layers} layers, width {model.embed_dim}, {model.num_heads} heads, context {model.max_seq_len}"
    text = "token ids separated by spaces" if kind == "ids" else f"{kind}, {run.tokenizer.vocab_size:,} tokens"
    rows = [["model", size], ["parameters", f"{parameters:,} of {model.param_dtype}"]]
    rows += [["rows", f"{model.vocab_size:,}"], ["text", text]]
    rows += [] if options.to == "jaxlm" else [["written", written]]
    print_table(str(options.out), ["what", "value"], rows)
