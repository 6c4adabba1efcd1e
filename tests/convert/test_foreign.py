"""What converters share: prefixes of wrappers, adapters, names that fit nothing."""

import jax
import numpy as np
import pytest
from foreign_folders import GPT2, LLAMA, weights, write

from jaxlm import convert
from jaxlm.convert.foreign import wrapper
from jaxlm.errors import UserError

PREFIXES = [
    "module.",
    "_orig_mod.",
    "base_model.model.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "base_model.model._orig_mod.",
    "net.",
    "module.model.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_what_a_wrapper_puts_in_front_of_all_names_is_taken_off(tmp_path, prefix, config):
    plain = convert.from_hf(write(tmp_path / "plain", config))
    wrapped = {f"{prefix}{name}": tensor for name, tensor in weights(config).items()}
    cfg, params = convert.from_hf(write(tmp_path / "wrapped", config, wrapped))
    assert cfg == plain[0]
    jax.tree.map(np.testing.assert_array_equal, params, plain[1])


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["model.layers.0.w", "model.embed_tokens.weight"], ""),  # of a tied Llama: the model itself
        (["model.model.layers.0.w", "model.model.norm.weight"], "model."),
        (["model.model.norm.weight", "model.lm_head.weight"], "model."),
        (["transformer.h.0.w", "transformer.wte.weight"], ""),
        (["base_model.model.wte.weight", "base_model.model.h.0.w"], "base_model.model."),
        (["module.transformer.h.0.w", "lm_head.weight"], ""),  # not common to all
        (["module.wte.weight", "module.h.0.w"], "module."),
        (["net.wte.weight", "net.h.0.w"], ""),
        (["gpt_neox.layers.0.w", "embed_out.weight"], ""),
        ([], ""),
    ],
)
def test_the_layout_begins_behind_the_wrapper(names, found):
    assert wrapper(names, "file") == found


def test_names_that_fit_nothing_are_told_by_how_they_begin(tmp_path):
    renamed = {f"net.body.{name}": tensor for name, tensor in weights(GPT2).items()}
    with pytest.raises(UserError, match=r"names that are left begin with net\): .*wte.weight is missing"):
        convert.from_hf(write(tmp_path / "renamed", GPT2, renamed))
    mixed = {f"module.{name}" if ".h." in name else name: tensor for name, tensor in weights(GPT2).items()}
    with pytest.raises(UserError, match=r"names that are left begin with module\): .*h.0.* is missing"):
        convert.from_hf(write(tmp_path / "mixed", GPT2, mixed))
    mixed = weights(GPT2) | {"score.weight": np.zeros((2, 15), np.float32)}
    with pytest.raises(UserError, match=r"does not fit its config: score.weight is unexpected"):
        convert.from_hf(write(tmp_path / "mixed", GPT2, mixed))


def test_an_adapter_is_refused_by_name(tmp_path):
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
    folder = write(tmp_path / "adapter", GPT2, {name: np.zeros((2, 3), np.float32)})
    with pytest.raises(UserError, match=rf"holds a LoRA adapter \({name}\): merge the adapter first"):
        convert.from_hf(folder)
