"""A refit trains anew at constant λ, the best candidate wins, and a broken one continues."""

import json
import os
import signal
from functools import partial

import pytest
import torch

from bilevel import BilevelError, Interval, Runner, SolverWarning, Space, best_solution, evaluate
from bilevel.checkpoint.refit_directory import result_directory
from bilevel.loggers.records import read_metrics
from bilevel.problems import digits
from bilevel.run.frozen_hypers import FrozenHypers
from bilevel.solvers import Fixed, PopulationBased, delta_stn, random_search
from tests.soak.kills import differences
from tests.support.fakes import FakeSolver
from tests.support.runs import run as run_fake
from tests.support.strikes import Act, Killed, kill

QUIET = {"warmup_epochs": 0.25, "progress": "none", "picture": False, "device": "cpu"}
RATE = partial(torch.optim.SGD, lr=0.05)


def solver(**changes):
    return delta_stn(inner_steps=3, inner_optimizer=RATE, **changes)


def problem():
    return digits(hidden=[6], dropout="gaussian", batch_size=256)


def run(directory, *, make=solver, resume=False, loggers=(), params=None, **settings):
    runner = Runner(**{"epochs": 2, "refit": "end", **QUIET, **settings})
    if not resume:
        torch.manual_seed(0)  # checkpoints hold the global state too
    return runner.run(
        problem(),
        make(),
        directory=directory,
        seed=3,
        resume=resume,
        loggers=loggers,
        params=params,
    )


def digits_test():
    return problem().data(torch.device("cpu"), torch.Generator()).test


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one) and one.keys() == other.keys()


@pytest.fixture(scope="module")
def refitted(tmp_path_factory):
    """A run with both refits."""
    directory = tmp_path_factory.mktemp("all") / "run"
    return run(directory, refit="all")


# --- the training


def test_a_refit_is_plain_training_at_the_last_values(refitted, tmp_path):
    """Bit for bit that of `Fixed` on the same problem with λ as its constants."""
    end = refitted.candidates["end"]
    found = refitted.candidates["run"].solution("last").hypers
    assert equal(end.solution("last").hypers, found)
    assert not equal(end.solution().hypers, refitted.candidates["start"].solution().hypers)
    plain = Fixed(inner_steps=3, inner_optimizer=RATE)
    runner = Runner(epochs=2, **QUIET)
    again = runner.run(FrozenHypers(problem(), found), plain, directory=tmp_path / "a", seed=3)
    assert equal(end.solution("last").params, again.solution("last").params)
    assert end["steps"] == again["steps"] == refitted.candidates["run"]["steps"]
    assert end["outer_steps"] == 0


def test_a_refit_at_the_start_is_a_run_of_fixed(refitted, tmp_path):
    plain = Fixed(inner_steps=3, inner_optimizer=RATE)
    again = Runner(epochs=2, **QUIET).run(problem(), plain, directory=tmp_path / "a", seed=3)
    start = refitted.candidates["start"]
    assert equal(start.solution("last").params, again.solution("last").params)


def test_the_best_values_are_those_of_the_best_evaluation(tmp_path):
    """A high loss is wanted, so that the best evaluation is not the last one."""
    result = run(tmp_path / "a", refit="best", select="max valid_loss")
    own, best = result.candidates["run"], result.candidates["best"]
    assert own["best"]["step"] < own["last"]["step"], "the case must tell best from last"
    assert equal(best.solution("last").hypers, own.solution("best").hypers)
    assert not equal(best.solution("last").hypers, own.solution("last").hypers)


def test_the_run_itself_keeps_its_bits(refitted, tmp_path):
    alone = run(tmp_path / "a", refit=False)
    assert "refit" not in alone
    assert alone.candidates == {}
    own = refitted.candidates["run"]
    assert equal(own.solution("last").params, alone.solution("last").params)
    assert own["best"]["test_loss"] == alone["best"]["test_loss"]


def test_inner_settings_are_those_of_the_solver():
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=2)
    tuned = delta_stn(inner_steps=7, inner_optimizer=RATE, inner_scheduler=schedule, clip_norm=0.5)
    plain = tuned.plain()
    assert (plain.inner_steps, plain.inner_optimizer) == (7, RATE)
    assert (plain.inner_scheduler, plain.clip_norm) == (schedule, 0.5)


def test_given_weights_begin_the_refits_too(refitted, tmp_path):
    given = refitted.candidates["start"].solution("last").params
    own_seed = refitted.metrics[0]["valid_loss"]
    killed = Act(kill, 3, in_refit=True)
    with pytest.raises(Killed):  # the resumed run is not given them again
        run(tmp_path / "a", params=given, loggers=[killed])
    (tmp_path / "a" / "refit-end" / "checkpoint.pt").unlink()
    run(tmp_path / "a", resume=True)
    first = read_metrics(tmp_path / "a" / "refit-end" / "metrics.jsonl")[0]
    own = read_metrics(tmp_path / "a" / "metrics.jsonl")[0]
    assert first["valid_loss"] == own["valid_loss"]
    assert first["valid_loss"] == refitted.candidates["start"]["last"]["valid_loss"] != own_seed


# --- the choice and the cost


def test_the_best_candidate_is_the_result(refitted):
    report = refitted["refit"]
    losses = {name: entry["valid_loss"] for name, entry in report["candidates"].items()}
    assert losses.keys() == {"run", "start", "end"}
    assert len(set(losses.values())) == 3
    chosen = min(losses, key=losses.get)
    assert report["chosen"] == chosen != "run", "the case must choose a refit"
    assert refitted["best"]["valid_loss"] == losses[chosen]
    assert refitted["best"]["test_loss"] == report["candidates"][chosen]["test_loss"]
    kept = refitted.candidates[chosen]
    assert equal(refitted.solution().params, kept.solution().params)
    assert refitted["hypers"] == report["candidates"][chosen]["hypers"]
    measured = evaluate(kept.problem, refitted.solution(), digits_test())
    assert measured["loss"] == pytest.approx(refitted["best"]["test_loss"])
    assert refitted.module().training is False
    # and from the files
    assert result_directory(refitted.directory).name == f"refit-{chosen}"
    assert equal(best_solution(refitted.directory).params, refitted.solution().params)
    stored = json.loads((refitted.directory / "summary.json").read_text())
    assert stored["refit"]["chosen"] == chosen
    assert stored["best"] == json.loads(json.dumps(refitted["best"]))


def test_another_metric_chooses(tmp_path):
    """The worst loss wins where it should be high, and the run itself where all are equal."""
    highest = run(tmp_path / "a", refit="all", select="max valid_loss")
    losses = {n: e["valid_loss"] for n, e in highest["refit"]["candidates"].items()}
    assert losses[highest["refit"]["chosen"]] == max(losses.values())
    assert highest["refit"]["chosen"] == "run", "all begin at the same weights and loss"


def test_all_costs_are_counted(refitted):
    report = refitted["refit"]
    for name in ("seconds", "examples", "steps", "evaluations"):
        parts = [entry[name] for entry in report["candidates"].values()]
        assert refitted[name] == pytest.approx(sum(parts))
        assert report[name] == pytest.approx(sum(parts[1:]))
    before = report["candidates"]["run"]["examples"] + report["candidates"]["start"]["examples"]
    own = report["candidates"]["end"]["best"]["examples"]
    assert report["chosen"] == "end"
    assert refitted["best"]["examples"] == before + own


def test_a_refit_has_the_whole_budgets_of_its_own(tmp_path):
    result = run(tmp_path / "a", epochs=None, examples=4000)
    own, end = (result["refit"]["candidates"][name] for name in ("run", "end"))
    assert 4000 <= end["examples"] < 4000 + 3 * 256
    assert end["steps"] > own["steps"], "its steps are cheaper"


# --- what is not refitted


def test_a_solver_that_tunes_nothing_is_not_refitted(tmp_path):
    with pytest.warns(SolverWarning, match=r"runner.refit=end has no effect, since Fixed"):
        result = run(tmp_path / "a", make=Fixed)
    assert "refit" not in result
    assert not list((tmp_path / "a").glob("refit-*"))


@pytest.mark.parametrize("make", [random_search, PopulationBased, FakeSolver])
def test_a_solver_without_plain_training_is_refused(tmp_path, make):
    name = type(make()).__name__
    with pytest.raises(BilevelError, match=f"runner.refit=end cannot follow {name}, which has no"):
        run(tmp_path / "a", make=make)
    assert not (tmp_path / "a").exists()


def test_a_metric_of_one_solver_cannot_choose(tmp_path):
    with pytest.raises(BilevelError, match=r"cannot choose by runner.select='min inner_loss'"):
        run(tmp_path / "a", select="min inner_loss")


def test_a_run_without_an_outer_step_is_not_refitted(tmp_path):
    result = run(tmp_path / "a", warmup_epochs=2)
    assert "nothing was tuned" in result["message"]
    assert "refit" not in result


def test_wrong_values_are_refused():
    assert Runner(epochs=1, refit=True).refits == ("end",)
    assert Runner(epochs=1, refit=None).refits == Runner(epochs=1).refits == ()
    with pytest.raises(BilevelError, match=r"refit='ends' is unknown \(did you mean `end`"):
        Runner(epochs=1, refit="ends")


def test_a_diverged_run_is_not_refitted(tmp_path):
    class Poisoned(FakeSolver):
        def plain(self):
            return Fixed()

    result, _ = run_fake(tmp_path / "a", Poisoned(poison_at=9), refit="end")
    assert result["diverged"]
    assert "refit" not in result


def test_a_diverged_refit_is_out_of_the_choice(tmp_path):
    """It was better than the run before it diverged."""

    class Poisoned(FakeSolver):
        def plain(self):
            return Frozen(rate=0.3, poison_at=20)

    class Frozen(FakeSolver):
        def step(self, *, warmup=False, limit=None):
            return super().step(warmup=True, limit=limit)

    result, _ = run_fake(tmp_path / "a", Poisoned(), refit="end")
    end = result["refit"]["candidates"]["end"]
    assert end["diverged"]
    assert end["valid_loss"] < result["refit"]["candidates"]["run"]["valid_loss"]
    assert result["refit"]["chosen"] == "run"
    assert not result["diverged"]
    assert result["best"]["valid_loss"] == result["refit"]["candidates"]["run"]["valid_loss"]


def test_values_on_the_edge_are_held():
    """In float32 a rate may reach the end of its interval, where u is infinite."""
    interval = partial(Interval, low=0.0, high=1.0, init=0.5)
    made = problem()
    made.space = Space(rate=interval(), many=interval(shape=(100,)))
    hypers = {"rate": torch.tensor(1.0), "many": torch.linspace(0, 1, 100)}
    frozen = FrozenHypers(made, hypers)
    assert frozen.space.numel == 0
    held = frozen.space.constrain(frozen.space.init(torch.float32))
    assert equal(held, hypers)


# --- ends in the middle


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "run"
    run(directory, refit="all")
    return directory


@pytest.mark.parametrize("step", [3, 6, 8])
def test_a_run_killed_in_a_refit_goes_on_bit_for_bit(whole, tmp_path, step):
    with pytest.raises(Killed):
        run(tmp_path / "a", refit="all", loggers=[Act(kill, step, in_refit=True)])
    assert not (tmp_path / "a" / "summary.json").exists()
    torch.rand(step)  # another process has another global state
    run(tmp_path / "a", refit="all", resume=True)
    assert differences(whole, tmp_path / "a") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_refit_interrupts_the_run(whole, tmp_path, number):
    act = Act(lambda: os.kill(os.getpid(), number), 6, in_refit=True)
    result = run(tmp_path / "a", refit="all", loggers=[act])
    assert result["interrupted"]
    assert result["stopped"] == "interrupted"
    assert result["signal"] == number.name
    assert result["message"] == (
        "the run was interrupted at step 6 of refit-start; continue with: bilevel "
        f"resume={tmp_path / 'a'}"
    )
    assert result["refit"]["chosen"] is None
    nested = json.loads((tmp_path / "a" / "refit-start" / "summary.json").read_text())
    assert nested["message"].endswith(f"bilevel resume={tmp_path / 'a'}")
    assert not (tmp_path / "a" / "refit-end").exists()
    run(tmp_path / "a", refit="all", resume=True)
    assert differences(whole, tmp_path / "a") == []


def test_a_signal_in_the_tuning_leaves_the_refits_for_later(whole, tmp_path):
    act = Act(lambda: os.kill(os.getpid(), signal.SIGTERM), 4)
    result = run(tmp_path / "a", refit="all", loggers=[act])
    assert result["interrupted"]
    assert "refit" not in result
    assert not list((tmp_path / "a").glob("refit-*"))
    run(tmp_path / "a", refit="all", resume=True)
    assert differences(whole, tmp_path / "a") == []


def test_a_finished_run_resumes_to_the_same_summary(whole, tmp_path):
    run(tmp_path / "a", refit="all")
    again = run(tmp_path / "a", refit="all", resume=True)
    assert again["refit"]["candidates"].keys() == {"run", "start", "end"}
    assert differences(whole, tmp_path / "a") == []


def test_a_refit_can_be_asked_for_afterwards(whole, tmp_path):
    run(tmp_path / "a", refit="none")
    run(tmp_path / "a", refit="all", resume=True)
    assert differences(whole, tmp_path / "a") == []


def test_a_longer_run_is_refitted_anew(tmp_path):
    """The refit at the start goes on, and the one of another λ begins anew."""
    run(tmp_path / "a", refit="all", epochs=1)
    run(tmp_path / "a", refit="all", epochs=2, resume=True)
    run(tmp_path / "b", refit="all", epochs=2)
    for name in ("start", "end"):
        records = [
            read_metrics(tmp_path / one / f"refit-{name}" / "metrics.jsonl")[-1] for one in "ab"
        ]
        assert records[0]["valid_loss"] == records[1]["valid_loss"]
        assert records[0]["hypers.weight_decay"] == records[1]["hypers.weight_decay"]


def test_a_damaged_refit_begins_anew(whole, tmp_path):
    run(tmp_path / "a", refit="all")
    for file in (tmp_path / "a" / "refit-end").glob("checkpoint*.pt"):
        file.write_bytes(b"nothing")
    run(tmp_path / "a", refit="all", resume=True)
    assert differences(whole, tmp_path / "a") == []


def test_a_directory_moved_during_a_refit_is_named(tmp_path):
    def move():
        (tmp_path / "a").rename(tmp_path / "b")

    with pytest.raises(BilevelError, match=rf"was moved to {tmp_path / 'b'} during the run"):
        run(tmp_path / "a", refit="end", epochs=40, loggers=[Act(move, 3, in_refit=True)])
    run(tmp_path / "b", refit="end", epochs=40, resume=True)
    run(tmp_path / "c", refit="end", epochs=40)
    assert differences(tmp_path / "c", tmp_path / "b") == []
