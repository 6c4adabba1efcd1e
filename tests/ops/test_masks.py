"""The mask of attention, written out."""

import jax.numpy as jnp

from jaxlm.ops.masks import attention_mask, document_numbers, document_starts


def test_masks_literally():
    positions = jnp.arange(4)[None]
    assert attention_mask(positions, positions)[0].astype(int).tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
    ]
    assert attention_mask(positions, positions, window=2)[0].astype(int).tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]


def test_mask_of_a_ring_with_an_empty_slot_and_a_padded_query():
    queries, ring = jnp.array([[5, 6, -1]]), jnp.array([[6, -1, 4, 5]])
    assert attention_mask(queries, ring, window=2)[0].astype(int).tolist() == [[0, 0, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0]]


def test_documents_literally():
    tokens = jnp.array([[5, 9, 6, 7, 9, 9, 8], [9, 5, 5, 5, 5, 5, 9]])
    documents = document_numbers(tokens, end_of_text=9)
    assert documents.tolist() == [[0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]
    first = document_starts(documents)
    assert first.tolist() == [[0, 0, 2, 2, 2, 5, 6], [0, 1, 1, 1, 1, 1, 1]]
    assert document_starts(documents[:, :1]).tolist() == [[0], [0]]
    positions = jnp.arange(7)[None]
    assert attention_mask(positions, positions, window=2, first=first)[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
