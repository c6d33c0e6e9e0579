"""Tests of the harness, and of every experiment."""

import doctest
import json
import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from benchmarks.experiments import __main__ as command
from benchmarks.experiments import ablation, equal_cost
from benchmarks.experiments.harness import ROOT, Context, Experiment, Sweep, find
from benchmarks.experiments.jobs import ended, expand, job, replaced, run_job
from benchmarks.experiments.pages import Page, blocks
from bilevel import BilevelError, Interval, Positive, Space
from bilevel.comparison.runs import Run
from bilevel.loggers.space_json import space_to_json

pytestmark = pytest.mark.usefixtures("elsewhere")
EXPERIMENTS = find()
RIDGE = (
    "problem=ridge",
    "runner.epochs=20",
    "runner.warmup_epochs=2",
    "runner.evaluate_every=10",
    "seed=100,101",
)
EMPTY = "prose <!-- made by: python -m benchmarks.experiments {} -->\n<!-- end --> more prose\n"


def table(context: Context) -> str:
    context.figures.joinpath("tiny.png").write_bytes(b"")
    losses = [run.summary["best"]["valid_loss"] for run in context.runs("ridge")]
    return f"{len(losses)} runs, best {min(losses)}; {context.map(abs, [-1, -2])}"


def tiny(*overrides: str) -> Experiment:
    return Experiment(
        page="experiments/tiny.md",
        sweeps={"ridge": Sweep((*RIDGE, *overrides), ("seed=102",))},
        report=table,
    )


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs the command with `tiny`: its exit status and its page."""
    page = tmp_path / "docs" / "experiments" / "tiny.md"
    page.parent.mkdir(parents=True)
    page.write_text(EMPTY.format("tiny"))
    monkeypatch.setattr(command, "ROOT", tmp_path)

    def run(experiment: Experiment, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(
            command, "find", lambda *names: find(*names) if names else {"tiny": experiment}
        )
        status = command.main(["--workers", "0", *arguments])
        made = tmp_path / "runs" / "experiments-quick" / "docs" / "experiments" / "tiny.md"
        return status, (made if "--quick" in arguments else page).read_text()

    return run


def test_every_experiment_has_its_block_and_every_block_its_experiment():
    found = {
        (str(p.relative_to(ROOT / "docs")), name)
        for p in ROOT.glob("docs/**/*.md")
        for name in blocks(p.read_text())
    }
    assert found == {(experiment.page, name) for name, experiment in EXPERIMENTS.items()}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_command_line_composes(name, tmp_path):
    """Each problem, solver and key once, rather than every combination; full and reduced size."""
    for sweep in EXPERIMENTS[name].sweeps.values():
        seen: set[str] = set()
        for overrides in (*sweep.jobs(False), *sweep.jobs(True)):
            parts = {
                text if "." not in text.partition("=")[0] else text.partition("=")[0]
                for text in overrides
            }
            parts = {part for part in parts if not part.startswith("seed=")}
            # Each problem, solver and key is composed once, not in every combination.
            if not parts <= seen:
                seen |= parts
                job(overrides, tmp_path)


def test_the_reduced_size_is_smaller_and_on_seeds_that_no_protocol_uses():
    for name, experiment in EXPERIMENTS.items():
        for sweep in experiment.sweeps.values():
            given = dict(text.split("=", 1) for text in sweep.quick)
            seeds = [int(seed) for seed in given.get("seed", "").split(",") if seed]
            assert 0 < len(seeds) <= 2, f"{name} has a sweep that is not reduced"
            assert min(seeds) >= 100


def test_a_command_line_expands_as_hydra_does():
    assert expand(("problem=ridge", "solver=stn,delta_stn", "seed=range(0,2)")) == [
        ("problem=ridge", f"solver={solver}", f"seed={seed}")
        for solver in ("stn", "delta_stn")
        for seed in (0, 1)
    ]
    assert replaced(("+experiment=mnist_mlp", "seed=0,1"), ("seed=100",)) == (
        "+experiment=mnist_mlp",
        "seed=100",
    )
    with pytest.raises(BilevelError):
        expand(("resume=here", "seed=0,1"))


def test_the_directory_changes_with_what_can_change_a_number_and_with_nothing_else(tmp_path):
    digests = [
        job(("problem=ridge", *more), tmp_path).directory.name.rpartition("-")[2]
        for more in (
            (),
            ("data.root=/elsewhere",),
            ("wandb.mode=disabled",),
            ("lr.inner=0.5",),
            ("seed=1",),
            ("solver=stn",),
        )
    ]
    assert digests[0] == digests[1] == digests[2]
    assert len(set(digests)) == 4


def test_a_page_is_made_and_what_has_ended_is_kept(run, tmp_path, capfd):
    status, page = run(tiny(), "--workers", "1")
    assert status == 0
    match = re.fullmatch(
        r"prose <!-- .* -->\n2 runs, best (\S+); \[1, 2\]\n\n"
        r"\*2 runs, .*\*\n<!-- end --> more prose\n",
        page,
        re.S,
    )
    summaries = [
        json.loads(path.read_text())
        for path in tmp_path.glob("runs/experiments/tiny/ridge/*/summary.json")
    ]
    assert float(match[1]) == min(summary["best"]["valid_loss"] for summary in summaries)
    assert {summary["seed"] for summary in summaries} == {100, 101}
    assert (tmp_path / "docs" / "experiments" / "tiny.png").exists()
    times = {
        path: path.stat().st_mtime_ns
        for path in tmp_path.glob("runs/experiments/tiny/ridge/*/summary.json")
    }
    assert run(tiny())[0] == 0
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert capfd.readouterr().out.count("1 of 2") == 1


def test_the_reduced_size_stays_out_of_docs(run, tmp_path, capfd):
    status, page = run(tiny(), "--quick")
    assert status == 0
    assert "1 runs" in page
    assert "not the numbers of the protocol" in page
    assert (tmp_path / "docs" / "experiments" / "tiny.md").read_text() == EMPTY.format("tiny")
    assert [path.name for path in (tmp_path / "docs").rglob("*.png")] == []
    assert run(tiny(), "--quick", "--out", str(tmp_path / "docs"))[0] == 2
    assert (tmp_path / "docs" / "experiments" / "tiny.md").read_text() == EMPTY.format("tiny")


def test_the_block_lists_runs_that_went_wrong(run, capfd):
    status, page = run(tiny("solver=fixed", "solver.inner_steps=0,1", "lr.inner=0.03,1e9"))
    assert status == 0
    assert page.count("left no run") == 4  # both rates, both seeds
    assert "inner_steps" in page
    assert page.count("lr.inner=1000000000.0` diverged: ") == 2


def test_an_experiment_without_its_data_is_skipped(run, capfd):
    status, page = run(tiny("problem=mnist"))
    assert status == 0
    assert page == EMPTY.format("tiny")
    assert "skipped" in capfd.readouterr().out


def test_bad_input_is_one_sentence(run, tmp_path, capfd):
    assert run(tiny(), "nothing")[0] == 2
    assert "experiment='nothing' is unknown" in capfd.readouterr().err
    assert run(tiny(), "pages")[0] == 2
    assert "experiment='pages' is unknown" in capfd.readouterr().err
    (tmp_path / "docs" / "experiments" / "tiny.md").write_text("no block")
    assert run(tiny())[0] == 1
    assert "has no block for tiny" in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_report_that_fails_fails_the_command(run, capfd):
    assert run(Experiment(page="experiments/tiny.md", report=lambda context: 1 / 0))[0] == 1
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_an_interrupted_or_broken_run_is_repeated(tmp_path):
    one = job((*RIDGE[:-1], "seed=100"), tmp_path)
    one.directory.mkdir()
    (one.directory / "metrics.jsonl").write_text("{")
    assert not ended(one.directory)
    assert run_job(one).failure is None
    assert ended(one.directory)


def test_blocks_of_an_earlier_call_stay(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text(EMPTY.format("one") + EMPTY.format("two"))
    page = Page("page.md", tmp_path / "docs", tmp_path / "out")
    page.write("one", "1")
    page.write("two", r"2 \1")
    assert blocks(Path(page.path).read_text()) == {"one": "1\n", "two": "2 \\1\n"}


@pytest.mark.parametrize(
    "module", ["ablation", "digits_bad_start", "equal_cost", "jobs", "pages", "report", "reviewers"]
)
def test_examples_in_docstrings(module):
    result = doctest.testmod(
        import_module(f"benchmarks.experiments.{module}"), optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert result.failed == 0


def made(solver: str, seed: int, losses: list[float], **columns: list[float]) -> Run:
    steps = np.arange(len(losses), dtype=float)
    known = {
        "epoch": steps,
        "seconds": 2 * steps,
        "examples": 1000 * steps,
        "valid_loss": np.array(losses),
    }
    known |= {name.replace("__", "."): np.array(values) for name, values in columns.items()}
    space = Space(rate=Interval(low=0.0, high=0.5, init=0.1), decay=Positive(init=0.1))
    place = {"directory": Path(), "problem": "p", "solver": solver, "label": solver, "seed": seed}
    return Run(
        **place, columns=known, description={"space": space_to_json(space)}, status="finished"
    )


def test_the_spike_is_measured_in_the_coordinates_of_the_solver():
    rates, decays = np.array([0.1, 0.4, 0.2]), np.array([0.5, 0.1, 3.0])
    run = made("stn", 0, [1.0, 1.0, 1.0], hypers__rate=rates, hypers__decay=decays)
    u = np.log(rates / (0.5 - rates))
    assert ablation.spike(ablation.unconstrained(run, "rate")) == pytest.approx(u[1] - u[2])
    u = np.log(np.expm1(decays))
    assert ablation.spike(ablation.unconstrained(run, "decay")) == pytest.approx(u[2] - u[1])


def test_the_target_is_random_searchs_loss_on_the_same_seed():
    groups = {
        "random_search": [
            made("random_search", 0, [3.0, 1.0, 2.0]),
            made("random_search", 1, [3.0, 2.5, 2.0]),
        ],
        "stn": [made("stn", 0, [3.0, 2.0, 1.5]), made("stn", 1, [3.0, 1.9, 1.0])],
    }
    assert equal_cost.targets(groups) == {0: 1.0, 1: 2.0}
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in equal_cost._table(groups).splitlines()
    ]
    search, stn = rows[2:]
    assert rows[0][6:8] == ["seconds to random search's", "thousand examples to it"]
    assert search[6:8] == ["3 ± 1.4", "1.5 ± 0.707"]
    assert stn[6:8] == ["2; never in 1 of 2", "1; never in 1 of 2"]
    assert stn[1:3] == ["2", "1.2500 ± 0.3536"]


def test_the_ablation_of_ridge_has_six_rows_with_the_losses_of_the_runs(tmp_path):
    tiny = ("seed=100", "runner.epochs=20", "runner.warmup_epochs=2", "runner.evaluate_every=5")
    sweeps = {
        name: Sweep(sweep.overrides, tiny) for name, sweep in ablation.sweeps("ridge").items()
    }
    experiment = Experiment(page="x.md", sweeps=sweeps, report=lambda context: "")
    with Context(
        "ablation", experiment, figures=tmp_path, runs=tmp_path, workers=0, quick=True
    ) as context:
        context.run()
        text = ablation.section(context, "ridge")
    assert (tmp_path / "ablation-ridge.png").stat().st_size > 10_000
    losses = [
        min(json.loads(line)["valid_loss"] for line in path.read_text().splitlines())
        for path in tmp_path.glob("ablation/*/*/metrics.jsonl")
    ]
    first = [line.split("|") for line in text.split("\n\n")[0].splitlines()[2:]]
    assert [cells[1].strip() for cells in first] == list(ablation.NAMES.values())
    assert sorted(cells[3].strip(" *") for cells in first) == sorted(
        f"{loss:.4f}" for loss in losses
    )
