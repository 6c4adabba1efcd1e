"""Writes exports of llama2.c (https://github.com/karpathy/llama2.c, export.py), from arrays under Meta's names."""

import struct

import numpy as np

SIZES = {"dim": 6, "hidden_dim": 7, "n_layers": 2, "n_heads": 3, "n_kv_heads": 1, "vocab_size": 11, "max_seq_len": 5}
ATTENTION = [f"attention.{name}" for name in ("wq", "wk", "wv", "wo")]
MLP = [f"feed_forward.{name}" for name in ("w1", "w2", "w3")]


def shapes(sizes, tied):
    width, hidden, table = sizes["dim"], sizes["hidden_dim"], (sizes["vocab_size"], sizes["dim"])
    keys = width // sizes["n_heads"] * sizes["n_kv_heads"]
    layer = dict(zip(ATTENTION, [(width, width), (keys, width), (keys, width), (width, width)], strict=True))
    layer |= dict(zip(MLP, [(hidden, width), (width, hidden), (hidden, width)], strict=True))
    layer |= {"attention_norm": (width,), "ffn_norm": (width,)}
    found = {f"layers.{i}.{name}.weight": shape for i in range(sizes["n_layers"]) for name, shape in layer.items()}
    found |= {"tok_embeddings.weight": table, "norm.weight": (width,)}
    return found if tied else found | {"output.weight": table}


def weights(sizes=SIZES, tied=True):
    rng = np.random.default_rng(0)
    return {name: 0.3 * rng.standard_normal(shape, np.float32) for name, shape in shapes(sizes, tied).items()}


def write(path, sizes, state, version, tied):
    """The legacy format (0) or version 1; `sizes` may lie, `state` gives the tensors."""
    numbers = [sizes[name] for name in SIZES]
    if version == 0:
        numbers[5] *= 1 if tied else -1
        head = struct.pack("<7i", *numbers)
        order = ["tok_embeddings", "attention_norm", *ATTENTION, "ffn_norm", *MLP, "norm", "angles", "angles"]
    else:
        head = struct.pack("<Ii7iB", 0x616B3432, version, *numbers, tied).ljust(256, b"\0")
        order = ["attention_norm", "ffn_norm", "norm", "tok_embeddings", *ATTENTION, *MLP]
    angles = np.full(sizes["max_seq_len"] * (sizes["dim"] // sizes["n_heads"] // 2), 9, np.float32)
    with path.open("wb") as file:
        file.write(head)
        for name in order if tied else [*order, "output"]:
            every = [f"layers.{i}.{name}.weight" for i in range(sizes["n_layers"])]
            for one in every if every[0] in state else [f"{name}.weight"]:
                file.write(angles.tobytes() if name == "angles" else state[one].tobytes())
    return path
