"""Runs read back, labels, curves over seeds, and tests between groups."""

import json
import statistics

import numpy as np
import pytest
import scipy.stats

from bilevel.comparison.curve_plots import perturbation_band
from bilevel.comparison.curves import band, common_target, reached
from bilevel.comparison.labels import label
from bilevel.comparison.runs import group_runs, read_runs
from bilevel.comparison.statistics import holm, paired
from bilevel.comparison.step_table import STEP, milliseconds
from bilevel.comparison.table import plus_minus, rows
from bilevel.domains import Integer, Interval, Positive, Simplex
from bilevel.loggers.space_json import space_from_json, space_to_json
from bilevel.space import Space
from tests.support.comparison_runs import records, write_run

TRIALS = (("stn", 5, {}), ("tpe", 5, {"epochs": 5}), ("stn", 9, {}), ("tpe", 9, {"epochs": 9}))


def one(place, losses, **more):
    (run,) = read_runs(write_run(place, records(losses), **more))
    return run


def test_runs_are_found_at_any_depth_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 9, 0):
        write_run(
            tmp_path / "sweeps" / "today" / f"{number}-ridge-stn-seed{number}",
            records([1.0]),
            seed=number,
        )
    write_run(tmp_path / "alone", records([1.0]), seed=77)
    (tmp_path / "alone" / "wandb").mkdir()
    (tmp_path / "alone" / "wandb" / "summary.json").write_text("{}")  # within a run: no run
    assert [run.seed for run in read_runs(tmp_path)] == [77, 0, 9, 10]
    assert len(read_runs(tmp_path, tmp_path / "alone", tmp_path / "sweeps")) == 4


def test_a_run_is_what_its_files_say(tmp_path):
    made = records(
        [3.0, 1.0, 2.0], hypers__decay=[0.1, 0.2, 0.3], hypers__rates=[[1, 2], [3, 4], [5, 6]]
    )
    made[2]["hypers.large"] = {"mean": 1.0, "min": 0.0, "max": 2.0}
    (run,) = read_runs(write_run(tmp_path / "r", made, seed=4))
    assert (run.problem, run.solver, run.label, run.seed, run.status) == (
        "ridge",
        "stn",
        "stn",
        4,
        "finished",
    )
    assert run.records == made
    assert run.column("hypers.rates").tolist() == [[1, 2], [3, 4], [5, 6]]
    assert np.isnan(run.column("hypers.large")[:2]).all()
    assert run.column("hypers.large.max")[2] == 2
    assert run.part("hypers.") == ["decay", "rates", "large"]
    assert (run.best, run.at_best("valid_loss"), run.at_best("test_loss")) == (1, 1.0, 0.5)
    assert (run.at_end("hypers.decay"), run.total("seconds"), run.total("outer_steps")) == (
        0.3,
        2.0,
        3,
    )
    assert np.isnan(run.column("no.such")).tolist() == [True] * 3


@pytest.mark.parametrize("ended", ["finished", "diverged", "interrupted", None])
def test_how_a_run_ended(tmp_path, ended):
    assert one(tmp_path / "r", [2.0, 1.0], ended=ended).status == (ended or "running")


def test_a_run_that_goes_on_after_an_interruption_is_running(tmp_path):
    place = write_run(tmp_path / "r", records([2.0, 1.0]), ended="interrupted")
    with open(place / "metrics.jsonl", "a") as file:
        file.write(json.dumps(records([2.0, 1.0, 0.5])[-1]) + "\n")
    (run,) = read_runs(place)
    assert (run.status, run.total("seconds"), run.at_best("valid_loss")) == ("running", 2.0, 0.5)


def test_a_line_that_is_half_written_is_passed_over_and_one_that_is_damaged_is_reported(tmp_path):
    place = write_run(tmp_path / "r", records([2.0, 1.0]), ended=None)
    messages: list[str] = []
    with open(place / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "valid_l')
    (run,) = read_runs(place, warn=messages.append)
    assert (run.evaluations, messages) == (2, [])
    lines = (place / "metrics.jsonl").read_text().splitlines(keepends=True)
    (place / "metrics.jsonl").write_text(lines[0] + "\0\0garbage\n[1]\n" + lines[1])
    (run,) = read_runs(place, warn=messages.append)
    assert run.evaluations == 2
    assert len(messages) == 1
    assert "has 2 damaged lines" in messages[0]


def test_losses_that_are_not_numbers_are_no_losses(tmp_path):
    made = records([3.0, None, "much", 2.0])
    place = write_run(tmp_path / "r", records([1.0]), ended=None)
    (place / "metrics.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in made) + '{"valid_loss": NaN}\n'
    )
    (run,) = read_runs(place)
    assert run.best == 3
    assert np.isnan(run.column("valid_loss")).tolist() == [False, True, True, False, True]


def test_a_loss_that_no_axis_can_show_is_no_loss(tmp_path):
    (run,) = read_runs(write_run(tmp_path / "run", records([1e308, 2.0]), ended=None))
    assert np.isnan(run.column("valid_loss")[0])
    assert run.at_best("valid_loss") == 2.0


def test_labels_tell_what_differs_and_nothing_else():
    def run(solver, seed, rate, steps=5, **more):
        shared = {
            "seed": seed,
            "lr": {"inner": rate},
            "wandb": {"mode": str(seed)},
            "runner": {"progress": str(seed)},
        }
        return (
            "p",
            solver,
            {**shared, "solver": {"inner_steps": steps, "inner_optimizer": {"lr": rate}, **more}},
        )

    assert label([run("stn", 0, 0.1), run("stn", 1, 0.1), run("fixed", 0, 0.1)]) == [
        "stn",
        "stn",
        "fixed",
    ]
    assert label([run("stn", 0, 0.1), run("stn", 1, 0.3)]) == [
        "stn lr.inner=0.1",
        "stn lr.inner=0.3",
    ]
    assert label([run("stn", 0, 0.1, 1), run("stn", 0, 0.1), run("fixed", 0, 0.1)]) == [
        "stn inner_steps=1",
        "stn inner_steps=5",
        "fixed",
    ]
    # an argument that only one of them sets; solvers that were not given the same rate
    assert label([run("stn", 0, 0.1, clip_norm=None), run("stn", 0, 0.1)]) == [
        "stn clip_norm=null",
        "stn",
    ]
    assert label([run("stn", 0, 0.1), run("fixed", 0, 0.3)]) == [
        "stn lr.inner=0.1",
        "fixed lr.inner=0.3",
    ]
    # a shared setting that only one of the solvers reads
    labels = label([run("tpe", 0, 0.1, epochs=5), run("stn", 0, 0.1)])
    assert labels == ["tpe", "stn"]
    trials = [
        ("p", solver, {"trial": {"epochs": n}, "solver": {"n": 1, **own}})
        for solver, n, own in TRIALS
    ]
    assert label(trials) == ["stn", "tpe trial.epochs=5", "stn", "tpe trial.epochs=9"]
    assert label([("p", "stn", {}), run("stn", 0, 0.1)]) == ["stn", "stn"]  # settings unknown
    assert label([run("stn", 0, 0.1), ("q", "stn", run("stn", 0, 0.3)[2])]) == [
        "stn",
        "stn",
    ]  # other problems are other tables


def test_a_band_is_the_mean_of_what_is_interpolated(tmp_path):
    generator = np.random.default_rng(0)
    runs = []
    for seed in range(3):
        made = records(generator.uniform(1, 2, 6).tolist())
        for record in made:
            record["seconds"] *= 1 + seed / 7  # runs of different speed
        runs += read_runs(write_run(tmp_path / str(seed), made, seed=seed))
    over = band(runs, x="seconds", points=50)
    for index in range(0, len(over.x), 7):
        values = [
            np.interp(over.x[index], run.column("seconds"), run.column("valid_loss"))
            for run in runs
            if over.x[index] <= run.column("seconds")[-1]
        ]
        assert over.n[index] == len(values)
        assert over.mean[index] == pytest.approx(statistics.fmean(values))
        assert over.low[index] == pytest.approx(min(values))
        assert over.std[index] == pytest.approx(statistics.stdev(values) if len(values) > 1 else 0)
    assert over.whole().x[-1] == runs[0].column("seconds")[-1]
    assert set(over.whole().n) == {3}


def test_the_best_so_far_is_a_staircase_and_a_run_that_diverged_ends_before_it(tmp_path):
    run = one(tmp_path / "r", [4.0, 2.0, 3.0, None], ended="diverged")
    over = band([run], best_so_far=True, points=9)
    assert over.x[-1] == 2.0
    assert [float(over.mean[over.x <= x][-1]) for x in (0, 0.99, 1.0, 2.0)] == [4, 4, 2, 2]


def test_a_target_is_reached_where_it_was_measured(tmp_path):
    run = one(tmp_path / "r", [4.0, 2.0, None, 1.0])
    assert reached(run, 2.0) == (1.0, 1.0, 20.0)
    assert reached(run, 1.9) == (3.0, 3.0, 60.0)
    assert reached(run, 0.5) is None


def test_the_common_target_is_what_the_worst_reaches_on_average(tmp_path):
    runs = [
        one(tmp_path / f"{s}{i}", [9.0, best], solver=s)
        for s, pair in (("a", (1, 3)), ("b", (4, 2)))
        for i, best in enumerate(pair)
    ]
    groups = group_runs(runs)["ridge"]
    assert common_target(groups) == 3.0
    gone = group_runs([one(tmp_path / "gone", [9.0, None], solver="c", ended="diverged")])["ridge"]
    assert common_target({**groups, **gone}) == 3.0
    assert common_target(gone) == 9.0
    assert common_target({}) is None


def test_paired_tests_are_scipys_over_the_seeds_that_both_have(tmp_path):
    generator = np.random.default_rng(1)
    losses = {solver: generator.normal(1, 0.3, 6) for solver in ("a", "b", "c")}
    runs = [
        one(
            tmp_path / f"{solver}{seed}",
            [9.0, float(loss)],
            solver=solver,
            seed=seed + (solver == "c"),
        )
        for solver, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    pairs, all_pairs = paired(group_runs(runs)["ridge"], lambda run: run.at_best("valid_loss"))
    assert all_pairs
    assert [(pair.first, pair.second, pair.n) for pair in pairs] == [
        ("a", "b", 6),
        ("a", "c", 5),
        ("b", "c", 5),
    ]
    for pair, (x, y) in zip(
        pairs,
        [
            (losses["a"], losses["b"]),
            (losses["a"][1:], losses["c"][:-1]),
            (losses["b"][1:], losses["c"][:-1]),
        ],
        strict=True,
    ):
        expected = scipy.stats.ttest_rel(x, y)
        assert (pair.t, pair.p) == (
            pytest.approx(expected.statistic),
            pytest.approx(expected.pvalue),
        )
        assert pair.difference == pytest.approx(np.mean(x - y))
    assert [pair.adjusted for pair in pairs] == holm([pair.p for pair in pairs])
    against, all_pairs = paired(
        group_runs(runs)["ridge"], lambda run: run.at_best("valid_loss"), many=2
    )
    assert not all_pairs
    best = min(losses, key=lambda solver: losses[solver].mean())
    assert {pair.first for pair in against} == {best}


def test_a_difference_that_cannot_be_tested_has_no_p(tmp_path):
    runs = [
        one(tmp_path / f"{s}{seed}", [9.0, 1.0 + (s == "b")], solver=s, seed=seed)
        for s in "ab"
        for seed in (0, 1)
    ]
    runs += [
        one(tmp_path / "c", [5.0], solver="c", seed=0),
        one(tmp_path / "d", [5.0], solver="d", seed=9),
    ]
    pairs, _ = paired(group_runs(runs)["ridge"], lambda run: run.at_best("valid_loss"))
    assert [(pair.first, pair.second, pair.n, pair.p) for pair in pairs] == [
        ("a", "b", 2, None),
        ("a", "c", 1, None),
        ("b", "c", 1, None),
    ]


def test_runs_of_one_seed_count_once_in_a_paired_test(tmp_path):
    runs = [
        one(tmp_path / f"a{i}", [loss], solver="a", seed=0) for i, loss in enumerate((1.0, 3.0))
    ]
    runs += [one(tmp_path / "b", [1.5], solver="b", seed=0)]
    ((pair,), _) = paired(group_runs(runs)["ridge"], lambda run: run.at_best("valid_loss"))
    assert (pair.n, pair.difference) == (1, 0.5)


def test_a_step_costs_what_the_records_say_in_warm_up_and_after(tmp_path):
    made = records([5.0, 4.0, 3.0, 2.0], per_step=0.1)
    for record in made[2:]:
        record["seconds"] += 0.3 * (
            record["epoch"] - 1
        )  # after an epoch of warm-up each epoch of 2 steps takes 0.3 s more
    (run,) = read_runs(write_run(tmp_path / "r", made))
    assert milliseconds(run, warmup=True) == pytest.approx(100)
    assert milliseconds(run, warmup=False) == pytest.approx(250)
    assert milliseconds(run) == pytest.approx(200)


def test_a_step_costs_what_its_phases_cost_where_records_tell_them(tmp_path):
    made = records([5.0, 4.0, 3.0])  # two steps between evaluations
    for number, record in enumerate(made):
        record |= {"seconds.inner": 0.2 * number, "seconds.evaluation": 0.5 * (number + 1)}
        if number:
            record["seconds.outer"] = 0.1 * (number - 1)
    runs = read_runs(write_run(tmp_path / "r", made))
    titles, (cells,), _ = rows({"stn": runs}, STEP)
    assert cells[titles.index("inner phase")] == "100"  # 0.4 s for 4 steps
    assert cells[titles.index("outer phase")] == "25"
    assert cells[titles.index("ms per evaluation")] == "500"
    assert "response phase" not in titles
    old = read_runs(write_run(tmp_path / "old", records([5.0, 4.0])))
    assert not any(
        "phase" in title or "evaluation" in title for title in rows({"stn": old}, STEP).titles
    )


def test_the_range_of_a_perturbation_is_that_of_its_domain(tmp_path):
    space = Space(p=Interval(low=0.0, high=0.5, init=0.1), mix=Simplex(shape=(2,), init=0.5))
    made = records(
        [2.0, 1.0],
        hypers__p=[0.1, 0.2],
        scales__p=[1.0, 0.5],
        hypers__mix=[[0.5, 0.5]] * 2,
        scales__mix=[[1.0, 0.5]] * 2,
    )
    (run,) = read_runs(write_run(tmp_path / "r", made, space=space_to_json(space)))
    low, high = perturbation_band(run, "p")
    odds, sigma = np.log(np.array([0.1, 0.2]) / np.array([0.4, 0.3])), np.array([1.0, 0.5])
    assert low == pytest.approx(0.5 / (1 + np.exp(sigma - odds)))
    assert high == pytest.approx(0.5 / (1 + np.exp(-sigma - odds)))
    assert perturbation_band(run, "mix")[0].shape == (2, 2)
    assert perturbation_band(run, "q") is None


def test_a_space_is_described_such_that_it_can_be_made_again():
    space = Space(
        p=Interval(low=0.0, high=0.5, init=[0.1, 0.2], shape=(2,), scale=0.5),
        n=Integer(low=1, high=9, init=3),
        lr=Positive(init=0.1, optimizer="lr"),
        large=Positive(init=1.0, shape=(65,)),
    )
    again = space_from_json(json.loads(json.dumps(space_to_json(space))))
    assert list(again) == ["p", "n", "lr"]
    assert again["p"].initial().tolist() == [0.1, 0.2]
    assert (again["n"].high, again["lr"].optimizer, again["p"].scale) == (9, "lr", 0.5)
    assert (
        list(
            space_from_json(
                {"p": {"domain": "Nonsense"}, "q": 3, "r": {"domain": "Positive", "init": -1}}
            )
        )
        == []
    )


def test_numbers_are_written_to_the_digits_that_they_have():
    assert plus_minus(0.123456, 0.00123) == "0.1235 ± 0.0012"
    assert plus_minus(1234.5, 98.7) == "1,234 ± 99"
    assert plus_minus(0.0, 0.0) == "0 ± 0"
    assert plus_minus(0.6461234, 3e-8) == "0.64612 ± 3e-08"
    assert plus_minus(2e12, 3e11) == "(2.00 ± 0.30)e+12"
