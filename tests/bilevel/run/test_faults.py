"""A fault during a run loses no work: the run continues, or ends in one sentence and can resume."""

import json
import logging
import os
import re
import resource
import signal
import sys
import threading
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace as Namespace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from bilevel import BilevelError, Data, ModuleProblem, Positive, Runner, Space, stream
from bilevel.checkpoint.checkpoints import load
from bilevel.cli.app import main
from bilevel.device import device as devices
from bilevel.errors import FaultWarning, Unwritable
from bilevel.loggers.jsonl import JsonLines
from bilevel.loggers.logger import Logger
from bilevel.loggers.records import read_metrics
from bilevel.loggers.wandb_logger import WandB
from bilevel.problems import Quadratic, digits
from bilevel.run import faults, signals
from bilevel.run.faults import CheckpointSaver
from bilevel.run.out_of_memory import OutOfMemory, memory_settings
from bilevel.run.signals import Interrupts
from bilevel.solvers import (
    SAMA,
    Dense,
    EvolutionStrategies,
    PopulationBased,
    Unrolled,
    delta_stn,
    implicit_nystrom,
    unrolled_forward,
)
from tests.support.fakes import FakeProblem, FakeSolver
from tests.support.runs import comparable, run, same_weights

TIMES = ("seconds", "peak_memory_bytes")


@pytest.fixture(autouse=True)
def _global_state():
    torch.manual_seed(0)  # FakeSolver draws from it


@pytest.fixture
def undisturbed(tmp_path):
    found = run(tmp_path / "undisturbed")[1]
    torch.manual_seed(0)
    return found


@pytest.fixture
def disk():
    """Fill and clear the disk for this process: no file can grow beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

    yield limit
    limit(None)


def told(caught):
    return [
        str(warning.message) for warning in caught if issubclass(warning.category, FaultWarning)
    ]


def full(disk, directory, more=10):
    return lambda: disk((directory / "metrics.jsonl").stat().st_size + more)


# --- disks


def test_a_disk_that_is_full_for_a_while_costs_nothing(tmp_path, disk, undisturbed):
    """The first line that does not fit is cut in the middle of it."""
    hooks = {7: full(disk, tmp_path / "run"), 19: lambda: disk(None)}
    seen = {}
    hooks[18] = lambda: seen.update(
        lines=len(read_metrics(tmp_path / "run" / "metrics.jsonl")),
        step=load(tmp_path / "run")["step"],
    )
    with pytest.warns(FaultWarning) as caught:
        _, solver = run(tmp_path / "run", FakeSolver(hooks=hooks))
    lines, saved = told(caught)
    assert "cannot write" in lines
    assert "(File too large); the run continues and keeps its lines until it can" in lines
    assert "checkpoint.pt" in saved
    assert "tries again at every evaluation" in saved
    assert seen == {"lines": 2, "step": 6}
    assert same_weights(solver, undisturbed)
    assert comparable(tmp_path / "run") == comparable(tmp_path / "undisturbed")
    assert load(tmp_path / "run")["step"] == 24
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 24


def test_lines_that_are_held_are_in_the_checkpoint(tmp_path, disk):
    def logger(state, resumed):
        found = JsonLines()
        space = Space(decay=Positive(init=0.1))
        info = {
            "directory": tmp_path,
            "problem": "p",
            "solver": "s",
            "seed": 0,
            "space": space,
            "resumed": resumed,
        }
        from bilevel.loggers.logger import RunInfo

        found.start(RunInfo(**info), state)
        return found

    first = logger({}, False)
    first.log({"step": 0})
    whole = first.state()
    disk((tmp_path / "metrics.jsonl").stat().st_size + 4)
    with pytest.warns(FaultWarning, match="keeps its lines"):
        first.log({"step": 1})
    first.log({"step": 2})  # which is not told again
    state = first.state()
    assert (state["bytes"], state["lines"], state["held"]) == (
        whole["bytes"],
        1,
        ['{"step": 1}\n', '{"step": 2}\n'],
    )
    with pytest.raises(Unwritable, match=r"2 lines cannot be written .* resume="):
        first.finish({})
    first.close()
    disk(None)
    second = logger(json.loads(json.dumps(state)), True)
    second.log({"step": 3})
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    assert second.state()["lines"] == 4
    second.close()


def test_a_sync_that_fails_vouches_for_nothing(tmp_path, monkeypatch):
    _, solver = run(tmp_path / "a")
    torch.manual_seed(0)
    failed, sync = [], os.fsync

    def fsync(number):
        if os.readlink(f"/proc/self/fd/{number}").endswith("metrics.jsonl") and len(failed) < 3:
            failed.append(number)
            raise OSError(5, "Input/output error")
        sync(number)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.warns(FaultWarning, match="Input/output error"):
        _, other = run(tmp_path / "b", epochs=4)
    assert len(failed) == 3
    assert same_weights(solver, other)
    assert comparable(tmp_path / "b") == comparable(tmp_path / "a")


def failing(monkeypatch, steps, heal=lambda: False):
    """Checkpoints of these steps cannot be written."""
    from bilevel.checkpoint.checkpoints import Checkpoints

    save = Checkpoints.save

    def saving(self, state):
        if state["step"] in steps and not heal():
            raise Unwritable(
                "cannot write checkpoint.pt: No space left on device; "
                "free some space or move the run"
            )
        save(self, state)

    monkeypatch.setattr(Checkpoints, "save", saving)


def test_without_a_first_checkpoint_no_work_is_begun(tmp_path, monkeypatch):
    failing(monkeypatch, {0})
    solver = FakeSolver()
    with pytest.raises(Unwritable, match="No space left"):
        run(tmp_path, solver)
    assert not solver.rounds


def test_a_run_whose_checkpoints_cannot_be_written_for_long_ends_and_keeps_the_old_one(
    tmp_path, monkeypatch, undisturbed
):
    failing(monkeypatch, {14, 18})
    monkeypatch.setattr(faults, "GRACE", 0.0)
    with (
        pytest.warns(FaultWarning, match="the run continues"),
        pytest.raises(Unwritable, match="the work since step 6, its last"),
    ):
        run(tmp_path / "run")
    assert load(tmp_path / "run")["step"] == 6
    monkeypatch.undo()
    _, solver = run(tmp_path / "run", resume=True)
    assert same_weights(solver, undisturbed)
    assert comparable(tmp_path / "run") == comparable(tmp_path / "undisturbed")


@pytest.mark.parametrize("heals", [False, True])
def test_at_its_end_a_run_waits_for_room(tmp_path, monkeypatch, heals):
    tried = []
    failing(monkeypatch, {24}, lambda: tried.append(0) or (heals and len(tried) > 2))
    monkeypatch.setattr(faults, "AT_THE_END", 10.0 if heals else 0.05)
    monkeypatch.setattr(faults, "PAUSE", 0.02)
    lost = nullcontext() if heals else pytest.raises(Unwritable, match="the work since step 18")
    with pytest.warns(FaultWarning, match="the run continues"), lost:
        run(tmp_path)
    assert load(tmp_path)["step"] == (24 if heals else 18)
    assert (tmp_path / "summary.json").exists() == heals


@pytest.mark.parametrize("late", [False, True])
def test_a_signal_shortens_the_wait_for_room(tmp_path, monkeypatch, late):
    """SLURM kills 30 s after SIGTERM."""
    failing(monkeypatch, set(range(7, 25)))
    monkeypatch.setattr(faults, "AFTER_SIGNAL", 0.3)
    monkeypatch.setattr(faults, "PAUSE", 0.02)
    signalled = threading.Timer(0.5, kill(signal.SIGTERM)) if late else None
    hooks = {} if late else {9: kill(signal.SIGTERM)}
    hooks |= {23: signalled.start} if signalled else {}
    began = time.monotonic()
    with (
        pytest.warns(FaultWarning, match="the run continues|the run has ended"),
        pytest.raises(Unwritable, match="the work since step 6"),
    ):
        run(tmp_path, FakeSolver(hooks=hooks))
    assert time.monotonic() - began < 20  # and not a minute
    assert load(tmp_path)["step"] == 6


def test_little_room_is_told_once_and_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr(
        faults.shutil,
        "disk_usage",
        lambda path: Namespace(free=3 * (tmp_path / "checkpoint.pt").stat().st_size),
    )
    with pytest.warns(FaultWarning) as caught:
        run(tmp_path)
    (said,) = told(caught)
    assert "KiB left, and a checkpoint takes" in said


def test_a_resumed_run_has_a_checkpoint_already(tmp_path):
    def save(state):
        raise Unwritable("full")

    saving = CheckpointSaver(save, tmp_path)
    with pytest.raises(Unwritable):
        saving({"step": 3})
    saving.resumed(3)
    with pytest.warns(FaultWarning, match="full; the run continues"):
        saving({"step": 4})
    assert saving.owed


def test_a_run_that_goes_on_has_not_ended(tmp_path):
    """Its old summary would have it taken for one that has."""
    run(tmp_path)
    assert (tmp_path / "summary.json").exists()
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, FakeSolver(hooks={30: lambda: 1 / 0}), resume=True, epochs=6)
    assert not (tmp_path / "summary.json").exists()
    assert run(tmp_path, resume=True, epochs=6)[0]["steps"] == 36


# --- loggers


class Broken(Logger):
    """Fails wherever it is told to."""

    def __init__(self, *events):
        self.events = events

    def start(self, run, state):
        self._called("start")

    def log(self, record):
        self._called("log")

    def advance(self, progress):
        self._called("advance")

    def finish(self, summary):
        self._called("finish")

    def close(self):
        self._called("close")

    def state(self):
        self._called("state")
        return {"fine": True}

    def _called(self, event):
        if event in self.events:
            raise ConnectionError(f"no {event}\nmore")


def test_a_logger_that_fails_is_told_once_and_costs_nothing(tmp_path, undisturbed):
    with pytest.warns(FaultWarning) as caught:
        _, solver = run(
            tmp_path / "run", loggers=[Broken("log", "advance", "finish", "close", "state")]
        )
    assert told(caught) == [
        "Broken failed to log (ConnectionError: no log); the run continues, and metrics.jsonl "
        "holds the missing values, which `bilevel log RUN` logs again"
    ]
    assert same_weights(solver, undisturbed)
    assert comparable(tmp_path / "run") == comparable(tmp_path / "undisturbed")
    assert load(tmp_path / "run")["loggers"].keys() == {"JsonLines", "SummaryFile"}


def test_the_last_state_of_a_logger_stands_for_one_that_it_cannot_tell(tmp_path):
    logger = Broken()
    hooks = {9: lambda: setattr(logger, "events", ("state",))}
    with pytest.warns(FaultWarning, match="failed to state"):
        run(tmp_path, FakeSolver(hooks=hooks), loggers=[logger])
    assert load(tmp_path)["loggers"]["Broken"] == {"fine": True}


def test_a_logger_that_cannot_start_ends_the_run_before_it_begins(tmp_path):
    solver = FakeSolver()
    with pytest.raises(ConnectionError):
        run(tmp_path, solver, loggers=[Broken("start")])
    assert not solver.rounds


def test_the_records_themselves_are_vital(tmp_path, monkeypatch):
    monkeypatch.setattr(JsonLines, "log", lambda self, record: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path)


def test_wandb_that_fails_to_log_does_not_end_the_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")

    class Run:
        id, dir = "x", str(tmp_path / "wandb" / "run" / "files")

        def define_metric(self, *_, **__):
            pass

        def log(self, *_, **__):
            raise BrokenPipeError("W&B's process is gone")

        class summary:
            update = staticmethod(lambda outcome: None)

        def finish(self, exit_code):
            raise BrokenPipeError("again")

    import wandb

    monkeypatch.setattr(wandb, "init", lambda **_: Run())
    monkeypatch.setattr("bilevel.loggers.wandb_file.WAIT", 0.0)
    with pytest.warns(FaultWarning) as caught:
        summary, _ = run(tmp_path / "run", loggers=[WandB()])
    assert summary["stopped"] == "epochs"
    said, end = told(caught)
    assert said.startswith(
        "WandB failed to log (BrokenPipeError: W&B's process is gone); the run continues"
    )
    assert "lacks 5 of 5 records" in end


def test_the_end_of_an_online_run_is_not_waited_for_without_end(tmp_path, monkeypatch, caplog):
    leave = threading.Event()

    class Run:
        dir = str(tmp_path / "wandb" / "run-1" / "files")

        def finish(self, exit_code):
            leave.wait(20)

    monkeypatch.setattr("bilevel.loggers.wandb_logger.FINISH_SECONDS", 0.1)
    logger = WandB(mode="online")
    logger.run, logger._online = Run(), True
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="bilevel"):
        logger.close()
    assert time.monotonic() - began < 5
    leave.set()
    assert f"wandb sync {tmp_path / 'wandb' / 'run-1'}" in caplog.text


# --- memory, workers


MESSAGES = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …"),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 400 bytes."
    ),
    "python": MemoryError(),
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_out_of_memory_is_a_sentence_and_the_checkpoint_stays(tmp_path, undisturbed, kind):
    def exhaust():
        raise MESSAGES[kind]

    with pytest.raises(OutOfMemory) as error:
        run(tmp_path / "run", FakeSolver(hooks={15: exhaust}))
    said = str(error.value)
    assert "out of memory at inner step 15" in said
    assert {
        "cuda": "(2.00 GiB more",
        "cpu": "(400 bytes more",
        "python": "step 15: this process held",
    }[kind] in said
    assert "free of" in said
    assert "smaller problem.batch_size (now 2)" in said
    assert "now 3 weights" in said
    assert error.value.__suppress_context__
    assert load(tmp_path / "run")["step"] == 14
    _, solver = run(tmp_path / "run", resume=True)
    assert same_weights(solver, undisturbed)
    assert comparable(tmp_path / "run") == comparable(tmp_path / "undisturbed")


def test_what_a_run_out_of_memory_held_is_free(tmp_path):
    import weakref

    held = []

    class Greedy(FakeSolver):
        def step(self, **_):
            big = torch.zeros(1000)
            held.append(weakref.ref(big))
            raise torch.OutOfMemoryError("no more")

    with pytest.raises(OutOfMemory):
        run(tmp_path, Greedy())
    assert held[0]() is None


def test_out_of_memory_at_set_up_says_so(tmp_path):
    class Large(FakeProblem):
        def data(self, device, generator):
            raise torch.OutOfMemoryError("no more")

    with pytest.raises(OutOfMemory, match=r"at set-up: .* smaller batches$"):
        run(tmp_path, problem=Large())


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        (delta_stn(), "fewer hyperparameters (now h = 3"),
        (delta_stn(response=Dense()), "response=null (Dense holds Θ as h copies of w)"),
        (Unrolled(inner_steps=7), "now 7 steps in one graph"),
        (unrolled_forward(), "now h = 3 directions"),
        (implicit_nystrom(), "linear_solve.rank (now"),
        (EvolutionStrategies(pairs=3), "solver.pairs (now 3"),
        (PopulationBased(population=4), "solver.population (now 4"),
        (SAMA(), "smaller batches"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_every_solver_tells_what_lowers_its_memory(solver, words):
    assert words in "; ".join(
        memory_settings(Quadratic.random(), solver, None, torch.device("cpu"))
    )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_out_of_memory_tells_what_it_held_and_is_free_afterwards(tmp_path):
    device = torch.device("cuda")

    class Greedy(FakeSolver):
        def step(self, **_):
            held = []
            while True:
                held.append(torch.empty(2**30, dtype=torch.uint8, device=device))

    with pytest.raises(OutOfMemory, match=r"in tensors, .* reserved, .* free of"):
        run(tmp_path, Greedy(), device="cuda")
    assert torch.cuda.memory_allocated() < 2**30


def in_a_fork(work, file):
    """Run `work` in a fork and return its error; PyTorch's handler of SIGCHLD would raise here."""
    if (child := os.fork()) == 0:
        try:
            work()
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            with suppress(RuntimeError):  # the handler may raise once more, here
                file.write_text(text)
            file.write_text(text)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return file.read_text()


class Mortal(Dataset):
    """Its examples are read by workers, of which one dies at the example `at`."""

    def __init__(self, at, signal_=None):
        self.at, self.signal = at, signal_

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == self.at and torch.utils.data.get_worker_info() is not None:
            if self.signal is None:
                os._exit(1)
            os.kill(os.getpid(), self.signal)
        return torch.ones(3), torch.ones(())


@pytest.mark.parametrize("kill", [None, signal.SIGKILL], ids=["exits", "killed"])
def test_a_worker_of_a_loader_that_dies_is_named_with_its_split(tmp_path, kill):
    class Loaded(FakeProblem):
        def data(self, device, generator):
            usual = super().data(device, generator)
            loader = DataLoader(Mortal(5, kill), batch_size=2, num_workers=1)
            return Data(stream(loader, None, generator, name="train"), usual.valid, None)

    # PyTorch's handler of SIGCHLD raises wherever the process is, rarely outside the run
    for attempt in map(str, range(3)):
        place = tmp_path / attempt
        said = in_a_fork(lambda place=place: run(place, problem=Loaded()), tmp_path / "said")
        if not said.startswith("RuntimeError: DataLoader worker"):
            break
    assert re.fullmatch(
        r"BilevelError: a worker of (the train loader|a DataLoader) died .* num_workers.* "
        r"resume=.*",
        said,
    )
    assert load(place)["step"] == 0


# --- numbers that are none


@pytest.mark.parametrize("kind", ["hypers", "scales", "beside"])
def test_what_ceases_to_be_finite_ends_the_run_and_spares_the_checkpoint(tmp_path, kind):
    class Spoilt(FakeSolver):
        def scales(self):
            return {
                "decay": torch.tensor(
                    torch.nan if kind == "scales" and self.inner_count >= 12 else 1.0
                )
            }

        def extra_tensors(self):
            return {
                "Θ": torch.tensor(
                    [1.0, torch.inf if kind == "beside" and self.inner_count >= 12 else 1.0]
                )
            }

        def step(self, **arguments):
            metrics = super().step(**arguments)
            if kind == "hypers" and self.inner_count >= 12:
                self.u = self.u * torch.nan
            return metrics

    summary, _ = run(tmp_path, Spoilt())
    what = {
        "hypers": "hyperparameter `decay`",
        "scales": "the scale of `decay`",
        "beside": "the response `Θ`",
    }[kind]
    assert summary["diverged"]
    assert f"{what} is nan at step 14" in summary["message"]
    assert load(tmp_path)["step"] == 6


def test_the_response_of_a_self_tuning_solver_is_looked_at():
    problem, device, generator = (
        digits(hidden=[4]),
        torch.device("cpu"),
        torch.Generator().manual_seed(0),
    )
    solver = delta_stn()
    solver.setup(problem, problem.data(device, generator), device, generator)
    assert all(tensor.isfinite().all() for tensor in solver.extra_tensors().values())
    assert any("weight" in name for name in solver.extra_tensors())


def test_of_a_sweep_that_run_alone_ends(tmp_path, capfd, elsewhere):
    arguments = (
        "wandb.mode=disabled",
        "runner.progress=none",
        "runner.picture=false",
        "problem=quadratic",
        "runner.epochs=300",
    )
    assert (
        main(
            [
                "-m",
                *arguments,
                "solver=fixed",
                "solver.inner_optimizer.lr=1000,0.01",
                "hydra.sweep.dir=sweep",
            ]
        )
        == 1
    )
    assert "diverged" in capfd.readouterr().err
    bad, good = (
        json.loads(path.read_text()) for path in sorted(Path("sweep").glob("*/summary.json"))
    )
    assert (bad["stopped"], good["stopped"]) == ("diverged", "epochs")


# --- signals


def kill(number):
    return lambda: os.kill(os.getpid(), number)


def test_a_time_limit_ahead_ends_the_round_and_is_told_apart(tmp_path, undisturbed):
    summary, _ = run(tmp_path / "run", FakeSolver(hooks={9: kill(signal.SIGUSR1)}))
    assert (summary["stopped"], summary["signal"], summary["steps"]) == (
        "interrupted",
        "SIGUSR1",
        10,
    )
    assert "interrupted by SIGUSR1 at step 10; continue with: bilevel resume=" in summary["message"]
    summary, solver = run(tmp_path / "run", resume=True)
    assert summary["signal"] is None
    assert same_weights(solver, undisturbed)
    assert comparable(tmp_path / "run") == comparable(tmp_path / "undisturbed")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_second_signal_acts_as_it_would_without_a_run(number):
    class Acted(Exception):
        pass

    def act(*_):
        raise Acted

    before = {s: signal.signal(s, act) for s in (number, signal.SIGTERM)}
    try:
        with Interrupts() as found:
            os.kill(os.getpid(), signal.SIGTERM)
            assert found.received
            with pytest.raises(Acted):
                os.kill(os.getpid(), number)
        assert found.number is signal.SIGTERM
        assert not found.of_time
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def test_under_nohup_a_closed_terminal_is_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as found:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not found.received
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A SLURM of three lines, which notes what it is asked for."""
    place = tmp_path / "bin"
    place.mkdir()
    (place / "scontrol").write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n'
        f"[ ! -e {tmp_path}/refuses ] || {{ echo no >&2; exit 3; }}\n"
    )
    (place / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    return tmp_path / "asked"


def test_slurm_is_asked_to_run_the_job_again_when_all_is_saved(tmp_path, scontrol, monkeypatch):
    hooks = {9: kill(signal.SIGUSR1)}
    run(tmp_path / "a", FakeSolver(hooks=hooks))
    assert not scontrol.exists()
    run(tmp_path / "b", FakeSolver(hooks={9: kill(signal.SIGTERM)}), requeue=True)
    assert not scontrol.exists()
    run(tmp_path / "c", FakeSolver(hooks=hooks), requeue=True)
    assert scontrol.read_text() == "requeue 42\n"
    assert load(tmp_path / "c")["step"] == 10
    (tmp_path / "refuses").touch()
    with pytest.warns(
        FaultWarning,
        match=r"not requeued: `scontrol requeue 42` failed: no; start the same command again",
    ):
        run(tmp_path / "d", FakeSolver(hooks=hooks), requeue=True)
    monkeypatch.delenv("SLURM_JOB_ID")
    with pytest.warns(FaultWarning, match="not a job of SLURM"):
        run(tmp_path / "e", FakeSolver(hooks=hooks), requeue=True)


# --- the command, started again and again

STOPPABLE = """
import os, signal
from bilevel.problems import Quadratic

class Stoppable(Quadratic):
    def __init__(self):
        self.__dict__.update(Quadratic.random(weights=3, hypers=2).__dict__)

    def predict(self, hypers, params, carry, batch, *, train, generator):
        if os.path.exists("stop"):
            with open("stop") as file:
                name, lines = file.read().split()
            try:
                with open("mine/metrics.jsonl") as file:
                    there = len(file.readlines())
            except FileNotFoundError:
                there = 0
            if there >= int(lines):
                os.remove("stop")
                os.kill(os.getpid(), getattr(signal, "SIG" + name))
        return super().predict(hypers, params, carry, batch, train=train, generator=generator)
"""
COMMAND = (
    *(
        "wandb.mode=disabled",
        "runner.progress=none",
        "runner.picture=false",
        "solver=fixed",
        "runner.epochs=20",
        "names.problem=s",
    ),
    "solver.inner_steps=1",
    *("~problem", "+problem={_target_: stopbox.Stoppable}"),
)


@pytest.fixture
def stoppable(elsewhere):
    Path("stopbox.py").write_text(STOPPABLE)
    yield
    sys.modules.pop("stopbox", None)


def lines(directory):
    return [
        {k: v for k, v in r.items() if not k.startswith(TIMES)}
        for r in read_metrics(Path(directory) / "metrics.jsonl")
    ]


def test_one_command_starts_goes_on_and_leaves_alone(stoppable, scontrol, capfd):
    command = [*COMMAND, "hydra.run.dir=mine", "resume=auto", "runner.requeue=true"]
    assert main([*COMMAND, "hydra.run.dir=whole"]) == 0
    Path("stop").write_text("USR1 3")
    assert main(command) == signals.EX_TEMPFAIL == 75
    assert scontrol.read_text() == "requeue 42\n"
    assert 3 <= len(lines("mine")) < 7
    Path("stop").write_text("INT 9")
    assert main(command) == 130
    capfd.readouterr()
    assert main(command) == 0
    assert lines("mine") == lines("whole")
    assert len(lines("mine")) == 21
    before = {path.name: path.read_bytes() for path in Path("mine").iterdir()}
    capfd.readouterr()
    assert main(command) == 0
    out = capfd.readouterr()
    assert out.out.startswith(f"{Path('mine').absolute()} is finished: valid loss ")
    assert out.err == ""
    assert {path.name: path.read_bytes() for path in Path("mine").iterdir()} == before
    assert main([*command, "runner.epochs=22"]) == 0
    assert len(lines("mine")) == 23


def test_what_the_command_cannot_go_on_with(stoppable, capfd):
    def refused(*more):
        assert main([*COMMAND, *more]) == 1
        (said,) = capfd.readouterr().err.splitlines()
        return said

    assert "add hydra.run.dir=runs/mine" in refused("resume=auto")
    assert "is for one run; repeat a sweep" in refused("-m", "resume=auto")
    assert main([*COMMAND, "resume=auto", "hydra.run.dir=mine"]) == 0
    said = refused("resume=auto", "hydra.run.dir=mine", "seed=1", "solver.inner_steps=2")
    assert "seed=1 differs from 0 in" in said
    assert "runner.warmup_epochs=2 differs from its default in" in refused(
        "resume=auto", "hydra.run.dir=mine", "runner.warmup_epochs=2"
    )
    for file in Path("mine").glob("checkpoint*"):
        file.unlink()
    assert "already holds a run" in refused("resume=auto", "hydra.run.dir=mine")
    rates = (
        "solver.inner_optimizer.lr=1e4",
        "runner.epochs=300",
        "hydra.run.dir=bad",
        "resume=auto",
    )
    for _ in range(2):  # the same bits would diverge again
        assert "diverged" in refused(*rates)


def test_a_time_limit_before_the_first_round_is_one_too(stoppable, scontrol):
    """Data may take minutes."""
    Path("slowbox.py").write_text(
        "import os, signal\n"
        "def Slow():\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    raise AssertionError('it goes on')\n"
    )
    try:
        command = [*COMMAND[:-1], "+problem={_target_: slowbox.Slow}", "runner.requeue=true"]
        assert main([*command, "resume=auto", "hydra.run.dir=mine"]) == 75
        assert scontrol.read_text() == "requeue 42\n"
    finally:
        sys.modules.pop("slowbox", None)
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


# --- determinism on request


class Scattered(ModuleProblem):
    """Uses an operation without a deterministic form."""

    def inputs(self, hypers, batch, *, train, generator):
        index = torch.tensor([0, 0])
        batch[0].clone().put_(index, torch.ones(2))  # twice to one place
        return (batch[0],), {}

    def inner_objective(self, hypers, params, prediction, batch):
        return (prediction - batch[1]).pow(2).mean() * hypers["weight"]

    def outer_objective(self, hypers, params, prediction, batch):
        return (prediction - batch[1]).pow(2).mean()


def test_the_strict_option_names_an_operation_without_a_deterministic_form(tmp_path):
    data = (torch.randn(6, 2), torch.randn(6, 1))
    space = Space(weight=Positive(init=1.0))
    problem = Scattered(lambda: torch.nn.Linear(2, 1), space, train=data, valid=data, batch_size=3)
    with pytest.raises(
        BilevelError,
        match=r"runner\.deterministic=true does not allow put_, which has no deterministic form",
    ):
        Runner(epochs=1, progress="none", picture=False, deterministic=True).run(
            problem, delta_stn(), directory=tmp_path / "a"
        )
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_strict_option_is_put_back(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with devices.deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic
    with devices.deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
