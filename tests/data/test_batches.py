"""Splits as values: their windows, targets, evaluation batches and length checks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.data import batches
from jaxlm.data.batches import PaddedRows, TokenStream, batch_starts, num_bytes, target_weights
from jaxlm.data.shards import ShardedTokens


def test_a_batch_is_a_function_of_seed_and_step_alone():
    draw = [np.asarray(batch_starts(seed, step, 50, 97)) for seed, step in ((1, 5), (1, 5), (1, 6), (2, 5))]
    np.testing.assert_array_equal(draw[0], draw[1])
    assert (draw[0] != draw[2]).any()
    assert (draw[0] != draw[3]).any()


@pytest.mark.parametrize("places", [1, 97, 65_536, 1_003_790, 2**31 - 1])
def test_windows_begin_where_the_recurrence_says_to_the_last_bit(places):
    offset = int(jax.random.bits(jax.random.key(5), (), jnp.uint32))
    for step in (0, 3, 2_000_000):
        exact = [((step * 13 + b) * 0x9E3779B9 + offset) % 2**32 * places >> 32 for b in range(13)]
        assert batch_starts(5, step, 13, places).tolist() == exact
        assert batches._host_starts(offset, np.array([step]), 13, places).tolist() == [exact]


def test_every_stretch_of_the_text_is_read_about_as_often():
    starts = np.asarray(jax.vmap(lambda step: batch_starts(0, step, 12, 10_000))(jnp.arange(500))).ravel()
    counts = np.bincount(starts // 100, minlength=100)
    assert counts.min() >= 57  # 60 each; independent draws spread by 8
    assert counts.max() <= 63
    assert len(np.unique(starts[:12] // 1000)) >= 8  # and so within a batch


def random_tokens(count, seed=0):
    return np.random.default_rng(seed).integers(0, 200, count).astype(np.uint8)


def mapped(tmp_path, tokens):
    tokens.tofile(tmp_path / "tokens.bin")
    return np.memmap(tmp_path / "tokens.bin", tokens.dtype, mode="r")


def sharded(tokens):
    return ShardedTokens(np.split(tokens, [7, 7, 100, 290]))


@pytest.mark.parametrize("kind", ["memory", "file", "shards"])
def test_what_the_device_reads_of_a_stream_are_the_windows_of_its_steps(tmp_path, kind):
    tokens = random_tokens(300)
    held = {"memory": tokens, "file": mapped(tmp_path, tokens), "shards": sharded(tokens)}
    stream = TokenStream(held[kind], 11)
    assert stream.is_mapped == (kind != "memory")
    source = stream.feed(seed=3, batch_size=5, num_steps=2)(7)
    for step in (7, 8):
        starts = np.asarray(batch_starts(3, step, 5, 300 - 11))
        windows = source.windows(3, step, 5)
        np.testing.assert_array_equal(windows, [tokens[s : s + 12] for s in starts])
        assert windows.dtype == jnp.int32
    assert source.weights(windows) is None


def test_a_stream_in_memory_is_copied_to_the_device_once_and_a_mapped_one_never_as_a_whole(tmp_path):
    tokens = random_tokens(10_000)
    read = TokenStream(tokens, 11).feed(0, 5, 2)
    assert read(0) is read(4)
    assert isinstance(read(0).tokens, jax.Array)
    read = TokenStream(mapped(tmp_path, tokens), 11).feed(0, 5, 2)
    assert [leaf.shape for leaf in jax.tree.leaves(read(4))] == [(2, 5, 12), ()]


class Counted:
    """Tokens of a shard that count how many are read."""

    dtype = np.dtype(np.uint16)

    def __init__(self, length):
        self.length, self.read = length, []

    def __len__(self):
        return self.length

    def __getitem__(self, places):
        start, stop, _ = places.indices(self.length)
        self.read.append((start, stop))
        return (np.arange(start, stop) % 60_013).astype(np.uint16)


def test_a_process_reads_the_rows_that_it_asks_for_and_no_other():
    tokens, asked = ShardedTokens([Counted(200), Counted(300)]), []

    def put(shape, dtype, read, *names):
        if not shape:
            return jnp.asarray(read(()))
        asked.append((shape, dtype, names))
        return jnp.asarray(read((slice(None), slice(2, 4), slice(None))))

    block = TokenStream(tokens, 11).feed(3, 6, 5, put)(20)
    assert asked == [((5, 6, 12), np.uint16, (None, "batch", None))]
    assert block.block.shape == (5, 2, 12)
    read = [stop - start for shard in tokens._arrays for start, stop in shard.read]
    assert sum(read) == 5 * 2 * 12
    whole = TokenStream(tokens, 11).feed(3, 6, 5)(20)
    np.testing.assert_array_equal(block.block, np.asarray(whole.block)[:, 2:4])

    def put_part(shape, dtype, read, *names):
        return jnp.asarray(read(np.s_[1:3, 5:, 4:7] if shape else ()))

    part = TokenStream(tokens, 11).feed(3, 6, 5, put_part)(20).block
    np.testing.assert_array_equal(part, np.asarray(whole.block)[1:3, 5:, 4:7])


@pytest.mark.parametrize("places", [2**31, 5_000_000_000, 2**48 + 12_345])
def test_windows_of_a_large_corpus_begin_where_the_long_recurrence_says_to_the_last_bit(places):
    offset = int(jax.random.bits(jax.random.key(5), (), jnp.uint32))
    for step in (0, 3, 2_000_000, 2**40):
        fractions = [((step * 13 + b) * 0x9E3779B97F4A7C15 + (offset << 32)) % 2**64 for b in range(13)]
        starts = batches._host_starts(offset, np.array([step]), 13, places)
        assert starts.tolist() == [[fraction * places >> 64 for fraction in fractions]]


def test_a_corpus_of_five_billion_tokens_is_read_everywhere():
    shards = [Counted(1_250_000_000) for _ in range(4)]
    stream = TokenStream(ShardedTokens(shards), 11)
    stream.check_training()
    block = np.asarray(stream.feed(0, 50, 20)(1000).block)
    read = np.array([place for shard in shards for place in shard.read])
    assert all(abs(len(shard.read) - 250) <= 2 for shard in shards)
    assert set((read[:, 1] - read[:, 0]).tolist()) == {12}
    assert len(set(read[:, 0].tolist())) == 1000
    assert read[:, 0].max() > 1_240_000_000
    np.testing.assert_array_equal(np.sort(block[..., 0].ravel()), np.sort(read[:, 0] % 60_013))
    shards = [np.broadcast_to(np.uint16(number), 1_250_000_000) for number in range(4)]
    head = TokenStream(ShardedTokens(shards), 11).head(3_000_000_000)
    assert (len(head), head.num_targets, int(head.tokens[-1:][0])) == (3_000_000_000, 2_999_999_999, 2)
    batch = next(TokenStream(ShardedTokens(shards).part(3_749_999_990, 5_000_000_000).part(0, 20), 11).eval_batches(2))
    assert int(batch.weights.sum()) == 19
    np.testing.assert_array_equal(batch.windows[0, 0], [2] * 10 + [3] * 2)


def padded(lengths, width):
    rows = np.full((len(lengths), width), 29, np.uint8)
    for i, row in enumerate(rows):
        row[: 1 + lengths[i]] = i
    return PaddedRows(rows, 29)


def test_a_batch_of_rows_takes_them_by_the_sequence_of_its_seed_and_weighs_no_padding():
    split = padded([1 + i % 7 for i in range(40)], 8)
    source = split.feed(3, 6, 2)(0)
    windows = source.windows(3, 1, 6)
    np.testing.assert_array_equal(windows, split.rows[np.asarray(batch_starts(3, 1, 6, 40))])
    weights = np.asarray(source.weights(windows))
    np.testing.assert_array_equal(weights > 0, windows[:, 1:] != 29)
    np.testing.assert_array_equal(weights, target_weights(windows, 29))
    assert weights.mean() == pytest.approx(1, rel=1e-6)
    assert len(np.unique(weights)) == 2


def test_the_length_of_a_stream_is_no_part_of_a_compiled_program_but_its_context_and_padding_are():
    traced = []

    @jax.jit
    def windows(split):
        traced.append(split)
        return split.windows(0, 0, 2)

    for tokens in (random_tokens(50), random_tokens(50, seed=1)):
        windows(TokenStream(jnp.asarray(tokens), 7))
    assert len(traced) == 1
    assert windows(TokenStream(jnp.asarray(random_tokens(50)), 5)).shape == (2, 6)


def test_targets_per_window_and_head():
    stream, rows = TokenStream(random_tokens(50), 7), padded([3, 4, 6], 8)
    assert (stream.targets_per_window, rows.targets_per_window) == (7.0, 13 / 3)
    assert (len(stream.head(20)), stream.head(20).num_targets) == (20, 19)
    assert (len(rows.head(2)), rows.head(2).num_targets) == (2, 7)


@pytest.mark.parametrize("block", [1 << 22, 20])
def test_bytes_are_those_of_the_targets(monkeypatch, block):
    monkeypatch.setattr(batches, "COUNT_BLOCK", block)
    token_bytes = np.arange(200, dtype=np.int32) % 4
    tokens, rows = random_tokens(50), padded([3, 4, 6], 8)
    assert num_bytes(TokenStream(tokens, 7), token_bytes) == sum(int(t) % 4 for t in tokens[1:])
    assert num_bytes(rows, token_bytes) == 3 * 0 + 4 * 1 + 6 * 2


def test_a_split_too_short_is_refused():
    with pytest.raises(
        ValueError, match="the training split has 7 tokens, shorter than one context of max_seq_len = 7"
    ):
        TokenStream(random_tokens(7), 7).check_training()
    TokenStream(random_tokens(8), 7).check_training()
    with pytest.raises(ValueError, match="the validation split has 1 tokens, too few for one target"):
        TokenStream(random_tokens(1), 7).check_evaluation()
    TokenStream(random_tokens(2), 7).check_evaluation()
    with pytest.raises(ValueError, match="the training split has no row"):
        padded([], 8).check_training()


def test_a_training_split_that_int32_cannot_address_is_refused():
    tokens = np.broadcast_to(np.uint8(1), 2**31)
    with pytest.raises(ValueError, match=r"has 2147483648 tokens: at most 2\^31 - 1"):
        TokenStream(tokens, 7).check_training()
    TokenStream(tokens[1:], 7).check_training()


@pytest.mark.parametrize("length", [2, 6, 7, 8, 29, 36, 37])
@pytest.mark.parametrize("groups", [1, 64])
def test_evaluation_counts_every_target_once_with_its_own_past(length, groups):
    tokens = np.arange(1, length + 1, dtype=np.uint8)
    seen = []
    for batch in TokenStream(tokens, 7).eval_batches(2, groups):
        assert batch.windows.shape[1:] == (2, 8)
        for window, weights in zip(batch.windows.reshape(-1, 8), batch.weights.reshape(-1, 7), strict=True):
            real = int(weights.sum())
            assert weights.tolist() == [1] * real + [0] * (7 - real)
            assert (np.diff(window[: real + 1].astype(int)) == 1).all()
            seen += window[1 : real + 1].tolist()
    assert seen == list(range(2, length + 1))
    assert len(seen) == TokenStream(tokens, 7).num_targets


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
@pytest.mark.parametrize("groups", [1, 64])
def test_evaluation_takes_every_row_once_and_counts_no_padding(count, groups):
    rows = np.full((count, 8), 29, np.uint8)
    for i, row in enumerate(rows):
        row[: 2 + i % 7] = i
    seen = []
    split = PaddedRows(rows, 29)
    for batch in split.eval_batches(2, groups):
        assert batch.windows.shape[1:] == (2, 8)
        assert batch.windows.dtype == np.uint8
        for window, weights in zip(batch.windows.reshape(-1, 8), batch.weights.reshape(-1, 7), strict=True):
            np.testing.assert_array_equal(weights, window[1:] != 29)
            seen += window[1:][weights > 0].tolist()
    assert seen == [i for i in range(count) for _ in range(1 + i % 7)]
    assert len(seen) == split.num_targets
