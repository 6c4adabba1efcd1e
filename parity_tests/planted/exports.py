"""Writing models for transformers: weights joined or named wrongly.

A wrong entry of config.json cannot go out: `to_hf` reads its own back and refuses one that is another model.
"""

from jaxlm.convert.export import TorchTensors
from jaxlm.convert.families.family import Family
from jaxlm.convert.layouts import Layout
from planted.bugs import Bug, Edit, edit

ATTENTION = "block_0/attention"


def exported(case: str, name: str, what: str, layer: str, cause: str, *edits: Edit) -> Bug:
    """A bug that shows when a model of `family_models.CASES` goes out again."""
    return Bug(name, what, layer, cause, edits, {"case": case}, check="exports", make=lambda case: case)


BUGS = [
    exported(
        "llama biases", "square weights written transposed",
        "Square kernels are written as they are, not transposed.",
        "block_0/attention/query", "transposed!",
        edit(Layout.join, "joined.T if self.transposed",
             "joined.T if self.transposed and joined.shape != joined.shape[::-1]"),
    ),
    exported(
        "gpt_neox", "heads written as whole projections",
        "All queries are written before all keys and values, where GPT-NeoX keeps each head together.",
        ATTENTION, "joined in another order!",
        edit(Layout.join, "if self.heads is not None", "if False"),
    ),
    exported(
        "gpt2", "fused projections written in another order",
        "The fused tensor of GPT-2 gets the keys first, then the queries.",
        ATTENTION, "joined in another order!",
        edit(Layout.join, "np.concatenate(leaves, axis=-1)",
             "np.concatenate([leaves[i] for i in (1, 0, 2)] if len(leaves) == 3 else leaves, axis=-1)"),
    ),
    exported(
        "llama", "layers written from the last",
        "The last layer is written as the first one.",
        "block_0/attention_norm", "is the source's model.layers.2.input_layernorm.weight!",
        edit(Family._modules, "{self.layer.format(i)}.{name}", "{self.layer.format(cfg.num_layers - 1 - i)}.{name}"),
    ),
    exported(
        "llama", "weights rounded on the way out",
        "Weights are written with the digits of bfloat16, though their type is wide.",
        "embedding", "rounded to bfloat16!",
        edit(TorchTensors.arrays, "entry.layout.join([self._leaf(path) for path in entry.paths])",
             "entry.layout.join([self._leaf(p) for p in entry.paths]).astype(jax.numpy.bfloat16).astype(self._dtype)"),
    ),
]  # fmt: skip
