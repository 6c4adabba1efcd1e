"""What the reference optimizers promise besides their formulas."""

import pytest
import torch

from torchref.optim import SGD, Adafactor, Adam, AdamSN, AdamW

KINDS = {
    "sgd": lambda params: SGD(params, 0.1, 0.9),
    "adam": Adam,
    "adamw": AdamW,
    "adamsn": AdamSN,
    "adafactor": lambda params: Adafactor(params, momentum=0.9),
}


def problem(dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((5, 3), (7,))]


def train(optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
    return params


@pytest.mark.parametrize("kind", list(KINDS))
def test_state_of_bfloat16_parameters_is_float32_also_when_loaded(kind):
    optimizer = KINDS[kind](problem(torch.bfloat16))
    params = train(optimizer, 3)
    kept = [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
    assert kept
    assert {x.dtype for x in kept} == {torch.float32}
    assert {p.dtype for p in params} == {torch.bfloat16}
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    again = KINDS[kind](copies)
    again.load_state_dict(optimizer.state_dict())
    train(optimizer, 3, seed=1)
    train(again, 3, seed=1)
    for p, other in zip(params, copies, strict=True):
        torch.testing.assert_close(p, other, rtol=0, atol=0)
        for name, x in optimizer.state[p].items():
            torch.testing.assert_close(again.state[other][name], x, rtol=0, atol=0)


def test_a_bfloat16_step_is_the_float32_step_rounded_once():
    narrow, wide = problem(torch.bfloat16), [torch.nn.Parameter(p.detach().float()) for p in problem(torch.bfloat16)]
    for p, q in zip(narrow, wide, strict=True):
        p.grad = torch.full_like(p, 0.5)
        q.grad = p.grad.float()
    AdamW(narrow, 0.1, weight_decay=7).step()
    AdamW(wide, 0.1, weight_decay=7).step()
    for p, q in zip(narrow, wide, strict=True):
        torch.testing.assert_close(p, q.to(torch.bfloat16), rtol=0, atol=0)


def test_the_closure_is_called_with_gradients_on_and_its_value_returned():
    (p, unused) = problem(torch.float32)
    before, kept = p.detach().clone(), unused.detach().clone()

    def closure():
        p.grad = torch.autograd.grad(p.square().sum(), p)[0]
        return "the loss"

    assert SGD([p, unused], 0.25).step(closure) == "the loss"
    torch.testing.assert_close(p.detach(), 0.5 * before)
    torch.testing.assert_close(unused.detach(), kept, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: SGD(p, -1.0), "lr = -1.0 is invalid: give a number at least 0"),
        (lambda p: SGD(p, 0.1, 1.0), "momentum = 1.0 is invalid: give a number at least 0 and below 1"),
        (lambda p: SGD(p, 0.1, nesterov=True), "nesterov = True with momentum = 0.0"),
        (lambda p: Adam(p, beta=1), "beta = 1 is invalid"),
        (lambda p: Adam(p, gamma=None), "gamma = None is invalid"),
        (lambda p: Adam(p, eps=float("nan")), "eps = nan is invalid"),
        (lambda p: Adam(p, eps_placement="floor"), "eps_placement = 'floor' is unknown: choose one of outside, uncorr"),
        (lambda p: AdamW([{"params": p, "weight_decay": -0.1}]), "weight_decay = -0.1 is invalid"),
        (
            lambda p: AdamSN(p, subset="rows"),
            "subset = 'rows' is unknown: choose one of per_output, per_input, auto, sm",
        ),
        (lambda p: AdamSN(p, subset_size=0), "subset_size = 0 is invalid"),
        (lambda p: train(AdamSN(p, subset_size=2), 1), "subset_size = 2 does not divide 3: give a divisor or None"),
        (lambda p: Adafactor(p, clipping_threshold=0), "clipping_threshold = 0 is invalid: give a number above 0"),
        (lambda p: Adafactor(p, eps_placement="outside"), "choose one of variance, squares, floor"),
        (lambda p: Adafactor(p, decay_exponent=-0.8), "decay_exponent = -0.8 is invalid"),
    ],
)
def test_a_bad_value_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make(problem(torch.float32))


def test_an_option_that_is_not_there_is_refused():
    with pytest.raises(TypeError, match="weigth_decay"):
        AdamW(problem(torch.float32), weigth_decay=0.1)
