"""A hash of what a short training and two samples compute: equal hashes, equal numbers to the last bit."""

import dataclasses
import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config.presets import preset
from jaxlm.data.batches import TokenStream
from jaxlm.decode.generate import generate
from jaxlm.model.build import build_model, init_params
from jaxlm.ops.matmul import matmul_precision
from jaxlm.optim import build_optimizer
from jaxlm.run.folder import provenance
from jaxlm.run.init_from import params_sha256
from jaxlm.training.loop import make_chunk
from jaxlm.training.step import TrainState, init_state

STEPS, WARMUP = 40, 4
"""Steps of training, and of its warm-up: enough to learn something."""
NEW_TOKENS = 24
"""Tokens of each sample: with the prompt they fill most of the context."""
PROMPT = 8
"""Tokens of the prompt."""


def fingerprint() -> dict[str, Any]:
    """Trains the preset `tiny` for STEPS steps on a text that a formula writes, and samples from what it has learned.

    Nothing is read from the disk or the network. The programs are those of `jaxlm.train` and `jaxlm.generate`.

    Returns:
      fingerprint: sha256 (hex) of the lines "name value" of `parts`, in their order.
      parts: sha256 of: text, the tokens trained on; first_parameters; losses, in float32, of the STEPS steps;
        parameters and optimizer_state after them; greedy and sample, the tokens of NEW_TOKENS steps with their
        log-probabilities. The text decides what is trained on, the others depend on all before them.
      values: the first and the last loss, and the tokens.
      settings: what the numbers may depend on besides: `provenance`, the processor, XLA_FLAGS, the precision of JAX's
        products and whether it has 64 bits.

    Raises:
      UserError: JAX finds no devices.
    """
    where = provenance()
    config = preset("tiny")
    optim = dataclasses.replace(config.optim, warmup_steps=WARMUP)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=STEPS), optim=optim)
    cfg = config.model
    tokens = synthetic_tokens(cfg.vocab_size)
    model = build_model(cfg)
    params = init_params(model, jax.random.key(config.train.seed))
    parts = {"text": _sha256(tokens), "first_parameters": params_sha256(params)}
    with matmul_precision(config.train.matmul_precision):
        losses, state = _trained(model, config, params, tokens)
        parts |= {"losses": _sha256(losses), "parameters": params_sha256(state.params)}
        parts["optimizer_state"] = _sha256(*jax.tree.leaves(state.opt_state))
        prompt, values = tokens[None, :PROMPT].astype(np.int32), {}
        for name, temperature in (("greedy", 0.0), ("sample", 1.0)):
            out = generate(
                model,
                state.params,
                prompt,
                max_new_tokens=NEW_TOKENS,
                key=jax.random.key(config.sample.seed),
                temperature=temperature,
            )
            parts[name] = _sha256(out.tokens, out.log_probs)
            values[name] = out.tokens[0].tolist()
    whole = "".join(f"{name} {value}\n" for name, value in parts.items())
    settings = {
        "processor": _processor(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "matmul_precision": jax.config.values["jax_default_matmul_precision"] or config.train.matmul_precision,
        "x64": bool(jax.config.values["jax_enable_x64"]),
    }
    return {
        "fingerprint": hashlib.sha256(whole.encode()).hexdigest(),
        "parts": parts,
        "values": {"first_loss": float(losses[0]), "last_loss": float(losses[-1]), **values},
        "settings": {**where, **settings},
    }


def synthetic_tokens(vocab_size: int, length: int = 4096) -> np.ndarray:
    """Tokens with something to learn, by integer arithmetic that is the same everywhere: [length] uint16.

    Each is what a linear congruential generator with the modulus 2^16 says of every third place, else the sum of the
    two before it.
    """
    state, tokens = 1, [1, 2]
    while len(tokens) < length:
        state = (25173 * state + 13849) % 65536
        tokens.append((state >> 8 if len(tokens) % 3 == 0 else tokens[-1] + tokens[-2]) % vocab_size)
    return np.array(tokens, np.uint16)


def _trained(model: Any, config: Any, params: Any, tokens: np.ndarray) -> tuple[np.ndarray, TrainState]:
    """The loss of each step, and the state after the last."""
    tx = build_optimizer(config.optim, STEPS, params)
    state, stream = init_state(params, tx), TokenStream(tokens, config.model.max_seq_len)
    source = stream.feed(config.train.seed, config.train.batch_size, STEPS)
    chunk, losses = make_chunk(model, tx, config.train, state), []
    for step in range(STEPS):
        state, metrics = chunk(state, source(step), jnp.int32(step + 1))
        losses.append(np.asarray(metrics.loss))
    return np.stack(losses), state


def _processor() -> str:
    """The name of the processor, whose vector width decides in which order XLA adds; "" where it is not known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _sha256(*arrays: Any) -> str:
    """sha256 of arrays: of each the line "dtype shape", then its numbers in C order, the low byte first."""
    digest = hashlib.sha256()
    for array in map(np.asarray, arrays):
        digest.update(f"{array.dtype} {list(array.shape)}\n".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()
