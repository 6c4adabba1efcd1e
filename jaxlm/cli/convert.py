"""`jaxlm convert`: makes a run of a model in another format."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from jaxlm.cli.options import JsonOption, parse_options
from jaxlm.cli.output import print_json, print_table
from jaxlm.config.base import to_dict
from jaxlm.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ConvertOptions(JsonOption):
    """Convert a model of Hugging Face (GPT-2 or Llama), nanoGPT, Meta or llama2.c to a run, which sample, eval and
    parity then read.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
    """The model to convert. hf: a folder that save_pretrained wrote, or ORG/NAME on the Hub; nanogpt: ckpt.pt or the
    folder that holds it; meta: a folder with params.json and consolidated.00.pth; llama2c: ckpt.pt or exported .bin."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """The run folder to create; it must not exist or be empty."""
    origin: Annotated[Literal["hf", "nanogpt", "meta", "llama2c", "torchref", "jaxlm"], tyro.conf.arg(name="from")]
    """Format of SRC: hf, nanogpt, meta or llama2c (torchref and jaxlm are not there yet)."""
    to: Literal["jaxlm", "hf", "torchref"] = "jaxlm"
    """Format of DST: jaxlm (the others are not there yet)."""
    activation: Literal["gelu", "gelu_tanh"] | None = None
    """For nanogpt, whose checkpoints do not say it: gelu_tanh for models of early 2023 and from GPT-2's weights; None =
    gelu, nanoGPT's own."""
    tokenizer: Path | None = None
    """A tokenizer.json of Hugging Face or jaxlm, or "ids" for texts that are token ids separated by spaces. None = the
    tokenizer.json beside the model, else ids."""


def convert(arguments: list[str]) -> int:
    """Creates the run of `jaxlm convert --from FORMAT SRC DST` and prints what it holds."""
    options = parse_options(_ConvertOptions, arguments, "convert")
    if options.origin == "torchref" or options.origin == "jaxlm":
        raise UserError(f"--from {options.origin} is not there yet: use --from hf, nanogpt, meta or llama2c")
    if options.to != "jaxlm":
        raise UserError(f"--to {options.to} is not there yet: leave it out")
    if options.activation is not None and options.origin != "nanogpt":
        raise UserError(
            f"--activation {options.activation} is for nanogpt, and the config.json of {options.origin} says it: "
            "leave it out"
        )
    import jax

    from jaxlm.compilation_cache import kept_programs
    from jaxlm.run.import_weights import import_run

    with kept_programs():
        run = import_run(options.origin, options.source, options.out, options.tokenizer, options.activation)

    model, kind = run.config.model, run.tokenizer.to_dict()["type"]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(run.params))
    if options.json:
        summary = {"run": str(options.out), "from": options.origin, "parameters": parameters, "tokenizer": kind}
        stops = {"stop_tokens": run.config.sample.stop_tokens}
        print_json({**summary, "tokens": run.tokenizer.vocab_size, **stops, "model": to_dict(model)})
        return 0
    size = f"{model.num_layers} layers, width {model.embed_dim}, {model.num_heads} heads, context {model.max_seq_len}"
    text = "token ids separated by spaces" if kind == "ids" else f"{kind}, {run.tokenizer.vocab_size:,} tokens"
    rows = [["model", size], ["parameters", f"{parameters:,} of {model.param_dtype}"]]
    print_table(str(options.out), ["what", "value"], [*rows, ["rows", f"{model.vocab_size:,}"], ["text", text]])
    return 0
