"""Models that compute NaN or infinity: every function of decoding refuses, in one line that says where."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import CFG, KEY, PROMPT
from support import built

from jaxlm.decode.beam_search import beam_search
from jaxlm.decode.generate import generate, predict
from jaxlm.decode.score import score
from jaxlm.decode.stream import stream
from jaxlm.decode.uncached import generate_naive
from jaxlm.errors import CheckError, UserError

FUNCTIONS = {
    "generate": lambda model, params: generate(model, params, PROMPT, max_new_tokens=4, key=KEY),
    "greedy": lambda model, params: generate(model, params, PROMPT, max_new_tokens=4, key=KEY, temperature=0),
    "naive": lambda model, params: generate_naive(model, params, PROMPT, max_new_tokens=4, key=KEY),
    "stream": lambda model, params: list(stream(model, params, PROMPT, max_new_tokens=4, key=KEY)),
    "predict": lambda model, params: predict(model, params, PROMPT, 4),
    "beam_search": lambda model, params: beam_search(model, params, PROMPT, max_new_tokens=4, beam_width=2),
    "score": lambda model, params: score(model, params, PROMPT),
}


def with_value(params, value):
    """The parameters with one number of the last block replaced."""
    changed = jax.tree.map(jnp.array, params)
    layer = changed["block_1"]["mlp"]["up"]
    layer["kernel"] = layer["kernel"].at[0, 0].set(value)
    return changed


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_parameter_that_is_not_finite_is_named_with_the_first_token(name):
    model, params = built(CFG)
    FUNCTIONS[name](model, params)  # which are finite
    token = "token 1" if name == "score" else "new token 0"
    for value in (jnp.nan, jnp.inf, -jnp.inf):
        with pytest.raises(CheckError) as refusal:
            FUNCTIONS[name](model, with_value(params, value))
        assert str(refusal.value) == (
            f"row 0, {token}: the model's logits are not finite; the parameter block_1/mlp/up/kernel holds {value} at "
            "[0, 0]: take another checkpoint"
        )


@pytest.mark.parametrize("name", ["generate", "beam_search"])
def test_one_infinite_logit_is_enough(name):
    """Of a head's bias. Where it is -inf, softmax gives that token probability 0, and all else seems well."""
    model, params = built(dataclasses.replace(CFG, tie_embeddings=False, head_bias=True))
    params = jax.tree.map(jnp.array, params)
    params["head"]["bias"] = params["head"]["bias"].at[3].set(-jnp.inf)
    with pytest.raises(CheckError, match=r"the parameter head/bias holds -inf at \[3\]"):
        FUNCTIONS[name](model, params)


UNTIED = dataclasses.replace(CFG, tie_embeddings=False)


def poisoned(token):
    """The model of UNTIED, whose logits are NaN once `token` has been fed."""
    model, params = built(UNTIED)
    params = jax.tree.map(jnp.array, params)
    params["embedding"] = params["embedding"].at[token].set(jnp.nan)
    return model, params


def test_the_row_and_the_token_are_those_that_are_wrong_first():
    sampling = {"max_new_tokens": 8, "key": KEY}
    tokens = np.asarray(generate(*built(UNTIED), PROMPT, **sampling).tokens)
    known = {0, *np.asarray(PROMPT).flat}  # 0 is what pads
    firsts = {token: step for step in range(7, -1, -1) for token in tokens[:, step] if token not in known}
    token, step = max(firsts.items(), key=lambda item: item[1])  # the one that comes last for the first time
    assert 0 < step < 7
    row = tokens[:, step].tolist().index(token)
    model, params = poisoned(token)
    for sampler in (generate, generate_naive, lambda *given, **named: list(stream(*given, **named))):
        with pytest.raises(CheckError, match=rf"^row {row}, new token {step + 1}: .*the parameter embedding holds nan"):
            sampler(model, params, PROMPT, **sampling)
    generate(model, params, PROMPT, **sampling | {"max_new_tokens": step + 1})  # which feeds that token no more
    out = generate(
        model,
        params,
        PROMPT[row : row + 1],
        key=jax.random.fold_in(KEY, row)[None],
        **{
            "max_new_tokens": 8,
            "stop_token": token,
        },
    )  # a row that has ended is not looked at
    assert out.lengths.tolist() == [step]


def test_an_overflow_of_finite_parameters_says_so():
    model, params = built(CFG)
    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, 3e38), params)
    with pytest.raises(CheckError, match=r"every parameter is finite, so a sum overflowed: compute in float32 or"):
        generate(model, params, PROMPT, max_new_tokens=2, key=KEY)


def test_filters_make_no_logit_of_the_model_infinite():
    model, params = built(CFG)
    filters = {"top_k": 1, "top_p": 0.01, "min_p": 0.9, "forbidden_tokens": range(9), "repetition_penalty": 1e30}
    assert np.isfinite(generate(model, params, PROMPT, max_new_tokens=4, key=KEY, **filters).log_probs).all()
    beams = beam_search(model, params, PROMPT, max_new_tokens=2, beam_width=4, forbidden_tokens=range(1, 11))
    assert np.isneginf(beams.scores).sum() == 6  # there are fewer hypotheses than beams


def test_weights_of_a_score_are_finite():
    model, params = built(CFG)
    with pytest.raises(UserError, match="weights holds nan: give finite numbers"):
        score(model, params, PROMPT, weights=np.full((2, 4), np.nan))
