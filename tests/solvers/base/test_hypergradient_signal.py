"""Tests of the signal-to-noise ratio of the hypergradient."""

import copy
import math

import pytest
import torch

from bilevel.problems import Quadratic
from bilevel.solvers.base.hypergradient_signal import SAMPLE, HypergradientSignal
from tests.support.device_waits import no_waiting
from tests.support.solver_cases import ready
from tests.support.solver_list import BLACK_BOX, SOLVERS, leaves_equal, suited

descending = pytest.mark.parametrize("name", [n for n in SOLVERS if n not in BLACK_BOX | {"fixed"}])


def ratios(shift, steps=600, h=400, scale=1.0):
    """Return the ratio after each hypergradient, of a mean and noise of a size."""
    draws = torch.Generator().manual_seed(0)
    signal = HypergradientSignal(torch.zeros(h))
    noted = [signal.note(shift + scale * torch.randn(h, generator=draws)) for _ in range(steps)]
    return torch.stack(noted)


def test_pure_noise_has_the_median_of_a_normal_size():
    assert float(ratios(0.0)[100:].mean()) == pytest.approx(0.674, abs=0.03)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_a_mean_as_large_as_its_noise_stands_out_by_the_root_of_the_effective_number(scale):
    """Some 19 gradients are in a running mean at β = 0.9."""
    found = float(ratios(scale, scale=scale)[200:].mean())
    assert found == pytest.approx(math.sqrt(19), rel=0.05)


def test_it_is_zero_at_first_and_bounded_without_noise():
    assert ratios(1.0, steps=3, scale=0.0).tolist() == [0.0, 100.0, 100.0]
    assert ratios(0.0, steps=3, scale=0.0).tolist() == [0.0, 0.0, 0.0]


def test_coordinates_without_a_gradient_do_not_count():
    draws = torch.Generator().manual_seed(0)
    few, many = (HypergradientSignal(torch.zeros(h)) for h in (11, 200))
    for _ in range(30):
        gradient = 0.5 + torch.randn(11, generator=draws)
        padded = torch.cat([gradient, torch.zeros(189)])
        assert few.note(gradient) == many.note(padded)


def test_a_large_number_of_coordinates_is_sampled():
    found = float(ratios(1.0, steps=40, h=5 * SAMPLE + 3)[-1])
    assert 3 < found < 6


@pytest.mark.filterwarnings("ignore::bilevel.SolverWarning")
@descending
def test_every_descent_reports_it_and_resumes_it(name):
    start = {"hyper": {"init": [0.5, -0.3]}}  # the direct terms vanish at 0
    problem = Quadratic.random(weights=3, hypers=2, dtype=torch.float64, space=start)
    problem = suited(name, problem)
    solver, resumed = (ready(problem, SOLVERS[name](), seed=seed) for seed in (1, 2))
    for _ in range(3):
        metrics = solver.step()
    assert 0 < float(metrics["hypergradient_snr"]) <= 100
    assert "hypergradient_snr" not in solver.step(warmup=True)
    assert int(solver.core.signal.count) == 3
    resumed.load_state_dict(copy.deepcopy(solver.state_dict()))
    ours, theirs = (each.core.signal.state_dict() for each in (solver, resumed))
    assert leaves_equal(ours, theirs)


def test_it_waits_for_nothing():
    signal, gradient = HypergradientSignal(torch.zeros(5)), torch.randn(5)
    signal.note(gradient)
    with no_waiting():
        signal.note(gradient)
