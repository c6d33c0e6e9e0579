"""A run that is killed at any moment and resumed equals an undisturbed one, bit for bit."""

import math
import random
import signal
import subprocess
import sys
import time

import pytest

from bilevel.loggers.records import read_metrics
from tests.soak import kills

SETTINGS = (
    *kills.QUIET,
    *kills.DIGITS,
    *kills.SOLVERS["delta_stn"],
    *kills.LENGTH,
    "wandb.mode=disabled",
)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    with kills.serving() as server:
        yield kills.Matrix(server, tmp_path_factory.mktemp("matrix"))


def test_kill_9_from_outside(matrix, tmp_path, monkeypatch):
    """The command as a user starts it, killed at a random time after its third line."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "bilevel",
            *SETTINGS,
            "runner.epochs=400",
            f"hydra.run.dir={tmp_path}/run",
        ]
    )
    try:
        metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(random.Random(0).uniform(0, 0.3))
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "run" / "summary.json").exists()
    ahead = math.ceil(read_metrics(metrics)[-1]["epoch"]) + 2  # which it has yet to reach
    length = f"runner.epochs={ahead}"
    ended = matrix.server.run(tmp_path, f"resume={tmp_path}/run", length)
    assert ended.rc == 0, ended.said
    assert matrix.server.run(tmp_path, *SETTINGS, length, f"hydra.run.dir={tmp_path}/whole").rc == 0
    assert not kills.differences(tmp_path / "whole", tmp_path / "run")


CASES = [
    kills.Case("delta_stn", "kill", 1, strikes=1, loggers=("wandb.mode=offline",)),
    kills.Case("implicit_nystrom", "term", 1),
    kills.Case("delta_stn, refitted", "kill", 1, strikes=3),
    kills.Case("delta_stn, refitted", "term", 2),
    kills.Case("pbt", "kill", 2, strikes=2),
    kills.Case("es", "full", 1, strikes=2),
    kills.Case("unrolled", "crash", 1),
    kills.Case("tpe", "interrupt", 1),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.solver}-{case.fault}")
def test_what_a_fault_interrupts_goes_on_to_the_same_bits(matrix, case):
    struck, lost = matrix.run(case)
    assert not lost, (struck, lost)
    assert len(struck) == case.strikes


@pytest.mark.parametrize(("event", "at"), [("checkpoint", 1100), ("link", 1), ("replace", 5)])
def test_a_kill_within_the_writing_of_a_checkpoint(matrix, tmp_path, event, at):
    """Kill within a checkpoint: in the file, between its two names, and before the rename."""
    directory, (whole, _) = tmp_path / "run", matrix.reference("delta_stn")
    fault = {"act": "kill", "at": at, "count": str(tmp_path / "count"), "only": event}
    assert (
        matrix.server.run(tmp_path, *SETTINGS, f"hydra.run.dir={directory}", fault=fault).rc
        == -signal.SIGKILL
    )
    assert bool(list(directory.glob(".checkpoint.pt.*.tmp"))) == (event != "link")
    assert matrix.server.run(tmp_path, f"resume={directory}").rc == 0
    assert not kills.differences(whole, directory)
    assert not list(directory.glob(".*.tmp"))


def test_what_is_lost_is_found(matrix, tmp_path):
    """The comparison itself: a run with another seed differs in all three."""
    whole, _ = matrix.reference("delta_stn")
    assert (
        matrix.server.run(tmp_path, *SETTINGS, "seed=2", f"hydra.run.dir={tmp_path}/other").rc == 0
    )
    found = kills.differences(whole, tmp_path / "other")
    for part in ("metrics.jsonl", "checkpoint: .solver", "checkpoint: .train", "summary"):
        assert any(line.startswith(part) for line in found), found
