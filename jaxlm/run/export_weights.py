"""Writes the model of a run in another format."""

import json
import math
from pathlib import Path
from typing import Any, Literal

import jax

from jaxlm import convert
from jaxlm.config import ModelConfig
from jaxlm.config.base import difference
from jaxlm.convert.shards import SHARD_SIZE
from jaxlm.data.tokenizer import CharTokenizer, TranscriptTokenizer
from jaxlm.run.folder import Run, provenance
from jaxlm.run.metrics import read_rows

Target = Literal["hf", "nanogpt", "torchref"]


def export_run(run: Run, target: Target, out: Path, shard_size: str = SHARD_SIZE) -> str:
    """Writes the model of a run as a new folder.

    Args:
      target: hf: a folder for transformers, with the tokenizer and a model card; nanogpt: ckpt.pt; torchref:
        config.json with the ModelConfig and model.safetensors with the names of torchref's state dict.
      shard_size: of hf; see `convert.to_hf`.

    Returns: what the model went out as, in words.

    Raises:
      UserError: the format cannot hold the model, or the folder cannot be written or is not new.
    """
    cfg = run.config.model
    if target == "nanogpt":
        convert.to_nanogpt(cfg, run.params, out, step=run.step)
        return "nanoGPT checkpoint, ckpt.pt"
    if target == "torchref":
        convert.save_torchref(cfg, run.params, out)
        return "config.json and model.safetensors of torchref"
    own = run.tokenizer.eos_token
    stops = run.config.sample.stop_tokens or (() if own is None else (own,))
    kind = convert.to_hf(
        cfg, run.params, out, run.tokenizer, stop_tokens=stops, shard_size=shard_size, card=model_card(run, out.name)
    )
    return f"transformers' {kind}"


def model_card(run: Run, name: str) -> str:
    """The README.md beside exported weights: what the model is, what it was trained on, and its numbers."""
    cfg, parameters = run.config.model, sum(leaf.size for leaf in jax.tree.leaves(run.params))
    rows = [
        ("parameters", f"{parameters:,} of {cfg.param_dtype}"),
        ("layers, width, heads", f"{cfg.num_layers}, {cfg.embed_dim}, {cfg.num_heads}"),
        ("context", f"{cfg.max_seq_len:,} tokens"),
        ("vocabulary", f"{run.tokenizer.vocab_size:,} tokens"),
        ("preset", run.config.preset),
    ]
    if run.corpus_sha256 is not None:
        rows += [("corpus, sha256", f"`{run.corpus_sha256}`"), ("trained for", f"{run.step:,} steps")]
    evaluated = [row for row in read_rows(run.path / "metrics.jsonl") if row["step"] == run.step and "val_loss" in row]
    if evaluated:
        loss, of_bytes = evaluated[-1]["val_loss"], evaluated[-1].get("bits_per_byte")
        rows += [("validation loss", f"{loss:.4f} nats per token"), ("perplexity", f"{math.exp(loss):.4f}")]
        rows += [] if of_bytes is None else [("bits per byte", f"{of_bytes:.4f}")]
    rows += [("written by", f"jaxlm {provenance()['versions']['jaxlm']}")]
    changed = [f"`{field} = {json.dumps(ours)}`" for field, ours, _ in difference(cfg, type(cfg)(**_sizes(cfg)))]
    table = "\n".join(["| | |", "| --- | --- |", *(f"| {what} | {value} |" for what, value in rows)])
    origin = "trained" if run.corpus_sha256 is not None else "converted"
    text = f"It was {origin} with jaxlm and loads with `transformers.AutoModelForCausalLM.from_pretrained`. "
    if isinstance(run.tokenizer, CharTokenizer | TranscriptTokenizer):
        text += "Its tokenizer reads one character a token. "
    proof = "If there is a folder `parity`, its page compares the model with jaxlm's, layer by layer."
    settings = f"Settings that differ from jaxlm's defaults: {', '.join(changed) or 'none'}."
    head = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [jaxlm]\n---\n"
    return f"{head}\n# {name}\n\n{text}{proof}\n\n{table}\n\n{settings}\n"


def _sizes(cfg: ModelConfig) -> dict[str, Any]:
    return {"vocab_size": cfg.vocab_size, "max_seq_len": cfg.max_seq_len, "family": cfg.family}
