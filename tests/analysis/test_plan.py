"""Plans on paper: memory, bytes and times of a training step on a mesh, against numbers worked out by hand."""

import dataclasses

import jax
import pytest

from jaxlm.analysis.accelerators import ACCELERATORS, accelerator
from jaxlm.analysis.costs import activation_bytes_per_sequence, cache_bytes, optimizer_bytes
from jaxlm.analysis.mesh_memory import device_memory, device_state, local_model
from jaxlm.analysis.mesh_traffic import Term, sent_over, step_traffic
from jaxlm.analysis.plan import EFFICIENCY, changes_that_help, make_plan, planned_mesh, step_time, utilisation
from jaxlm.config import ExperimentConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig
from jaxlm.config.presets import preset
from jaxlm.errors import UserError
from jaxlm.model.build import build_model, init_params
from jaxlm.sharding.layout import micro_batch_rows

D, F, V, T, L = 16, 24, 40, 8, 4
CONFIG = ExperimentConfig(
    preset="small",
    model=ModelConfig(
        vocab_size=V,
        max_seq_len=T,
        num_layers=L,
        embed_dim=D,
        num_heads=4,
        num_kv_heads=2,
        mlp_dim=F,
        norm="rmsnorm",
        use_bias=False,
        position="rope",
    ),
    train=TrainConfig(batch_size=8, steps=200),
)
KERNELS = L * (2 * D * D + 2 * D * D // 2 + 2 * D * F)
"""Numbers in queries and outputs, in keys and values of half as many heads, and in the MLP."""
SCALES = (2 * L + 1) * D
ONE = {"data": 1, "fsdp": 1, "tensor": 1}
TWO_EACH = {"data": 2, "fsdp": 2, "tensor": 2}


def changed(train=None, optim=None, **model):
    """The small config with these changes."""
    parts = {"model": dataclasses.replace(CONFIG.model, **model), "optim": optim or CONFIG.optim}
    return dataclasses.replace(CONFIG, **parts, train=dataclasses.replace(CONFIG.train, **(train or {})))


def mesh(**sizes):
    return {**ONE, **sizes}


def test_on_one_device_the_memory_is_that_of_the_whole_model():
    memory = device_memory(CONFIG, ONE)
    numbers = V * D + KERNELS + SCALES
    assert memory.parameters == memory.gradients == 4 * numbers
    assert memory.optimizer_state == optimizer_bytes(CONFIG.model)["adamw"]
    assert (memory.gradient_totals, memory.weights_in_use, memory.recomputed_layer) == (0, 0, 0)
    gradient_of_logits = 4 * T * V
    kept = activation_bytes_per_sequence(CONFIG.model) + gradient_of_logits
    assert memory.activations + memory.logits == 8 * kept
    assert memory.logits >= 2 * 8 * gradient_of_logits
    assert memory.total == sum(memory)


def test_each_axis_splits_what_it_is_for():
    whole, counters = 4 * (V * D + KERNELS), 8
    for sizes, parts in (({"data": 4}, 1), ({"fsdp": 4}, 4), ({"tensor": 2}, 2), (TWO_EACH, 4)):
        state = device_state(CONFIG, mesh(**sizes))
        assert state.parameters == whole // parts + 4 * SCALES
        assert state.optimizer_state == 2 * state.parameters + counters


def test_a_parameter_that_fsdp_splits_is_whole_while_it_is_read():
    assert device_state(CONFIG, mesh(fsdp=4)).weights_in_use == 4 * (V * D + KERNELS)
    assert device_state(CONFIG, TWO_EACH).weights_in_use == 4 * (V * D + KERNELS) // 2
    assert device_state(changed(remat=True), mesh(fsdp=4)).weights_in_use == 4 * (V * D + KERNELS // L)
    half = device_state(changed(dtype="bfloat16"), ONE)  # copies in the type of the products, the tied table's too
    assert half.weights_in_use == 2 * (V * D + KERNELS)


@pytest.mark.parametrize(
    ("name", "arguments", "times"),
    [
        ("sgd", (), 0),
        ("sgd", ("momentum=0.9",), 1),
        ("adamw", ("mu_dtype=bfloat16",), 1.5),
        ("lion", (), 1),
    ],
)
def test_the_state_of_an_optimizer_is_split_as_its_parameters_are(name, arguments, times):
    config = changed(optim=OptimConfig(name=name, arguments=arguments))
    for devices in (1, 4):
        state = device_state(config, mesh(fsdp=devices))
        assert 0 <= state.optimizer_state - times * state.parameters <= 12  # counters


@pytest.mark.parametrize("name", ["adamsn", "adafactor"])
def test_reduced_states_are_split_on_the_axes_that_they_still_have(name):
    config = changed(optim=OptimConfig(name=name))
    one, two, four = (device_state(config, mesh(fsdp=n)).optimizer_state for n in (1, 2, 4))
    assert four < two < one
    assert one - two == 2 * (two - four)  # half of what is split goes with each doubling


def test_activations_follow_the_rows_the_heads_and_remat():
    one = device_memory(CONFIG, ONE)
    assert device_memory(CONFIG, mesh(data=2, fsdp=4)).activations == one.activations // 8
    split = device_memory(CONFIG, mesh(tensor=2))
    assert one.activations // 2 < split.activations < one.activations  # the residual stream is whole
    assert split.logits < 0.6 * one.logits
    saved = device_memory(changed(remat=True), ONE)
    assert saved.activations < saved.recomputed_layer + saved.activations < one.activations
    summed = device_memory(changed(train={"grad_accum": 4}), ONE)
    assert (summed.activations, summed.gradient_totals) == (one.activations // 4, one.parameters)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"window": (2, None)}, {"remat": True, "scan_layers": True}, {"remat": True}])
def test_activations_found_with_two_periods_of_layers_are_those_of_all(changes):
    config = changed(**changes)
    memory = device_memory(config, ONE)
    kept = activation_bytes_per_sequence(config.model) + 4 * T * V
    assert memory.activations + memory.logits == 8 * kept


@pytest.mark.parametrize("family", ["bigram", "embedding_bigram", "recurrent"])
def test_the_other_families_have_plans(family):
    sizes = {} if family == "bigram" else {"embed_dim": 16}
    model = ModelConfig(family=family, vocab_size=40, max_seq_len=8, init="torch", **sizes)
    config = dataclasses.replace(CONFIG, model=model)
    plan = make_plan(config, TWO_EACH)
    params = jax.eval_shape(lambda: init_params(build_model(model), jax.random.key(0)))
    assert plan.memory.parameters < sum(leaf.size * 4 for leaf in jax.tree.leaves(params)) / 2
    assert set(sent_over(plan.traffic)) >= {"data+fsdp", "fsdp", "tensor"}
    assert (plan.flops > 0) == (family != "bigram")


def test_what_is_sent_is_each_formula_by_hand():
    def terms(config, **sizes):
        return {(term.name, term.axes): term.sent for term in step_traffic(config, mesh(**sizes))}

    assert terms(CONFIG) == {}
    table, scales = 4 * V * D, 4 * SCALES
    split = table + 4 * KERNELS
    assert terms(CONFIG, data=4) == {  # the gradients of the table as table and as head are summed apart
        ("gradients of parameters that fsdp does not split, summed", "data"): 2 * 3 * (split + table + scales) // 4
    }
    assert terms(CONFIG, fsdp=4) == {
        ("parameters, gathered for the forward pass", "fsdp"): 3 * split // 4,
        ("gradients, summed and scattered", "fsdp"): 3 * (split + table) // 4,
        ("gradients of parameters that fsdp does not split, summed", "fsdp"): 2 * 3 * scales // 4,
    }
    both = terms(CONFIG, data=2, fsdp=2)
    assert both == {
        ("parameters, gathered for the forward pass", "fsdp"): split // 2,
        ("gradients of parameters that fsdp splits, summed", "data+fsdp"): 2 * 3 * (split + table) // 4,
        ("gradients of parameters that fsdp does not split, summed", "data+fsdp"): 2 * 3 * scales // 4,
    }
    untied = terms(changed(tie_embeddings=False), data=4)
    assert sum(untied.values()) == 2 * 3 * (split + table + scales) // 4  # two matrices, each with one gradient
    stream = 4 * 8 * T * D  # float32, all eight rows; of two devices each sends once its size in an all-reduce
    assert terms(CONFIG, tensor=2) == {
        ("output of attention", "tensor"): L * stream,
        ("gradient of the input of attention", "tensor"): L * stream,
        ("output of the MLP", "tensor"): L * stream,
        ("gradient of the input of the MLP", "tensor"): L * stream,
        ("rows of the embedding table", "tensor"): stream,
        ("gradient of the input of the head", "tensor"): stream,
        ("largest logit, sum and target's logit of each token", "tensor"): 3 * 4 * 8 * T,
    }


def test_micro_batches_remat_and_types_change_what_is_sent():
    both = sent_over(step_traffic(CONFIG, TWO_EACH))
    assert both["tensor"] == (4 * L + 2) * 4 * 2 * T * D + 3 * 4 * 2 * T
    cut = sent_over(step_traffic(changed(train={"grad_accum": 2}), TWO_EACH))
    assert cut == {
        axes: sent if axes == "tensor" else 2 * sent for axes, sent in both.items()
    }  # twice, of half the rows
    again = sent_over(step_traffic(changed(remat=True), TWO_EACH))
    assert again["fsdp"] - both["fsdp"] == 4 * KERNELS // 2 // 2
    assert again["tensor"] - both["tensor"] == L * 4 * 2 * T * D
    half = sent_over(step_traffic(changed(dtype="bfloat16"), TWO_EACH))
    assert both["fsdp"] - half["fsdp"] == (4 - 2) * KERNELS // 2 // 2  # the table stays in float32


def test_flops_of_a_step_are_three_forward_passes_and_with_remat_one_more_of_the_layers():
    products = 2 * KERNELS + L * 2 * 2 * T * D
    plan = make_plan(CONFIG, ONE)
    assert plan.flops == plan.useful_flops == 3 * 8 * T * (products + 2 * V * D)
    assert make_plan(CONFIG, TWO_EACH).flops == plan.flops // 8
    saved = make_plan(changed(remat=True), ONE)
    assert saved.flops == plan.flops + 8 * T * products
    assert saved.useful_flops == plan.useful_flops
    characters = local_model(dataclasses.replace(CONFIG.model, vocab_size=41), mesh(tensor=2))
    assert (characters.vocab_size, characters.mlp_dim) == (41, F // 2)  # such a vocabulary stays whole


def test_the_cache_of_a_row_is_split_by_its_heads():
    assert make_plan(CONFIG, ONE).cache == cache_bytes(CONFIG.model, T)
    positions = 4 * T * L + 4
    assert make_plan(CONFIG, mesh(tensor=2)).cache == (cache_bytes(CONFIG.model, T) - positions) // 2 + positions


def test_time_is_bytes_by_the_links_that_a_group_lies_on():
    h100 = accelerator("h100")
    plan = make_plan(CONFIG, TWO_EACH)
    time = step_time(plan, CONFIG, h100)
    assert time.compute == plan.flops / (EFFICIENCY * 494.7e12)
    sent = sent_over(plan.traffic)
    assert time.communication == {axes: count / 450e9 for axes, count in sent.items()}  # eight share NVLink
    assert time.overlapped == max(time.compute, sum(sent.values()) / 450e9) + time.update
    assert time.apart == time.compute + sum(sent.values()) / 450e9 + time.update
    assert utilisation(plan, CONFIG, h100, time.apart) == plan.useful_flops / (8 * 494.7e12 * time.apart)
    wide = changed(train={"batch_size": 64})
    plan = make_plan(wide, mesh(data=4, fsdp=4, tensor=2))  # 8 of 32 in a server: 2 x 2 of fsdp's groups of 4
    time, sent = step_time(plan, wide, h100), sent_over(plan.traffic)
    assert set(sent) == {"fsdp", "tensor", "data+fsdp"}
    assert time.communication["tensor"] == sent["tensor"] / 450e9
    assert time.communication["fsdp"] == sent["fsdp"] / 450e9  # 4 x 2 devices are a server
    assert time.communication["data+fsdp"] == sent["data+fsdp"] / (4 * 50e9)  # four of each server
    plan = make_plan(wide, mesh(data=32))
    assert step_time(plan, wide, h100).communication == {"data": sent_over(plan.traffic)["data"] / (8 * 50e9)}
    plan = make_plan(wide, mesh(data=2, fsdp=8))
    lone = plan._replace(traffic=[Term("x", "data", "all-reduce", 7)])
    assert step_time(lone, wide, h100).communication == {"data": 7 / 50e9}  # one of each server


def test_the_peak_is_that_of_the_products_as_jax_computes_them():
    assert accelerator("a100").peak("float32", "default") == 156e12
    assert accelerator("a100").peak("float32", "float32") == 19.5e12
    assert accelerator("v5p").peak("float32", "default") == accelerator("v5p").peak("bfloat16", "float32") == 459e12
    for dtype, precision in (("float32", "float32"), ("float64", "default")):
        with pytest.raises(UserError, match=f"TPU v5p is known for model.dtype = '{dtype}'.*'{precision}'"):
            accelerator("v5p").peak(dtype, precision)


@pytest.mark.parametrize("name", ACCELERATORS)
def test_an_accelerator_is_described_by_public_sources(name):
    found = ACCELERATORS[name]
    assert all(source.startswith("https://") for source in found.sources)
    assert found.link > (found.network or 0)
    assert found.bfloat16 / found.memory_bandwidth > 100  # products, not memory, are what they are built for


def test_what_helps_is_named_with_what_it_leaves():
    plan = make_plan(CONFIG, mesh(data=2))
    helps = {change.what: change.total for change in changes_that_help(CONFIG, plan)}
    assert list(helps.values()) == sorted(helps.values())
    assert set(helps) >= {"--model.remat", "--train.grad-accum 4", "--mesh.data 1 --mesh.fsdp 2"}
    assert helps["--train.grad-accum 4"] == device_memory(changed(train={"grad_accum": 4}), mesh(data=2)).total
    assert all(total < plan.memory.total for total in helps.values())
    assert "--mesh.tensor 4 (of 8 devices)" not in {
        change.what for change in changes_that_help(CONFIG, make_plan(CONFIG, mesh(tensor=2)))
    }  # two key/value heads


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"data": 3}, "3 x 1 = 3 does not divide the 8 rows of a micro-batch .*batch_size = 8, train.grad_accum = 1"),
        ({"fsdp": 16}, "1 x 16 = 16 does not divide the 8 rows"),
        ({"tensor": 4}, "mesh.tensor = 4 does not divide num_kv_heads = 2"),
    ],
)
def test_what_does_not_divide_is_refused_with_both_numbers(sizes, words):
    with pytest.raises(UserError, match=words):
        make_plan(CONFIG, mesh(**sizes))


def test_a_plan_has_no_rest_of_the_devices():
    assert planned_mesh(MeshConfig(data=4, tensor=2)) == {"data": 4, "fsdp": 1, "tensor": 2}
    with pytest.raises(UserError, match="mesh.fsdp = -1 is the rest of the devices, but a plan has no devices"):
        planned_mesh(MeshConfig(fsdp=-1))
    with pytest.raises(UserError, match="accelerator 'b200' is unknown: choose one of a100, h100"):
        accelerator("b200")


def test_beyond_a_pod_whose_network_is_not_published_there_is_no_time():
    config = changed(train={"batch_size": 512})
    with pytest.raises(UserError, match="512 x TPU v6e are more than the 256 that fast links connect"):
        step_time(make_plan(config, mesh(data=512)), config, accelerator("v6e"))


@pytest.mark.parametrize(("name", "count"), [("gpt3-xl", 1_315_819_520), ("llama-7b", 6_738_415_616)])
def test_the_large_presets_have_the_published_sizes(name, count):
    """Llama 7B has 6,738,415,616 parameters; GPT-3 XL here 24 (12 D^2 + 13 D) + (V + T + 2) D."""
    config = preset(name)
    params = jax.eval_shape(lambda: init_params(build_model(config.model), jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    assert micro_batch_rows(config.train, mesh(data=8, fsdp=8)) == 1
    cfg = config.model
    assert (cfg.scan_layers, cfg.remat, cfg.dtype) == (True, True, "bfloat16")
    assert cfg.vocab_size % 64 == cfg.num_heads % 8 == 0
