"""The command, called in this process: what it runs, where it leaves it, how it goes on."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from bilevel.cli.app import main
from bilevel.loggers.records import read_metrics

QUIET = ("wandb.mode=disabled", "runner.progress=none", "runner.picture=false")
QUICK = (
    *QUIET,
    "problem=quadratic",
    "runner.epochs=4",
    "runner.warmup_epochs=1",
    "runner.evaluate_every=1",
)

pytestmark = pytest.mark.usefixtures("elsewhere")


def only_run(parent: str = "runs") -> Path:
    (directory,) = Path(parent).iterdir()
    return directory


def test_a_run_leaves_everything_in_a_directory_that_says_what_it_is():
    assert main([*QUICK, "solver=stn", "seed=3"]) == 0
    directory = only_run()
    assert re.fullmatch(r"quadratic-stn-seed3-\d{8}-\d{6}-\d{6}", directory.name)
    left = {"config.yaml", "run.json", "metrics.jsonl", "summary.json", "checkpoint.pt"}
    left |= {"checkpoint-step0.pt", "checkpoint-step1.pt"}
    assert {path.name for path in directory.iterdir()} == left
    config = OmegaConf.load(directory / "config.yaml")
    assert (config.seed, config.solver.centered, config.names.solver, config.runner.epochs) == (
        3,
        False,
        "stn",
        4,
    )
    summary = json.loads((directory / "summary.json").read_text())
    assert (summary["problem"], summary["solver"], summary["seed"], summary["steps"]) == (
        "quadratic",
        "stn",
        3,
        4,
    )
    assert [path.name for path in Path.cwd().iterdir()] == ["runs"]


def test_an_ablation_is_an_override_and_unlisted_settings_can_be_set():
    assert (
        main(
            [
                *QUICK,
                "solver.linearize=false",
                "problem.space.hyper.init=2.5",
                "runner.evaluate_every=2",
            ]
        )
        == 0
    )
    config = OmegaConf.load(only_run() / "config.yaml")
    assert (config.solver.linearize, config.runner.evaluate_every) == (False, 2)
    assert read_metrics(only_run() / "metrics.jsonl")[0]["hypers.hyper"] == pytest.approx([2.5] * 3)


def test_a_key_that_a_users_own_file_adds_at_the_top_level_is_a_setting(capfd):
    """Although the runner has a setting of this name."""
    Path("own/problem").mkdir(parents=True)
    text = "# @package _global_\ndefaults: [quadratic@problem]\nepochs: 3\n"
    Path("own/problem/mine.yaml").write_text(text)
    assert main(["--config-dir", "own", "problem=mine", "epochs=7", "--cfg", "job"]) == 0
    assert "epochs: 7" in capfd.readouterr().out


def test_an_optimizer_of_pytorch_is_given_by_name():
    """Alone, with a setting of its own, and in a sweep; momentum of the default does not remain."""
    quick = [*QUICK, "runner.epochs=1", "lr.inner=0.5", "lr.outer=0.25"]
    own = "solver.inner_optimizer.eps=0.25"
    assert main([*quick, "solver.inner_optimizer=Adam", own, "hydra.run.dir=one"]) == 0
    assert main([*quick, "-m", "solver.inner_optimizer=adam,sgd", "hydra.sweep.dir=two"]) == 0
    assert main([*quick, "solver.outer_optimizer=adam", "hydra.run.dir=three"]) == 0

    def solver(directory):
        return OmegaConf.to_container(OmegaConf.load(Path(directory) / "config.yaml"))["solver"]

    def node(name, **settings):
        return {"_target_": f"torch.optim.{name}", "_partial_": True, **settings}

    found = solver("one")
    assert found["inner_optimizer"] == node("Adam", lr=0.5, eps=0.25)
    assert found["response_optimizer"] == found["inner_optimizer"]
    swept = [solver(run)["inner_optimizer"] for run in sorted(Path("two").glob("*-quadratic*"))]
    assert swept == [node("Adam", lr=0.5), node("SGD", lr=0.5)]
    assert solver("three")["outer_optimizer"] == node("Adam", lr=0.25)


@pytest.mark.parametrize("hidden", ["[64]", "[16,16,16]"])
def test_the_width_and_depth_of_a_network_are_settings(hidden):
    last = "dropout1" if hidden == "[64]" else "dropout3"
    settings = (*QUIET, "problem=digits", "solver=fixed", "runner.epochs=0.1")
    assert main([*settings, f"problem.hidden={hidden}", f"problem.space.{last}.init=0.3"]) == 0
    record = read_metrics(only_run() / "metrics.jsonl")[0]
    assert record[f"hypers.{last}"] == pytest.approx(0.3)
    assert ("hypers.dropout2" in record) == (last == "dropout3")


def test_an_experiment_suits_every_solver():
    quick = (*QUIET, "problem=quadratic", "runner.epochs=1")
    assert (
        main(["-m", "+experiment=mnist_mlp", *quick, "solver=fixed,delta_stn,centered_stn,stn"])
        == 0
    )
    configs = [
        OmegaConf.load(d / "config.yaml")
        for d in sorted(only_run("sweeps").iterdir())
        if d.is_dir()
    ]
    assert [config.solver.inner_optimizer.lr for config in configs] == [0.01] * 4
    assert [config.solver.outer_optimizer.lr for config in configs[1:]] == [0.01] * 3
    assert [config.solver.scale_optimizer.lr for config in configs[1:]] == [0.01] * 3


def test_a_problem_that_may_waste_the_run_is_told_in_a_line():
    Path("idlebox.py").write_text(
        "from bilevel.problems import Quadratic\n"
        "from bilevel import Real, Space\n"
        "def Idle():\n"
        "    problem = Quadratic.random(weights=2, hypers=1)\n"
        "    problem.space = Space(**problem.space, idle=Real(init=0.0))\n"
        "    return problem\n"
    )
    arguments = (
        *QUIET,
        "solver=fixed",
        "runner.epochs=1",
        "~problem",
        "+problem={_target_: idlebox.Idle}",
        "names.problem=idle",
    )
    done = subprocess.run(
        [sys.executable, "-m", "bilevel", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "bilevel: warning: the hyperparameter `idle` changes neither objective; "
        "use it, or remove it"
    ]


def test_the_seed_decides_the_run():
    for seed in (0, 0, 1):
        assert main([*QUICK, f"seed={seed}"]) == 0
    first, again, other = (
        read_metrics(directory / "metrics.jsonl")[-1]["train_loss"]
        for directory in sorted(Path("runs").iterdir())
    )
    assert first == again != other


def test_a_sweep_ends_with_one_summary_for_each_combination():
    assert main(["-m", *QUICK, "solver=fixed,stn", "solver.inner_steps=1,2", "seed=0,1"]) == 0
    names = sorted(
        directory.name for directory in only_run("sweeps").iterdir() if directory.is_dir()
    )
    assert len(names) == 8
    assert names[:2] == [
        "0-quadratic-fixed-seed0-inner_steps-1",
        "1-quadratic-fixed-seed1-inner_steps-1",
    ]
    summaries = [
        json.loads((only_run("sweeps") / name / "summary.json").read_text()) for name in names
    ]
    assert {(s["solver"], s["seed"]) for s in summaries} == {
        ("fixed", 0),
        ("fixed", 1),
        ("stn", 0),
        ("stn", 1),
    }


def test_a_sweep_goes_on_after_a_run_that_is_refused(capfd):
    assert main(["-m", *QUICK, "solver.inner_steps=0,1"]) == 1
    assert "inner_steps" in capfd.readouterr().err
    assert [
        d.name[0]
        for d in only_run("sweeps").iterdir()
        if d.is_dir() and (d / "summary.json").exists()
    ] == ["1"]


def test_a_resumed_run_equals_an_undisturbed_one():
    # one warm-up epoch of one step, then rounds of five: both budgets end with a round
    assert main([*QUICK, "runner.epochs=11", "hydra.run.dir=whole"]) == 0
    assert main([*QUICK, "runner.epochs=6", "hydra.run.dir=parts"]) == 0
    assert (
        main(["resume=parts", "runner.epochs=11", "runner.picture=false", "runner.device=cpu"]) == 0
    )
    whole, parts = (read_metrics(Path(name) / "metrics.jsonl") for name in ("whole", "parts"))
    spent = ("seconds", "peak_memory_bytes")
    assert [{k: v for k, v in r.items() if not k.startswith(spent)} for r in whole] == [
        {k: v for k, v in r.items() if not k.startswith(spent)} for r in parts
    ]
    assert OmegaConf.load("parts/config.yaml").runner.epochs == 11
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["parts", "whole"]


def test_resume_alone_continues_with_the_stored_settings():
    assert main([*QUICK, "solver=fixed", "seed=5", "solver.inner_steps=2", "hydra.run.dir=it"]) == 0
    before = OmegaConf.load("it/config.yaml")
    assert main(["resume=it"]) == 0
    assert (
        main(["resume=it", "solver=fixed", "seed=5", "solver.inner_steps=2", "wandb.mode=disabled"])
        == 0
    )
    assert OmegaConf.load("it/config.yaml") == before


def test_a_problem_of_ones_own_beside_oneself():
    Path("conf/problem").mkdir(parents=True)
    Path("conf/problem/toy.yaml").write_text("_target_: toybox.Toy\nscale: 3\n")
    Path("toybox.py").write_text(
        "from bilevel.problems import Quadratic\n"
        "class Toy(Quadratic):\n"
        "    def __init__(self, scale: float):\n"
        "        q = Quadratic.random(weights=2, hypers=1)\n"
        "        self.__dict__.update(q.__dict__)\n"
    )
    Path("problems").mkdir()  # ours is found all the same
    try:
        assert (
            main(
                [
                    *QUIET,
                    "--config-dir",
                    "conf",
                    "problem=toy",
                    "runner.epochs=1",
                    "names.solver=mine",
                ]
            )
            == 0
        )
    finally:
        sys.modules.pop("toybox", None)
    assert only_run().name.startswith("toy-mine-seed0-")


def test_a_problem_brings_its_run_length_and_can_be_overruled():
    settings = (*QUIET, "solver=stn", "runner.epochs=2", "hydra.run.dir=it")
    assert main([*settings, "problem=ridge", "lr.outer=0.5"]) == 0
    config = OmegaConf.load("it/config.yaml")
    assert (
        config.runner.epochs,
        config.runner.warmup_epochs,
        config.lr.inner,
        config.lr.outer,
    ) == (2, 100, 0.03, 0.5)
    assert config.solver.response == {"_target_": "bilevel.solvers.Dense"}
    assert config.names.problem == "ridge"
    assert main(["resume=it", "problem=ridge", "runner.epochs=3"]) == 0
    assert read_metrics("it/metrics.jsonl")[-1]["step"] == 3


@pytest.mark.parametrize("header", ["", "# @package _global_\nproblem:\n"])
def test_a_users_problem_with_and_without_a_run_length(header):
    Path("conf/problem").mkdir(parents=True)
    node = "_target_: bilevel.problems.Quadratic.random\nweights: 2\n"
    if header:
        node = "".join(f"  {line}\n" for line in node.splitlines()) + "runner: {epochs: 3}\n"
    Path("conf/problem/mine.yaml").write_text(header + node)
    arguments = (
        *QUIET,
        "--config-dir",
        "conf",
        "problem=mine",
        "solver=fixed",
        "problem.hypers=1",
        "hydra.run.dir=it",
    )
    assert main([*arguments, *(() if header else ("runner.epochs=3",))]) == 0
    config = OmegaConf.load("it/config.yaml")
    assert (
        config.runner.epochs,
        config.problem.weights,
        config.problem.hypers,
        config.names.problem,
    ) == (3, 2, 1, "mine")
    assert read_metrics("it/metrics.jsonl")[-1]["step"] == 3


@pytest.mark.parametrize(
    "problem", ["ridge", "quadratic", "elastic_net", "linear_network", "input_dropout"]
)
def test_closed_forms_are_reported_and_the_self_tuning_solvers_run(problem):
    for solver in ("stn", "delta_stn"):
        settings = (
            f"problem={problem}",
            f"solver={solver}",
            "problem.dtype=float64",
            f"hydra.run.dir={solver}",
        )
        assert main([*QUIET, *settings, "runner.epochs=12", "runner.warmup_epochs=2"]) == 0
        record = read_metrics(f"{solver}/metrics.jsonl")[-1]
        assert record["exact.regret"] > 0
        assert record["exact.hypergradient_norm"] > 0


def test_a_diverged_run_is_a_failure_that_leaves_its_records(capfd):
    assert (
        main([*QUICK, "solver=fixed", "runner.epochs=200", "solver.inner_optimizer.lr=1000"]) == 1
    )
    assert "diverged" in capfd.readouterr().err
    assert json.loads((only_run() / "summary.json").read_text())["diverged"]


def test_help_says_how_to_begin_and_where_things_go(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for words in (
        "bilevel -m solver=stn,delta_stn seed=0,1,2",
        "resume=",
        "distillation, elastic_net",
        "solver: centered_stn",
        "summary.json",
    ):
        assert words in text
    assert not list(Path.cwd().iterdir())


def test_the_process_is_left_as_it_was(monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    argv = sys.argv[:]
    main([*QUICK, "runner.epochs=1"])
    assert sys.argv == argv
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "bilevel", *QUICK, "solver=fixed", "runner.epochs=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert torch.load(only_run() / "checkpoint.pt", weights_only=True)["solver"] == "fixed"


def test_resume_takes_any_path(capfd):
    """Whatever its letters would mean to Hydra's grammar."""
    place = Path("a, b=(c) 'jürgen' ~1")
    Path("runs").mkdir()
    assert main([*QUICK, "hydra.run.dir=runs/plain", "runner.epochs=1"]) == 0
    Path("runs/plain").rename(place)
    assert main([f"resume={place}", "runner.epochs=2"]) == 0
    assert len((place / "metrics.jsonl").read_text().splitlines()) == 3
