"""Folders of Meta and checkpoints of llama2.c: the command on them, and what is refused."""

import json

import jax
import numpy as np
import pytest
import torch
from meta_llama import MetaLlama, save_checkpoint, save_meta, save_parts
from support import command

from jaxlm import convert
from jaxlm.errors import UserError
from jaxlm.run.folder import load_run

torch.manual_seed(0)
MODEL = MetaLlama()


def refused(converter, source):
    with pytest.raises(UserError) as error:
        converter(source)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_command_makes_a_run_of_a_folder_of_meta(tmp_path):
    source, out = save_meta(MODEL, tmp_path / "meta"), tmp_path / "new"
    assert command("convert", "--from", "meta", source, out)[0] == 0
    cfg, params = convert.from_meta(source)
    loaded = load_run(out)
    assert loaded.config.model == cfg
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert json.loads((out / "config.json").read_text())["source"] == {"format": "Meta", "name": "meta"}


def test_bfloat16_stays(tmp_path):
    model = MetaLlama().bfloat16()
    cfg, params = convert.from_meta(save_meta(model, tmp_path / "meta"))
    assert (cfg.dtype, cfg.param_dtype) == ("bfloat16", "bfloat16")
    expected = model.layers[1].feed_forward.w2.weight.T.float().detach()
    np.testing.assert_array_equal(params["block_1"]["mlp"]["down"]["kernel"].astype("float32"), expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moe": {"num_experts": 8}}, "moe = {'num_experts': 8} is not supported: jaxlm does not know this field"),
        ({"dim": "18"}, "dim = '18' is not supported: give a whole number of at least 1"),
        ({"dim": None}, "params.json has no dim"),
        ({"multiple_of": 0}, "multiple_of = 0 is not supported: give a whole number of at least 1"),
        ({"ffn_dim_multiplier": -1.0}, "ffn_dim_multiplier = -1.0 is not supported: give a number above 0, or null"),
        ({"ffn_dim_multiplier": 2.0}, "layers.0.feed_forward.w1.weight has shape (50, 18), not (100, 18)"),
        ({"n_heads": 4}, "num_heads = 4 does not divide embed_dim = 18"),
        ({"n_kv_heads": 1}, "layers.0.attention.wk.weight has shape (18, 18), not (6, 18)"),
        ({"n_layers": 1}, "layers.1.attention.wk.weight is unexpected"),
        ({"vocab_size": 38}, "tok_embeddings.weight has shape (37, 18), not (38, 18)"),
        (
            {"use_scaled_rope": True},
            "use_scaled_rope = True is not supported: add its factor as rope_scaling_factor, 8 for Llama 3.1 and 3.3",
        ),
    ],
)
def test_a_params_json_that_does_not_fit_is_named(tmp_path, changes, words):
    assert words in refused(convert.from_meta, save_meta(MODEL, tmp_path / "meta", **changes))


def test_tensors_that_do_not_fit_are_named(tmp_path):
    folder = save_meta(MODEL, tmp_path / "meta", vocab_size=-1)
    state = torch.load(folder / "consolidated.00.pth")
    head = state.pop("output.weight")
    torch.save(state, folder / "consolidated.00.pth")
    assert "consolidated.00.pth does not fit its config: output.weight is missing" in refused(convert.from_meta, folder)
    torch.save({**state, "output.weight": head, "lora": head}, folder / "consolidated.00.pth")
    assert "lora is unexpected" in refused(convert.from_meta, folder)
    del state["tok_embeddings.weight"]
    torch.save(state, folder / "consolidated.00.pth")
    assert "has no matrix tok_embeddings.weight, which params.json needs for vocab_size = -1" in refused(
        convert.from_meta, folder
    )


def test_parts_that_do_not_make_the_whole_are_named(tmp_path):
    model = MetaLlama(dim=24, n_heads=6, multiple_of=6, vocab_size=42)
    folder = save_parts(model, tmp_path / "meta", 3, by_tokens=True)
    (folder / "consolidated.02.pth").unlink()
    assert "layers.0.attention.wk.weight has shape (16, 24), not (24, 24)" in refused(convert.from_meta, folder)
    state = torch.load(folder / "consolidated.01.pth")
    torch.save({name: tensor.half() for name, tensor in state.items()}, folder / "consolidated.01.pth")
    assert "has parts of several types or shapes" in refused(convert.from_meta, folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["model_args"].pop("dim"), "model_args has no dim"),
        (lambda r: r["model_args"].update(lora_modules={"wq": 1}), "lora_modules = {'wq': 1} is not supported"),
        (lambda r: r["model_args"].update(n_experts=2), "n_experts = 2 is not supported"),
        (lambda r: r["model"].pop("norm.weight"), "ckpt.pt does not fit its config: norm.weight is missing"),
        (lambda r: r["model"].pop("tok_embeddings.weight"), "tok_embeddings.weight is missing"),
        (lambda r: r["model"].update(more=torch.ones(1)), "more is unexpected"),
        (lambda r: r.pop("model"), "is not a checkpoint of llama2.c: it lacks the dicts model_args and model"),
    ],
)
def test_a_checkpoint_of_llama2c_that_does_not_fit_is_named(tmp_path, change, words):
    file = save_checkpoint(MODEL, tmp_path / "ckpt.pt")
    record = torch.load(file)
    change(record)
    torch.save(record, file)
    assert words in refused(convert.from_llama2c, file)


def test_a_mask_and_angles_beside_the_parameters_are_passed_over(tmp_path):
    file = save_checkpoint(MODEL, tmp_path / "ckpt.pt")
    plain = convert.from_llama2c(file)
    record = torch.load(file)
    record["model"] |= {"freqs_cos": torch.ones(2), "layers.0.attention.mask": torch.ones(1, 1, 3, 3).double()}
    torch.save(record, file)
    found = convert.from_llama2c(file)
    assert found[0] == plain[0]
    jax.tree.map(np.testing.assert_array_equal, found[1], plain[1])
