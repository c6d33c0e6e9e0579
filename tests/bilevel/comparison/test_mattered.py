"""The table of the hyperparameters that mattered, from the summaries of runs."""

import json

from bilevel.comparison.mattered import MOST, mattered
from bilevel.comparison.report import printed, sections, write_report
from bilevel.comparison.runs import group_runs, read_runs
from tests.support.comparison_runs import records, write_run


def entry(effect, g=0.5, **more):
    numbers = {"moved": 1.0, "hypergradient": g, "standard_error": 0.1, "curvature": None}
    return {**numbers, "effect": effect, **more}


def made(place, solver, *sensitivities):
    for seed, found in enumerate(sensitivities):
        directory = write_run(
            place / f"{solver}-{seed}", records([2.0, 1.0]), solver=solver, seed=seed
        )
        summary = json.loads((directory / "summary.json").read_text())
        summary["sensitivities"] = found
        (directory / "summary.json").write_text(json.dumps(summary))


def test_rows_are_means_over_runs_with_the_largest_effect_first(tmp_path):
    one, other = ({"decay": entry(e), "rate": entry(9.0, g=-0.5)} for e in (1.0, 3.0))
    made(tmp_path, "stn", one, other)
    without = {"moved": 2.0, "hypergradient": 0.25, "effect": None}
    small = {"moved": 1.0, "hypergradient": 0.125, "effect": None}
    made(tmp_path, "cg", {"decay": small, "rate": without})
    made(tmp_path, "tpe", {"decay": {"moved": 1.0, "hypergradient": None, "effect": None}})
    groups = group_runs(read_runs(tmp_path))["ridge"]
    titles, cells, _ = mattered(groups)
    assert titles == [
        *("solver", "hyperparameter", "n", "moved / σ", "dL_V/du", "d²L_V/du²", "effect")
    ]
    assert cells == [
        ["cg", "rate", "1", "2", "0.25", "", ""],
        ["cg", "decay", "1", "1", "0.125", "", ""],
        ["stn", "rate", "2", "1 ± 0", "-0.5 ± 0", "", "9 ± 0"],
        ["stn", "decay", "2", "1 ± 0", "0.5 ± 0", "", "2.0 ± 1.4"],
    ]


def test_the_report_has_the_table_and_damaged_entries_are_left_out(tmp_path):
    many = {f"h{k}": entry(float(k)) for k in range(MOST + 3)}
    made(tmp_path, "stn", {**many, "odd": 3, "<b>": entry("x", g="<i>"), "worse": None})
    made(tmp_path, "sama", ["no", "mapping"])
    runs = read_runs(tmp_path)
    (section,) = sections(runs)
    (table,) = [part for part in section.tables if "mattered" in part.title]
    names = [row[1] for row in table.rows.cells]
    assert names == [f"h{k}" for k in range(MOST + 2, 2, -1)] + ["and 3 more"]
    assert any(
        getattr(part, "title", "") == "ridge: which hyperparameters mattered"
        for part in printed(section, 200)
    )
    report = write_report([section], tmp_path / "report", warn=print)
    assert "Which hyperparameters mattered" in report.read_text()
    (plain,) = sections([run for run in runs if run.solver == "sama"])
    assert not any("mattered" in part.title for part in plain.tables)
