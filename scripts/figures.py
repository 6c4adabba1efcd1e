"""Draws docs/masks.png: what a query sees in each layer, and what the model's output depends on, for some windows.

    python scripts/figures.py [--out docs/masks.png]

The dependence is measured: whether the gradient of each position's logits in each token's embedding is zero.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.model.build import build_model, init_params
from jaxlm.ops.masks import attention_mask
from jaxlm.run.plots import plot_masks

LENGTH = 16
PATTERNS = {"window=None": None, "window=1": 1, "window=4": 4, "window=(4, 2)": (4, 2), "window=(3, None)": (3, None)}


def receptive_field(cfg: ModelConfig) -> np.ndarray:
    """[T, T], whether the logits at t depend on the token at s; every token has an embedding of its own."""
    model, tokens = build_model(cfg), jnp.arange(LENGTH)[None]
    params = init_params(model, jax.random.key(0))

    def loudness(table: jax.Array, t: jax.Array) -> jax.Array:
        return jnp.abs(model.apply({"params": {**params, "embedding": table}}, tokens)[0][0, t]).sum()

    gradients = jax.jit(jax.vmap(jax.grad(loudness), (None, 0)))(params["embedding"], jnp.arange(LENGTH))
    return np.asarray(jnp.abs(gradients).max(axis=-1) > 0)


def main() -> None:
    """Writes the picture and prints, for each pattern, how many tokens back the last position sees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/masks.png"))
    out = parser.parse_args().out
    positions = jnp.arange(LENGTH)[None]
    rows: dict[str, list[tuple[str, np.ndarray]]] = {
        "seen in layer 0": [],
        "seen in layer 1": [],
        "output depends on": [],
    }
    for name, window in PATTERNS.items():
        sizes = {"vocab_size": LENGTH, "max_seq_len": LENGTH, "num_layers": 2, "embed_dim": 16, "num_heads": 2}
        cfg = ModelConfig(**sizes, window=window, tie_embeddings=False, init="torch")
        masks = [np.asarray(attention_mask(positions, positions, w)[0]) for w in cfg.layer_windows]
        field = receptive_field(cfg)
        for row, mask in zip(rows.values(), [*masks, field], strict=True):
            row.append((name, mask))
        print(f"{name}: the last of {LENGTH} positions depends on {int(field[-1].sum())} tokens")
    plot_masks(rows, out, f"Keys that a query sees in a model of 2 layers and {LENGTH} tokens (scripts/figures.py)")


if __name__ == "__main__":
    main()
