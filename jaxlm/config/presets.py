"""Named configurations. Each is an ExperimentConfig; the command overrides its fields."""

import dataclasses
from typing import Any

from jaxlm.config import DataConfig, ExperimentConfig, ModelConfig, OptimConfig, SampleConfig, TrainConfig
from jaxlm.errors import UserError


def _nanogpt_cpu() -> ExperimentConfig:
    """nanoGPT's CPU configuration: 0.8 M parameters, two minutes on two cores; rate, warm-up and decay measured."""
    return ExperimentConfig(
        preset="nanogpt-cpu",
        model=ModelConfig(vocab_size=65, max_seq_len=64, num_layers=4, embed_dim=128, num_heads=4, use_bias=False),
        optim=OptimConfig(learning_rate=5e-3, warmup_steps=200, weight_decay=0.2),
    )


def _shakespeare_char() -> ExperimentConfig:
    """nanoGPT's GPU configuration: 10.7 M parameters, dropout 0.2; for an accelerator."""
    return ExperimentConfig(
        preset="shakespeare-char",
        model=ModelConfig(
            vocab_size=65,
            max_seq_len=256,
            num_layers=6,
            embed_dim=384,
            num_heads=6,
            use_bias=False,
            dropout=0.2,
            attention_dropout=0.2,
        ),
        train=TrainConfig(steps=5000, batch_size=64, eval_every=250, checkpoint_every=250),
    )


def _chargpt() -> ExperimentConfig:
    """CMU 10-423's chargpt, a minGPT: 6 layers, width 192, context 128, learned positions, dropout 0.1."""
    return ExperimentConfig(
        preset="chargpt",
        model=ModelConfig(
            vocab_size=65,
            max_seq_len=128,
            num_layers=6,
            embed_dim=192,
            num_heads=6,
            activation="gelu_tanh",
            tie_embeddings=False,
            dropout=0.1,
            attention_dropout=0.1,
        ),
        optim=OptimConfig(learning_rate=5e-4, schedule="constant", warmup_steps=0, b2=0.95),
        train=TrainConfig(steps=600, batch_size=64, eval_every=100, checkpoint_every=100),
    )


def _llama_char() -> ExperimentConfig:
    """A Llama-style block on characters: RoPE, grouped queries, RMS norm, SwiGLU, alternating windows."""
    return ExperimentConfig(
        preset="llama-char",
        model=ModelConfig(
            vocab_size=65,
            max_seq_len=128,
            num_layers=4,
            embed_dim=128,
            num_heads=4,
            num_kv_heads=2,
            mlp_dim=344,
            activation="swiglu",
            norm="rmsnorm",
            use_bias=False,
            position="rope",
            window=(32, None),
        ),
        optim=OptimConfig(learning_rate=5e-3),
        train=TrainConfig(steps=2000, batch_size=12),
    )


def _librispeech_char() -> ExperimentConfig:
    """CMU 11-785's task: characters of LibriSpeech transcripts, embedding dropout, tied head; 1.8 M parameters."""
    return ExperimentConfig(
        preset="librispeech-char",
        model=ModelConfig(
            vocab_size=30,
            max_seq_len=256,
            num_layers=4,
            embed_dim=192,
            num_heads=6,
            use_bias=False,
            position="rope",
            embedding_dropout=0.05,
        ),
        data=DataConfig(dataset="librispeech", tokenizer="transcript"),
        optim=OptimConfig(learning_rate=3e-3),
        train=TrainConfig(steps=1000, batch_size=16, eval_every=500, checkpoint_every=250),
        sample=SampleConfig(max_new_tokens=255, num_samples=3),
    )


def _gpt2_124m() -> ExperimentConfig:
    """GPT-2 small: 124 M parameters, 1024 tokens of context, byte-level BPE; for an accelerator."""
    return ExperimentConfig(
        preset="gpt2-124m",
        model=ModelConfig(
            vocab_size=50257, max_seq_len=1024, num_layers=12, embed_dim=768, num_heads=12, activation="gelu_tanh"
        ),
        data=DataConfig(tokenizer="bpe", bpe_vocab_size=50257),
        optim=OptimConfig(learning_rate=6e-4, warmup_steps=2000, b2=0.95),
        train=TrainConfig(steps=600_000, batch_size=480, grad_accum=40, eval_every=1000, checkpoint_every=1000),
    )


def _gpt3_xl() -> ExperimentConfig:
    """GPT-3 XL's shape: 1.3 B parameters, 2048 tokens of context, 1 M tokens a step; for 8 accelerators and more."""
    return ExperimentConfig(
        preset="gpt3-xl",
        model=ModelConfig(
            vocab_size=50304,  # a multiple of 64, so that a mesh can split it
            max_seq_len=2048,
            num_layers=24,
            embed_dim=2048,
            num_heads=16,  # of 128; the 24 heads of 128 in the paper's table do not make 2048
            activation="gelu_tanh",
            dtype="bfloat16",
            scan_layers=True,
            remat=True,
        ),
        data=DataConfig(tokenizer="bpe", bpe_vocab_size=50304),
        optim=OptimConfig(learning_rate=2e-4, warmup_steps=375, b2=0.95),
        train=TrainConfig(steps=300_000, batch_size=512, grad_accum=8, eval_every=1000, checkpoint_every=1000),
    )


def _llama_7b() -> ExperimentConfig:
    """Llama's shape: 6.7 B parameters, RoPE, RMS norm, SwiGLU, 4 M tokens a step; for 8 accelerators and more."""
    return ExperimentConfig(
        preset="llama-7b",
        model=ModelConfig(
            vocab_size=32000,
            max_seq_len=2048,
            num_layers=32,
            embed_dim=4096,
            num_heads=32,
            mlp_dim=11008,
            activation="swiglu",
            norm="rmsnorm",
            use_bias=False,
            position="rope",
            tie_embeddings=False,
            dtype="bfloat16",
            scan_layers=True,
            remat=True,
        ),
        data=DataConfig(tokenizer="bpe", bpe_vocab_size=32000),
        optim=OptimConfig(learning_rate=3e-4, warmup_steps=2000, b2=0.95),
        train=TrainConfig(steps=250_000, batch_size=2048, grad_accum=32, eval_every=1000, checkpoint_every=1000),
    )


def _tiny() -> ExperimentConfig:
    """A few seconds on anything: to try the commands."""
    return ExperimentConfig(
        preset="tiny",
        model=ModelConfig(vocab_size=65, max_seq_len=32, num_layers=2, embed_dim=32, num_heads=2, use_bias=False),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=20),
        train=TrainConfig(steps=500, batch_size=8, eval_every=250, checkpoint_every=250),
        sample=SampleConfig(max_new_tokens=100),
    )


_STATS305: dict[str, Any] = {
    "vocab_size": 65,
    "max_seq_len": 256,
    "init": "torch",
    "tie_embeddings": False,
    "head_bias": True,
}
"""What the baselines of Stanford's STATS 305 share besides batch 32 and AdamW at a constant rate."""


def _stats305(name: str, model: ModelConfig, optim: OptimConfig, steps: int = 1000) -> ExperimentConfig:
    constant = dataclasses.replace(optim, schedule="constant", warmup_steps=0, b2=0.999, clip_norm=None)
    train = TrainConfig(steps=steps, batch_size=32, eval_every=500, checkpoint_every=500)
    return ExperimentConfig(preset=name, model=model, optim=constant, train=train)


def _bigram() -> ExperimentConfig:
    """STATS 305: a V x V table of logits."""
    model = ModelConfig(family="bigram", vocab_size=65, max_seq_len=256, init="torch")
    return _stats305("bigram", model, OptimConfig(learning_rate=1e-2, weight_decay=0.01))


def _embedding_bigram() -> ExperimentConfig:
    """STATS 305: a bigram through 32 features."""
    model = ModelConfig(family="embedding_bigram", embed_dim=32, **_STATS305)
    return _stats305("embedding-bigram", model, OptimConfig(learning_rate=1e-2, weight_decay=0.01))


def _attention_only(num_heads: int, **fields: Any) -> ModelConfig:
    """One attention layer with values of width D per head; no MLP, norm or residual."""
    return ModelConfig(
        num_layers=1,
        embed_dim=384,
        num_heads=num_heads,
        value_head_dim=384,
        mlp_dim=0,
        norm="none",
        residual=False,
        qkv_bias=False,
        **_STATS305,
        **fields,
    )


def _single_head() -> ExperimentConfig:
    """STATS 305: one attention head of width 384 and nothing else; no output projection."""
    model = _attention_only(1, attention_out_proj=False)
    return _stats305("single-head", model, OptimConfig(learning_rate=6e-4, weight_decay=0.01))


def _multi_head() -> ExperimentConfig:
    """STATS 305: one attention layer of 6 heads, values of width 384 per head."""
    return _stats305("multi-head", _attention_only(6), OptimConfig(learning_rate=6e-4, weight_decay=0.01))


def _relu_transformer() -> ExperimentConfig:
    """STATS 305: 6 blocks of width 384 with ReLU and values of width 384 per head; hours on a CPU."""
    model = ModelConfig(
        num_layers=6,
        embed_dim=384,
        num_heads=6,
        value_head_dim=384,
        activation="relu",
        qkv_bias=False,
        **{**_STATS305, "init": "normal"},
    )
    return _stats305("relu-transformer", model, OptimConfig(learning_rate=1e-4, weight_decay=0.0), steps=2000)


PRESETS = {
    "nanogpt-cpu": _nanogpt_cpu,
    "shakespeare-char": _shakespeare_char,
    "chargpt": _chargpt,
    "llama-char": _llama_char,
    "librispeech-char": _librispeech_char,
    "gpt2-124m": _gpt2_124m,
    "gpt3-xl": _gpt3_xl,
    "llama-7b": _llama_7b,
    "tiny": _tiny,
    "bigram": _bigram,
    "embedding-bigram": _embedding_bigram,
    "single-head": _single_head,
    "multi-head": _multi_head,
    "relu-transformer": _relu_transformer,
}


def preset(name: str) -> ExperimentConfig:
    """The configuration called `name`.

    Raises:
      UserError: no preset has that name; the message lists those there are.
    """
    if name not in PRESETS:
        raise UserError(f"preset {name!r} is unknown: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]()


def describe(name: str) -> str:
    """The line that says what a preset is for."""
    return PRESETS[name].__doc__ or ""
