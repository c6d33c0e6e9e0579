"""The check compares with differences of short trainings, and leaves the run as it is."""

from functools import partial

import pytest
import torch

from bilevel import BilevelError, Runner, SolverWarning
from bilevel.checkpoint.checkpoints import load
from bilevel.loggers.records import read_metrics
from bilevel.problems import Ridge, digits
from bilevel.run.hypergradient_check import HypergradientCheck
from bilevel.run.hypergradient_error import in_coordinates
from bilevel.run.settings import RunSettings
from bilevel.solvers import EvolutionStrategies, Fixed, delta_stn, implicit_cg, random_search, stn
from bilevel.solvers import unrolled_forward as unrolled
from tests.soak.kills import unequal
from tests.support.fakes import FakeSolver
from tests.support.strikes import Act, Killed, kill

CPU = torch.device("cpu")
QUIET = {"warmup_epochs": 0.25, "progress": "none", "picture": False, "device": "cpu"}
CHECK = {"hypergradient_check": 2, "check_steps": 5, "check_coordinates": 2}
NAMES = {"hypergradient.check_cosine", "hypergradient.check_ratio"}


def run(directory, *, make=delta_stn, resume=False, loggers=(), **settings):
    if not resume:
        torch.manual_seed(0)
    problem = digits(hidden=[6], dropout="gaussian", batch_size=256)
    runner = Runner(**{"epochs": 5, **QUIET, **settings})
    solver = make(inner_steps=2)
    return runner.run(problem, solver, directory=directory, seed=3, resume=resume, loggers=loggers)


def checks(directory):
    records = read_metrics(directory / "metrics.jsonl")
    return [{name: r[name] for name in sorted(NAMES & r.keys())} for r in records]


def test_differences_of_long_trainings_are_the_exact_hypergradient():
    problem = Ridge.synthetic(features=4)
    settings = RunSettings(
        epochs=1, hypergradient_check=1, check_steps=3000, check_coordinates=9, check_size=0.01
    )
    solver = implicit_cg(inner_optimizer=partial(torch.optim.SGD, lr=0.1))
    check = HypergradientCheck.of(settings, problem, solver, CPU, 0)
    data = problem.data(CPU, torch.Generator().manual_seed(0))
    solver.setup(problem, data, CPU, torch.Generator().manual_seed(0))
    for _ in range(600):
        solver.step(warmup=True)
    hypers = solver.solution().hypers
    exact = in_coordinates(problem.space, hypers, problem.exact_hypergradient(hypers))
    chosen = torch.arange(problem.space.numel)
    found = check.differences(solver, data, chosen, [data.valid.peek()])
    torch.testing.assert_close(found, exact, rtol=0.02, atol=1e-6)
    measured = check.measure(solver, data, 1)
    assert measured["check_cosine"] == pytest.approx(1, abs=0.01)
    assert measured["check_ratio"] == pytest.approx(1, abs=0.1)  # its curvature is damped


SOLVERS = {
    "delta_stn": delta_stn,
    "stn": stn,
    "implicit": partial(implicit_cg, stationarity=1e9),
    "unrolled": unrolled,
    "es": partial(EvolutionStrategies, horizon=6),
}


@pytest.mark.filterwarnings("ignore::bilevel.SolverWarning")
@pytest.mark.parametrize("name", SOLVERS)
def test_the_run_keeps_its_bits(tmp_path, name):
    make = SOLVERS[name]
    run(tmp_path / "a", make=make)
    run(tmp_path / "b", make=make, **CHECK)
    states = [load(tmp_path / one) for one in "ab"]
    for part in ("solver", "train", "valid", "rng"):
        assert unequal(states[0][part], states[1][part]) == []
    found = checks(tmp_path / "b")
    assert [bool(entry) for entry in found] == [False, False, True, False, True, False]
    assert found[2].keys() == found[4].keys() == NAMES
    assert all(-1.0001 <= entry["hypergradient.check_cosine"] <= 1.0001 for entry in found[2::2])
    plain = [
        {key: value for key, value in r.items() if key not in NAMES and "seconds" not in key}
        for r in read_metrics(tmp_path / "b" / "metrics.jsonl")
    ]
    for ours, theirs in zip(plain, read_metrics(tmp_path / "a" / "metrics.jsonl"), strict=True):
        assert all(theirs[key] == v for key, v in ours.items() if key != "peak_memory_bytes")


def test_a_resumed_run_measures_the_same(tmp_path):
    run(tmp_path / "a", **CHECK)
    with pytest.raises(Killed):
        run(tmp_path / "b", loggers=[Act(kill, 15)], **CHECK)
    run(tmp_path / "b", resume=True, **CHECK)
    assert checks(tmp_path / "a") == checks(tmp_path / "b")


def test_batches_and_coordinates_are_settings(tmp_path):
    for number, changes in enumerate(({}, {"check_coordinates": 1}, {"check_batches": 2})):
        run(tmp_path / str(number), epochs=3, **CHECK | changes)
    found = [checks(tmp_path / str(number))[2] for number in range(3)]
    assert abs(found[1]["hypergradient.check_cosine"]) == pytest.approx(1)
    assert found[0] != found[2]


def test_constant_values_are_not_checked(tmp_path):
    run(tmp_path / "a", tune_fraction=0.5, **CHECK)
    assert [bool(entry) for entry in checks(tmp_path / "a")] == [*[False] * 2, True, *[False] * 3]


def test_what_cannot_be_checked_is_refused(tmp_path):
    for make in (random_search, FakeSolver):
        with pytest.raises(BilevelError, match=r"hypergradient_check=2 cannot measure"):
            run(tmp_path / make.__name__, make=make, **CHECK)
    with pytest.warns(SolverWarning, match=r"hypergradient_check has no effect, since Fixed"):
        run(tmp_path / "a", make=Fixed, epochs=1, **CHECK)
    for wrong in ({"hypergradient_check": 0}, {"check_size": 0}, {"check_steps": 1.5}):
        with pytest.raises(BilevelError, match=f"runner.{next(iter(wrong))}="):
            Runner(epochs=1, **wrong)
