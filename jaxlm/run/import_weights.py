"""Writes a model of another format as a run folder, which every command on runs can open."""

from pathlib import Path

import jax

from jaxlm.convert.export import check_new
from jaxlm.run import checkpoint
from jaxlm.run.folder import Run, load_run, new_folder
from jaxlm.run.foreign_model import Activation, Format, read_model
from jaxlm.run.session import fit_prompt
from jaxlm.training.step import TrainState

FORMATS: dict[Format, str] = {
    "hf": "Hugging Face",
    "nanogpt": "nanoGPT",
    "meta": "Meta",
    "llama2c": "llama2.c",
    "torchref": "torchref",
}


def import_run(
    kind: Format,
    source: Path,
    out: Path,
    tokenizer: Path | None = None,
    activation: Activation | None = None,
) -> Run:
    """Writes a model of another format as the run folder `out`: preset "imported", no data, a checkpoint at step 0.

    Args:
      source, tokenizer, activation: as `foreign_model.read_model` takes them.

    Raises:
      UserError: `out` is not an empty or new folder, the model cannot be converted, or the tokenizer does not fit.
    """
    check_new(out)
    read = read_model(kind, source, tokenizer, activation)
    config, origin = fit_prompt(read.config, read.tokenizer), {"format": FORMATS[kind], "name": source.resolve().name}
    with new_folder(out, config, read.tokenizer, None, source=origin) as aside:
        state = TrainState(read.params, (), jax.numpy.int32(0))
        checkpoint.save(aside / "checkpoints", state, None, keep=1)
    return load_run(out)
