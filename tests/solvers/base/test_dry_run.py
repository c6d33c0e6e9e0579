"""The memory and the batches of set-up and of a round, and the watch over hypergradients."""

import gc
import weakref
from functools import partial

import pytest
import torch

from bilevel import Positive
from bilevel.problems import Quadratic
from bilevel.solvers import SAMA, EvolutionStrategies, Implicit, Penalty, SelfTuning, Unrolled
from bilevel.solvers.base import descent
from tests.support.solver_cases import ready

SOLVERS = [SelfTuning, Implicit, Unrolled, SAMA, Penalty, EvolutionStrategies]


@pytest.mark.parametrize("make", SOLVERS)
def test_the_dry_run_leaves_no_memory_behind(make, monkeypatch):
    ready(Quadratic.random(seed=1), make())  # what PyTorch keeps of a first call is not meant
    alive = []

    class Watched(descent.Core):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            alive.append(weakref.ref(self))

    monkeypatch.setattr(descent, "Core", Watched)
    gc.collect()
    gc.disable()  # reference counts alone must free it
    try:
        solver = ready(Quadratic.random(seed=1), make())
        assert [core() is solver.core for core in alive if core() is not None] == [True]
        assert len(alive) == 2
    finally:
        gc.enable()


@pytest.mark.parametrize("make", [SAMA, Penalty])
def test_an_outer_step_after_training_peeks_at_no_batch(make, monkeypatch):
    solver = ready(Quadratic.random(seed=1), make())
    solver.inner_phase(2)
    monkeypatch.setattr(
        type(solver.core.data.train), "peek", lambda self: pytest.fail("a batch was peeked at")
    )
    solver.outer_phase()


def test_a_warm_up_round_keeps_no_unroll():
    problem = Quadratic.random(seed=1)
    rate = Positive(init=0.1, per_example=False, optimizer="lr")
    problem.space = type(problem.space)(**dict(problem.space.items()), rate=rate)
    solver = ready(problem, Unrolled())
    assert solver.method.optimizer.tuned
    solver.step(warmup=True)
    assert solver.method.unroll is None


def test_a_hypergradient_that_is_not_finite_is_noted(monkeypatch):
    solver = ready(
        Quadratic.random(seed=1),
        EvolutionStrategies(inner_optimizer=partial(torch.optim.SGD, lr=0.01)),
    )
    loss, gradient = torch.tensor(1.0), torch.full_like(solver.core.search.u0, torch.inf)
    monkeypatch.setattr(solver.method, "differentiate", lambda batch: (loss, gradient, {}))
    assert solver.services.bad_step() is None
    solver.step()
    assert solver.services.bad_step() == solver.inner_count
