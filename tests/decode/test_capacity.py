"""How many tokens the cache holds, and what happens past that."""

import dataclasses
import warnings
from unittest import mock

import numpy as np
import pytest
from decoding import CFG, KEY, PROMPT, sampled
from models import VARIANTS
from support import built, random_tokens

from jaxlm.decode.capacity import CapacityPlan, cache_capacities, plan_capacity, power_of_two
from jaxlm.decode.generate import generate
from jaxlm.errors import ContextWarning, PositionTableWarning, UserError

LEARNED = dataclasses.replace(CFG, position="learned", max_seq_len=8)


def test_what_overflows_is_refused_with_the_numbers_where_asked():
    words = r"prompt 5 \+ 9 new tokens pass the capacity 12: give fewer, a larger capacity, or on_overflow"
    with pytest.raises(UserError, match=words):
        sampled(PROMPT, capacity=12, on_overflow="error")
    sampled(PROMPT, capacity=13, on_overflow="error")  # the last token is never fed
    model, params = built(dataclasses.replace(CFG, window=4))
    generate(model, params, PROMPT, max_new_tokens=9, key=KEY, capacity=12, on_overflow="error")  # no window reaches it


def test_past_a_learned_table_a_warning_tells_the_numbers():
    model, params = built(LEARNED)
    with pytest.warns(PositionTableWarning, match=r"prompt 5 \+ 9 new tokens pass .*max_seq_len = 8"):
        generate(model, params, PROMPT, max_new_tokens=9, key=KEY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, params, PROMPT, max_new_tokens=4, key=KEY)


def test_past_the_context_a_model_that_rolls_warns_unless_the_capacity_is_chosen():
    words = r"prompt 24 \+ 4 new tokens pass the context of the model \(capacity 16, max_seq_len = 16\)"
    prompt = random_tokens(CFG, 1, 24)
    model, params = built(dataclasses.replace(CFG, max_seq_len=16))
    with pytest.warns(ContextWarning, match=words) as warned:
        rolled = generate(model, params, prompt, max_new_tokens=4, key=KEY)
    assert not issubclass(warned[0].category, PositionTableWarning)
    # A capacity is a choice (and a test has warnings raised); one that holds all sees more.
    same = generate(model, params, prompt, max_new_tokens=4, key=KEY, capacity=16)
    wider = generate(model, params, prompt, max_new_tokens=4, key=KEY, capacity=27)
    np.testing.assert_array_equal(same.log_probs, rolled.log_probs)
    assert not np.array_equal(wider.log_probs, rolled.log_probs)
    generate(model, params, prompt[:, :13], max_new_tokens=4, key=KEY)  # 16 tokens are fed
    for position in ("sinusoidal", "none"):
        with pytest.warns(ContextWarning):
            plan_capacity(dataclasses.replace(CFG, position=position), 23, 3)


@pytest.mark.parametrize(
    ("cfg", "longest", "new", "capacity", "plan"),
    [
        (CFG, 5, 9, None, (14, False, 9)),
        (CFG, 5, 20, None, (24, False, 20)),  # 24 tokens are fed: the last is not
        (CFG, 5, 21, None, (24, True, 21)),
        (CFG, 5, 9, 7, (7, True, 9)),
        (CFG, 30, 2, None, (24, True, 2)),
        (dataclasses.replace(CFG, window=7), 5, 90, 7, (7, False, 90)),
        (dataclasses.replace(CFG, window=(7, None)), 5, 90, 7, (7, True, 90)),
        (VARIANTS["lstm"], 5, 90, None, (7, False, 90)),
        (VARIANTS["bigram"], 5, 90, 3, (3, False, 90)),
        (LEARNED, 5, 4, None, (8, False, 4)),
        (LEARNED, 5, 3, 6, (6, True, 2)),
    ],
    ids=str,
)
def test_a_plan_says_what_the_cache_serves(cfg, longest, new, capacity, plan):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ContextWarning)
        assert plan_capacity(cfg, longest, new, capacity) == CapacityPlan(*plan)


def test_a_full_table_gives_one_more_token_and_a_longer_prompt_none():
    for longest, served in ((7, 2), (8, 1), (9, 0), (12, 0)):
        with pytest.warns(PositionTableWarning):
            assert plan_capacity(LEARNED, longest, 5).cached_steps == served


def test_only_a_learned_table_cannot_roll():
    with pytest.warns(ContextWarning):
        assert plan_capacity(CFG, 5, 90, on_overflow="roll").overflows
    with pytest.raises(UserError, match="pass the capacity 8: give fewer$"):
        plan_capacity(LEARNED, 5, 5, on_overflow="roll")


@pytest.mark.parametrize(
    ("capacity", "words"),
    [
        (0, "capacity = 0: give a whole number of at least 1"),
        (9, "9 tokens are beyond the learned position table, max_seq_len = 8: give a smaller capacity, or use a model"),
    ],
)
def test_capacities_out_of_range_are_refused(capacity, words):
    with pytest.raises(UserError, match=words):
        plan_capacity(LEARNED, 5, 2, capacity)


def test_a_cache_begins_about_as_large_as_the_weights_and_grows_in_quarters():
    cfg = dataclasses.replace(CFG, max_seq_len=4096)
    plan = plan_capacity(cfg, 5, 1000)
    many = {"weights": np.zeros(10**7, np.float32)}
    assert cache_capacities(cfg, {}, 2, 5, plan) == [128, 256, 512, 768, 1024]
    assert cache_capacities(cfg, {}, 2, 1030, plan) == [1536, 2048]
    assert cache_capacities(cfg, many, 2, 5, plan) == [1024]
    with mock.patch("jax.default_backend", return_value="gpu"):
        assert cache_capacities(cfg, {}, 2, 5, plan) == [1024]
    assert cache_capacities(cfg, {}, 2, 5, plan_capacity(cfg, 5, 1000, 100)) == [32, 64, 100]  # it rolls from there
    assert cache_capacities(cfg, {}, 2, 5, plan_capacity(cfg, 5, 20)) == [32]
    per_slot = 2 * 2 * (2 * 4 * 4) + 2 * 2 * 4  # layers x rows x (keys and values of one head of 4) and positions
    some = {"weights": np.zeros(per_slot * 512 + 2 * 4, np.uint8)}
    assert cache_capacities(cfg, some, 2, 5, plan) == [512, 768, 1024]
    assert cache_capacities(cfg, {"weights": some["weights"][:-1]}, 2, 5, plan) == [256, 512, 768, 1024]
    long = plan_capacity(cfg, 5, 4000)
    assert cache_capacities(cfg, {}, 2, 5, long) == [128, 256, 512, 1024, 2048, 3072, 4096]
    assert cache_capacities(VARIANTS["lstm"], {}, 2, 5, plan) == [1]
    assert cache_capacities(LEARNED, {}, 1, 5, plan_capacity(LEARNED, 5, 2)) == [8]  # not 16


def test_powers_of_two():
    assert [power_of_two(n) for n in (0, 1, 2, 3, 4, 5, 1000)] == [1, 1, 2, 4, 4, 8, 1024]
