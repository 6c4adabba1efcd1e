"""Attention: masks and windows, heads that share keys, scores, rotary positions."""

from jaxlm.model import transformer
from jaxlm.model.layer_stack import apply_layers
from jaxlm.ops import attention, blocked_attention, masks
from jaxlm.ops.attention_scores import dot_scores, multiplicative_scores
from jaxlm.ops.positions import apply_rope, rope_angles
from planted.bugs import GROUPED, ROPE, bug, edit

ATTENTION = "block_0/attention"

BUGS = [
    bug(
        "RoPE pairs of the other layout",
        "RoPE turns the pairs (2i, 2i + 1) of features where (i, i + H/2) are meant.",
        ATTENTION, "rope_layout = 'interleaved'!",
        edit(apply_rope, 'layout == "half"', 'layout != "half"'), head_dim=4, **ROPE,
    ),
    bug(
        "RoPE theta ten times too large",
        "The base of the frequencies of RoPE is ten times too large.",
        ATTENTION, "rope_theta!",
        edit(rope_angles, "rope_frequencies(width, theta, ", "rope_frequencies(width, 10 * theta, "), **ROPE,
    ),
    bug(
        "RoPE on the queries only",
        "RoPE turns the queries and leaves the keys as they are.",
        ATTENTION, "queries and keys",
        edit(transformer.Attention._project,
             "queries, keys = (apply_rope(a, angles, cfg.rope_layout, magnitude) for a in (queries, keys))",
             "queries = apply_rope(queries, angles, cfg.rope_layout, magnitude)"), **ROPE,
    ),
    bug(
        "window one key too wide",
        "A query sees one key more than its window.",
        ATTENTION, "window = (6,)!",
        edit(masks.attention_mask, "query - key < window", "query - key <= window"), window=5, **ROPE,
    ),
    bug(
        "window one key too narrow",
        "A query sees one key less than its window.",
        ATTENTION, "window = (4,)!",
        edit(masks.attention_mask, "query - key < window", "query - key < window - 1"), window=5, **ROPE,
    ),
    bug(
        "windows given to the layers in reverse",
        "The first layer has the window of the last one.",
        ATTENTION, "window",
        edit(apply_layers, "cfg, cfg.layer_settings, x", "cfg, cfg.layer_settings[::-1], x"), window=(5, None),
    ),
    bug(
        "mask that lets one future key through",
        "A query sees the key after its own.",
        ATTENTION, "future",
        edit(masks.attention_mask, "key <= query", "key <= query + 1"),
    ),
    bug(
        "mask that hides the query's own key",
        "A query does not see its own key.",
        ATTENTION, "future",
        edit(masks.attention_mask, "key <= query", "key < query"),
    ),
    bug(
        "mask after the softmax, not renormalised",
        "Hidden keys take part in the softmax; their weights are zeroed only after it.",
        ATTENTION, "after the softmax",
        edit(attention.masked_softmax, "jnp.where(mask, scores, jnp.finfo(scores.dtype).min)", "scores"),
    ),
    bug(
        "key/value heads tiled, not grouped",
        "Query head n reads key/value head n mod K, not n // G.",
        ATTENTION, "tiled instead of grouped!",
        edit(attention._grouped, "b t (kv group) width ->", "b t (group kv) width ->"),
        edit(attention.attend, "-> b t (kv maps) width", "-> b t (maps kv) width"), **GROUPED,
    ),
    bug(
        "block of queries that does not read its last key",
        "A block of queries reads all keys but the last of its own.",
        ATTENTION, "",
        edit(blocked_attention._causal, "slice(first, seen - length + stop)", "slice(first, seen - length + stop - 1)"),
    ),
    bug(
        "mean pooling over tiled groups",
        "Pooled keys are means of every K-th head, not of neighbours.",
        ATTENTION, "tiled instead of grouped",
        edit(transformer.Attention._project, "b t (kv group) width", "b t (group kv) width"),
        kv_sharing="mean_pooled", **GROUPED,
    ),
    bug(
        "scores not divided by sqrt H",
        "Attention scores are not divided by the root of the head width.",
        ATTENTION, "attention_scale = 1.0!",
        edit(dot_scores, "scores * _scale_of(queries, scale)", "scores"),
    ),
    bug(
        "weight of multiplicative scores transposed",
        "The weight between query and key is applied transposed.",
        ATTENTION, "score_weight transposed!",
        edit(multiplicative_scores, "bkgth,kgjh->bkgtj", "bkgth,kghj->bkgtj"),
        attention_score="multiplicative",
    ),
    bug(
        "soft cap of the scores forgotten",
        "Attention scores are not capped.",
        ATTENTION, "attention_softcap = None!",
        edit(attention.attend, "axis=-1), cap)", "axis=-1), None)"), attention_softcap=1.0,
    ),
    bug(
        "queries and keys normalised after RoPE",
        "Queries and keys are rotated first and normalised afterwards.",
        ATTENTION, "after their norms",
        edit(transformer.Attention._project, "if cfg.qk_norm:", "def normalised():",
             "queries, keys = self._normalised(", "return self._normalised(",
             "for a in (queries, keys))", "for a in (queries, keys))\n        queries, keys = normalised()"),
        qk_norm=True, **ROPE,
    ),
]  # fmt: skip
