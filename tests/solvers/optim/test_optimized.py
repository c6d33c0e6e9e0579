"""Options of optimizers that do not work on trained tensors are refused in one sentence."""

from functools import partial

import pytest
import torch
import torch.nn as nn
from torch.optim import LBFGS, SGD, Adam, AdamW, SparseAdam

from bilevel import BilevelError
from bilevel.solvers import Fixed, Implicit, Search, SelfTuning, Unrolled
from bilevel.solvers.optim.optimized import Optimized
from tests.support.solver_cases import Decayed, ready


class Sharp(SGD):
    """An optimizer of somebody else whose step needs a closure."""

    def step(self, closure):
        closure()


WRONG = {
    "closure": (LBFGS, r"LBFGS needs a closure or sparse gradients, .* another optimizer"),
    "closure of somebody else": (partial(Sharp, lr=0.1), "Sharp needs a closure"),
    "sparse": (SparseAdam, "SparseAdam needs a closure or sparse gradients"),
    "maximize": (
        partial(SGD, lr=0.1, maximize=True),
        "maximize=True of SGD climbs the loss, and solvers descend it; leave maximize out",
    ),
    "maximize, fused": (partial(AdamW, maximize=True, fused=True), "maximize=True of AdamW"),
    "differentiable": (
        partial(SGD, lr=0.1, differentiable=True),
        "differentiable=True of SGD cannot change .* leave differentiable out",
    ),
    "differentiable Adam": (partial(Adam, differentiable=True), "differentiable=True of Adam"),
    "capturable": (
        partial(Adam, capturable=True),
        "capturable=True of Adam needs tensors on a GPU, and these are not; leave capturable out",
    ),
    "capturable in one group": (
        lambda params: torch.optim.RMSprop([{"params": params, "capturable": True}]),
        "capturable=True of RMSprop",
    ),
}


def problem():
    return Decayed(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


@pytest.mark.parametrize(("make", "match"), WRONG.values(), ids=WRONG)
def test_an_option_that_does_not_work_is_refused(make, match):
    with pytest.raises(BilevelError, match=match):
        Optimized({"w": torch.ones(2)}, make)
    for solver in (Fixed, Implicit, SelfTuning, Search):
        with pytest.raises(BilevelError, match=match):
            ready(problem(), solver(inner_optimizer=make))


@pytest.mark.parametrize("option", ["maximize", "differentiable", "capturable", "foreach", "fused"])
def test_the_plain_optimizer_is_the_remedy(option):
    ready(problem(), SelfTuning(inner_optimizer=partial(Adam, **{option: False}))).step()
    ready(problem(), Unrolled(inner_optimizer=partial(Adam, **{option: False}))).step()
    if option in ("foreach", "fused"):
        ready(problem(), Implicit(inner_optimizer=partial(Adam, **{option: True}))).step()


LEFT_OUT = {
    "biases": lambda params: SGD([p for p in params if p.ndim > 1], lr=0.1),
    "a rate of 0": lambda params: SGD([{"params": [p], "lr": 0.1 * (p.ndim > 1)} for p in params]),
}


@pytest.mark.parametrize("make", LEFT_OUT.values(), ids=LEFT_OUT)
def test_an_optimizer_that_trains_a_part_of_w_is_refused(make):
    """A solver would take the response of the other part to λ, which never moves."""
    with pytest.raises(BilevelError, match=r"inner_optimizer does not train `0\.bias` .*module"):
        ready(problem(), Implicit(inner_optimizer=make))
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    for layer in (module[0], module[2]):
        layer.bias.requires_grad_(False)
    solver = ready(Decayed(module), Implicit(inner_optimizer=make))
    assert list(solver.core.weights.tensors) == ["0.weight", "2.weight"]
    solver.step()


class Averaging(torch.optim.SGD):
    """An optimizer of other weights in evaluation, as schedule-free ones are."""

    def train(self):
        """Go to the weights of training."""

    def eval(self):
        """Go to the average."""


def test_an_optimizer_with_weights_for_evaluation_is_refused():
    with pytest.raises(BilevelError, match="Averaging keeps other weights for evaluation"):
        Optimized({"w": torch.ones(2)}, partial(Averaging, lr=0.1))
