"""The whole model written out in NumPy, one sequence and one head at a time: what the tests hold jaxlm against."""

import math

import numpy as np

ERF = np.vectorize(math.erf)
ACTIVATIONS = {
    "gelu": lambda x: x * (1 + ERF(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}
CELL_ACTIVATIONS = {"tanh": np.tanh, "relu": ACTIVATIONS["relu"], "slide": lambda x: np.minimum(1, np.maximum(0, x))}


def logits(cfg, params, tokens):
    """[T, V] float64 of one sequence [T]; `params` unstacked."""
    if cfg.family == "bigram":
        return capped(params["table"][tokens], cfg.final_softcap)
    x = params["embedding"][tokens]
    if cfg.family == "recurrent":
        for i in range(cfg.num_layers):
            x = recurrent_layer(cfg, params[f"block_{i}"]["cell"], x)
    if cfg.family == "transformer":
        x = transformer(cfg, params, x)
    head = params.get("head", {})
    out = x @ (params["embedding"].T if cfg.tie_embeddings else head["kernel"])
    return capped(out + head.get("bias", 0), cfg.final_softcap)


def capped(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)


def linear(p, x):
    return x @ p["kernel"] + p.get("bias", 0)


def norm(cfg, kind, p, x):
    if kind == "none":
        return x
    centred = x - x.mean(-1, keepdims=True) if kind == "layernorm" else x
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + cfg.norm_eps) * p["scale"] + p.get("bias", 0)


def transformer(cfg, params, x):
    for t in range(len(x)):
        if cfg.position == "learned":
            x[t] = x[t] + params["position_embedding"][t]
        for i in range(cfg.embed_dim // 2 if cfg.position == "sinusoidal" else 0):
            angle = t / 10000 ** (2 * i / cfg.embed_dim)
            x[t, 2 * i : 2 * i + 2] += [math.sin(angle), math.cos(angle)]
    for i in range(cfg.num_layers):
        block = params[f"block_{i}"]
        window = cfg.window[i % len(cfg.window)] if isinstance(cfg.window, tuple) else cfg.window
        x = sublayer(cfg, block.get("attention_norm"), x, lambda y: attention(cfg, block["attention"], y, window))  # noqa: B023
        if cfg.mlp_dim != 0:
            x = sublayer(cfg, block.get("mlp_norm"), x, lambda y: mlp(cfg, block["mlp"], y))  # noqa: B023
    return norm(cfg, cfg.norm, params.get("final_norm"), x) if cfg.norm_order == "pre" else x


def sublayer(cfg, p, x, function):
    out = function(norm(cfg, cfg.norm, p, x)) if cfg.norm_order == "pre" else function(x)
    out = x + out if cfg.residual else out
    return norm(cfg, cfg.norm, p, out) if cfg.norm_order == "post" else out


def mlp(cfg, p, x):
    if cfg.activation in ("swiglu", "geglu"):
        gate = ACTIVATIONS["silu" if cfg.activation == "swiglu" else "gelu"](linear(p["gate"], x))
        return linear(p["down"], gate * linear(p["up"], x))
    return linear(p["down"], ACTIVATIONS[cfg.activation](linear(p["up"], x)))


def attention(cfg, p, x, window):
    heads, kv_heads = cfg.num_heads, cfg.num_kv_heads or cfg.num_heads
    group, pooled = heads // kv_heads, cfg.kv_sharing == "mean_pooled"
    queries = np.split(linear(p["query"], x), heads, axis=1)
    keys, values = (np.split(linear(p[name], x), heads if pooled else kv_heads, axis=1) for name in ("key", "value"))
    if pooled:
        keys, values = ([sum(a[k * group : (k + 1) * group]) / group for k in range(kv_heads)] for a in (keys, values))
    if cfg.qk_norm:
        queries = [norm(cfg, "rmsnorm", p["query_norm"], q) for q in queries]
        keys = [norm(cfg, "rmsnorm", p["key_norm"], k) for k in keys]
    if cfg.position == "rope":
        queries, keys = ([rotated(cfg, a) for a in side] for side in (queries, keys))
    out = []
    for k in range(kv_heads):
        maps = [
            np.array([[score(cfg, p, n, q, key) for key in keys[k]] for q in queries[n]])
            for n in range(k * group, (k + 1) * group)
        ]
        if cfg.kv_sharing == "summed_scores":
            maps = [sum(maps)]
        for scores in maps:
            rows = []
            for t, row in enumerate(capped(scores, cfg.attention_softcap)):
                first = 0 if window is None else max(0, t - window + 1)
                weights = np.exp(row[first : t + 1] - row[first : t + 1].max())
                rows.append(weights / weights.sum() @ values[k][first : t + 1])
            out.append(np.array(rows))
    joined = np.concatenate(out, axis=1)
    return linear(p["out"], joined) if cfg.attention_out_proj else joined


def rotated(cfg, x):
    """Each pair of features turned by position * theta^(-2i/H), as a complex product."""
    half = x.shape[1] // 2
    first, second = (
        (slice(half), slice(half, None)) if cfg.rope_layout == "half" else (slice(0, None, 2), slice(1, None, 2))
    )
    angles = np.arange(len(x))[:, None] * cfg.rope_theta ** (-2 * np.arange(half) / x.shape[1])
    turned = (x[:, first] + 1j * x[:, second]) * np.exp(1j * angles)
    out = np.empty_like(x)
    out[:, first], out[:, second] = turned.real, turned.imag
    return out


def score(cfg, p, n, query, key):
    """The score of head n."""
    both, root = np.concatenate([key, query]), math.sqrt(len(query))
    match cfg.attention_score:
        case "dot":
            return key @ query / root
        case "multiplicative":
            return key @ p["score_weight"][n] @ query / root
        case "concat":
            return np.concatenate([p["score_key"][n], p["score_query"][n]]) @ both
        case "additive":
            weight = np.concatenate([p["score_key"][n], p["score_query"][n]])
            return p["score_out"][n] @ np.tanh(weight.T @ both)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def recurrent_layer(cfg, p, x):
    hidden, cell, out = np.zeros(cfg.embed_dim), np.zeros(cfg.embed_dim), []
    for token in x:
        both = {name[1:]: linear(p[f"i{name[1:]}"], token) + linear(p[name], hidden) for name in p if name[0] == "h"}
        if cfg.cell == "elman":
            hidden = CELL_ACTIVATIONS[cfg.cell_activation](both[""])
        elif cfg.cell == "lstm":
            cell = sigmoid(both["f"]) * cell + sigmoid(both["i"]) * np.tanh(both["g"])
            hidden = sigmoid(both["o"]) * np.tanh(cell)
        else:
            new = np.tanh(linear(p["in"], token) + sigmoid(both["r"]) * linear(p["hn"], hidden))
            hidden = (1 - sigmoid(both["z"])) * new + sigmoid(both["z"]) * hidden
        out.append(hidden)
    return np.array(out)
