"""A comparison shows the candidate that a run chose, and counts the tuning and all refits."""

import json

import pytest

from bilevel.comparison.curves import reached
from bilevel.comparison.report import sections
from bilevel.comparison.runs import read_runs
from tests.support.comparison_runs import records, write_run

COSTS = ("seconds", "examples")


def refitted(place, chosen, *, seed=0):
    """A run of four seconds and 80 examples whose refits take one second and 30 examples each."""
    directory = write_run(place, records([4.0, 2.0, 3.0, 2.5, 2.6]), seed=seed, solver="delta_stn")
    path = directory / "summary.json"
    summary = json.loads(path.read_text())
    evaluations = {
        "run": summary["best"] | {"last": 4.0},
        "start": {"step": 6, "epoch": 3.0, "seconds": 0.9, "examples": 27, "valid_loss": 1.9},
        "end": {"step": 8, "epoch": 4.0, "seconds": 0.8, "examples": 24, "valid_loss": 1.5},
    }
    candidates = {
        name: {"best": best, "last": {"epoch": 4.0}, "seconds": 1.0, "examples": 30}
        for name, best in evaluations.items()
    }
    before = {"run": 0, "start": 1, "end": 2}[chosen]
    best = dict(evaluations[chosen])
    if chosen != "run":
        best["seconds"] += summary["seconds"] + 1.0 * (before - 1)
        best["examples"] += summary["examples"] + 30 * (before - 1)
        best |= {"test_loss": 1.25, "test_accuracy": 0.75}
    report = {"chosen": chosen, "seconds": 2.0, "examples": 60, "candidates": candidates}
    total = {name: summary[name] + report[name] for name in COSTS}
    path.write_text(json.dumps(summary | total | {"best": best, "refit": report}))
    folder = directory / "refit-end"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("{}\n")
    return directory


@pytest.fixture
def runs(tmp_path):
    for seed, chosen in enumerate(("end", "run")):
        refitted(tmp_path / f"delta_stn-{chosen}", chosen, seed=seed)
    return {run.seed: run for run in read_runs(tmp_path, warn=pytest.fail)}


def test_the_folders_of_refits_are_no_runs_of_their_own(runs):
    assert len(runs) == 2
    assert [run.refit for run in runs.values()] == ["end", None]


def test_the_chosen_candidate_is_compared(runs):
    assert [run.at_best("valid_loss") for run in runs.values()] == [1.5, 2.0]
    assert [run.at_best("test_loss") for run in runs.values()] == [1.25, 0.5]
    # curves and their marks are those of the tuning
    assert [run.best for run in runs.values()] == [1, 1]


def test_the_whole_cost_is_counted(runs):
    for run in runs.values():
        assert [run.total(name) for name in COSTS] == [6.0, 140]
        assert [run.of_refits(name) for name in COSTS] == [2.0, 60]


def test_a_target_that_the_refit_alone_reaches_costs_the_tuning_too(runs):
    first = runs[0]
    assert reached(first, 2.0) == (1.0, 1.0, 20)  # by the tuning
    assert reached(first, 1.6) == (12.0, 4.0 + 1.0 + 0.8, 80 + 30 + 24)
    assert reached(first, 1.4) is None
    assert reached(runs[1], 1.6) is None


def cost_of(section):
    [rows] = [part.rows for part in section.tables if part.title == "Cost"]
    return rows


def test_the_report_says_so(runs):
    [section] = sections(list(runs.values()))
    few, note = section.notes
    assert few.startswith("fewer than 3 runs")
    assert note.startswith("delta_stn: the result is that of a refit in 1 of 2 runs; tables")
    cost = cost_of(section)
    assert "time of refits" in cost.titles
    assert cost.cells[0][cost.titles.index("examples of refits")] == "60 ± 0"


def test_runs_without_refits_have_no_such_columns(tmp_path):
    write_run(tmp_path / "a", records([4.0, 2.0]))
    [run] = read_runs(tmp_path)
    assert (run.refit, run.candidates, run.of_refits("seconds")) == (None, {}, None)
    [section] = sections([run])
    assert not any("refits" in title for title in cost_of(section).titles)


def test_a_damaged_report_of_refits_is_left_out(tmp_path):
    for number, wrong in enumerate(
        (3, {"chosen": "end"}, {"chosen": [], "candidates": {"run": 1}})
    ):
        directory = write_run(tmp_path / str(number), records([4.0, 2.0]), seed=number)
        path = directory / "summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"refit": wrong}))
    for run in read_runs(tmp_path):
        assert run.refit is None
        assert run.at_best("valid_loss") == 2.0
