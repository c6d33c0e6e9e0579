"""Population-based training: copies, moves, scores, and the state of a checkpoint."""

import io
import json
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from bilevel import BilevelError, Integer, Interval, Positive, Real, Runner, Simplex, Space
from bilevel.problems import Ridge, digits
from bilevel.run.evaluation import evaluate
from bilevel.solvers import Fixed
from bilevel.solvers.black_box.population import PopulationBased
from tests.support.device_waits import no_waiting
from tests.support.solver_cases import CPU, at, every_domain, normed, ready, sgd


def population(problem, *, seed=1, **options):
    options = {
        "population": 4,
        "inner_steps": 2,
        "inner_optimizer": sgd(0.05, momentum=0.9),
    } | options
    return ready(problem, PopulationBased(**options), seed=seed)


def generation(solver, *, warmup=False):
    """Rounds up to the end of a generation."""
    before = solver.generations
    while solver.generations == before:
        metrics = solver.step(warmup=warmup)
    return metrics


def everything(solver):
    return tree_leaves((solver.state_dict(), solver.solution()))


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


# --- members ---


def test_the_first_member_begins_as_any_solver_does_and_the_others_elsewhere():
    problem = digits(hidden=[16])
    solver, fixed = population(problem), ready(problem, Fixed())
    assert all(
        torch.equal(solver.members[0].weights.tensors[n], w)
        for n, w in fixed.core.weights.tensors.items()
    )
    torch.testing.assert_close(solver.members[0].u, problem.space.init())
    for one, other in zip(solver.members, solver.members[1:], strict=False):
        assert not torch.equal(one.weights.leaves[0], other.weights.leaves[0])
        assert bool((one.u != other.u).all())


def test_members_take_turns_and_a_limit_ends_a_turn_early():
    solver = population(
        Ridge.synthetic(features=4, batch_size=8), population=3
    )  # 7 batches an epoch
    for limit in (None, None, 1, None, None):
        solver.step(limit=limit)
    assert [m.steps for m in solver.members] == [4, 2, 3]
    generation(solver)
    assert [m.steps for m in solver.members] == [7, 7, 7]
    assert (solver.inner_count, solver.outer_count, solver.generations) == (21, 1, 1)


def test_a_member_trains_as_fixed_does_at_its_lambda():
    problem = Ridge.synthetic(features=4, dtype=torch.float64)
    solver, fixed = (
        population(problem),
        ready(problem, Fixed(inner_steps=2, inner_optimizer=sgd(0.05, momentum=0.9))),
    )
    solver.generation_steps = 10
    for _ in range(4 * 3):
        solver.step()
    for _ in range(3):
        fixed.step()
    assert torch.equal(solver.members[0].weights.leaves[0], fixed.core.weights.leaves[0])


def test_examples_of_training_and_of_scores_are_counted():
    solver = population(Ridge.synthetic(features=4, batch_size=8))
    generation(solver)
    assert (solver.data.train.examples, solver.data.valid.examples) == (4 * 7 * 8, 4 * 60)


# --- exploit and explore ---


def test_exploit_copies_and_shares_nothing():
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    solver = population(normed(dropout=0.3), inner_scheduler=schedule)
    for _ in range(4 * 3):
        solver.step()
    donor, member = solver.members[0], solver.members[1]
    before = [leaf.data_ptr() for leaf in member.weights.leaves]
    assert not same(tree_leaves(donor.state_dict()), tree_leaves(member.state_dict()))
    member.steps, member.score = donor.steps, donor.score
    solver.exploit(member, donor)
    assert same(tree_leaves(donor.state_dict()), tree_leaves(member.state_dict()))
    assert [leaf.data_ptr() for leaf in member.weights.leaves] == before

    def places(m):
        tensors = (
            *m.weights.leaves,
            *tree_leaves(m.weights.optimizer.state_dict()),
            *m.carry.values(),
            m.u,
        )
        return {t.data_ptr() for t in tensors if isinstance(t, torch.Tensor)}

    assert not places(donor) & places(member)
    lists = [
        [v for v in m.weights.scheduler.state_dict().values() if isinstance(v, list)]
        for m in (donor, member)
    ]
    assert lists[0]
    assert all(one is not other for one, other in zip(*lists, strict=True))
    frozen = [
        t.clone() if isinstance(t, torch.Tensor) else t for t in tree_leaves(donor.state_dict())
    ]
    for _ in range(3):
        solver.descend(member)
    assert same(tree_leaves(donor.state_dict()), frozen)


def test_the_worst_quarter_is_replaced_from_the_best():
    solver = population(Ridge.synthetic(features=4), population=8)
    solver.members[0].weights.leaves[0].data.fill_(3.0)
    for member, score in zip(solver.members, [5, 1, 8, 3, 2, 7, 6, 4], strict=True):
        member.score = float(score)
    before = [m.weights.leaves[0].detach().clone() for m in solver.members]
    us = [m.u.clone() for m in solver.members]
    solver.decide()
    for i, member in enumerate(solver.members):
        if i in (2, 5):  # the scores 8 and 7
            assert any(torch.equal(member.weights.leaves[0], before[best]) for best in (1, 4))
        else:
            assert torch.equal(member.weights.leaves[0], before[i])
            assert torch.equal(member.u, us[i])


def test_every_donor_and_every_move_occurs_as_often_as_it_should():
    """Moves of ±0.2 scales three times in four, draws anew once in four."""
    problem = Ridge.synthetic(
        features=4, per_feature=True, space={"log_decay": {"scale": 0.5}}, dtype=torch.float64
    )
    solver = population(problem, population=8)
    member, start, moves = solver.members[0], solver.members[0].u.clone(), []
    for _ in range(500):
        member.u.copy_(start)
        solver.explore(member)
        moves.append((member.u - start).clone())
    moves = torch.cat(moves)
    up, down = ((moves - s * 0.1).abs() < 1e-9 for s in (1, -1))
    for found, expected in ((up, 0.375), (down, 0.375), (~(up | down), 0.25)):
        assert (
            abs(float(found.double().mean()) - expected)
            < 4 * (expected * (1 - expected) / len(moves)) ** 0.5
        )


DOMAINS = st.fixed_dictionaries(
    {
        "rate": st.floats(0.01, 0.94).map(lambda x: Interval(low=0.0, high=0.95, init=x)),
        "holes": st.floats(0.01, 4.99).map(lambda x: Integer(low=0, high=5, init=x)),
        "decay": st.floats(1e-6, 1e3).map(lambda x: Positive(init=x)),
        "shift": st.floats(-10, 10).map(lambda x: Real(init=x, shape=(2,))),
        "mixture": st.integers(2, 4).map(lambda n: Simplex(init=1 / n, shape=(n,))),
    }
)


@settings(max_examples=25, deadline=None)
@given(
    domains=DOMAINS,
    perturbation=st.floats(0, 3),
    resample=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_explore_stays_inside_every_domain(domains, perturbation, resample, seed):
    problem = Ridge.synthetic(features=2, examples=4)
    problem.space = space = Space(**domains)
    solver = population(
        problem, population=2, perturbation=perturbation, resample=resample, seed=seed
    )
    for _ in range(10):
        solver.explore(solver.members[1])
    hypers = space.constrain(solver.members[1].u, solver.generator)
    assert 0 <= hypers["rate"] <= 0.95
    assert hypers["holes"] in range(6)
    assert 0 <= hypers["decay"] < math.inf
    assert bool(torch.isfinite(hypers["shift"]).all())
    assert bool((hypers["mixture"] >= 0).all())
    torch.testing.assert_close(hypers["mixture"].sum(), torch.tensor(1.0))
    assert solver.members[1].u.shape == (space.numel,)


# --- settings of the optimizer ---


@pytest.mark.parametrize("schedule", ["StepLR", "LambdaLR", "ReduceLROnPlateau", None])
def test_a_tuned_learning_rate_reaches_the_optimizer_and_keeps_the_factor_of_its_schedule(schedule):
    schedules = {
        "StepLR": partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
        "LambdaLR": partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda epoch: 0.5**epoch),
        "ReduceLROnPlateau": partial(
            torch.optim.lr_scheduler.ReduceLROnPlateau, factor=0.5, patience=0, threshold=1e9
        ),
        None: None,
    }
    rates = {
        "rate": {"optimizer": "lr", "init": 0.05},
        "momentum": {"optimizer": "momentum", "init": 0.7},
    }
    problem = Ridge.synthetic(features=4, batch_size=8, space=rates)
    solver = population(
        problem, inner_scheduler=schedules[schedule], perturbation=1.0, ranges={"rate": [0.01, 0.1]}
    )
    for ended in range(4):
        for member in solver.members:
            hypers, group = (
                problem.space.constrain(member.u),
                member.weights.optimizer.param_groups[0],
            )
            halved = 0 if schedule is None else ended
            if (
                schedule == "ReduceLROnPlateau"
            ):  # at the end of the first epoch there is no score to be read
                halved = max(0, ended - 1)
            assert group["lr"] == pytest.approx(float(hypers["rate"]) * 0.5**halved, rel=1e-5)
            assert group["momentum"] == pytest.approx(float(hypers["momentum"]), rel=1e-5)
        generation(solver)
    assert len({float(m.u[1]) for m in solver.members}) > 1


# --- the solution ---


def test_the_solution_is_the_best_score_so_far_with_the_weights_that_had_it():
    solver, best = population(digits(hidden=[16]), inner_optimizer=sgd(0.5, momentum=0.9)), math.inf
    first = solver.members[0]
    assert all(
        torch.equal(w, first.weights.tensors[n]) for n, w in solver.solution().params.items()
    )
    for _ in range(5):
        generation(solver)
        scores = [m.score for m in solver.members]
        best = min(best, *scores)
        assert solver.best.score == best
        for _ in range(2):  # the population goes on, the solution stays
            assert evaluate(solver.problem, solver.solution(), solver.data.valid)["loss"] == best
            solver.step()


def test_records_of_a_run_never_get_worse_once_there_is_a_score(tmp_path):
    problem = Ridge.synthetic(batch_size=20)
    runner = Runner(epochs=80, warmup_epochs=0, evaluate_every=4, progress="none", picture=False)
    solver = PopulationBased(population=4, inner_steps=3, inner_optimizer=sgd(0.1))
    summary = runner.run(problem, solver, directory=tmp_path / "run")
    records = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [record["valid_loss"] for record in records][1:]
    assert len(losses) == 20
    assert losses == sorted(losses, reverse=True)
    assert summary["best"]["valid_loss"] == losses[-1] == pytest.approx(solver.best.score)
    assert (summary["steps"], summary["outer_steps"]) == (80 * 3, 20)


def test_a_budget_of_examples_holds_scores_too(tmp_path):
    problem = Ridge.synthetic(batch_size=20)
    runner = Runner(examples=5_000, warmup_epochs=0, progress="none", picture=False)
    summary = runner.run(
        problem, PopulationBased(population=4, inner_steps=3), directory=tmp_path / "run"
    )
    assert summary["stopped"] == "examples"
    assert 5_000 <= summary["examples"] <= 5_000 + 60 + 4 * 60
    assert summary["outer_steps"] == summary["steps"] // 12
    assert summary["examples"] == summary["steps"] * 20 + summary["outer_steps"] * 4 * 60


# --- it finds something ---


@pytest.mark.parametrize("init", [-9.0, 4.0])
def test_finds_a_better_decay_than_the_initial_one(init):
    """The best score comes near the lowest loss of converged weights, or below it, and λ follows.

    There are 20 generations of 10 steps for each of 4 members. A population minimizes the loss
    itself, with w stopped early.
    """
    problem = Ridge.synthetic(dtype=torch.float64, space={"log_decay": {"init": init}})
    options = {"inner_steps": 10, "interval": 10, "ranges": {"log_decay": [-10.0, 5.0]}}
    solver = population(problem, inner_optimizer=sgd(0.01, momentum=0.9), **options)

    def converged(hypers):
        X, y = problem._valid
        return 0.5 * float((X @ problem.best_response(hypers)["weight"][0] - y).square().mean())

    before, lowest = converged(solver.solution().hypers), converged(problem.optimum())
    for _ in range(20):
        generation(solver)
    assert solver.best.score - lowest < 0.2 * (before - lowest)
    assert converged(solver.solution().hypers) - lowest < 0.5 * (before - lowest)


def test_finds_better_dropout_on_digits_at_the_same_steps_for_each_member():
    high = {name: {"init": 0.8} for name in ("input_dropout", "dropout1")}
    problem = digits(hidden=[16], space=high)
    solver, fixed = (
        population(problem, population=8, inner_steps=16),
        ready(problem, Fixed(inner_optimizer=sgd(0.05, momentum=0.9))),
    )
    for _ in range(5):
        generation(solver)
    while fixed.inner_count < solver.members[0].steps:
        fixed.step()
    ours, theirs = (
        evaluate(problem, s.solution(), at(s).data.valid)["loss"] for s in (solver, fixed)
    )
    assert ours < 0.5 * theirs
    assert solver.solution().hypers["input_dropout"] < 0.6


# --- divergence ---


def test_a_member_that_diverges_is_replaced_and_the_run_goes_on():
    solver = population(Ridge.synthetic(features=4))
    solver.step()
    solver.members[2].weights.leaves[0].data.fill_(math.nan)
    metrics = generation(solver)
    assert metrics["lost_members"] == 0.25
    assert all(math.isfinite(value) for value in (solver.best.score, float(metrics["outer_loss"])))
    assert all(
        bool(torch.isfinite(leaf).all()) for m in solver.members for leaf in m.weights.leaves
    )
    assert solver.services.bad_step() is None
    assert "25% of the members" in solver.warnings({"lost_members": 0.25})["lost_members"]
    assert not solver.warnings({"lost_members": 0.0})


def test_more_lost_members_than_a_quarter_are_all_replaced_and_a_lost_population_ends_the_run(
    tmp_path,
):
    solver = population(Ridge.synthetic(features=4))
    for member in solver.members[:3]:
        member.weights.leaves[0].data.fill_(math.inf)
    generation(solver)
    assert all(
        bool(torch.isfinite(leaf).all()) for m in solver.members for leaf in m.weights.leaves
    )
    assert solver.services.bad_step() is None
    for member in solver.members:
        member.weights.leaves[0].data.fill_(math.nan)
    generation(solver)
    assert solver.services.bad_step() == solver.inner_count
    runner = Runner(epochs=200, warmup_epochs=0, progress="none", picture=False)
    diverging = PopulationBased(population=2, inner_optimizer=sgd(1e30))
    summary = runner.run(Ridge.synthetic(features=4), diverging, directory=tmp_path / "run")
    assert summary["diverged"]


# --- state ---


@pytest.mark.parametrize("at", [3, 8])
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(at):
    """Stopped in the middle of an interval, before the first score and after it."""
    problem = normed(dropout=0.3)
    problem.space = problem.space.override({"rate": {"optimizer": "lr", "init": 0.05}})
    options = {
        "inner_scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.9),
        "inner_optimizer": partial(torch.optim.Adam, lr=0.05),
        "clip_norm": 1.0,
        "interval": 4 / 3,  # 4 batches
    }

    def rounds(solver, n):
        for _ in range(n):
            solver.step()

    solver = population(problem, **options)
    rounds(solver, at)
    file = io.BytesIO()
    torch.save(
        (solver.state_dict(), solver.data.train.state_dict(), solver.data.valid.state_dict()), file
    )
    rounds(solver, 20)
    resumed = population(problem, seed=2, **options)
    file.seek(0)
    state, train, valid = torch.load(file, weights_only=True)
    resumed.load_state_dict(state)
    resumed.data.train.load_state_dict(train)
    resumed.data.valid.load_state_dict(valid)
    rounds(resumed, 20)
    assert solver.outer_count >= 2
    assert len(everything(solver)) > 50
    assert same(everything(resumed), everything(solver))
    groups = (
        [m.weights.optimizer.param_groups[0]["lr"] for m in s.members] for s in (resumed, solver)
    )
    assert len({tuple(g) for g in groups}) == 1


def test_a_seed_gives_one_run_and_another_seed_another():
    problem, ends = normed(dropout=0.3), []
    for seed in (1, 1, 2):
        solver = population(problem, seed=seed)
        for _ in range(3):
            generation(solver)
        ends.append(everything(solver))
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


def test_warmup_scores_and_replaces_nobody():
    solver = population(Ridge.synthetic(features=4))
    before = [m.u.clone() for m in solver.members]
    for _ in range(3):
        generation(solver, warmup=True)
    assert solver.outer_count == 0
    assert solver.best is not None
    assert all(torch.equal(m.u, u) for m, u in zip(solver.members, before, strict=True))
    generation(solver)
    assert sum(not torch.equal(m.u, u) for m, u in zip(solver.members, before, strict=True)) == 1


@pytest.mark.parametrize(
    "make", [lambda: digits(hidden=[16]), lambda: normed(dropout=0.3), every_domain]
)
def test_no_round_waits_for_the_device_but_the_one_that_scores(make):
    solver = population(make(), clip_norm=1.0, interval=10)
    solver.step()
    with no_waiting():
        for _ in range(6):
            solver.step()
    assert solver.generations == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"population": 1},
        {"interval": 0},
        {"resample": 1.5},
        {"resample": -0.1},
        {"perturbation": -1},
        {"inner_steps": 0},
        {"clip_norm": 0.0},
    ],
)
def test_settings_out_of_range_are_errors(wrong):
    with pytest.raises(BilevelError, match=next(iter(wrong))):
        PopulationBased(**wrong)


def test_a_setting_that_the_optimizer_has_not_is_an_error():
    problem = Ridge.synthetic(space={"beta": {"optimizer": "beta1", "init": 0.9}})
    with pytest.raises(BilevelError, match="no setting `beta1`"):
        PopulationBased().setup(
            problem, problem.data(CPU, torch.Generator()), CPU, torch.Generator()
        )
