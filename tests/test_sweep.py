"""The table at the end of a sweep."""

from pathlib import Path

import pytest
from comparison_cases import records, write_run

from bilevel.cli.app import main
from bilevel.comparison.runs import read_runs
from bilevel.comparison.table import SWEEP, part_of_regret, plus_minus, rows

QUICK = (
    "wandb.mode=disabled",
    "runner.progress=none",
    "runner.picture=false",
    "runner.epochs=4",
    "runner.warmup_epochs=1",
    "runner.evaluate_every=1",
)

pytestmark = pytest.mark.usefixtures("elsewhere")


def sweep() -> Path:
    (directory,) = Path("sweeps").iterdir()
    return directory


def test_a_sweep_ends_with_a_table_of_its_runs(capfd):
    assert main(["-m", *QUICK, "problem=quadratic", "solver=fixed,stn", "solver.inner_steps=1,2", "seed=0,1"]) == 0
    out = capfd.readouterr().out
    lines = [line.split() for line in (sweep() / "table.txt").read_text().splitlines()]
    assert lines[0] == ["quadratic"]
    assert lines[1][:2] == ["solver", "n"]
    assert [line[:3] for line in lines[2:]] == [
        [solver, f"inner_steps={steps}", "2"] for solver in ("fixed", "stn") for steps in (1, 2)
    ]
    assert (sweep() / "table.txt").read_text() in out
    assert str(sweep()) in out


def test_the_numbers_are_those_of_the_runs(capfd):
    assert main(["-m", *QUICK, "problem=quadratic", "solver=fixed", "seed=0,1"]) == 0
    runs = read_runs(sweep())
    losses = [run.summary["best"]["valid_loss"] for run in runs]
    mean, std = sum(losses) / 2, abs(losses[0] - losses[1]) / 2**0.5
    assert plus_minus(mean, std) in (sweep() / "table.txt").read_text()


def test_a_run_that_went_wrong_is_marked_and_one_that_left_nothing_is_not_there(capfd):
    rates = "solver.inner_optimizer.lr=0.01,1000"
    assert main(["-m", *QUICK, "problem=quadratic", "solver=fixed", rates, "runner.epochs=200"]) == 1
    assert main(["-m", *QUICK, "problem=quadratic", "solver=fixed", "solver.inner_steps=0,1"]) == 1
    marked, alone = sorted(Path("sweeps").iterdir())
    assert (marked / "table.txt").read_text().splitlines()[3].rstrip().endswith("1 diverged")
    assert not (alone / "table.txt").exists()


def test_a_folder_that_is_no_run_is_passed_over(tmp_path):
    (tmp_path / "0-a-b-seed0").mkdir()
    (tmp_path / "note.txt").write_text("")
    assert read_runs(tmp_path) == []


def test_regret_is_told_with_the_examples_that_it_took(tmp_path):
    runs = [
        *read_runs(write_run(tmp_path / "a", records([4, 3, 2, 1], exact__regret=[2.0, 0.3, 0.2, 0.5]))),
        *read_runs(write_run(tmp_path / "b", records([4, 3], exact__regret=[2.0, 0.3]))),
        *read_runs(write_run(tmp_path / "c", records([4]))),
    ]
    assert [part_of_regret(run) for run in runs] == [40, None, None]
    titles, cells = rows({"stn": runs[:2]}, SWEEP)
    assert cells[0][titles.index("examples to ⅒ of it")] == "40 (1 of 2)"


def test_a_column_that_nobody_fills_is_left_out(tmp_path):
    runs = read_runs(write_run(tmp_path / "a", records([1.0]), ended=None))
    titles, cells = rows({"stn": runs}, SWEEP)
    assert titles == ["solver", "n", "best valid loss", "time", "examples", ""]
    assert cells == [["stn", "1", "1", "0.00 s", "0", "1 not ended"]]
