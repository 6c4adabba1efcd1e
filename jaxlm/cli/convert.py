"""`jaxlm convert`: a model from elsewhere as a run."""

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
    """Make a run of a model from elsewhere: `jaxlm convert --from hf SRC DST`."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
    """hf: a folder that save_pretrained wrote; nanogpt: ckpt.pt or its folder."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """Run folder to make."""
    origin: Annotated[Literal["hf", "nanogpt", "torchref", "jaxlm"], tyro.conf.arg(name="from")]
    """Format of SRC; torchref and jaxlm are not there yet."""
    to: Literal["jaxlm", "hf", "torchref"] = "jaxlm"
    """Format of DST; others than jaxlm are not there yet."""
    tokenizer: Path | None = None
    """Hugging Face's or jaxlm's tokenizer.json, or "ids": text is token ids between spaces. None =
    tokenizer.json beside the model, else ids."""


def convert(arguments: list[str]) -> int:
    """`jaxlm convert --from FORMAT SRC DST`: makes the run and says what it holds."""
    options = parse_options(_ConvertOptions, arguments, "convert")
    if options.origin == "torchref" or options.origin == "jaxlm":
        raise UserError(f"--from {options.origin} is not there yet: use --from hf or --from nanogpt")
    if options.to != "jaxlm":
        raise UserError(f"--to {options.to} is not there yet: leave it out")
    from jaxlm.run.import_weights import import_run

    made = import_run(options.origin, options.source, options.out, options.tokenizer)
    import jax

    model, kind = made.config.model, made.tokenizer.to_dict()["type"]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(made.params))
    if options.json:
        found = {"run": str(options.out), "from": options.origin, "parameters": parameters, "tokenizer": kind}
        print_json({**found, "tokens": made.tokenizer.vocab_size, "model": to_dict(model)})
        return 0
    size = f"{model.num_layers} layers, width {model.embed_dim}, {model.num_heads} heads, context {model.max_seq_len}"
    text = "token ids between spaces" if kind == "ids" else f"{kind}, {made.tokenizer.vocab_size:,} tokens"
    rows = [["model", size], ["parameters", f"{parameters:,} of {model.param_dtype}"]]
    print_table(str(options.out), ["what", "value"], [*rows, ["rows", f"{model.vocab_size:,}"], ["text", text]])
    return 0
