"""The warning of unrolled steps that amplify a change of w and stay finite."""

from functools import partial

import pytest
import torch

from bilevel.problems import Quadratic, Ridge, digits
from bilevel.solvers import Forward, Reverse, Unrolled
from tests.support.solver_cases import PROBLEMS, normed, ready

MODES = {"reverse": Reverse(), "checkpoint": Reverse(checkpoint=True), "forward": Forward()}
UNSTABLE = {
    "quadratic": partial(Quadratic.random, weights=4, hypers=2),
    "ridge": partial(Ridge.synthetic, features=4),
}


def found(problem, rounds=2, **options):
    solver = ready(problem, Unrolled(**options))
    for _ in range(rounds):
        metrics = {name: float(value) for name, value in solver.step().items()}
    return solver.warnings(metrics), metrics


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", UNSTABLE)
def test_steps_above_two_over_l_are_reported_with_their_growth(name, mode):
    sgd = partial(torch.optim.SGD, lr=20.0)
    warnings, metrics = found(
        UNSTABLE[name](), 1, mode=MODES[mode], inner_steps=6, inner_optimizer=sgd
    )
    assert metrics["adjoint_growth"] > 100
    assert f"{metrics['adjoint_growth']:.2g}" in warnings["growth"]


@pytest.mark.parametrize("mode", ["reverse", "checkpoint"])
def test_truncation_lowers_the_growth_as_the_warning_says(mode):
    options = {"inner_steps": 6, "inner_optimizer": partial(torch.optim.SGD, lr=20.0)}
    whole = found(UNSTABLE["quadratic"](), 1, mode=MODES[mode], **options)[1]
    checkpoint = mode == "checkpoint"
    short = found(
        UNSTABLE["quadratic"](), 1, mode=Reverse(truncate=2, checkpoint=checkpoint), **options
    )[1]
    assert short.get("adjoint_growth", 0.0) < whole["adjoint_growth"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "make",
    [
        *(
            PROBLEMS[name]
            for name in (
                "quadratic",
                "ridge",
                "linear network",
                "loss weights",
                "carried state",
            )
        ),
        partial(digits, hidden=[8], dropout="gaussian"),
        partial(normed, per_example=False),
    ],
)
def test_the_defaults_are_silent(make, mode):
    if mode == "forward" and make is PROBLEMS["loss weights"]:
        pytest.skip("forward mode is for few hyperparameters")
    assert found(make(), 3, mode=MODES[mode])[0] == {}
