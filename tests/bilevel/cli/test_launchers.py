"""Repeated sweeps, and sweeps on Hydra's joblib and submitit launchers with worker processes."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from bilevel.cli import sweep
from bilevel.cli.app import main
from bilevel.cli.job import Job
from bilevel.run.signals import OutOfTime
from tests.support.sweeps import OWN, QUICK, comparable, content, summaries

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture(autouse=True)
def _own(elsewhere, monkeypatch):
    Path("ownbox.py").write_text(OWN)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    sys.modules.pop("ownbox", None)


@pytest.fixture
def joblib_launcher():
    if (
        find_spec("hydra_plugins") is None
        or find_spec("hydra_plugins.hydra_joblib_launcher") is None
    ):
        pytest.skip("needs hydra-joblib-launcher: pip install 'bilevel[joblib]'")
    yield
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown(wait=True, kill_workers=True)


@pytest.fixture
def submitit_launcher():
    if (
        find_spec("hydra_plugins") is None
        or find_spec("hydra_plugins.hydra_submitit_launcher") is None
    ):
        pytest.skip("needs hydra-submitit-launcher: pip install 'bilevel[submitit]'")


# --- a sweep that is repeated, on Hydra's own launcher


def test_the_same_command_runs_what_is_missing(capfd):
    quiet = (*QUICK, "runner.progress=none")
    command = ["-m", *quiet, "seed=0,1", "solver.inner_steps=1,0", "hydra.sweep.dir=sweep"]
    assert main(command) == 1
    names = ["0-own-fixed-seed0-inner_steps-1", "1-own-fixed-seed1-inner_steps-1"]
    assert list(summaries()) == names
    failed = {"2-own-fixed-seed0-inner_steps-0", "3-own-fixed-seed1-inner_steps-0"}
    assert set(sweep.failures(Path("sweep"))) == failed
    table = Path("sweep/table.txt").read_text()
    assert (
        "failed: 2-own-fixed-seed0-inner_steps-0: solver.inner_steps=0 must be a whole number"
        in table
    )
    assert table in capfd.readouterr().out

    kept, whole = content(f"sweep/{names[0]}"), comparable(f"sweep/{names[1]}")
    checkpoints = sorted(Path(f"sweep/{names[1]}").glob("checkpoint-step*.pt"))
    checkpoints[-1].rename(Path(f"sweep/{names[1]}/checkpoint.pt"))  # it stands where it was killed
    Path(f"sweep/{names[1]}/summary.json").unlink()
    assert main(command) == 1
    assert content(f"sweep/{names[0]}") == kept
    assert comparable(f"sweep/{names[1]}") == whole
    assert f"{names[0]} is finished: valid loss" in capfd.readouterr().out

    assert main([*command, "runner.warmup_epochs=2"]) == 1
    said = [
        line
        for line in capfd.readouterr().err.splitlines()
        if "runner.warmup_epochs=2 differs from 1" in line
    ]
    assert len(said) == 2
    assert content(f"sweep/{names[0]}") == kept


def test_a_failure_that_is_mended_is_forgotten(capfd):
    quiet = (*QUICK, "runner.progress=none", "hydra.sweep.dir=sweep")
    Path("ownbox.py").write_text("def Own():\n    raise ValueError('not yet')\n")
    assert main(["-m", *quiet, "seed=0,1,2"]) == 1
    assert Path("sweep/table.txt").read_text().count("failed: ") == 3
    assert main(["-m", *quiet, "seed=0,1"]) == 1  # the third is asked for no more
    assert "2-own" not in Path("sweep/table.txt").read_text()
    assert Path("sweep/table.txt").read_text().count("failed: ") == 2
    sys.modules.pop("ownbox")
    Path("ownbox.py").write_text(OWN)
    assert main(["-m", *quiet, "seed=0,1"]) == 0
    assert "failed" not in Path("sweep/table.txt").read_text()
    assert len(summaries()) == 2


def test_a_time_limit_ends_the_sweep_and_the_same_command_goes_on(capfd):
    command = [
        "-m",
        *QUICK,
        "runner.progress=none",
        "+problem.flag=flag",
        "seed=0,1",
        "hydra.sweep.dir=sweep",
    ]
    assert main([*command[:-1], "hydra.sweep.dir=whole"]) == 0
    Path("flag").write_text("USR1")
    assert main(command) == 75
    assert [s["signal"] for s in summaries().values()] == ["SIGUSR1"]
    assert main(command) == 0
    assert len(summaries()) == 2
    for name in summaries():
        assert comparable(f"sweep/{name}") == comparable(f"whole/{name}")


# --- what a job is in another process


def test_a_job_is_pickled_with_what_its_process_needs(monkeypatch):
    import pickle

    from omegaconf import OmegaConf

    job = pickle.loads(pickle.dumps(Job()))
    assert not job.is_worker
    assert OmegaConf.create({"a": "${bilevel.times:2,3}"}).a == 6
    monkeypatch.setattr(job, "process", -1)
    assert job.is_worker
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    assert not job.is_worker  # its output is a file of its own


def test_a_worker_whose_run_was_interrupted_begins_no_other(monkeypatch):
    job = Job()
    monkeypatch.setattr(job, "process", -1)
    monkeypatch.setattr(Job, "stopped", False)
    asked = []

    def interrupted(composed):
        asked.append(composed)
        raise OutOfTime

    monkeypatch.setattr(job, "_run", interrupted)
    values = [job(None), job(None)]
    assert all(
        value != value for value in values
    )  # not raised: the launcher would kill the other workers
    assert asked == [None]


def test_submitits_own_handler_has_the_last_word(monkeypatch):
    """When all is saved, and with the run's own handlers put back."""
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    job = Job()

    class Requeued(SystemExit):
        pass

    def requeued(*_):
        raise Requeued

    def out_of_time(composed):
        raise OutOfTime

    monkeypatch.setattr(job, "_run", out_of_time)
    before = signal.signal(signal.SIGUSR2, requeued)
    try:
        with pytest.raises(Requeued):
            job(None)
    finally:
        signal.signal(signal.SIGUSR2, before)


# --- the launchers


def test_joblib(capfd, joblib_launcher):
    command = [
        "-m",
        *QUICK,
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        "hydra.sweep.dir=sweep",
    ]
    command += ["solver.inner_steps=0,1", "seed=0,1"]
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)]
    assert main(command) == 1
    told = capfd.readouterr()
    assert told.err.count("inner_steps=0 must be a whole number") == 2
    assert (
        told.out.count("is finished: valid loss") == 2
    )  # and nothing of what several displays would mix
    assert "epoch" not in told.out.replace("epochs", "")
    assert told.out.count("failed: ") == 2
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)] == before
    assert list(summaries()) == [
        "2-own-fixed-seed0-inner_steps-1",
        "3-own-fixed-seed1-inner_steps-1",
    ]
    workers = [json.loads(path.read_text()) for path in Path.cwd().glob("told-*")]
    assert workers
    assert all(told == {"runs": "4", "threads": 1} for told in workers)
    kept = content("sweep/2-own-fixed-seed0-inner_steps-1")
    Path("sweep/3-own-fixed-seed1-inner_steps-1/summary.json").unlink()
    assert main(command) == 1
    assert content("sweep/2-own-fixed-seed0-inner_steps-1") == kept
    assert len(summaries()) == 2


def test_a_worker_that_is_killed_is_told_and_the_same_command_goes_on(capfd, joblib_launcher):
    """Joblib gives all of its workers up then."""
    Path("flag").write_text("KILL")
    command = [
        "-m",
        *QUICK,
        "+problem.flag=flag",
        "seed=0,1",
        "hydra.sweep.dir=sweep",
        "runner.progress=none",
    ]
    assert main([*command, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]) == 1
    (said,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("bilevel: ")]
    assert "a process of the launcher ended without a result" in said
    assert main(command) == 0
    assert [s["stopped"] for s in summaries().values()] == ["epochs", "epochs"]


def test_ctrl_c_lets_joblibs_workers_end_their_rounds(joblib_launcher):
    command = [
        "-m",
        *QUICK,
        "runner.epochs=100000",
        "runner.evaluate_every=50",
        "runner.checkpoint_every=1000",
        "seed=0,1",
    ]
    command.append("hydra.sweep.dir=sweep")
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bilevel", *command, *launcher], start_new_session=True
    )
    try:
        deadline = time.monotonic() + 120
        while (
            sum(
                path.read_bytes().count(b"\n") >= 3
                for path in Path("sweep").glob("*/metrics.jsonl")
            )
            < 2
        ):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    ended = summaries()
    assert [s["stopped"] for s in ended.values()] == ["interrupted", "interrupted"]
    for name, summary in ended.items():
        assert comparable(f"sweep/{name}")[-1]["step"] <= summary["steps"]
    # ten epochs more, here: both go on
    most = max(s["steps"] for s in ended.values()) + 10
    assert main([*command, "runner.progress=none", f"runner.epochs={most}"]) == 0
    assert [s["steps"] for s in summaries().values()] == [most, most]


def test_submitit(capfd, submitit_launcher):
    """One run fails, and one has its time limit announced: submitit requeues it, and it goes on."""
    Path("flag").write_text("USR2")
    command = [
        "-m",
        *QUICK,
        "+problem.flag=flag",
        "solver.inner_steps=0,1",
        "hydra.sweep.dir=sweep",
    ]
    assert main([*command, "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"]) == 1
    (name,) = summaries()
    assert summaries()[name]["stopped"] == "epochs"
    assert (
        "failed: 0-own-fixed-seed0-inner_steps-0-flag-flag: solver.inner_steps=0"
        in Path("sweep/table.txt").read_text()
    )
    output = "\n".join(path.read_text() for path in Path("sweep/.submitit").glob("*/*.out"))
    assert "Requeued job" in output
    assert "resumed" in output
    assert (
        main(
            [
                *QUICK,
                "solver.inner_steps=1",
                "+problem.flag=flag",
                "runner.progress=none",
                "hydra.run.dir=whole",
            ]
        )
        == 0
    )
    assert comparable(f"sweep/{name}") == comparable("whole")
