"""A hyperparameter with one value per example acts on that example alone."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bilevel import (
    BilevelError,
    Interval,
    ModuleProblem,
    Positive,
    Real,
    Space,
    along_examples,
    check_problem,
    solvers,
    squared_norm,
)
from bilevel.solvers.hyper_schedules import Gaussian

CPU, B = torch.device("cpu"), 8
WORDS = "with one value per example"


class PerExample(ModuleProblem):
    """Cross-entropy of inputs that `change(x, λ, generator)` alters in training."""

    def __init__(self, module, shape, change=None, weigh=None, *, domain=None, **space):
        draws = torch.Generator().manual_seed(0)
        splits = [
            (torch.randn(3 * B, *shape, generator=draws).double(), torch.arange(3 * B) % 2)
            for _ in range(2)
        ]
        self.change, self.weigh = change, weigh
        space = {"strength": domain or Positive(init=0.5), **space}
        super().__init__(module.double(), Space(**space), *splits, batch_size=B)

    def inputs(self, hypers, batch, *, train, generator):
        x = batch[0]
        if train and self.change is not None:
            x = self.change(x, hypers["strength"], generator)
        return (x,), {}

    def inner_objective(self, hypers, params, prediction, batch):
        if self.weigh is not None:
            return self.weigh(hypers["strength"], prediction, batch[1])
        return F.cross_entropy(prediction, batch[1])

    def outer_objective(self, hypers, params, prediction, batch):
        return F.cross_entropy(prediction, batch[1])


def noise(x, generator):
    return torch.randn(x.shape, generator=generator, dtype=x.dtype)


def mask(x, rate, generator):
    return x * (torch.rand(x.shape, generator=generator, dtype=x.dtype) >= rate)


def gated(x, strength, generator):
    """Multiply by one draw per example, laid along the last axis."""
    draws = torch.rand(len(x), generator=generator, dtype=x.dtype)
    return x * (1 + strength * draws)


def dense(features, norm=False):
    layers = [nn.BatchNorm1d(5)] if norm else []
    return nn.Sequential(nn.Linear(features, 5), *layers, nn.Tanh(), nn.Linear(5, 2))


def tokens(length):
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * length, 2))


def conv(channels, size, norm=False):
    norms = [nn.BatchNorm2d(4)] if norm else []
    layers = [nn.Conv2d(channels, 4, 3, padding=1), *norms, nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4 * size * size, 2))


RATE = Interval(low=0.0, high=0.9, init=0.3, differentiable=False)


def scaled_along(axis):
    def change(x, strength, generator):
        shape = [1] * x.ndim
        shape[axis] = -1
        return x + strength.reshape(shape if strength.ndim else ()) * noise(x, generator)

    return change


def smeared(x, strength, generator):
    return x + strength.mean() * noise(x, generator)


def sorted_strengths(x, strength, generator):
    return x + along_examples(strength.flip(-1) if strength.ndim else strength, x) * noise(
        x, generator
    )


def per_class(strength, prediction, labels):
    return (strength * F.softplus(prediction)).mean() - prediction.mean()


def outer_product(strength, prediction, labels):
    return (strength * F.cross_entropy(prediction, labels, reduction="none")[:, None]).mean()


def temperature(strength, prediction, labels):
    return F.cross_entropy(prediction / strength, labels)


def eight(network):
    """Return eight classes, as many as examples."""
    return nn.Sequential(network, nn.Tanh(), nn.Linear(2, B))


WRONG = {
    "features": lambda: PerExample(dense(B), (B,), scaled_along(-1)),
    "features, batch norm": lambda: PerExample(dense(B, norm=True), (B,), scaled_along(-1)),
    "features of another number": lambda: PerExample(dense(6), (6,), scaled_along(-1)),
    "one example more than features": lambda: PerExample(dense(B - 1), (B - 1,), scaled_along(-1)),
    "tokens": lambda: PerExample(tokens(B), (B, 3), scaled_along(1)),
    "channels": lambda: PerExample(conv(B, 4), (B, 4, 4), scaled_along(1)),
    "channels, batch norm": lambda: PerExample(conv(B, 4, norm=True), (B, 4, 4), scaled_along(1)),
    "columns of pixels": lambda: PerExample(conv(1, B), (1, B, B), scaled_along(-1)),
    "dropout mask": lambda: PerExample(dense(B, norm=True), (B,), mask, domain=RATE),
    "one draw per example": lambda: PerExample(dense(B), (B,), gated),
    "mean over the batch": lambda: PerExample(dense(6), (6,), smeared),
    "in another order": lambda: PerExample(dense(6, norm=True), (6,), sorted_strengths),
    "losses per class": lambda: PerExample(eight(dense(6)), (6,), None, per_class),
    "losses of every pair": lambda: PerExample(dense(6), (6,), None, outer_product),
    "temperature of classes": lambda: PerExample(eight(dense(6)), (6,), None, temperature),
}


def set_up(problem, solver):
    data = problem.data(CPU, torch.Generator().manual_seed(0))
    solver.setup(problem, data, CPU, torch.Generator().manual_seed(0))
    return solver


DRAW_PER_EXAMPLE = {
    "delta_stn": solvers.delta_stn,
    "centered_stn": solvers.centered_stn,
    "stn": solvers.stn,
    "fixed, perturbed": lambda: solvers.Fixed(hypers=Gaussian(0.1)),
}
"""Solvers that give a hyperparameter one value per example."""


@pytest.mark.parametrize("make", WRONG.values(), ids=WRONG)
def test_a_value_that_acts_on_other_examples_is_found(make):
    report = check_problem(make(), solvers={})
    assert not report.ok
    assert str(report).count(f"`strength` {WORDS}") == 1
    for solver in DRAW_PER_EXAMPLE.values():
        with pytest.raises(BilevelError, match=f"`strength` {WORDS}"):
            set_up(make(), solver())


@pytest.mark.parametrize("make", WRONG.values(), ids=WRONG)
def test_the_remedy_of_a_common_value_works(make):
    problem = make()
    problem.space = problem.space.override({"strength": {"per_example": False}})
    assert WORDS not in str(check_problem(problem, solvers={}))
    set_up(problem, solvers.delta_stn()).step()


def broadcast(x, strength, generator):
    return x + along_examples(strength, x) * noise(x, generator)


def broadcast_mask(x, rate, generator):
    return mask(x, along_examples(rate, x), generator)


def weighted(strength, prediction, labels):
    return (strength * F.cross_entropy(prediction, labels, reduction="none")).mean()


def contrasts(strength, prediction, labels):
    """Compare every example with all others, at a temperature of its own."""
    similar = prediction @ prediction.T
    return F.cross_entropy(similar / along_examples(strength, similar), torch.arange(len(similar)))


class OwnNorm(nn.Module):
    """Batch statistics in elementary operations."""

    def forward(self, x):
        return (x - x.mean(0)) / (x.std(0) + 1e-3)


class Pooled(nn.Module):
    """Returns a pair of predictions, one of which has two rows per example."""

    def __init__(self, features):
        super().__init__()
        self.layer = nn.Linear(features, 2)

    def forward(self, x):
        y = self.layer(x)
        return y, y.repeat_interleave(2, 0)


class Pairs(PerExample):
    def inner_objective(self, hypers, params, prediction, batch):
        return F.cross_entropy(prediction[0], batch[1]) + prediction[1].square().mean()

    outer_objective = inner_objective


RIGHT = {
    "features": lambda: PerExample(dense(B), (B,), broadcast),
    "features, batch norm": lambda: PerExample(dense(B, norm=True), (B,), broadcast),
    "tokens": lambda: PerExample(tokens(B), (B, 3), broadcast),
    "channels, batch norm": lambda: PerExample(conv(B, 4, norm=True), (B, 4, 4), broadcast),
    "dropout mask": lambda: PerExample(dense(B, norm=True), (B,), broadcast_mask, domain=RATE),
    "losses of examples": lambda: PerExample(dense(6), (6,), None, weighted),
    "own statistics": lambda: PerExample(
        nn.Sequential(nn.Linear(B, 5), OwnNorm(), nn.Linear(5, 2)), (B,), broadcast
    ),
    "contrasts": lambda: PerExample(dense(6), (6,), None, contrasts),
    "rows of an example": lambda: Pairs(Pooled(6), (6,), broadcast),
    "a fixed dropout too": lambda: PerExample(
        nn.Sequential(nn.Dropout(0.5), dense(B, norm=True)), (B,), broadcast
    ),
}


@pytest.mark.parametrize("make", RIGHT.values(), ids=RIGHT)
def test_a_value_that_acts_on_its_own_example_is_accepted(make):
    assert WORDS not in str(check_problem(make(), solvers={}))
    for solver in DRAW_PER_EXAMPLE.values():
        set_up(make(), solver()).step()


def test_only_the_wrong_one_of_two_is_named():
    class Two(PerExample):
        def inner_objective(self, hypers, params, prediction, batch):
            penalty = (hypers["decay"] * squared_norm(params)).mean()
            return super().inner_objective(hypers, params, prediction, batch) + penalty

    decay = Positive(init=0.1)
    report = check_problem(Two(dense(B), (B,), scaled_along(-1), decay=decay), solvers={})
    assert re.findall(f"`(.*?)` {WORDS}", str(report)) == ["strength"]


def test_two_that_are_wrong_only_together_are_named_together():
    class Product(PerExample):
        def inner_objective(self, hypers, params, prediction, batch):
            loss = super().inner_objective(hypers, params, prediction, batch)
            one, other = hypers["strength"], hypers["shift"]
            both = one.ndim and other.ndim
            return loss + (one.sum() if both else one.mean()) + other.mean()

    report = check_problem(Product(dense(6), (6,), shift=Real(init=0.1)), solvers={})
    assert f"`strength`, `shift` {WORDS}" in str(report)


def test_a_run_without_values_per_example_is_not_refused():
    set_up(WRONG["features"](), solvers.implicit_cg()).step()
