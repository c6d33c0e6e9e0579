"""Tests of draws from the global generators: found out, seeded, and never left behind."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bilevel import ModuleProblem, Positive, Space
from bilevel.data.global_rng import NEVER_DRAW, GlobalDraws, seeded


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Noisy(nn.Module):
    """Draw from the global generator where the first input is negative."""

    def forward(self, x):
        return x + torch.rand(()) if x[0] < 0 else x


class Broken(nn.Module):
    """Draw, and raise."""

    def forward(self, x):
        torch.rand(())
        if x[0] > 0:
            raise RuntimeError("broken")
        return x


class Failing(nn.Module):
    """Raise after a draw where the first input is positive."""

    def forward(self, x):
        if x[0] > 0:
            torch.rand(())
            raise RuntimeError("failing")
        return x


def called(draws, module, inputs, *, always):
    """Return the outputs, and the state of the generator that is given."""
    own, outputs = generator(), []
    for x in inputs:
        if always:
            with seeded(own):
                outputs.append(module(x))
        else:
            outputs.append(draws(lambda x=x: module(x), own))
    return torch.stack(outputs), own.get_state()


POSITIVE, NEGATIVE = torch.tensor([1.0]), torch.tensor([-1.0])


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (nn.Sequential(nn.Linear(1, 1), nn.Tanh()), [POSITIVE] * 3),
        (nn.Dropout(0.5), [torch.ones(8)] * 3),
        (Noisy(), [POSITIVE, POSITIVE, NEGATIVE, POSITIVE, NEGATIVE]),
        (Noisy(), [NEGATIVE, POSITIVE, NEGATIVE]),
        (nn.Sequential(nn.Identity(), nn.RReLU()), [-torch.ones(8)] * 3),
    ],
)
def test_a_call_equals_one_that_is_always_seeded(module, inputs):
    """Outputs and the generator that is given agree bit for bit; the global one stays."""
    before = torch.get_rng_state()
    draws = GlobalDraws(module)
    outputs, state = called(draws, module, inputs, always=False)
    expected, expected_state = called(None, module, inputs, always=True)
    assert torch.equal(outputs, expected)
    assert torch.equal(state, expected_state)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("module", [Broken(), Failing()])
def test_an_error_leaves_the_global_generator_as_it_was(module):
    draws, own = GlobalDraws(module), generator()
    draws(lambda: module(NEGATIVE), own)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match=r"broken|failing"):
        draws(lambda: module(POSITIVE), own)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_are_remembered():
    quiet, noisy = GlobalDraws(), GlobalDraws(Noisy())
    assert quiet.draws is noisy.draws is None
    quiet(lambda: None, generator())
    assert quiet.draws is False
    for x, known in [(POSITIVE, False), (NEGATIVE, True), (POSITIVE, True)]:
        noisy(lambda x=x: Noisy()(x), generator())
        assert noisy.draws is known


def test_without_a_generator_nothing_is_seeded():
    before = torch.get_rng_state()
    GlobalDraws()(lambda: torch.rand(()), None)
    assert not torch.equal(torch.get_rng_state(), before)


def test_layers_that_never_draw_are_those_of_pytorch_without_hooks():
    layers = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert GlobalDraws(layers).draws is False
    hooked, subclass = copy.deepcopy(layers), type("Own", (nn.Linear,), {})(2, 2)
    hooked[0].register_forward_pre_hook(lambda module, args: (args[0] + torch.rand(()),))
    patched = copy.deepcopy(layers)
    patched[1].forward = lambda x: F.dropout(x)
    for module in (hooked, patched, nn.Sequential(subclass), nn.Dropout(), nn.RReLU()):
        assert GlobalDraws(module).draws is None
    weight = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    assert GlobalDraws(weight).draws is None


@pytest.mark.parametrize("layer", sorted(NEVER_DRAW, key=lambda layer: layer.__name__))
def test_the_source_of_a_listed_layer_names_no_draw(layer):
    source = inspect.getsource(layer.forward)
    for word in ("dropout", "bernoulli", "rand", "rrelu"):
        assert word not in source


class Fitted(ModuleProblem):
    def inner_objective(self, hypers, params, prediction, batch):
        return F.mse_loss(prediction, batch[1]) * hypers["scale"]

    outer_objective = inner_objective


def test_a_problem_draws_as_before_whatever_the_global_generator_does():
    """The masks follow the generator of `predict`, also where others draw in between."""
    x, y = torch.randn(4, 3, generator=generator(1)), torch.zeros(4, 2)
    module = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    problem = Fitted(module, Space(scale=Positive(init=1.0)), (x, y), (x, y))
    params, carry = problem.init(generator())

    def losses(between):
        own, found = generator(3), []
        for _ in range(3):
            hypers = problem.space.constrain(problem.space.init())
            found.append(problem.inner_loss(hypers, params, carry, (x, y), own)[0])
            between()
        return torch.stack(found)

    assert torch.equal(losses(lambda: None), losses(lambda: torch.rand(5)))
    assert losses(lambda: None).unique().numel() == 3
