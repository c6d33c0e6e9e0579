"""Differentiable optimizers: equal to torch.optim step by step, and with right derivatives."""

from functools import partial

import pytest
import torch

from bilevel import BilevelError, Positive, Refused, Space
from bilevel.domains import optimizer_setting
from bilevel.solvers.optim.functional import FunctionalOptimizer
from bilevel.solvers.optim.optimized import Optimized
from bilevel.solvers.optim.settings import configured
from bilevel.solvers.optim.updates import square_root

SGD, Adam, AdamW, RMSprop = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.RMSprop,
)

OPTIMIZERS = {
    "SGD": partial(SGD, lr=0.1),
    "SGD, weight decay": partial(SGD, lr=0.1, weight_decay=0.2),
    "SGD, momentum": partial(SGD, lr=0.1, momentum=0.9),
    "SGD, momentum, dampening, weight decay": partial(
        SGD, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.2
    ),
    "NAdam": partial(torch.optim.NAdam, lr=0.05, weight_decay=0.1),
    "decoupled NAdam": partial(
        torch.optim.NAdam, lr=0.05, weight_decay=0.1, decoupled_weight_decay=True
    ),
    "Adamax": partial(torch.optim.Adamax, lr=0.1, weight_decay=0.1),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.3, lr_decay=0.01, initial_accumulator_value=0.1),
    "SGD, a decay for each weight": lambda params: SGD(
        [{"params": [p], "weight_decay": 0.1 * i} for i, p in enumerate(params)], lr=0.1
    ),
    "AdamW, a decay for each weight": lambda params: AdamW(
        [{"params": [p], "weight_decay": 0.3 * i} for i, p in enumerate(params)], lr=0.1
    ),
    "SGD, Nesterov": partial(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": partial(Adam, lr=0.1),
    "Adam, weight decay": partial(Adam, lr=0.1, betas=(0.7, 0.9), eps=1e-3, weight_decay=0.2),
    "AdamW": partial(AdamW, lr=0.1, betas=(0.7, 0.9)),
    "AdamW, no decay": partial(AdamW, lr=0.1, weight_decay=0.0),
    "RMSprop": partial(RMSprop, lr=0.1),
    "RMSprop, weight decay": partial(RMSprop, lr=0.1, alpha=0.8, eps=1e-3, weight_decay=0.2),
    "RMSprop, centered": partial(RMSprop, lr=0.1, alpha=0.8, centered=True),
    "RMSprop, momentum": partial(RMSprop, lr=0.1, alpha=0.8, momentum=0.9),
    "RMSprop, centered, momentum": partial(
        RMSprop, lr=0.1, alpha=0.8, momentum=0.9, centered=True, weight_decay=0.1
    ),
}
all_optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
NOTHING = Space(decay=Positive(init=1.0))
STEPS = 20


def weights():
    draws = torch.Generator().manual_seed(0)
    return {name: torch.randn(4, generator=draws).double() for name in ("a", "b", "unused")}


def gradients(step, params):
    """Return noisy gradients of a curved loss.

    Two entries of `a` have zero gradient in the first seven steps; `unused` has no gradient.
    """
    draws = torch.Generator().manual_seed(step)
    seen = torch.tensor([1.0, 0.0, 0.0, 1.0] if step < 7 else [1.0] * 4).double()
    noise = {name: torch.randn(4, generator=draws).double() for name in ("a", "b")}
    return [seen * (params["a"].tanh() + noise["a"]), params["b"] * params["a"] + noise["b"], None]


def run(functional, point, settings, steps=STEPS, first=0):
    for step in range(first, first + steps):
        point = functional.step(*point, gradients(step, point[0]), settings)
    return point


# --- values ---


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@all_optimizers
def test_the_function_takes_the_steps_of_its_optimizer(make, clip_norm):
    """Compare weights and memory after each of 20 steps, also for zero and absent gradients."""
    theirs, ours = (Optimized(weights(), make, clip_norm=clip_norm) for _ in range(2))
    functional = FunctionalOptimizer(ours, NOTHING)
    point, settings = functional.read(), functional.settings({})
    for step in range(STEPS):
        for leaf, gradient in zip(theirs.leaves, gradients(step, theirs.detached()), strict=True):
            leaf.grad = gradient
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(theirs.leaves, clip_norm)
        theirs.optimizer.step()
        point = functional.step(*point, gradients(step, point[0]), settings)
        torch.testing.assert_close(point[0], theirs.detached(), rtol=1e-13, atol=1e-13)
    assert torch.equal(point[0]["unused"], weights()["unused"])
    moved = (point[0]["a"] - weights()["a"]).abs().min()
    assert moved > 0.01, "a functional that loses its parameters does not move them"

    functional.write(*point)
    for mine, other in zip(ours.leaves, theirs.leaves, strict=True):
        state = {
            key: value for key, value in theirs.optimizer.state[other].items() if value is not None
        }
        torch.testing.assert_close(dict(ours.optimizer.state[mine]), state, rtol=1e-13, atol=1e-13)


@all_optimizers
def test_steps_of_optimizer_and_function_may_alternate(make):
    """The optimizer continues from what the function wrote, and the reverse."""
    theirs, ours = Optimized(weights(), make), Optimized(weights(), make)
    functional = FunctionalOptimizer(ours, NOTHING)
    for step in range(12):
        for trained in (theirs, ours):
            if trained is ours and step % 4 < 2:
                functional.write(
                    *run(
                        functional, functional.read(), functional.settings({}), steps=1, first=step
                    )
                )
                continue
            for leaf, gradient in zip(
                trained.leaves, gradients(step, trained.detached()), strict=True
            ):
                leaf.grad = gradient
            trained.optimizer.step()
    torch.testing.assert_close(ours.detached(), theirs.detached(), rtol=1e-13, atol=1e-13)


def test_an_expanded_gradient_is_written_back_as_a_copy():
    """Autograd returns expanded tensors; an in-place step on them fails or changes many weights."""
    trained = Optimized({"w": torch.zeros(3)}, partial(SGD, lr=1.0, momentum=0.5))
    functional = FunctionalOptimizer(trained, NOTHING)
    params, moments = functional.read()
    functional.write(
        *functional.step(params, moments, [torch.ones(()).expand(3)], functional.settings({}))
    )
    trained.leaves[0].grad = torch.tensor([1.0, 2.0, 3.0])
    trained.optimizer.step()
    assert trained.detached()["w"].tolist() == [-2.5, -3.5, -4.5]


# --- derivatives ---


def final(make, start, settings=None, clip_norm=None):
    """Return the sum of all weights after 20 steps, differentiable in start and settings."""
    functional = FunctionalOptimizer(Optimized(start, make, clip_norm=clip_norm), NOTHING)
    point = (dict(start), functional.read()[1])
    params, _ = run(functional, point, {**functional.settings({}), **(settings or {})})
    return sum((p * torch.arange(1.0, 5.0).double()).sum() for p in params.values())


def central(function, x, h=1e-6):
    out = torch.zeros_like(x)
    for i in range(x.numel()):
        e = torch.zeros_like(x)
        e.view(-1)[i] = h
        out.view(-1)[i] = (function(x + e) - function(x - e)) / (2 * h)
    return out


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@all_optimizers
def test_the_derivative_in_the_start_is_that_of_central_differences(make, clip_norm):
    """The derivative is finite for weights that had no gradient yet."""
    start = weights()

    def at(a):
        return final(make, {**start, "a": a}, clip_norm=clip_norm)

    a = start["a"].clone().requires_grad_()
    (found,) = torch.autograd.grad(at(a), a)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, central(at, start["a"]), rtol=1e-6, atol=1e-7)


SETTINGS = [
    ("SGD, momentum", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2}),
    ("SGD, Nesterov", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    ("SGD, momentum, dampening, weight decay", {"lr": 0.1, "momentum": 0.8}),
    ("Adam", {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 0.01, "weight_decay": 0.1}),
    ("AdamW", {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 0.01, "weight_decay": 0.1}),
    ("RMSprop", {"lr": 0.1, "alpha": 0.9, "eps": 0.01, "momentum": 0.5, "weight_decay": 0.1}),
    ("RMSprop, centered, momentum", {"lr": 0.1, "alpha": 0.9, "eps": 0.1, "momentum": 0.5}),
]


@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=[name for name, _ in SETTINGS])
def test_the_derivative_in_every_setting_is_that_of_central_differences(name, settings):
    def at(values):
        return final(OPTIMIZERS[name], weights(), dict(zip(settings, values, strict=True)))

    values = torch.tensor(list(settings.values()), dtype=torch.float64)
    leaf = values.clone().requires_grad_()
    (found,) = torch.autograd.grad(at(leaf), leaf)
    assert (found.abs() > 1e-6).all()
    torch.testing.assert_close(found, central(at, values), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=[name for name, _ in SETTINGS])
def test_a_setting_as_a_tensor_changes_no_value(name, settings):
    tensors = {key: torch.tensor(value, dtype=torch.float64) for key, value in settings.items()}
    numbers, both = (final(OPTIMIZERS[name], weights(), s) for s in (settings, tensors))
    torch.testing.assert_close(both, numbers, rtol=1e-12, atol=0)


def test_adam_divides_by_the_root_of_the_second_moment():
    """The first step of Adam is lr · sign(g), whatever the size of g."""
    for size in (1e-3, 1.0, 1e3):
        functional = FunctionalOptimizer(
            Optimized({"w": torch.zeros(2).double()}, partial(Adam, lr=0.1, eps=0.0)), NOTHING
        )
        params, moments = functional.read()
        g = size * torch.tensor([1.0, -1.0]).double()
        stepped = functional.step(params, moments, [g], functional.settings({}))[0]["w"]
        torch.testing.assert_close(
            stepped, torch.tensor([-0.1, 0.1], dtype=torch.float64), rtol=1e-12, atol=0
        )


# --- settings that λ holds, schedules ---


def tuning(make, scheduler=None, **settings):
    space = Space(
        **{f"of {name}": optimizer_setting(name, init=value) for name, value in settings.items()}
    )
    trained = Optimized(weights(), configured(make, settings), scheduler)
    return FunctionalOptimizer(trained, space), space


def test_settings_in_lambda_replace_those_of_the_optimizer():
    functional, space = tuning(partial(Adam, lr=0.5), lr=0.01, beta1=0.8)
    hypers = space.constrain(space.init(torch.float64))
    settings = functional.settings(hypers)
    assert settings["lr"] is hypers["of lr"]
    assert settings["beta1"] is hypers["of beta1"]
    assert (settings["beta2"], settings["eps"]) == (0.999, 1e-8)


def test_a_frozen_setting_is_a_constant_of_the_optimizer():
    space = Space(rate=Positive(init=0.02, optimizer="lr", frozen=True), decay=Positive(init=1.0))
    functional = FunctionalOptimizer(
        Optimized(weights(), configured(partial(SGD, lr=0.5), {"lr": 0.02})), space
    )
    assert functional.tuned == {}
    assert functional.settings(space.constrain(space.init()))["lr"] == 0.02


@pytest.mark.parametrize("first", [1.0, 0.5])
def test_a_schedule_multiplies_a_tuned_learning_rate(first):
    """The factor is that of the optimizer's own learning rate, from the first epoch on."""

    def factor(epoch):
        return first * 0.1**epoch

    functional, space = tuning(
        partial(SGD, lr=0.5), partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=factor), lr=0.2
    )
    moved = space.constrain(space.unconstrain({"of lr": torch.tensor(0.3)}))
    for epoch in range(3):
        torch.testing.assert_close(
            functional.settings(moved)["lr"], torch.tensor(0.3 * factor(epoch))
        )
        functional.optimized.optimizer.step()
        functional.optimized.epoch_ended(None)


# --- optimizers without a differentiable form ---


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            partial(torch.optim.Adadelta, lr=0.1),
            "inner_optimizer=Adadelta has no differentiable form here; choose one of torch",
        ),
        (
            partial(Adam, amsgrad=True),
            r"inner_optimizer\.amsgrad=true of Adam has no .* leave it out",
        ),
        (partial(Adam, fused=True), r"inner_optimizer\.fused=true of Adam has no"),
        (
            partial(Adam, decoupled_weight_decay=True),
            r"\.decoupled_weight_decay=true of Adam has no",
        ),
        (
            lambda params: SGD([{"params": [p], "lr": 1 / (1 + i)} for i, p in enumerate(params)]),
            "inner_optimizer has several groups of parameters that differ in more than",
        ),
    ],
    ids=["Adadelta", "amsgrad", "fused", "decoupled", "groups"],
)
def test_an_optimizer_without_a_differentiable_form_is_refused(make, match):
    with pytest.raises(Refused, match=match):
        FunctionalOptimizer(Optimized(weights(), make), NOTHING)


def test_a_setting_that_the_optimizer_lacks_is_refused():
    space = Space(first=optimizer_setting("beta1", init=0.9))
    with pytest.raises(
        Refused, match="`first` sets `beta1`, but inner_optimizer=SGD has no such setting"
    ):
        FunctionalOptimizer(Optimized(weights(), partial(SGD, lr=0.1)), space)
    with pytest.raises(BilevelError, match="inner_optimizer has no setting `beta1`"):
        Optimized(weights(), configured(partial(SGD, lr=0.1), {"beta1": 0.9}))


def test_the_root_of_zero_is_zero_in_half_precision():
    """√0 and its derivative are 0 in every dtype."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        v = torch.tensor([0.0, 4.0], dtype=dtype, requires_grad=True)
        root = square_root(v)
        (slope,) = torch.autograd.grad(root.sum(), v)
        assert (root.tolist(), slope.tolist()) == ([0.0, 2.0], [0.0, 0.25])
