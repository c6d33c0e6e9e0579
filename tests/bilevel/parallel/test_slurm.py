"""Ranks that a scheduler starts and signals: all of them save, and their status reaches it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from bilevel.loggers.records import read_metrics
from bilevel.loggers.wandb_logger import MARK
from bilevel.parallel.slurm import slurm_environment, slurm_ranks
from bilevel.run import signals
from bilevel.run.signals import Interrupts

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX signals")

ROOT = Path(__file__).parents[3]
RUN = (
    *("problem=ridge", "solver=fixed", "runner.epochs=100000", "runner.evaluate_every=50"),
    *("runner.progress=none", "runner.picture=false", "runner.device=cpu", "wandb.mode=offline"),
    *("hydra.run.dir=mine", "resume=auto"),
)
STEP = {
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def environment(**more):
    own = {key: value for key, value in os.environ.items() if "WANDB" not in key}
    return {**own, "OMP_NUM_THREADS": "1", "MASTER_PORT": free_port(), **more}


def wait_for_lines(directory, lines, processes):
    deadline = time.monotonic() + 200
    metrics = directory / "mine" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_status_of_ranks_reaches_the_scheduler(tmp_path):
    """The script of docs/several-gpus.md starts two tasks with the variables of `srun`."""
    (script,) = re.findall(
        r"```sh\n(#!/bin/sh\n# ranks.sh.*?)```", (ROOT / "docs/several-gpus.md").read_text(), re.S
    )
    (tmp_path / "ranks.sh").write_text(script)
    task = 'unset WORLD_SIZE; SLURM_PROCID=$RANK SLURM_LOCALID=$LOCAL_RANK exec "$@"'
    process = subprocess.Popen(
        ["sh", "ranks.sh", "2", "sh", "-c", task, "task", sys.executable, "-m", "bilevel", *RUN],
        cwd=tmp_path,
        env=environment(**STEP),
        start_new_session=True,
    )
    try:
        wait_for_lines(tmp_path, 3, [process])
        os.killpg(process.pid, signal.SIGUSR1)  # to all, and the script passes it on
        assert process.wait(120) == 75
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    run = tmp_path / "mine"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["stopped"], summary["signal"]) == ("interrupted", "SIGUSR1")
    (mark,) = run.glob(f"wandb/offline-run-*/{MARK}")  # the first rank ended W&B in order
    assert int(mark.read_text()) == read_metrics(run / "metrics.jsonl")[-1]["step"]


def test_only_a_step_of_several_tasks_is_one_run(monkeypatch):
    step = {**STEP, "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    assert slurm_ranks({**step, "MASTER_ADDR": "here"}) == {
        "WORLD_SIZE": "2",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "here",
        "MASTER_PORT": "20007",
    }
    assert slurm_ranks({**step, "SLURM_GPUS_PER_TASK": "1"})["LOCAL_RANK"] == "0"
    for other in (
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"WORLD_SIZE": "1"},
        {"SUBMITIT_EXECUTOR": "slurm"},
    ):
        assert slurm_ranks({**step, **other}) == {}
    assert slurm_ranks({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == {}  # a batch script
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with slurm_environment():
        assert os.environ["RANK"] == "1"
    assert "RANK" not in os.environ


def test_signals_that_come_together_are_one_among_several_ranks(monkeypatch):
    monkeypatch.setattr(signals, "is_distributed", lambda: True)

    class Acted(Exception):
        pass

    def act(*_):
        raise Acted

    before = signal.signal(signal.SIGTERM, act)
    try:
        with Interrupts() as found:
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
                os.kill(os.getpid(), number)
            assert found.number is signal.SIGUSR1
            monkeypatch.setattr(signals, "TOGETHER", 0.0)
            with pytest.raises(Acted):
                os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
