"""Tests of the initial values of the structured response."""

import math

import pytest
import torch
import torch.nn as nn

from bilevel import BilevelError
from bilevel.params import detached
from bilevel.solvers import SelfTuning, Structured
from tests.support.solver_cases import Decayed, ready


def drawn(weights, **settings):
    """Return W₁ of each weight."""
    draws = torch.Generator().manual_seed(0)
    tensors = Structured(**settings).init(weights, 2, {}, draws)
    return {name: tensors[f"weights.{name}"] for name in weights}


def rms(tensor):
    return float(tensor.double().square().mean().sqrt())


WEIGHTS = {
    "he": torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(1)) * math.sqrt(2 / 72),
    "large": 5 * torch.randn(40, 30, generator=torch.Generator().manual_seed(2)),
    "half": torch.randn(40, 30, generator=torch.Generator().manual_seed(3)).bfloat16(),
    "zero": torch.zeros(20, 50),
    "bias": 7 * torch.ones(400),
}
FAN_IN = {"he": 72, "large": 30, "half": 30, "zero": 50, "bias": 400}


def test_a_response_has_the_root_mean_square_of_its_weight():
    found = drawn(WEIGHTS)
    for name in ("he", "large", "half"):
        size = rms(WEIGHTS[name])
        assert rms(found[name]) == pytest.approx(size, rel=0.05)
        assert float(found[name].abs().max()) <= math.sqrt(3) * size * (1 + 1e-6)  # uniform


@pytest.mark.parametrize(
    ("init", "names"), [("fan_in", list(WEIGHTS)), ("weights", ["zero", "bias"])]
)
def test_a_vector_a_zero_weight_and_fan_in_take_the_bound_of_the_fan_in(init, names):
    found = drawn(WEIGHTS, init=init)
    for name in names:
        bound = 1 / math.sqrt(FAN_IN[name])
        assert 0.95 * bound < float(found[name].abs().max()) <= bound


def test_the_default_layer_of_pytorch_has_about_the_bound_of_the_fan_in():
    layer = nn.Linear(200, 300)
    for init in ("weights", "fan_in"):
        assert rms(drawn({"w": layer.weight}, init=init)["w"]) == pytest.approx(
            1 / math.sqrt(600), rel=0.03
        )


def test_a_solver_draws_from_the_weights_that_it_starts_with():
    layer = nn.Linear(4, 3)
    nn.init.normal_(layer.weight, std=100.0)
    solver = ready(Decayed(layer), SelfTuning())
    initial = rms(solver.core.weights.tensors["weight"].detach())
    response = detached(solver.method.theta.tensors)["weights.weight"]
    assert float(response.abs().max()) > 0.5 * initial


def test_an_unknown_initial_distribution_is_one_sentence():
    with pytest.raises(BilevelError, match=r"^init='weight' is unknown.*choose weights or fan_in$"):
        Structured(init="weight")
