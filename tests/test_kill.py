"""A run killed at any moment and resumed equals one that was left alone, bit for bit."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

from bilevel.cli.app import main
from bilevel.records import read_metrics

SETTINGS = (
    *("wandb.mode=disabled", "runner.progress=none", "runner.picture=false", "runner.device=cpu", "seed=1"),
    *("problem=digits", "problem.hidden=[32,32]", "runner.epochs=7", "runner.warmup_epochs=1", "runner.evaluate_every=0.5"),
    "runner.checkpoint_every=3",  # so that the kill leaves lines that are younger than the checkpoint
)
SPENT = ("seconds", "peak_memory_bytes")

pytestmark = pytest.mark.usefixtures("elsewhere")


def lines(directory: str) -> list[dict]:
    records = read_metrics(Path(directory) / "metrics.jsonl")
    return [{name: value for name, value in r.items() if not name.startswith(SPENT)} for r in records]


def state(directory: str) -> dict:
    return torch.load(Path(directory) / "checkpoint.pt", weights_only=True)["state"]


def test_kill_9_and_resume(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    process = subprocess.Popen([sys.executable, "-m", "bilevel", *SETTINGS, "hydra.run.dir=killed"])
    try:
        metrics, deadline = Path("killed/metrics.jsonl"), time.monotonic() + 120
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 5):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not Path("killed/summary.json").exists()
    assert len(lines("killed")) < 15

    assert main(["resume=killed"]) == 0
    assert main([*SETTINGS, "hydra.run.dir=undisturbed"]) == 0
    assert len(lines("undisturbed")) == 15
    assert lines("killed") == lines("undisturbed")
    killed, undisturbed = state("killed"), state("undisturbed")
    for part in ("solver", "train", "valid"):
        ours, theirs = pytree.tree_leaves(killed[part]), pytree.tree_leaves(undisturbed[part])
        assert len(ours) == len(theirs) > 0
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(ours, theirs, strict=True)), (
            part
        )
