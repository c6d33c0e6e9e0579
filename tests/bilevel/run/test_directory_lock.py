"""A second process is refused where a run is going on, and nobody is when that was killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bilevel import BilevelError, Runner
from bilevel.cli.app import main
from bilevel.errors import DirectoryLocked
from bilevel.problems import Quadratic
from bilevel.run.directory_lock import DirectoryLock
from bilevel.solvers import Fixed

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
