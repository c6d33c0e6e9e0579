"""Sensitivities at the end of a run: closed forms, what they leave alone, and where they stand."""

import copy
import io
import json
import math

import pytest
import torch
import torch.nn as nn
from rich.console import Console

from bilevel import Positive, Runner
from bilevel.data.tensor_stream import TensorStream
from bilevel.errors import FaultWarning
from bilevel.loggers.tables import final_tables
from bilevel.problems import Quadratic, Ridge
from bilevel.run.sensitivities import COORDINATES, LARGEST, sensitivities
from bilevel.solvers import Dense, SelfTuning, delta_stn, implicit_cg, stn
from tests.support.runs import run
from tests.support.solver_cases import Decayed, ready, set_to
from tests.support.solver_list import (
    BLACK_BOX,
    DIRECT_ONLY,
    SELF_TUNING,
    SMALL,
    SOLVERS,
    leaves_equal,
    suited,
)

KEYS = ("moved", "hypergradient", "standard_error", "curvature", "effect")


def measured(solver, problem):
    initial = problem.space.constrain(problem.space.init(torch.float64))
    return sensitivities(solver, problem, solver.core.data, initial)


def at_exact_response(make, problem):
    """The solver with w₀ = w*(λ₀) and Θ = ∂w*/∂u, after a move of u by 0.5 in each coordinate."""
    solver = ready(problem, make(response=Dense()))
    core = solver.core
    with torch.no_grad():
        core.search.u += 0.5
        core.search.recentre()
        hypers = problem.space.constrain(core.search.u0)
        w, J = problem.best_response(hypers)["w"], problem.best_response_jacobian()
        set_to(solver.method.theta.tensors["w"], J)
        uncentered = J @ core.search.u0 if not solver.centered else torch.zeros_like(w)
        set_to(core.weights.tensors["w"], w - uncentered)
    return solver, hypers


@pytest.mark.parametrize("make", [delta_stn, stn])
def test_on_a_quadratic_both_derivatives_are_the_closed_forms(make):
    """g = dL_V/dλ and c = diag(JᵀMJ + P), where w*(λ) is linear; one batch has no error."""
    problem = Quadratic.random(
        6, 3, direct=0.7, dtype=torch.float64, space={"hyper": {"scale": 0.25}}
    )
    solver, hypers = at_exact_response(make, problem)
    found = measured(solver, problem)["hyper"]
    J = problem.best_response_jacobian()
    curvature = torch.diag(J.T @ problem.M @ J + problem.P)
    g = problem.hypergradient(hypers)
    entries = found["entries"]
    assert entries["hypergradient"] == pytest.approx(g.tolist(), rel=1e-9)
    assert entries["curvature"] == pytest.approx(curvature.tolist(), rel=1e-9)
    assert entries["moved"] == pytest.approx([2.0] * 3)
    effect = g.abs() * 0.25 + curvature * 0.25**2 / 2
    assert entries["effect"] == pytest.approx(effect.tolist())
    totals = [2.0, float(g.norm()), None, float(curvature.mean()), float(effect.sum())]
    assert [found[key] for key in KEYS[:2]] == pytest.approx(totals[:2])
    assert [found[key] for key in KEYS[3:]] == pytest.approx(totals[3:])
    assert found["standard_error"] is None


def test_on_ridge_the_curvature_is_that_of_the_linear_response_and_the_error_that_of_the_mean():
    """ΘᵀX_vᵀX_vΘ/n_v; the error is that of a mean over equal parts of the validation split."""
    problem = Ridge.synthetic(features=5, dtype=torch.float64)
    solver = ready(problem, delta_stn(response=Dense()), away=0.3)
    found = measured(solver, problem)["log_decay"]
    assert "entries" not in found
    X, y = solver.core.data.valid.peek()[:2]
    (theta,), (w,) = (
        solver.method.theta.detached().values(),
        solver.core.weights.detached().values(),
    )
    theta, w = theta.reshape(-1), w.reshape(-1)
    each = (X @ w - y.reshape(-1)) * (X @ theta)
    assert found["hypergradient"] == pytest.approx(float(each.mean()))
    assert found["curvature"] == pytest.approx(float((X @ theta).square().mean()), rel=1e-8)
    parts = torch.stack([each[k::8].mean() for k in range(8)])
    sizes = torch.tensor([len(each[k::8]) for k in range(8)], dtype=torch.float64)
    weight = sizes / sizes.sum()
    error = (8 / 7 * (weight * (parts - each.mean())).square().sum()).sqrt()
    assert found["standard_error"] == pytest.approx(float(error))


def test_on_a_network_the_curvature_is_the_second_derivative_along_a_coordinate():
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    space = {"decay": Positive(init=0.1), "other": Positive(init=0.2, scale=0.5)}
    problem = Decayed(module, batch_size=None, **space)
    solver = ready(problem, SelfTuning(), away=0.3)
    batch, zero = solver.core.data.valid.peek(), torch.zeros(2, dtype=torch.float64)
    exact = torch.autograd.functional.hessian(lambda d: solver.outer_loss_at(d, batch), zero)
    found = measured(solver, problem)
    for k, name in enumerate(space):
        assert found[name]["curvature"] == pytest.approx(float(exact[k, k]), rel=2e-2)
        assert abs(float(exact[k, k])) > 1e-4


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_is_left_as_it_was_and_measures_the_same_again(name):
    problem = suited(name, SMALL(batch_size=64))
    solver = SOLVERS[name]()
    torch.manual_seed(0)
    data = problem.data(torch.device("cpu"), torch.Generator().manual_seed(0))
    solver.setup(problem, data, torch.device("cpu"), torch.Generator().manual_seed(1))
    for _ in range(3):
        solver.step()
    state = copy.deepcopy(solver.state_dict())
    streams = copy.deepcopy([data.train.state_dict(), data.valid.state_dict()])
    initial = problem.space.constrain(problem.space.init(torch.float64))
    found = sensitivities(solver, problem, data, initial)
    assert leaves_equal(solver.state_dict(), state)
    assert leaves_equal([data.train.state_dict(), data.valid.state_dict()], streams)
    assert sensitivities(solver, problem, data, initial) == found
    assert list(found) == list(problem.space.tuned)
    for entry in found.values():
        assert tuple(entry) == KEYS
        unknown = {key for key in KEYS if entry[key] is None}
        if name in BLACK_BOX | {"fixed"}:
            assert unknown == set(KEYS) - {"moved"}
        else:
            known = name in SELF_TUNING | DIRECT_ONLY
            assert unknown == (set() if known else {"curvature", "effect"})


def test_of_many_coordinates_those_of_the_largest_slope_have_a_curvature():
    h = COORDINATES + 10
    problem = Quadratic.random(4, h, dtype=torch.float64)
    solver, _ = at_exact_response(delta_stn, problem)
    entries = measured(solver, problem)["hyper"]["entries"]
    known = {k for k, c in enumerate(entries["curvature"]) if c is not None}
    order = sorted(range(h), key=lambda k: -abs(entries["hypergradient"][k]))
    assert known == set(order[:LARGEST])
    assert measured(solver, problem)["hyper"]["curvature"] is None


def test_half_precision_has_no_curvature():
    result = Runner(
        epochs=1, warmup_epochs=0, precision="bf16", progress="none", picture=False
    ).run(SMALL(), delta_stn(), directory=None)
    entry = result["sensitivities"]["weight_decay"]
    assert entry["hypergradient"] is not None
    assert entry["curvature"] is None


@pytest.mark.parametrize(
    ("size", "batch", "least", "most", "lengths"),
    [
        (20, None, 8, 8, [3, 3, 3, 3, 2, 2, 2, 2]),
        (20, 5, 1, 2, [5, 5]),
        (20, 6, 1, 8, [5, 5, 5, 5]),
        (3, 3, 8, 8, [3]),
        (1, 1, 8, 8, [1]),
    ],
)
def test_batches_are_spread_over_the_split(size, batch, least, most, lengths):
    stream = TensorStream((torch.arange(float(size)),), batch, torch.Generator())
    found = [x for (x,) in stream.spread(least, most)]
    assert [len(x) for x in found] == lengths
    rows = torch.cat(found).tolist()
    assert len(set(rows)) == len(rows)
    if len(rows) == size:
        assert sorted(rows) == list(range(size))
    else:
        assert {row % 4 for row in rows} == {0, 2}  # evenly, and not the first rows
    assert stream.examples == 0


# --- a run ---


def test_a_run_keeps_them_in_its_summary_and_shows_them(tmp_path):
    settings = {"progress": "none", "picture": False, "epochs": 4, "warmup_epochs": 1}
    result = Runner(**settings).run(SMALL(), delta_stn(), directory=tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "summary.json").read_text())["sensitivities"]
    assert stored == result["sensitivities"]
    assert set(stored) == set(result["hypers"])
    without = Runner(**settings, sensitivities=False).run(
        SMALL(), delta_stn(), directory=tmp_path / "other"
    )
    assert without["sensitivities"] == {}
    assert without["hypers"] == result["hypers"]
    assert without["examples"] == result["examples"]
    shown = Console(file=io.StringIO(), width=100)
    for table in final_tables(result):
        shown.print(table)
    text = shown.file.getvalue().partition("which hyperparameters mattered")[2]
    order = sorted(stored, key=lambda name: -stored[name]["effect"])
    assert [line.split()[0] for line in text.splitlines()[2:] if line.split()] == order
    assert f"{stored[order[0]]['curvature']:.2g}" in text
    for table in final_tables(without):
        shown.print(table)
    assert shown.file.getvalue().count("mattered") == 1


def test_the_last_solution_is_the_one_before_the_measurement(tmp_path):
    """A method that unrolls trains on for its hypergradient."""
    settings = {"progress": "none", "picture": False, "epochs": 2, "warmup_epochs": 0}
    found = [
        Runner(**settings, sensitivities=on).run(
            SMALL(), SOLVERS["unrolled"](), directory=tmp_path / str(on)
        )
        for on in (True, False)
    ]
    assert leaves_equal(*(tuple(one.solution("last")) for one in found))
    assert [one["steps"] for one in found] == [found[0]["steps"]] * 2
    assert found[0]["examples"] == found[1]["examples"]


def test_a_run_resumed_at_its_end_measures_the_same(tmp_path):
    settings = {"progress": "none", "picture": False, "epochs": 2, "warmup_epochs": 0}
    with pytest.warns(UserWarning, match="Implicit"):
        one = Runner(**settings).run(SMALL(), implicit_cg(), directory=tmp_path)
    (tmp_path / "summary.json").unlink()
    again = Runner(**settings).run(SMALL(), implicit_cg(), directory=tmp_path, resume=True)
    assert again["sensitivities"] == one["sensitivities"]


def test_a_solver_without_a_hypergradient_has_its_moves_alone(tmp_path):
    result, solver = run(tmp_path / "run")
    assert {key for e in result["sensitivities"].values() for key in e if e[key] is not None} == {
        "moved"
    }
    problem = solver.problem
    moved = (solver.u - problem.space.init()).tolist()
    found = [entry["moved"] for entry in result["sensitivities"].values()]
    assert found == pytest.approx(moved, rel=1e-4)
    result, _ = run(tmp_path / "none", problem=SMALL(), solver=SOLVERS["fixed"]())
    assert result["sensitivities"] == {}


def test_an_error_leaves_the_summary_without_them(tmp_path):
    class Broken(type(SOLVERS["sama"]())):
        def hypergradient(self, batch=None):
            raise RuntimeError("no memory left")

    with pytest.warns(FaultWarning, match="sensitivities cannot be measured .*no memory left"):
        result, _ = run(tmp_path / "run", problem=SMALL(), solver=Broken())
    assert result["sensitivities"] == {}
    assert math.isfinite(result["best"]["test_loss"])
    assert (tmp_path / "run" / "summary.json").exists()
