"""Convergence to λ* of self-tuning, unrolled and implicit solvers within one budget of examples.

Other solvers have budgets of their own: base/test_descent.py, test_evolution.py,
test_population.py, test_search.py.
"""

import json
import warnings
from functools import partial

import pytest
import torch

from bilevel import Runner, SolverWarning
from bilevel.problems import Quadratic, Ridge
from bilevel.solvers import (
    Dense,
    Unrolled,
    centered_stn,
    delta_stn,
    implicit_cg,
    implicit_neumann,
    implicit_nystrom,
    stn,
    unrolled_forward,
)
from tests.support.solver_cases import sgd

BUDGET = 400
"""Epochs of one full batch, of which the first twentieth is warm-up; for all of them."""

INNER = {"quadratic": sgd(0.3), "ridge": sgd(0.3)}
OUTER = partial(torch.optim.RMSprop, lr=0.06)
DENSE = {
    "response": Dense(),
    "scale_optimizer": partial(torch.optim.SGD, lr=0.0),
    "entropy_weight": 0.0,
}

SOLVERS = {
    "delta_stn": partial(delta_stn, **DENSE, outer_optimizer=OUTER),
    "centered_stn": partial(centered_stn, **DENSE, outer_optimizer=OUTER),
    "stn": partial(stn, **DENSE, outer_optimizer=OUTER),
    "unrolled": partial(Unrolled, inner_steps=5, outer_optimizer=OUTER),
    "unrolled_forward": partial(unrolled_forward, inner_steps=5, outer_optimizer=OUTER),
    "implicit_cg": partial(implicit_cg, outer_optimizer=OUTER),
    "implicit_neumann": partial(implicit_neumann, outer_optimizer=OUTER),
    "implicit_nystrom": partial(implicit_nystrom, outer_optimizer=OUTER),
}
PROBLEMS = {
    "quadratic": lambda init: Quadratic.random(
        weights=5,
        hypers=1,
        condition=3.0,
        seed=1,
        dtype=torch.float64,
        space={"hyper": {"init": init, "scale": 0.5}},
    ),
    "ridge": lambda init: Ridge.synthetic(
        features=5, dtype=torch.float64, space={"log_decay": {"init": init, "scale": 0.5}}
    ),
}
PART = dict.fromkeys(SOLVERS, 0.02) | {
    "stn": 0.1,
    "unrolled": 0.1,
    "unrolled_forward": 0.1,
}  # STN is slow far from u = 0
"""The part of the initial regret that may be left, or of that at 1 where 1 is nearer to λ*."""


@pytest.mark.parametrize("init", [-3.0, -1.0, 1.0])
@pytest.mark.parametrize("title", PROBLEMS)
@pytest.mark.parametrize("name", SOLVERS)
def test_each_comes_to_the_optimum_within_the_budget(name, title, init, tmp_path, record_property):
    problem = PROBLEMS[title](init)
    runner = Runner(
        epochs=BUDGET,
        warmup_epochs=BUDGET / 20,
        evaluate_every=20,
        progress="none",
        picture=False,
        checkpoint_every=1000,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolverWarning)
        inner = (
            sgd(0.04) if name == "stn" else INNER[title]
        )  # uncentered, the curvature of Θ grows with |u|² (T2)
        runner.run(problem, SOLVERS[name](inner_optimizer=inner), directory=tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    regret = [(r["examples"], r["exact.regret"]) for r in records]
    record_property("regret per example", regret[-1][1] / regret[-1][0])
    start = max(regret[0][1], float(PROBLEMS[title](init).exact(far(problem))["regret"]))
    assert regret[-1][1] <= PART[name] * start, regret[::5]
    assert records[-1]["step"] == BUDGET


def far(problem):
    """λ one away from λ*."""
    return {name: leaf + 1 for name, leaf in problem.optimum().items()}
