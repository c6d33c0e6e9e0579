"""Timers and measurements at evaluations: neither changes a run."""

import time

import pytest
import torch

from bilevel import Runner, Space, solvers
from bilevel.domains import Interval, Positive, Real, Simplex
from bilevel.loggers.records import read_metrics
from bilevel.problems import Quadratic, Ridge
from bilevel.run.hypergradient_error import HypergradientError, in_coordinates
from bilevel.timers import Timers
from tests.support.fakes import FakeProblem, FakeSolver
from tests.support.solver_cases import at, ready

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_no_second_counts_twice(clock):
    phases = Timers(CPU)
    clock(7)
    with phases("inner"):
        clock(1)
        with phases("response"):
            clock(2)
            with phases("response"):
                clock(4)
        clock(8)
    clock(16)
    with phases("outer"):
        clock(32)
        with phases("inner"):
            clock(64)
    assert phases.read() == {"inner": 1 + 8 + 64, "response": 2 + 4, "outer": 32}


def test_a_phase_that_raises_ends(clock):
    phases = Timers(CPU)

    def fail():
        clock(1)
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"), phases("outer"), phases("response"):
        fail()
    clock(5)
    with phases("inner"):
        clock(2)
    assert phases.read() == {"outer": 0, "response": 1, "inner": 2}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_the_time_is_the_devices_and_nothing_waits():
    device = torch.device("cuda")
    phases, a = Timers(device), torch.randn(4096, 4096, device=device)
    a @ a
    torch.cuda.synchronize()
    began = time.perf_counter()
    with phases("inner"):
        for _ in range(50):
            a @ a
        with phases("response"):
            a @ a
    launched = time.perf_counter() - began
    torch.cuda.synchronize()
    passed = time.perf_counter() - began
    measured = phases.read()
    assert launched < 0.5 * passed
    assert sum(measured.values()) == pytest.approx(passed, rel=0.2)
    assert measured["inner"] > 20 * measured["response"] > 0


def finished(directory, problem, solver, resume=False, **settings):
    settings = {"epochs": 60, "warmup_epochs": 10, "evaluate_every": 10, **settings}
    Runner(progress="none", picture=False, device="cpu", **settings).run(
        problem, solver, directory=directory, resume=resume
    )
    return read_metrics(directory / "metrics.jsonl")


SOLVERS = {
    "delta_stn": lambda: solvers.delta_stn(response=solvers.Dense()),
    "stn": lambda: solvers.stn(response=solvers.Dense()),
    "implicit": lambda: solvers.implicit_cg(stationarity=1e9),
    "unrolled": solvers.Unrolled,
    "soba": solvers.SOBA,
    "sama": solvers.SAMA,
    "penalty": solvers.Penalty,
    "es": solvers.EvolutionStrategies,
    "first_order": solvers.FirstOrder,
    "fixed": solvers.Fixed,
    "random_search": solvers.random_search,
    "pbt": solvers.PopulationBased,
}
every_solver = pytest.mark.parametrize("name", SOLVERS)
doubting = pytest.mark.filterwarnings("ignore::bilevel.SolverWarning")


@doubting
@every_solver
def test_phases_make_up_the_time_of_training(tmp_path, name):
    lines = finished(tmp_path, Quadratic.random(seed=1), SOLVERS[name]())
    last = lines[-1]
    phases = {
        key.removeprefix("seconds."): value
        for key, value in last.items()
        if key.startswith("seconds.")
    }
    evaluation = phases.pop("evaluation")
    assert 0.7 * last["seconds"] < sum(phases.values()) <= last["seconds"]
    assert evaluation > 0
    assert set(phases) <= {"data", "inner", "response", "outer"}
    assert "data" in phases
    assert phases["inner"] > 0
    has_response = name in ("delta_stn", "implicit", "soba", "sama", "penalty", "es")
    assert ("response" in phases) == has_response
    for key in ("seconds.inner", "seconds.evaluation"):
        values = [line.get(key, 0.0) for line in lines]
        assert values == sorted(values)


@pytest.mark.parametrize("name", ["delta_stn", "implicit", "es", "penalty", "soba", "pbt"])
def test_waiting_for_batches_is_told_apart_from_training(clock, name):
    solver = ready(Quadratic.random(seed=1), SOLVERS[name]())
    solver.services.timers = Timers(CPU)
    for stream in (at(solver).data.train, at(solver).data.valid):
        stream.next = lambda draw=stream.next: (clock(3), draw())[1]
    drawn = at(solver).data.train.examples + at(solver).data.valid.examples
    solver.step()
    measured = solver.services.timers.read()
    drawn = at(solver).data.train.examples + at(solver).data.valid.examples - drawn
    assert measured["data"] >= 3
    assert measured["data"] == pytest.approx(
        sum(measured.values())
    )  # nothing else has moved the clock
    if name == "delta_stn":
        assert measured["data"] == 3 * drawn  # of one example each


def test_phases_go_on_where_a_resumed_run_left_them(tmp_path):
    before = finished(
        tmp_path, FakeProblem(), solvers.Fixed(), epochs=2, evaluate_every=1, warmup_epochs=0
    )
    after = finished(
        tmp_path,
        FakeProblem(),
        solvers.Fixed(),
        resume=True,
        epochs=4,
        evaluate_every=1,
        warmup_epochs=0,
    )
    assert after[: len(before)] == before
    inner, evaluation = (
        [line.get(f"seconds.{name}", 0.0) for line in after] for name in ("inner", "evaluation")
    )
    assert inner == sorted(inner)
    assert evaluation == sorted(evaluation)


def test_a_solver_that_tells_no_phase_has_none(tmp_path):
    (*_, last) = finished(tmp_path, FakeProblem(), FakeSolver(), epochs=2)
    assert [key for key in last if key.startswith("seconds.")] == ["seconds.evaluation"]


# --- the hypergradient against the exact one ---


def without_costs(lines):
    return [
        {
            k: v
            for k, v in line.items()
            if not k.startswith(("seconds", "peak_memory", "hypergradient."))
        }
        for line in lines
    ]


@doubting
@every_solver
def test_a_run_is_the_same_whether_it_is_probed_or_not(tmp_path, name, monkeypatch):
    problem = Quadratic.random(seed=1)
    probed = finished(tmp_path / "probed", problem, SOLVERS[name]())
    monkeypatch.setattr(Quadratic, "exact_hypergradient", lambda self, hypers: None)
    plain = finished(tmp_path / "plain", problem, SOLVERS[name]())
    assert without_costs(probed) == without_costs(plain)
    follows = name not in ("fixed", "random_search", "pbt")
    assert any("hypergradient.norm" in line for line in probed) == follows
    assert not any("hypergradient.norm" in line for line in plain)


@pytest.mark.parametrize("shift", [0.0, 0.1])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_the_measures_are_those_of_the_closed_form(shift, damping):
    """An implicit solve with H + γ for H, at w* + shift for w*, has the error of the formulas."""
    problem = Quadratic.random(seed=1, dtype=torch.float64)
    solve, curvature = solvers.CG(iterations=100, tolerance=1e-12), solvers.Hessian(damping=damping)
    solver = solvers.Implicit(linear_solve=solve, curvature=curvature, stationarity=1e9)
    data = problem.data(CPU, torch.Generator())
    probe = HypergradientError.of(problem, solver, CPU)
    solver.setup(problem, data, CPU, torch.Generator().manual_seed(0))
    hypers = solver.solution().hypers
    w = problem.best_response(hypers)["w"]
    w = w + shift * torch.randn(
        len(w), generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    with torch.no_grad():
        solver.core.weights.tensors["w"].copy_(w)
    exact = problem.hypergradient(hypers)
    damped = problem.A + damping * torch.eye(len(w), dtype=torch.float64)
    expected = -problem.B.T @ torch.linalg.solve(damped, problem.M @ (w - problem.w_bar))
    measured = probe.measure(solver, data, hypers)
    assert measured["norm"] == pytest.approx(float(expected.norm()), rel=1e-8)
    assert measured["error"] == pytest.approx(
        float((expected - exact).norm() / exact.norm()), rel=1e-6, abs=1e-9
    )
    assert measured["cosine"] == pytest.approx(
        float(expected @ exact / (expected.norm() * exact.norm())), abs=1e-9
    )
    assert (measured["error"] > 0.001) == bool(shift or damping)


@doubting
@pytest.mark.parametrize("name", ["delta_stn", "unrolled", "implicit", "sama"])
def test_the_measured_hypergradient_is_the_solvers_own_on_its_next_validation_batch(name):
    problem = Ridge.synthetic(features=4, batch_size=8, dtype="float64")
    solver = SOLVERS[name]()
    probe = HypergradientError.of(problem, solver, CPU)
    ready(problem, solver)
    for _ in range(3):  # away from the first batch, with a response other than zero
        solver.step()
    measured = probe.measure(solver, at(solver).data, solver.solution().hypers)
    # as in a resumed run, where an implicit solve uses the next training batch
    solver.load_state_dict(solver.state_dict())
    # the solver's own batch and draws
    assert measured["norm"] == pytest.approx(float(solver.hypergradient().norm()), rel=1e-12)


def test_a_biased_solver_differs_from_an_unbiased_one(tmp_path):
    """First order follows ∂L_V/∂λ alone, and its error is the missing part.

    Δ-STN learns that part.
    """
    measured = {}
    for name in ("first_order", "delta_stn"):
        problem = Quadratic.random(
            seed=1, direct=1.0, dtype=torch.float64, space={"hyper": {"scale": 0.5}}
        )
        measured[name] = finished(
            tmp_path / name,
            problem,
            SOLVERS[name](),
            epochs=600,
            warmup_epochs=599,
            evaluate_every=300,
        )[-1]
    hypers = {"hyper": torch.zeros(3, dtype=torch.float64)}
    exact = problem.hypergradient(hypers)
    left_out = exact - problem.P @ (hypers["hyper"] - problem.lambda_bar)
    expected = float(left_out.norm() / exact.norm())
    assert measured["first_order"]["hypergradient.error"] == pytest.approx(expected, rel=0.05)
    assert measured["first_order"]["hypergradient.cosine"] < 0.8
    assert measured["delta_stn"]["hypergradient.cosine"] > 0.95


def test_a_gradient_of_nothing_has_no_direction(tmp_path):
    first = finished(tmp_path, Quadratic.random(seed=1), SOLVERS["delta_stn"](), epochs=1)[0]
    assert first["hypergradient.norm"] == 0  # no response is known yet
    assert first["hypergradient.error"] == 1
    assert "hypergradient.cosine" not in first


def test_a_gradient_in_units_becomes_one_in_coordinates():
    space = Space(
        rate=Interval(low=0.0, high=2.0, init=[0.5, 1.5], shape=(2,)),
        fixed=Real(init=1.0, frozen=True),
        decay=Positive(init=0.3),
        mix=Simplex(init=[0.2, 0.3, 0.5], shape=(3,)),
    )
    hypers = {name: domain.initial() for name, domain in space.items()}
    gradient = torch.arange(1.0, 7.0, dtype=torch.float64)
    Jacobian = torch.autograd.functional.jacobian(
        lambda u: torch.cat([space.constrain(u)[name].reshape(-1) for name in space.tuned]),
        space.init(torch.float64),
    )
    torch.testing.assert_close(in_coordinates(space, hypers, gradient), Jacobian.T @ gradient)


def test_a_space_with_more_than_the_truth_knows_is_not_compared():
    problem = Quadratic.random(seed=1, space={"rate": {"optimizer": "lr", "init": 0.01}})
    assert HypergradientError.of(problem, solvers.Unrolled(), CPU) is None
