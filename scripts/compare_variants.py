"""Every family and variant, one table: parameters, cache bytes a token, step time, val loss after equal training.

    python scripts/compare_variants.py [--steps 300] [--only gru concat]

All share 4 layers of width 128, context 64, batch 12, AdamW 3e-3 with warm-up 50 on tinyshakespeare, seed 0. The first
row, dot scores with grouped keys and values (4 query heads on 2), is what step times are compared with: each variant is
timed in turn with it, after its training, as the median of 5 rounds of 10 steps.
"""

import argparse
import dataclasses
import platform
import statistics
import time
from typing import Any

import jax

from jaxlm.analysis.costs import cache_bytes_per_token, parameter_table
from jaxlm.config import DataConfig, ExperimentConfig, ModelConfig, OptimConfig, TrainConfig
from jaxlm.data.corpus import Corpus, load_corpus
from jaxlm.model.build import build_model, init_params
from jaxlm.optim import build_optimizer
from jaxlm.training.evaluate import Evaluation
from jaxlm.training.loop import make_chunk
from jaxlm.training.step import init_state

SIZES: dict[str, Any] = {"vocab_size": 65, "max_seq_len": 64}
BASE = ModelConfig(**SIZES, num_layers=4, embed_dim=128, num_heads=4, num_kv_heads=2, use_bias=False, position="rope")
REFERENCE = "dot/grouped"


def changed(**fields: Any) -> ModelConfig:
    """The reference with other fields."""
    return dataclasses.replace(BASE, **fields)


def recurrent(**fields: Any) -> ModelConfig:
    """A recurrent network of the same depth and width, PyTorch's initialisation."""
    return ModelConfig(**SIZES, family="recurrent", num_layers=4, embed_dim=128, init="torch", **fields)


VARIANTS = {
    REFERENCE: BASE,
    "full multi-head": changed(num_kv_heads=4),
    "multi-query": changed(num_kv_heads=1),
    "mean_pooled": changed(kv_sharing="mean_pooled"),
    "summed_scores": changed(kv_sharing="summed_scores"),
    "multiplicative": changed(attention_score="multiplicative"),
    "concat": changed(attention_score="concat"),
    "additive": changed(attention_score="additive"),
    "additive, score_dim 8": changed(attention_score="additive", score_dim=8),
    "summed multiplicative": changed(kv_sharing="summed_scores", attention_score="multiplicative"),
    "qk_norm": changed(qk_norm=True),
    "attention_softcap 30": changed(attention_softcap=30.0),
    "final_softcap 30": changed(final_softcap=30.0),
    "window 16": changed(window=16),
    "window 16, local": changed(window=16, attention_impl="local"),
    "windows 16, 16, 16, None": changed(window=(16, 16, 16, None)),
    "value_head_dim 128": changed(value_head_dim=128),
    "learned positions": changed(position="learned"),
    "sinusoidal positions": changed(position="sinusoidal"),
    "sinusoidal positions, init torch": changed(position="sinusoidal", init="torch"),
    "no positions": changed(position="none"),
    "post-norm": changed(norm_order="post"),
    "rmsnorm, swiglu": changed(norm="rmsnorm", activation="swiglu", mlp_dim=344),
    "no MLP": changed(mlp_dim=0),
    "untied head": changed(tie_embeddings=False),
    "dropout 0.1, all three": changed(dropout=0.1, attention_dropout=0.1, embedding_dropout=0.1),
    "scan_layers": changed(scan_layers=True),
    "remat": changed(remat=True),
    "scan_layers, remat": changed(scan_layers=True, remat=True),
    "bigram": ModelConfig(**SIZES, family="bigram"),
    "embedding_bigram": ModelConfig(**SIZES, family="embedding_bigram", embed_dim=128),
    "elman, tanh": recurrent(),
    "elman, relu": recurrent(cell_activation="relu"),
    "elman, slide": recurrent(cell_activation="slide"),
    "lstm": recurrent(cell="lstm"),
    "gru": recurrent(cell="gru"),
}


class Trainer:
    """One variant's training, a call at a time."""

    def __init__(self, model_config: ModelConfig, corpus: Corpus, steps: int) -> None:
        train = TrainConfig(steps=steps, batch_size=12)
        optim = OptimConfig(learning_rate=3e-3, warmup_steps=min(50, steps - 1))
        self.config = ExperimentConfig(preset="comparison", model=model_config, optim=optim, train=train)
        self.model, self.corpus = build_model(model_config), corpus
        tx = build_optimizer(self.config.optim, steps)
        self.state = init_state(init_params(self.model, jax.random.key(0)), tx)
        self._chunk, self._source = (
            make_chunk(self.model, tx, train),
            corpus.train.feed(train.seed, train.batch_size, 1)(0),
        )

    def advance(self, steps: int) -> float:
        """Takes so many steps; seconds a step."""
        started = time.perf_counter()
        self.state, metrics = self._chunk(self.state, self._source, int(self.state.step) + steps)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - started) / steps

    def val_loss(self) -> float:
        """Exact, in nats a token."""
        return Evaluation(self.model, self.corpus, self.config)(self.state.params)["val_loss"]


def main() -> None:
    """Prints the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", nargs="*", metavar="VARIANT", choices=VARIANTS, help="rows besides the first")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error(f"--steps {arguments.steps} is too few: give at least 2")
    corpus = load_corpus(DataConfig(), SIZES["max_seq_len"])
    device = f"{jax.devices()[0].device_kind} ({platform.machine()})"
    print(f"{device}, jax {jax.__version__}, {arguments.steps} steps, float32")
    print("step time: after the training, in turn with the first row, ratio of the medians of 5 rounds of 10 steps")
    print("| variant | parameters | cache bytes a token | step time | val loss |\n| --- | ---: | ---: | ---: | ---: |")
    base = Trainer(BASE, corpus, arguments.steps)
    for name in dict.fromkeys([REFERENCE, *(arguments.only or VARIANTS)]):
        cfg = VARIANTS[name]
        trainer = base if name == REFERENCE else Trainer(cfg, corpus, arguments.steps)
        trainer.advance(arguments.steps)
        loss, ratio = trainer.val_loss(), 1.0
        if trainer is not base:
            rounds = [(trainer.advance(10), base.advance(10)) for _ in range(5)]
            ours, theirs = map(statistics.median, zip(*rounds, strict=True))
            ratio = ours / theirs
        parameters = sum(row[-1] for row in parameter_table(cfg))
        cache = cache_bytes_per_token(cfg)
        print(f"| {name} | {parameters:,} | {cache:,} | {ratio:.2f} | {loss:.3f} |", flush=True)


if __name__ == "__main__":
    main()
