"""The table at the end of a sweep."""

from pathlib import Path

import pytest

from bilevel.cli.app import main
from bilevel.comparison.quality_table import part_of_regret
from bilevel.comparison.runs import read_runs
from bilevel.comparison.sweep_table import SWEEP
from bilevel.comparison.table import plus_minus, rows
from tests.support.comparison_runs import records, write_run

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
    assert (
        main(
            [
                "-m",
                *QUICK,
                "problem=quadratic",
                "solver=fixed,stn",
                "solver.inner_steps=1,2",
                "seed=0,1",
            ]
        )
        == 0
    )
    out = capfd.readouterr().out
    lines = [line.split() for line in (sweep() / "table.txt").read_text().splitlines()]
    assert lines[0] == ["quadratic"]
    assert lines[1][:2] == ["solver", "n"]
    assert lines[-1][:3] == ["*", "marks", "the"]
    assert [line[:3] for line in lines[2:-1]] == [
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


def test_a_run_that_went_wrong_is_marked_and_one_that_left_nothing_is_told(capfd):
    rates = "solver.inner_optimizer.lr=0.01,1000"
    assert (
        main(["-m", *QUICK, "problem=quadratic", "solver=fixed", rates, "runner.epochs=200"]) == 1
    )
    assert main(["-m", *QUICK, "problem=quadratic", "solver=fixed", "solver.inner_steps=0,1"]) == 1
    marked, alone = sorted(Path("sweeps").iterdir())
    assert (marked / "table.txt").read_text().splitlines()[3].rstrip().endswith("1 diverged")
    *_, failed = (alone / "table.txt").read_text().splitlines()
    assert failed.startswith(
        "failed: 0-quadratic-fixed-seed0-inner_steps-0: solver.inner_steps=0 must be a whole number"
    )


def test_a_folder_that_is_no_run_is_passed_over(tmp_path):
    (tmp_path / "0-a-b-seed0").mkdir()
    (tmp_path / "note.txt").write_text("")
    assert read_runs(tmp_path) == []


def test_regret_is_told_with_the_examples_that_it_took(tmp_path):
    runs = [
        *read_runs(
            write_run(tmp_path / "a", records([4, 3, 2, 1], exact__regret=[2.0, 0.3, 0.2, 0.5]))
        ),
        *read_runs(write_run(tmp_path / "b", records([4, 3], exact__regret=[2.0, 0.3]))),
        *read_runs(write_run(tmp_path / "c", records([4]))),
    ]
    assert [part_of_regret(run) for run in runs] == [40, None, None]
    titles, cells, _ = rows({"stn": runs[:2]}, SWEEP)
    assert cells[0][titles.index("examples to ⅒ of it")] == "40 (1 of 2)"


def test_a_column_that_nobody_fills_is_left_out(tmp_path):
    runs = read_runs(write_run(tmp_path / "a", records([1.0]), ended=None))
    titles, cells, _ = rows({"stn": runs}, SWEEP)
    assert titles == ["solver", "n", "best valid loss", "time", "examples", ""]
    assert cells == [["stn", "1", "1", "0.00 s", "0", "1 not ended"]]


def places(capfd, *arguments):
    quick = [setting for setting in QUICK if not setting.startswith("runner.progress")]
    main(["-m", *quick, "runner.progress=plain", "problem=quadratic", *arguments])
    return [
        line.split(" · ")[0]
        for line in capfd.readouterr().out.splitlines()
        if line.startswith("run ")
    ]


@pytest.mark.parametrize(
    ("arguments", "runs"),
    [
        (["solver=fixed", "seed=0,1"], 2),
        (["solver=fixed,random_search", "seed=range(0,2)"], 4),
        (["solver=fixed", "+experiment=swept", "seed=0,1"], 6),
        (["solver=fixed", "seed=1"], 1),
    ],
)
def test_every_run_tells_its_place(capfd, arguments, runs):
    extra = []
    if "+experiment=swept" in arguments:
        Path("mine/experiment").mkdir(parents=True)
        params = "{seed: '5,6,7,8', solver.inner_steps: '1,2,3'}"
        swept = f"# @package _global_\nhydra: {{sweeper: {{params: {params}}}}}\n"
        Path("mine/experiment/swept.yaml").write_text(
            swept
        )  # the command line's seeds replace the file's
        extra = ["--config-dir", "mine"]
    assert places(capfd, *arguments, *extra) == [
        f"run {number} of {runs}" for number in range(1, runs + 1)
    ]


def test_a_run_by_itself_has_no_place(capfd):
    assert (
        main([*QUICK[:1], *QUICK[2:], "runner.progress=plain", "problem=quadratic", "solver=fixed"])
        == 0
    )
    assert capfd.readouterr().out.startswith("quadratic · fixed · seed 0")


def test_of_a_sweep_whose_size_is_not_known_the_number_alone_is_told(capfd):
    assert places(capfd, "solver=glob(fix*)", "seed=0") == ["run 1"]
