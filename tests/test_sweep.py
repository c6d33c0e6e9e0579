"""The table at the end of a sweep."""

import json
from pathlib import Path

import pytest

from bilevel.cli.app import main
from bilevel.cli.sweep import examples_to, read_runs, spread, sweep_table

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
    assert lines[0][:3] == ["problem", "solver", "n"]
    assert [line[:4] for line in lines[1:]] == [
        ["quadratic", solver, f"inner_steps-{steps}", "2"] for solver in ("fixed", "stn") for steps in (1, 2)
    ]
    assert (sweep() / "table.txt").read_text() in out
    assert str(sweep()) in out


def test_the_numbers_are_those_of_the_runs(capfd):
    assert main(["-m", *QUICK, "problem=quadratic", "solver=fixed", "seed=0,1"]) == 0
    runs = read_runs(sweep())
    losses = [run["best"]["valid_loss"] for run in runs]
    mean, std = sum(losses) / 2, abs(losses[0] - losses[1]) / 2**0.5
    assert f"{mean:.3g} ± {std:.3g}" in (sweep() / "table.txt").read_text()


def test_a_run_that_went_wrong_is_marked_and_one_that_left_nothing_is_not_there(capfd):
    rates = "solver.inner_optimizer.lr=0.01,1000"
    assert main(["-m", *QUICK, "problem=quadratic", "solver=fixed", rates, "runner.epochs=200"]) == 1
    assert main(["-m", *QUICK, "problem=quadratic", "solver=fixed", "solver.inner_steps=0,1"]) == 1
    marked, alone = sorted(Path("sweeps").iterdir())
    assert (marked / "table.txt").read_text().splitlines()[2].rstrip().endswith("1 diverged")
    assert not (alone / "table.txt").exists()


def test_a_folder_that_is_no_run_is_passed_over(tmp_path):
    (tmp_path / "0-a-b-seed0").mkdir()
    (tmp_path / "note.txt").write_text("")
    assert read_runs(tmp_path) == []


def test_runs_come_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 9, 0):
        place = tmp_path / f"{number}-p-s-seed{number}-lr-0.1"
        place.mkdir()
        (place / "metrics.jsonl").write_text('{"examples": 0}\n')
        (place / "summary.json").write_text(json.dumps({"problem": "p", "solver": "s", "seed": number}))
    assert [run["seed"] for run in read_runs(tmp_path)] == [0, 9, 10]
    assert {run["label"] for run in read_runs(tmp_path)} == {"s lr-0.1"}


def test_regret_is_told_with_the_examples_that_it_took():
    records = [{"examples": n, "exact.regret": regret} for n, regret in ((0, 2.0), (10, 0.3), (20, 0.2), (30, 0.5))]
    assert examples_to(records, 0.1) == 20
    assert examples_to(records, 0.01) is None
    assert examples_to([{"examples": 0}], 0.1) is None
    assert spread([20.0, None], str) == "20.0 (1 of 2)"


def test_a_column_that_nobody_fills_is_left_out():
    run = {"problem": "p", "label": "s", "best": {"valid_loss": 1.0}, "last": {}, "examples_to_part": None, "seconds": 1.0}
    run |= {"examples": 10, "outer_steps": 0, "diverged": False, "interrupted": True}
    titles = [column.header for column in sweep_table([run]).columns]
    assert "best valid loss" in titles
    assert not {"test accuracy", "regret of last λ"} & set(titles)
