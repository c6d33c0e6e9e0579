"""A second process is refused where a run is going on, and nobody is when that was killed."""

import errno
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bilevel import BilevelError, Runner
from bilevel.checkpoint.checkpoints import load
from bilevel.cli.app import main
from bilevel.errors import DirectoryLocked, DirectoryLost
from bilevel.problems import Quadratic
from bilevel.run import lock_file
from bilevel.run.directory_lock import DirectoryLock
from bilevel.solvers import Fixed
from tests.support.fakes import FakeSolver
from tests.support.runs import comparable
from tests.support.runs import run as fake_run

pytest.importorskip("fcntl")

HOLDER = """
import os, sys, time
from pathlib import Path
from bilevel.run.directory_lock import DirectoryLock

with DirectoryLock() as lock:
    lock.take(Path("."))
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
    time.sleep(60)
"""


def run(directory, **more):
    runner = Runner(epochs=2, warmup_epochs=0, progress="none", picture=False)
    return runner.run(Quadratic.random(weights=3, hypers=2), Fixed(), directory=directory, **more)


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_is_refused_and_the_first_is_left_as_it_is(tmp_path, resume):
    if resume:
        run(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with DirectoryLock() as lock:
        lock.take(tmp_path)
        with pytest.raises(
            DirectoryLocked,
            match=r"is in use by another run; wait for its end, stop it, "
            "or choose another directory",
        ):
            run(tmp_path, resume=resume)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert not run(tmp_path, resume=resume)["interrupted"]


def test_a_run_lets_its_directory_go_however_it_ends(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n{}\n")
    with pytest.raises(BilevelError, match="already holds a run"):
        run(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    run(tmp_path)
    with DirectoryLock() as lock:
        lock.take(tmp_path)


def test_the_command_leaves_the_directory_to_the_other_though_it_is_empty(elsewhere, capsys):
    Path("mine").mkdir()
    with DirectoryLock() as lock:
        lock.take(Path("mine"))
        assert main(["problem=quadratic", "wandb.mode=disabled", "hydra.run.dir=mine"]) == 1
    assert "is in use by another run" in capsys.readouterr().err
    assert Path("mine").is_dir()


def test_a_killed_run_holds_nothing_though_a_forked_worker_lives_on(tmp_path):
    held = subprocess.Popen(
        [sys.executable, "-c", HOLDER], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert held.stdout is not None
    worker = int(held.stdout.readline())
    try:
        with DirectoryLock() as lock, pytest.raises(DirectoryLocked):
            lock.take(tmp_path)
        held.kill()
        held.wait()
        os.kill(worker, 0)  # it lives
        with DirectoryLock() as lock:
            lock.take(tmp_path)
    finally:
        os.kill(worker, signal.SIGKILL)
        held.stdout.close()


# --- file systems without locks on directories

WITHOUT_FLOCK = """
import errno, fcntl
def flock(*_):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = flock
"""


@pytest.fixture
def network_disk(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the directory by a lock file."""
    process = subprocess.Popen(
        [sys.executable, "-c", WITHOUT_FLOCK + HOLDER],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    yield process
    os.kill(worker, signal.SIGKILL)
    process.kill()
    process.wait()
    process.stdout.close()


def test_without_locks_a_file_holds_the_directory(tmp_path, network_disk, holder):
    with pytest.raises(
        DirectoryLocked,
        match=rf"is in use by process {holder.pid} on \S+, which refreshed run.lock \d s ago; wait",
    ):
        run(tmp_path)
    assert os.listdir(tmp_path) == ["run.lock"]
    holder.kill()
    holder.wait()
    assert not run(tmp_path)["interrupted"]  # that process is dead
    assert "run.lock" not in os.listdir(tmp_path)


def test_the_file_of_another_machine_becomes_stale(tmp_path, network_disk):
    file = tmp_path / "run.lock"
    file.write_text('{"host": "far\\u001b[2J", "pid": 1, "token": "x"}')
    with DirectoryLock() as lock, pytest.raises(DirectoryLocked, match=r"process 1 on far\\x1b"):
        lock.take(tmp_path)
    past = time.time() - lock_file.STALE - 5
    os.utime(file, (past, past))
    with DirectoryLock() as lock:
        lock.take(tmp_path)
        with DirectoryLock() as other, pytest.raises(DirectoryLocked):
            other.take(tmp_path)
    assert os.listdir(tmp_path) == []


def test_the_file_is_refreshed_and_a_run_whose_file_was_replaced_ends(
    tmp_path, network_disk, monkeypatch
):
    monkeypatch.setattr(lock_file, "HEARTBEAT", 0.05)
    with DirectoryLock() as lock:
        lock.take(tmp_path)
        file = tmp_path / "run.lock"
        os.utime(file, (0, 0))
        deadline = time.monotonic() + 10
        while file.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert file.stat().st_mtime > 0
        assert not lock.is_lost()
        file.write_text('{"host": "far", "pid": 1, "token": "x"}')
        lock._looked = -math.inf
        assert lock.is_lost()
        with pytest.raises(DirectoryLost, match="was taken by another run"):
            lock.place(tmp_path)
    assert file.exists()  # it belongs to the other run


# --- directories that are moved or removed during a run


@pytest.mark.parametrize("moved", [True, False], ids=["moved", "removed"])
def test_a_run_whose_directory_is_lost_ends_at_once(tmp_path, moved):
    old, new = tmp_path / "old", tmp_path / "new"

    def lose():
        old.rename(new) if moved else shutil.rmtree(old)

    # the run looks once a second
    hooks = {9: lose, **{step: lambda: time.sleep(0.3) for step in range(10, 30)}}
    said = (
        r"was moved to .*new during the run; the run ended at step \d+, and its checkpoint is "
        "there; continue with: bilevel resume=.*new"
        if moved
        else "old was removed during the run, or moved to an unknown place; the run ends"
    )
    with pytest.raises(DirectoryLost, match=said):
        fake_run(old, FakeSolver(hooks=hooks), epochs=100, evaluate_every=50)
    assert not old.exists()
    if not moved:
        return
    torch.manual_seed(0)
    saved = load(new)["step"]
    assert 9 < saved < 30
    fake_run(new, FakeSolver(), resume=True, epochs=10, evaluate_every=50)
    torch.manual_seed(0)
    fake_run(old, FakeSolver(), epochs=10, evaluate_every=50)
    assert comparable(new) == comparable(old)
