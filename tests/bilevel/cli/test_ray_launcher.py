"""Sweeps on Ray: the launcher on a stand-in, and on a local Ray where it is installed."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from bilevel.cli import sweep
from bilevel.cli.app import main
from bilevel.cli.ray_connection import token
from tests.support.fake_ray import FakeRay
from tests.support.sweeps import OWN, QUICK, comparable, content, summaries

pytestmark = [
    pytest.mark.usefixtures("elsewhere"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX signals"),
]

HAS_RAY = find_spec("ray") is not None
COMMAND = ("-m", *QUICK, "+problem.flag=flag", "hydra.sweep.dir=sweep")
RAY = ("hydra/launcher=ray",)


@pytest.fixture(autouse=True)
def _own(elsewhere, monkeypatch):
    Path("ownbox.py").write_text(OWN)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    sys.modules.pop("ownbox", None)


@pytest.fixture
def fake(monkeypatch):
    for module in ("bilevel.run.runner", "bilevel.solvers", "bilevel.problems", "torch._dynamo"):
        import_module(module)  # once, and not in every fork
    ray = FakeRay()
    ray.install(monkeypatch)
    return ray


def begun():
    """Return what each process that made the problem has told, and forget it."""
    files = sorted(Path.cwd().glob("told-*"))
    told = [json.loads(file.read_text()) for file in files]
    for file in files:
        file.unlink()
    return told


# --- settings


def refused(capfd, *overrides):
    assert main([*COMMAND, *RAY, *overrides]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("beside", [None, ModuleType("ray")], ids=["missing", "a folder `ray`"])
def test_without_ray_the_extra_is_named(capfd, monkeypatch, beside):
    monkeypatch.setitem(sys.modules, "ray", beside)
    monkeypatch.delitem(sys.modules, "ray.exceptions", raising=False)
    said = refused(capfd, "seed=0,1")
    assert said.startswith("bilevel: hydra/launcher=ray needs Ray, which cannot be imported (")
    assert said.endswith("run `pip install 'bilevel[ray]'`")


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("num_cpus=0", "num_cpus=0 must be positive"),
        ("num_cpus=many", "num_cpus='many' is a str; give float"),
        ("num_gpus=-1", "num_gpus=-1 must be at least 0"),
        ("num_gpus=1.5", "num_gpus=1.5 must be at least 0, and whole above 1"),
        ("address=3", "address=3 is an int; give str or null"),
        ("init=3", "init=3 is not a mapping"),
        ("speed=3", "`speed` is not a key of hydra.launcher"),
    ],
)
def test_a_wrong_setting_is_named(capfd, fake, setting, reason):
    assert reason in refused(capfd, "seed=0,1", f"hydra.launcher.{setting}")
    assert fake.calls == []


def test_a_run_that_fits_on_no_machine_is_refused(capfd, fake):
    said = refused(capfd, "seed=0,1", "hydra.launcher.num_gpus=1")
    assert "num_cpus=1 num_gpus=1 is more than any machine of Ray has (at most 2 and 0)" in said
    assert fake.tasks == []
    assert fake.calls[-1] == "shutdown"


def test_a_cluster_may_still_start_a_machine(capfd, fake):
    command = [*COMMAND, *RAY, "seed=0,1", "hydra.launcher.num_cpus=3"]
    assert main([*command, "hydra.launcher.address=auto", "runner.epochs=2"]) == 0
    assert "the runs wait until a machine is added" in capfd.readouterr().err


def test_a_ray_that_does_not_start_is_named(capfd, fake):
    fake.refusal = ConnectionError("nobody is there")
    before = signal.getsignal(signal.SIGTERM)
    said = refused(capfd, "seed=0,1", "hydra.launcher.address=ray://none:10001")
    assert "address=ray://none:10001 gives no Ray (ConnectionError: nobody is there)" in said
    assert signal.getsignal(signal.SIGTERM) is before
    assert fake.calls[-1] == "shutdown"


def test_ray_starts_quietly_and_with_a_secret(fake, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    token.cache_clear()
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)

    def of_ray():
        return {name: value for name, value in os.environ.items() if name.startswith("RAY_")}

    before = of_ray()
    short = [*COMMAND, *RAY, "seed=0", "runner.epochs=2"]
    assert main([*short, "hydra.launcher.init={object_store_memory:90000000}"]) == 0
    assert main([*short, "hydra.launcher.address=auto"]) == 0
    (address, own, variables), _, (cluster, theirs, plain), _ = fake.calls
    assert (address, cluster) == ("local", "auto")
    assert own["include_dashboard"] is False
    assert own["log_to_driver"] is theirs["log_to_driver"] is False
    assert own["object_store_memory"] == 90_000_000
    assert "object_store_memory" not in theirs
    assert variables["RAY_USAGE_STATS_ENABLED"] == plain["RAY_USAGE_STATS_ENABLED"] == "0"
    assert len(variables["RAY_AUTH_TOKEN"]) == 64
    assert "RAY_AUTH_TOKEN" not in plain
    assert variables["RAY_worker_niceness"] == "0"
    assert of_ray() == before
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    token.cache_clear()
    assert token() == {}
    token.cache_clear()


# --- the runs


def test_the_runs_of_a_sweep_and_its_repetition(capfd, fake):
    command = [*COMMAND, *RAY, "solver.inner_steps=0,1", "seed=0,1", "hydra.launcher.num_cpus=2"]
    assert main(command) == 1
    told = capfd.readouterr()
    assert told.err.count("bilevel: solver.inner_steps=0 must be a whole number") == 2
    assert told.out.count("is finished: valid loss") == 2
    assert "epoch" not in told.out.replace("epochs", "")
    assert told.out.count("failed: ") == 2
    names = [f"{n}-own-fixed-seed{n - 2}-inner_steps-1-flag-flag" for n in (2, 3)]
    assert list(summaries()) == names
    processes = begun()
    assert processes
    assert all(process == {"runs": "4", "threads": 2} for process in processes)
    assert fake.options == [
        {"num_cpus": 2, "num_gpus": 0, "max_retries": 0, "name": "bilevel"},
    ]
    assert not fake.connected
    kept = content(f"sweep/{names[0]}")
    Path(f"sweep/{names[1]}/summary.json").unlink()
    assert main(command) == 1
    assert content(f"sweep/{names[0]}") == kept
    assert list(summaries()) == names


def killed_and_repeated(capfd):
    """Kill the process of a run of three, and repeat the command."""
    assert main([*COMMAND, "seed=0,1,2", "runner.progress=none"]) == 0
    whole = {name: comparable(f"sweep/{name}") for name in summaries()}
    Path("sweep").rename("whole")
    begun()
    capfd.readouterr()
    Path("flag").write_text("KILL")
    assert main([*COMMAND, *RAY, "seed=0,1,2"]) == 1
    told = capfd.readouterr()
    (said,) = [line for line in told.err.splitlines() if line.startswith("bilevel: ")]
    assert "a process of the launcher ended without a result" in said
    ended = summaries()
    assert len(ended) == 2  # the others went on
    (lost,) = set(whole) - set(ended)
    assert list(sweep.failures(Path("sweep"))) == [lost]
    assert f"failed: {lost}: a process of the launcher" in Path("sweep/table.txt").read_text()
    kept = {name: content(f"sweep/{name}") for name in ended}
    assert len(begun()) >= 2
    assert main([*COMMAND, *RAY, "seed=0,1,2"]) == 0
    assert len(begun()) == 1  # only the missing run
    assert {name: content(f"sweep/{name}") for name in ended} == kept
    assert {name: comparable(f"sweep/{name}") for name in summaries()} == whole
    assert "failed" not in Path("sweep/table.txt").read_text()


def test_a_killed_run_fails_alone_and_the_same_command_runs_it(capfd, fake):
    killed_and_repeated(capfd)
    assert len(fake.tasks) == 6  # Ray itself starts no run again


@pytest.mark.parametrize(("name", "status"), [("INT", 130), ("TERM", 130), ("USR1", 75)])
def test_a_signal_lets_the_runs_end_their_rounds(capfd, fake, name, status):
    Path("flag").write_text(f"{name} parent")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    command = [*COMMAND, *RAY, "seed=0,1,2", "runner.evaluate_every=50"]
    assert main([*command, "runner.epochs=100000"]) == status
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    ended = summaries()
    assert 1 <= len(ended) <= 2  # the third never began; the second may have been too young
    assert {summary["stopped"] for summary in ended.values()} == {"interrupted"}
    assert fake.calls[-1] == "shutdown"
    assert {signal.SIGUSR1, signal.SIGHUP} <= fake.masks[0]  # they would end Ray's own processes
    assert signal.SIGUSR1 not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    most = max(summary["steps"] for summary in ended.values()) + 10
    assert main([*command, f"runner.epochs={most}"]) == 0
    assert [summary["steps"] for summary in summaries().values()] == [most] * 3


# --- a local Ray


@pytest.mark.skipif(not HAS_RAY, reason="needs Ray: pip install 'bilevel[ray]'")
@pytest.mark.filterwarnings("default")  # Ray is not strict
class TestRay:
    def test_a_killed_run_fails_alone_and_the_same_command_runs_it(self, capfd):
        killed_and_repeated(capfd)

    @pytest.mark.parametrize(("name", "status"), [("INT", 130), ("USR1", 75)])
    def test_a_signal_lets_the_runs_end_their_rounds(self, name, status):
        command = [*COMMAND, *RAY, "seed=0,1,2", "runner.evaluate_every=50"]
        process = subprocess.Popen(
            [sys.executable, "-m", "bilevel", *command, "runner.epochs=1000000"],
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 300
            while not all(
                any(Path("sweep").glob(f"{number}-*/checkpoint.pt")) for number in (0, 1)
            ):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            os.killpg(process.pid, getattr(signal, f"SIG{name}"))
            assert process.wait(120) == status
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        assert [s["stopped"] for s in summaries().values()] == ["interrupted"] * 2
