"""Tests of the measures for the reviewers' questions."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.experiments.question_gradients import Probe
from benchmarks.experiments.question_learning_rate import RATE, refused
from benchmarks.experiments.reviewers import mean_loss, overshoot, path, score, spike
from bilevel import Runner, problems, solvers
from bilevel.comparison.runs import Run
from bilevel.loggers.space_json import space_to_json

SPACE = problems.digits(hidden=[4]).space


def run_of(u: list[list[float]], status: str = "finished", loss: float = 1.0) -> Run:
    hypers = SPACE.constrain(torch.tensor(u, dtype=torch.float64))
    columns = {f"hypers.{name}": leaf.numpy() for name, leaf in hypers.items()} | {
        "valid_loss": np.full(len(u), loss)
    }
    names = {"problem": "digits", "solver": "stn", "label": "stn", "seed": 0}
    return Run(
        directory=Path(),
        **names,
        columns=columns,
        description={"space": space_to_json(SPACE)},
        status=status,
    )


def test_a_path_is_read_back_in_unconstrained_coordinates():
    u = [[-2.0, 0.5, -9.0], [1.0, -0.5, -8.0]]
    np.testing.assert_allclose(path(run_of(u)), u, rtol=1e-9)
    np.testing.assert_allclose(path(run_of(u), ["dropout1"]), [[0.5], [-0.5]], rtol=1e-9)
    assert len(path(run_of([*u, [float("nan")] * 3]))) == 2


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_detour_is_an_overshoot_and_a_long_way_is_none(sign):
    detour = sign * np.array([[0.0], [3.0], [-0.5], [1.0]])
    assert spike(detour) == 2.0
    assert overshoot(detour) == (0.5, 2.0)
    straight = sign * np.array([[0.0, 1.0], [1.0, 0.5], [4.0, 0.0]])
    assert spike(straight) == 4.0
    assert overshoot(straight) == (0.0, 0.0)


def test_a_group_with_a_diverged_run_is_marked_and_not_chosen():
    fine, broken = run_of([[0.0] * 3]), run_of([[0.0] * 3], "diverged", 0.1)
    assert mean_loss([fine, fine]) == 1.0
    assert mean_loss([fine, broken]) == float("inf")
    assert score([fine, broken], lambda run: run.at_best("valid_loss")).endswith("1 diverged")
    assert score([fine, fine, fine], lambda run: None) == "never"


@pytest.mark.parametrize("recipe", [solvers.stn, solvers.delta_stn])
def test_the_probe_leaves_the_run_as_it_is(recipe, tmp_path):
    ends = []
    for watched in (True, False):
        problem, solver = problems.digits(hidden=[8, 8]), recipe()
        probe = Probe(problem, solver)
        runner = Runner(
            epochs=2, warmup_epochs=1, threads=1, device="cpu", progress="none", picture=False
        )
        runner.run(
            problem, solver, directory=tmp_path / str(watched), loggers=[probe] if watched else []
        )
        ends.append(solver.solution())
        assert len(probe.points) == (8 if watched else 0)  # 5 + 5 + 5 + 1 of 16 steps, twice
    for one, other in zip(*ends, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_probe_sees_the_gradients_of_both_losses(tmp_path):
    problem, solver = (
        problems.digits(hidden=[8], space={"weight_decay": {"init": 0.1}}),
        solvers.stn(),
    )
    device = torch.device("cpu")
    solver.setup(problem, problem.data(device, torch.Generator()), device, torch.Generator())
    probe = Probe(problem, solver)
    train, valid = probe.gradients()
    hypers, params, carry = solver.solution()

    def outer(step: float) -> float:
        moved, at = {}, 0
        for name, p in params.items():
            moved[name] = (p.double() + step * valid[at : at + p.numel()].reshape(p.shape)).detach()
            at += p.numel()
        (batch,) = solver.core.data.valid.once()
        return problem.outer_loss(hypers, moved, carry, (batch[0].double(), batch[1]))[0].item()

    slope = (outer(1e-3) - outer(-1e-3)) / 2e-3
    assert slope == pytest.approx((valid @ valid).item(), rel=1e-3)
    # Only L_T has the penalty, whose gradient is weight_decay · w.
    w = torch.cat([p.reshape(-1) for p in params.values()])
    penalized = problems.digits(hidden=[8], space={"weight_decay": {"init": 1e-6}})
    probe.problem, probe.masks = penalized, torch.Generator()
    solver.core.problem, solver.core.search.u0 = penalized, penalized.space.init(torch.float32)
    torch.testing.assert_close(train - probe.gradients()[0], (0.1 - 1e-6) * w, rtol=1e-3, atol=1e-5)


def test_the_refusal_is_what_the_command_prints():
    sentence = refused(("problem=digits", "solver=delta_stn", RATE))
    assert sentence.startswith("bilevel: SelfTuning cannot tune `rate`")
    assert "\n" not in sentence
