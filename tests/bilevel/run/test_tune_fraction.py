"""λ moves in the first part of a run, exactly; then w trains on alone, or the refit follows."""

import pytest
import torch

from bilevel import BilevelError, Runner
from bilevel.loggers.records import read_metrics
from bilevel.problems import digits
from bilevel.solvers import Fixed, delta_stn, random_search
from tests.soak.kills import differences
from tests.support.fakes import FakeSolver
from tests.support.runs import run as run_fake
from tests.support.strikes import Act, Killed, kill

QUIET = {"warmup_epochs": 0.25, "progress": "none", "picture": False, "device": "cpu"}
HALF = {"epochs": 4, "tune_fraction": 0.5}
"""Of 16 steps, the last eight are at constant λ."""


def run(directory, *, make=delta_stn, resume=False, loggers=(), **settings):
    if not resume:
        torch.manual_seed(0)
    problem = digits(hidden=[6], dropout="gaussian", batch_size=256)
    solver = make(inner_steps=3)
    runner = Runner(**QUIET | HALF | settings)
    return runner.run(
        problem, solver, directory=directory, seed=3, resume=resume, loggers=loggers
    ), solver


class Freezing(FakeSolver):
    def step(self, *, warmup=False, limit=None, frozen=False):
        if frozen:
            assert not warmup
            metrics = super().step(warmup=True, limit=limit)
            self.rounds[-1] = (*self.rounds[-1][:2], "frozen")
            return metrics
        return super().step(warmup=warmup, limit=limit)


def test_the_tuning_ends_exactly(tmp_path):
    """It ends at step 13 of 24, in the middle of what would be a round of four."""
    _, solver = run_fake(tmp_path, Freezing(), tune_fraction=0.55, warmup_epochs=1)
    assert solver.rounds == [
        *[(0, 4, True), (4, 2, True)],
        *[(6, 4, False), (10, 3, False)],
        *[(13, 4, "frozen"), (17, 4, "frozen"), (21, 3, "frozen")],
    ]
    assert solver.outer_count == 2


def test_the_values_stay_and_the_weights_train_on(tmp_path):
    result, solver = run(tmp_path / "a")
    records = read_metrics(tmp_path / "a" / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 4, 8, 14, 16]
    decays = [record["hypers.weight_decay"] for record in records]
    assert decays[1] != decays[2] == decays[3] == decays[4]
    assert records[-1]["train_loss"] < records[2]["train_loss"]
    short, other = run(tmp_path / "b", epochs=2, tune_fraction=1)
    assert solver.outer_count == other.outer_count > 0
    assert short["hypers"] == result["hypers"]
    # a frozen step draws a training batch alone
    frozen = result["examples"] - short["examples"]
    plain, _ = run(tmp_path / "c", make=Fixed, epochs=2, tune_fraction=1)
    assert frozen == plain["examples"]


def test_a_run_with_a_refit_trains_on_too(tmp_path):
    result, _ = run(tmp_path / "a", refit="end")
    steps = {name: entry["steps"] for name, entry in result["refit"]["candidates"].items()}
    assert steps == {"run": 16, "end": 16}
    alone, _ = run(tmp_path / "b")
    own = result["refit"]["candidates"]["run"]
    assert own["hypers"] == alone["hypers"]
    assert own["valid_loss"] == alone["best"]["valid_loss"]


@pytest.mark.parametrize("step", [8, 11, 14])
def test_a_run_killed_at_constant_values_goes_on_bit_for_bit(tmp_path, step):
    run(tmp_path / "a")
    with pytest.raises(Killed):
        run(tmp_path / "b", loggers=[Act(kill, step)])
    run(tmp_path / "b", resume=True)
    assert differences(tmp_path / "a", tmp_path / "b") == []


def test_the_end_of_the_tuning_does_not_move_when_it_has_passed(tmp_path):
    run(tmp_path / "a")
    with pytest.raises(BilevelError, match=r"at step 16, and its tuning ended after step 8, not "):
        run(tmp_path / "a", epochs=8, resume=True)
    with pytest.raises(BilevelError, match=r"ended after step 8, not at its end; resume it with"):
        run(tmp_path / "a", tune_fraction=1, resume=True)


def test_wrong_settings_are_refused(tmp_path):
    for fraction in (0, -0.1, 1.5, True):
        with pytest.raises(BilevelError, match=r"tune_fraction=.*"):
            Runner(epochs=1, tune_fraction=fraction)
    with pytest.raises(BilevelError, match=r"tune_fraction=0.5 is a part of runner.epochs, which"):
        Runner(seconds=1, tune_fraction=0.5)
    for make in (random_search, FakeSolver):
        name = type(make()).__name__
        with pytest.raises(BilevelError, match=f"cannot hold the λ of {name}, whose step takes no"):
            run(tmp_path / "a", make=make)
    assert not (tmp_path / "a").exists()
