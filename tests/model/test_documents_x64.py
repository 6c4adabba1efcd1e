"""Attention inside a document: each document of a row is computed as if it stood alone."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradients import normal
from models import BASE
from support import built, random_tokens
from tolerances import FLOAT64, assert_close

from jaxlm.errors import UserError
from jaxlm.model.transformer import Transformer
from jaxlm.ops.attention import attend
from jaxlm.ops.blocked_attention import blocked_attend
from jaxlm.ops.loss import cross_entropy
from jaxlm.ops.masks import attention_mask, document_numbers, document_starts
from jaxlm.training.step import batch_loss

pytestmark = pytest.mark.x64

LENGTHS = [3, 1, 6, 4]
"""Of the documents of a row."""
END = 2
WIDE = dataclasses.replace(BASE, num_layers=1, embed_dim=16, dtype="float64", param_dtype="float64", max_seq_len=20)


def packed(cfg):
    """[3, 14] tokens whose documents end with END; the last row begins in the middle of one."""
    tokens = np.array(random_tokens(cfg, 3, sum(LENGTHS)))
    tokens[tokens == END] = 1
    tokens[:, np.cumsum(LENGTHS)[:-1] - 1] = END
    tokens[2] = np.roll(tokens[2], 2)
    return jnp.asarray(tokens)


def spans(tokens):
    """(row, start, stop) of each document."""
    for row, own in enumerate(np.asarray(tokens)):
        starts = [0, *(np.flatnonzero(own == END) + 1).tolist(), len(own)]
        yield from ((row, start, stop) for start, stop in itertools.pairwise(starts) if start < stop)


def logits_of(cfg, tokens, **more):
    model, params = built(cfg)
    return jax.jit(model.apply)({"params": params}, tokens, **more)[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"attention_impl": "local"},
        {"attention_impl": "local", "window": (4, None), "num_layers": 4, "scan_layers": True, "remat": True},
        {"attention_impl": "reference", "window": 2, "position": "none"},
    ],
)
def test_each_document_has_the_logits_that_it_has_alone(fields):
    cfg = dataclasses.replace(WIDE, **fields)
    tokens = packed(cfg)
    logits = logits_of(cfg, tokens, documents=document_numbers(tokens, END))
    # Alone means at the beginning of a row: what stands behind a token does not reach it.
    alone = logits_of(cfg, jnp.stack([jnp.roll(tokens[row], -start) for row, start, _ in spans(tokens)]))
    for of_document, (row, start, stop) in zip(alone, spans(tokens), strict=True):
        assert_close(logits[row, start:stop], of_document[: stop - start], FLOAT64)
    assert len(alone) == 12
    assert abs(logits_of(cfg, tokens) - logits).max() > 1e-3


def test_learned_positions_stay_those_of_the_row_and_what_does_not_go_together_is_refused():
    cfg = dataclasses.replace(WIDE, position="learned")
    model, params = built(cfg)
    tokens = packed(cfg)[:1]
    documents = document_numbers(tokens, END)
    logits = logits_of(cfg, tokens, documents=documents)
    # The third document begins at place 4 of the row.
    moved = {**params, "position_embedding": jnp.roll(params["position_embedding"], -4, axis=0)}
    alone = jax.jit(model.apply)({"params": moved}, jnp.roll(tokens, -4, axis=1))[0]
    assert_close(logits[0, 4:10], alone[0, :6], FLOAT64)
    with pytest.raises(UserError, match="documents do not go together with a cache: leave one out"):
        model.apply({"params": params}, tokens, cache=20, documents=documents)
    fused = dataclasses.replace(cfg, attention_impl="cudnn", dtype="bfloat16", head_dim=8)
    with pytest.raises(UserError, match="documents do not go together with attention_impl = 'cudnn'"):
        Transformer(fused).apply({"params": params}, tokens, documents=documents)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("batched", "block", "tile"), [(False, 4, 200), (True, 4, 200), (False, None, None)])
def test_blocks_mask_documents_as_the_whole_mask_does_and_never_read_another_one(window, batched, block, tile):
    """A huge key and value of another document changes nothing, to the bit, and has no gradient."""
    queries, keys, values = normal(0, 3, 14, 4, 3), normal(1, 3, 14, 2, 3), normal(2, 3, 14, 2, 5)
    positions, first = jnp.arange(14)[None], document_starts(document_numbers(packed(WIDE), END))
    weight = normal(99, 3, 14, 4, 5)
    of_last = weight.at[:, :10].set(0)

    def blocked(queries, keys, values):
        at = positions, positions, window
        return blocked_attend(queries, keys, values, *at, first=first, batched=batched, block=block, tile=tile)

    def masked(queries, keys, values):
        return attend(queries, keys, values, attention_mask(positions, positions, window, first))

    def results(function):
        @jax.jit
        def both(*inputs):
            value, pull = jax.vjp(function, *inputs)
            return value, pull(weight), pull(of_last)

        return both

    ours, theirs = results(blocked), results(masked)
    found, reference = ours(queries, keys, values), theirs(queries, keys, values)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-12), found, reference)
    for of_array in found[2][1:]:  # keys and values, under the last document of rows 0 and 1 alone
        assert abs(of_array[:2, :10]).max() == 0
        assert abs(of_array[:2, 10:]).max() > 0
    planted = queries, keys.at[:2, 4:10].set(1e30), values.at[:2, 4:10].set(1e30)  # the third document
    for function, usual in ((ours, found), (theirs, reference)):
        value = function(*planted)[0]
        np.testing.assert_array_equal(value[:2, np.r_[0:4, 10:14]], usual[0][:2, np.r_[0:4, 10:14]])
        assert abs(value[:2, 4:10] - usual[0][:2, 4:10]).max() > 1


def test_the_loss_of_a_packed_batch_is_that_of_logits_with_documents():
    model, params = built(WIDE)
    windows = packed(WIDE)
    losses = [
        jax.jit(batch_loss, static_argnums=1, static_argnames="document_end")(params, model, windows, document_end=end)
        for end in (END, None)
    ]
    inputs = windows[:, :-1]
    expected = cross_entropy(logits_of(WIDE, inputs, documents=document_numbers(inputs, END)), windows[:, 1:])
    assert float(losses[0]) == pytest.approx(float(expected), rel=1e-12)
    assert abs(float(losses[1]) - float(expected)) > 1e-4
