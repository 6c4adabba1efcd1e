"""Every family of transformers, in and out, in float64: logits, gradients, greedy tokens, and the way back."""

import dataclasses
import functools
import json

import family_models
import huggingface
import jax
import numpy as np
import pytest
import torch
import transformers
from tolerances import FLOAT64, assert_close

import jaxlm
from jaxlm import convert
from jaxlm.config import ModelConfig
from jaxlm.convert.export import torch_tensors
from jaxlm.convert.families import FAMILIES, by_model_type
from jaxlm.convert.families.fields import REQUIRED
from jaxlm.convert.families.holding import Held
from jaxlm.convert.tensors import to_array
from jaxlm.errors import UserError
from jaxlm.model.layer_stack import stack_params
from jaxlm.parity import random_params

pytestmark = pytest.mark.x64

FAST = ("gpt_neox", "phi3", "gemma3")
"""Between them they have every layout of tensors; the others are slow."""


def cases(fast, names=family_models.CASES):
    """All names, of which those that are not fast are slow."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


LENGTH, PROMPT, NEW = 29, 5, 64


@functools.cache
def imported(case):
    theirs = family_models.model(case)
    return theirs, *convert.from_hf(theirs)


def tokens_for(cfg, length=LENGTH):
    return np.random.default_rng(0).integers(0, cfg.vocab_size, (3, length))


def logits_of(theirs, tokens):
    with huggingface.in_float64(), torch.no_grad():
        return theirs(torch.tensor(tokens), use_cache=False).logits.numpy()


def named_as_theirs(cfg, tree, theirs):
    """A tree of parameters or gradients, under transformers' names."""
    family = by_model_type(theirs.config.model_type)
    names = {f"{ours}.weight": f"{other}.weight" for other, ours in family.renamed.items()}
    return {names.get(name, name): x for name, x in torch_tensors(Held(family, cfg, {}), cfg, tree).arrays()}


GONE = object()


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("gemma", {"hidden_act": "gelu"}),
        ("gemma2", {"attn_logit_softcapping": GONE, "final_logit_softcapping": GONE}),
        ("gemma3", {"attn_logit_softcapping": 2.0}),
        ("mistral", {"layer_types": family_models.SLIDING}),
        ("mistral", {"sliding_window": GONE}),
        ("gpt2", {"n_head": GONE, "num_attention_heads": 5, "n_positions": GONE, "max_position_embeddings": 80}),
        ("gpt2", {"scale_attn_weights": False}),
        ("gpt2", {"reorder_and_upcast_attn": True}),
        ("gpt_neo", {"attention_layers": ["local", "global", "global"]}),
        ("llama", {"attention_dropout": None}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*attn_logit_softcapping changes nothing")
def test_entries_mean_what_transformers_reads(case, changes, tmp_path):
    family_models.model(case).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not GONE}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    cfg, params = convert.from_hf(tmp_path)
    logits = jaxlm.build_model(cfg).apply({"params": params}, tokens_for(cfg))[0]
    assert_close(logits, logits_of(load(tmp_path), tokens_for(cfg)), FLOAT64)


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_missing_has_the_default_of_transformers(kind):
    """Entries that ModelConfig derives (None) and those without a default here are not compared."""
    theirs = transformers.CONFIG_MAPPING[kind]
    compared = 0
    for field in FAMILIES[kind].fields:
        name, ours = getattr(field, "theirs", None), getattr(field, "default", None)
        if name is None or ours is None or ours is REQUIRED or not hasattr(theirs, name):
            continue
        compared += 1
        assert getattr(theirs, name) == ours, name
    assert compared > 2


def test_every_family_has_a_case():
    assert {family_models.model(case).config.model_type for case in FAST} <= set(FAMILIES)
    names = {transformers.CONFIG_MAPPING[kind].__name__.removesuffix("Config") for kind in FAMILIES}
    assert {name for name, _ in family_models.CASES.values()} == names - {"Ministral"}  # a Mistral with layer_types


@pytest.mark.parametrize("case", cases(FAST))
def test_a_model_comes_in_as_the_same_function(case):
    theirs, cfg, params = imported(case)
    model, tokens = jaxlm.build_model(cfg), tokens_for(cfg)
    weight = np.random.default_rng(1).standard_normal((*tokens.shape, cfg.vocab_size))
    theirs.zero_grad()
    with huggingface.in_float64():
        expected = theirs(torch.tensor(tokens), use_cache=False).logits
        (expected * torch.tensor(weight)).sum().backward()

    @functools.partial(jax.value_and_grad, has_aux=True)
    def ours(params):
        logits = model.apply({"params": params}, tokens)[0]
        return (logits * weight).sum(), logits

    (_, logits), gradients = jax.jit(ours)(params)
    assert_close(logits, expected.detach(), FLOAT64)
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    found = named_as_theirs(cfg, gradients, theirs)
    assert found.keys() == wanted.keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert np.max(np.abs(found[name] - to_array(gradient))) < 1e-10 * largest, name


@pytest.mark.parametrize("case", cases(FAST[-1:]))
def test_greedy_tokens_are_theirs_past_every_window(case):
    theirs, cfg, params = imported(case)
    prompt = tokens_for(cfg, PROMPT)
    with huggingface.in_float64():
        given = torch.tensor(prompt)
        continued = theirs.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=NEW, pad_token_id=0
        )[:, PROMPT:]
    model = jaxlm.build_model(cfg)
    drawn = jaxlm.generate(model, params, prompt, max_new_tokens=NEW, temperature=0, key=jax.random.key(0))
    assert np.asarray(drawn.tokens).tolist() == continued.tolist()
    assert len(set(continued.flatten().tolist())) > 1


@pytest.mark.parametrize("case", cases(FAST))
def test_a_model_goes_out_as_the_same_function(case, tmp_path):
    theirs, cfg, params = imported(case)
    convert.to_hf(cfg, params, tmp_path / "out", shard_size="20KB")
    loaded = load(tmp_path / "out")
    assert_close(logits_of(loaded, tokens_for(cfg)), logits_of(theirs, tokens_for(cfg)), FLOAT64)
    back_cfg, back = convert.from_hf(tmp_path / "out")
    assert dataclasses.replace(back_cfg, head_dim=cfg.head_dim, mlp_dim=cfg.mlp_dim) == cfg
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize("case", cases(FAST[-1:]))
def test_rounding_is_at_most_twice_theirs(case):
    theirs, cfg, params = imported(case)
    tokens = tokens_for(cfg, 80)
    exact = logits_of(theirs, tokens)
    single = family_models.model(case, dtype=torch.float32)
    with torch.no_grad():
        in_torch = single(torch.tensor(tokens), use_cache=False).logits.numpy()
    narrow = dataclasses.replace(cfg, dtype="float32", param_dtype="float32")
    model, rounded = jaxlm.build_model(narrow), jax.tree.map(lambda leaf: leaf.astype("float32"), params)
    in_jax = jax.jit(lambda params: model.apply({"params": params}, tokens)[0])(rounded)
    errors = [float(np.sqrt(np.mean((np.asarray(x, np.float64) - exact) ** 2))) for x in (in_jax, in_torch)]
    assert errors[0] < 2 * errors[1]


def load(folder):
    """The model in a folder, in float64; nothing missing, unexpected or of another shape."""
    with huggingface.in_float64():
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager", output_loading_info=True
        )
    assert not any(info.values()), info
    return model.eval()


SMALL = {
    **{"vocab_size": 41, "max_seq_len": 40, "num_layers": 2, "embed_dim": 24, "num_heads": 4, "mlp_dim": 30},
    **{"dtype": "float64", "param_dtype": "float64"},
}
ROPE = {"position": "rope", "num_kv_heads": 2, "tie_embeddings": False}
BARE = {"norm": "rmsnorm", "activation": "swiglu", "use_bias": False}
GEMMA = {
    **(ROPE | BARE | {"norm_order": "sandwich", "norm_unit_offset": True, "activation": "geglu_tanh"}),
    **{"embedding_scale": 24**0.5, "tie_embeddings": True},
}
GEMMA3 = GEMMA | {"qk_norm": True}
GOING_OUT = {
    "gemma": {**GEMMA, "norm_order": "pre", "activation": "geglu"},
    "gemma2": {**GEMMA, "attention_softcap": 2.0, "final_softcap": 3.0},
    "gemma3_text": {**GEMMA3, "rope_scaling": "linear", "rope_factor": (1.0, 4.0), "window": (5, None)},
    "granite": {
        **ROPE,
        **BARE,
        "logit_divisor": 3.0,
        "residual_scale": 0.5,
        "rope_scaling": "yarn",
        "rope_factor": 4.0,
    },
    "phi": {**ROPE, "block_layout": "parallel_one_norm", "rotary_dim": 4, "head_bias": True},
    "phi3": {**ROPE, **BARE, "rotary_dim": 4, "rope_layout": "interleaved"},
    "stablelm": {**ROPE, "activation": "swiglu", "use_bias": False, "rotary_dim": 4, "qkv_bias": True},
    "gpt2": {"activation": "gelu"},
    "gpt2, zeros for biases": {"use_bias": False, "scan_layers": True, "dropout": 0.2},
    "starcoder2": {**ROPE, "window": 7, "activation": "gelu_tanh"},
    "starcoder2, no biases": {**ROPE, "use_bias": False},
    "llama": {**ROPE, **BARE, "rope_layout": "interleaved", "head_dim": 10},
    "mistral": {**ROPE, **BARE, "window": 6, "scan_layers": True},
    "qwen3": {**ROPE, **BARE, "rope_layout": "interleaved", "qk_norm": True, "window": (None, 9), "init": "torch"},
    "qwen2": {**ROPE, **BARE, "qkv_bias": True},
    "olmo2": {
        **(ROPE | BARE | {"norm_order": "reordered", "qk_norm": True, "qk_norm_over": "projection"}),
        **{"num_kv_heads": 4, "rope_layout": "interleaved"},
    },
    "gpt_neox": {
        **{"position": "rope", "rotary_dim": 4, "block_layout": "parallel", "tie_embeddings": False},
        "rope_layout": "interleaved",
    },
    "gpt_neo": {"attention_scale": 1.0, "window": (None, 5), "qkv_bias": False, "use_bias": False},
}
"""Models of our own, by the family they go out as."""


@pytest.mark.parametrize("kind", cases(("gpt2, zeros for biases", "llama", "gemma3_text"), GOING_OUT))
def test_a_model_of_ours_goes_out_as_the_first_family_that_holds_it(kind, tmp_path):
    cfg = ModelConfig(**(SMALL | GOING_OUT[kind]))
    params = random_params(dataclasses.replace(cfg, scan_layers=False))
    if cfg.scan_layers:
        params = stack_params(cfg, params)
    assert convert.to_hf(cfg, params, tmp_path / "out") == kind.partition(",")[0]
    tokens = tokens_for(cfg)
    logits = jaxlm.build_model(cfg).apply({"params": params}, tokens)[0]
    assert_close(logits, logits_of(load(tmp_path / "out"), tokens), FLOAT64)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"position": "sinusoidal"}, "gpt2, has position = 'learned' and not 'sinusoidal'"),
        ({"kv_sharing": "summed_scores", "num_kv_heads": 2}, ", kv_sharing = 'grouped' and not 'summed_scores'"),
        ({"attention_score": "additive"}, "has attention_score = 'dot' and not 'additive'"),
        ({"mlp_dim": 0}, "mlp_dim = 0: every family of Hugging Face has an MLP"),
        ({**ROPE, **BARE, "window": (3, 5)}, "has window ="),
        ({**ROPE, **BARE, "rope_theta": (10.0, 20.0)}, "has rope_theta ="),
        (
            {**ROPE, **BARE, "rotary_dim": 4, "rope_scaling": "linear", "rope_factor": 2.0},
            "has norm = 'layernorm' and not 'rmsnorm'",
        ),
        ({**GEMMA3, "attention_softcap": 2.0}, "has qk_norm = False and not True"),
        ({**ROPE, **BARE, "norm": "layernorm", "rotary_dim": 4, "qk_norm": True}, "has qk_norm = False and not True"),
    ],
)
def test_a_model_that_no_family_holds_is_refused_with_the_field(fields, words, tmp_path):
    cfg = ModelConfig(**(SMALL | fields))
    with pytest.raises(UserError) as error:
        convert.to_hf(cfg, {}, tmp_path / "out")
    assert words in str(error.value)
    assert not (tmp_path / "out").exists()
