"""Test the phases of a run: plain training, warm-up, tuning, and w alone at a frozen λ."""

import pytest

from bilevel import BilevelError, Runner
from bilevel.problems import digits
from bilevel.run.loop import Loop
from bilevel.solvers import Fixed, Search, delta_stn
from tests.support.solver_list import leaves_equal

QUIET = {"progress": "none", "picture": False, "threads": 1}


class Stop(Exception):
    """Ends a run as a crash would."""


def problem():
    return digits(hidden=[8], batch_size=128)


def run(solver, directory, **settings):
    runner = Runner(**{"epochs": 8, "warmup_epochs": 1, **QUIET, **settings})
    return runner.run(problem(), solver, directory=directory, seed=1)


def tuner():
    return delta_stn(inner_steps=4)  # an epoch has eight steps


def rates(result):
    return {record["epoch"]: record["hypers.dropout1"] for record in result.metrics}


def test_lambda_moves_in_the_tuning_phase_alone(tmp_path):
    result = run(tuner(), tmp_path, plain_epochs=2, tune_fraction=0.75)
    path = rates(result)
    assert len({path[epoch] for epoch in (0, 1, 2, 3)}) == 1
    assert len({path[epoch] for epoch in (3, 4, 5, 6)}) == 4
    assert path[6] == path[7] == path[8]
    responses = [record["epoch"] for record in result.metrics if "response_loss" in record]
    assert responses == [3, 4, 5, 6]
    assert result["outer_steps"] == 3 * 2


def test_plain_epochs_are_plain_training_bit_for_bit(tmp_path):
    ours = run(tuner(), tmp_path / "a", plain_epochs=2, epochs=2)
    plain = run(Fixed(), tmp_path / "b", epochs=2)
    assert leaves_equal(ours.solution("last").params, plain.solution("last").params)
    assert ours["last"]["valid_loss"] == plain["last"]["valid_loss"]
    assert ours["message"].startswith("nothing was tuned")


def test_frozen_epochs_draw_no_validation_batches(tmp_path):
    def drawn(**settings):
        return run(tuner(), None, **settings)["examples"]

    plain = drawn(plain_epochs=8)
    assert plain == 8 * 8 * 128
    assert drawn(tune_fraction=0.5) - plain == 3 * 2 * 128  # two outer steps an epoch


@pytest.mark.parametrize("stop", [1.5, 4, 7], ids=["plain", "tuning", "frozen"])
def test_a_run_resumes_in_any_phase_to_the_same_bits(tmp_path, monkeypatch, stop):
    settings = {"plain_epochs": 2, "tune_fraction": 0.75, "evaluate_every": 0.5}
    whole = run(tuner(), tmp_path / "whole", **settings)

    take = Loop._round

    def stopping(loop):
        if loop.step >= round(stop * 8):
            raise Stop
        take(loop)

    monkeypatch.setattr(Loop, "_round", stopping)
    with pytest.raises(Stop):
        run(tuner(), tmp_path / "part", **settings)
    monkeypatch.undo()
    runner = Runner(**{"epochs": 8, "warmup_epochs": 1, **QUIET, **settings})
    part = runner.run(problem(), tuner(), directory=tmp_path / "part", seed=1, resume=True)
    assert leaves_equal(whole.solution("last").params, part.solution("last").params)
    assert rates(whole) == rates(part)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"plain_epochs": -1}, "runner.plain_epochs=-1"),
        ({"plain_epochs": float("inf")}, "runner.plain_epochs=inf"),
        ({"tune_fraction": 0}, "choose a part above 0"),
        ({"tune_fraction": 1.5}, "choose a part above 0"),
        ({"tune_fraction": 0.5, "epochs": None, "seconds": 3}, "a part of runner.epochs"),
        ({"tune_fraction": 0.1}, "leaves no epoch for tuning"),
    ],
)
def test_a_wrong_phase_is_one_sentence(settings, words):
    with pytest.raises(BilevelError, match=words):
        Runner(**{"epochs": 8, "warmup_epochs": 1, **settings})


@pytest.mark.parametrize("settings", [{"plain_epochs": 1}, {"tune_fraction": 0.5}])
def test_a_solver_with_trials_of_its_own_has_no_such_phase(tmp_path, settings):
    with pytest.raises(
        BilevelError, match=f"runner.{next(iter(settings))}=.* cannot hold the λ of Search"
    ):
        run(Search(trial_epochs=1), tmp_path, **settings)
