"""Decoding through a cache: slots, positions, what a later token sees."""

from jaxlm.decode.prefill import start
from jaxlm.model import attention, cache, transformer
from planted.bugs import ROPE, edit, later

ATTENTION = "block_0/attention"

BUGS = [
    later(
        "decoding", "ring of slots one too short",
        "The ring of slots of a cache is one slot too short.",
        ATTENTION, "a slot of the ring",
        edit(cache.LayerCache.write, "positions % self.slots", "positions % (self.slots - 1)"), **ROPE,
    ),
    later(
        "decoding", "position not advanced by a step",
        "A decoding step of one token does not advance the position.",
        "embedding", "not advanced",
        edit(transformer.Transformer.__call__, "past + added", "past + jnp.where(added == 1, 0, added)"),
    ),
    later(
        "decoding", "a step that does not see its own key",
        "A decoding step reads the cache before its own key is written.",
        ATTENTION, "before it is written",
        edit(cache.LayerCache.extend, "(written.view(),), written", "(self.view(),), written"), **ROPE,
    ),
    later(
        "decoding", "a later chunk that forgets the old keys",
        "A chunk of tokens behind others sees only itself.",
        ATTENTION, "old keys",
        edit(attention.attend_seen, "[part.positions for part in seen]",
             "[jnp.full_like(part.positions, -1) for part in seen[:-1]] + [new.positions]"), **ROPE,
    ),
    later(
        "decoding", "a chunk that sees the keys it overwrites",
        "A chunk reads a window's slots after it has overwritten some that it needs.",
        ATTENTION, "old keys",
        edit(cache.LayerCache.extend, "self.in_order() if in_order else self.view()",
             "KeyValues(written.keys, written.values, self.positions)"), **ROPE,
    ),
    later(
        "decoding", "sampling that reads the last prompt token twice",
        "The last token of the prompt is cached and then fed again.",
        "model", "prompt",
        edit(start, "np.clip(fed - begin, 0, width)", "np.clip(fed + 1 - begin, 0, width)"), **ROPE,
    ),
]  # fmt: skip
