"""Kill, stop, crash or starve runs at seeded moments, resume them, and compare with a whole run."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bilevel.loggers.records import read_metrics
from tests.support.wandb_files import of_kind, read_file

QUIET = ("runner.progress=none", "runner.picture=false", "runner.device=cpu", "seed=1")
DIGITS = (
    "problem=digits",
    "problem.hidden=[8]",
    "problem.dropout=gaussian",
    "problem.batch_size=256",
)
LENGTH = (
    *("runner.epochs=6", "runner.warmup_epochs=0.5", "runner.evaluate_every=0.5"),
    "runner.checkpoint_every=2",  # so that there are lines that are younger than a checkpoint
)
STEPS = "solver.inner_steps=3"
TRIALS = "trial.epochs=2"

SOLVERS = {
    "fixed": ("solver=fixed",),
    "delta_stn": ("solver=delta_stn",),
    "delta_stn, refitted": ("solver=delta_stn", "runner.refit=all"),
    "centered_stn": ("solver=centered_stn",),
    "stn": ("solver=stn",),
    "unrolled": ("solver=unrolled", STEPS),
    "unrolled, checkpointed": ("solver=unrolled", STEPS, "solver.mode.checkpoint=true"),
    "unrolled, restarted": ("solver=unrolled", STEPS, "solver.restart=true"),
    "unrolled_forward": ("solver=unrolled_forward", STEPS),
    "implicit_cg": ("solver=implicit_cg",),
    "implicit_neumann": ("solver=implicit_neumann",),
    "implicit_nystrom": ("solver=implicit_nystrom",),
    "implicit_identity": ("solver=implicit_identity",),
    "soba": ("solver=soba",),
    "sama": ("solver=sama",),
    "penalty": ("solver=penalty",),
    "first_order": (
        "solver=first_order",
        "problem=architecture_tabular",
        "problem.width=4",
        "problem.batch_size=256",
    ),
    "es": ("solver=es", "solver.horizon=6"),
    "es, truncated": ("solver=es", "solver.horizon=6", "solver.persistent=false"),
    "random_search": ("solver=random_search", TRIALS),
    "tpe": ("solver=tpe", TRIALS),
    "gp": ("solver=gp", TRIALS),
    "pbt": ("solver=pbt", "solver.population=4", "solver.interval=0.5"),
}
"""The solvers of tests/support/solver_list.py, from the command line."""

FAULTS = ("kill", "term", "interrupt", "full", "crash")
ATTEMPTS = 8


class Ended(NamedTuple):
    """The exit status of a process, and the text of its standard error."""

    rc: int
    said: str


class Server:
    """Runs command lines in processes of their own; see `server.py`."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("server.py"))]
        # a test before this one may have left the address of its own W&B service
        own = {key: value for key, value in os.environ.items() if "WANDB" not in key}
        environment = {**own, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            bufsize=1,
        )
        assert self._answer()["ready"]

    def run(
        self,
        cwd: Path,
        *arguments: str,
        fault: dict[str, Any] | None = None,
        after: float | None = None,
    ) -> Ended:
        """Run one command line with a fault, or kill it from outside after so many seconds."""
        request = {"cwd": str(cwd), "arguments": arguments, "fault": fault}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        pid = self._answer()["pid"]
        if after is not None:
            time.sleep(after)
            os.kill(pid, signal.SIGKILL)  # a zombie at worst: the server waits for it
        return Ended(**self._answer())

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the server has ended"
        return json.loads(line)


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    try:
        yield server
    finally:
        server.close()


class Case(NamedTuple):
    """A solver, a fault, the seed of its moments, and the number of strikes."""

    solver: str
    fault: str
    seed: int
    strikes: int = 1
    loggers: tuple[str, ...] = ("wandb.mode=disabled",)


class Matrix:
    """Runs cases, and compares each with one undisturbed run of its solver."""

    def __init__(self, server: Server, place: Path) -> None:
        self.server, self.place = server, place
        self._references: dict[str, dict[str, int]] = {}

    def reference(self, solver: str) -> tuple[Path, dict[str, int]]:
        """Return the directory of the undisturbed run, and its number of events of each kind."""
        directory = self.place / f"{_folder(solver)}-undisturbed"
        if solver not in self._references:
            count = self.place / "count"
            fault = {"act": "none", "at": 0, "count": str(count)}
            ended = self.server.run(
                self.place, *self._settings(solver, directory), "wandb.mode=disabled", fault=fault
            )
            assert ended.rc == 0, ended.said
            self._references[solver] = json.loads(count.read_text())
        return directory, self._references[solver]

    def run(self, case: Case) -> tuple[list[str], list[str]]:
        """Return where the fault struck, and what was lost."""
        whole, events = self.reference(case.solver)
        directory = self.place / f"{_folder(case.solver)}-{case.fault}-{case.seed}"
        draw, struck, resumed = random.Random(f"{case.solver} {case.fault} {case.seed}"), [], False
        for attempt in range(ATTEMPTS):
            arguments = (
                [f"resume={directory}"] if resumed else self._settings(case.solver, directory)
            )
            fault = None
            if attempt < case.strikes:
                # By kind, since most events are writes of a checkpoint. Later strikes meet a run
                # that has less before it.
                only = draw.choice(list(events)) if case.fault != "crash" else "evaluate"
                at = draw.randint(1, max(1, events[only] // (attempt + 1)))
                fault = {
                    "act": case.fault,
                    "at": at,
                    "only": only,
                    "count": str(self.place / "count"),
                }
                if case.fault == "full":
                    fault["limit"] = draw.randint(0, (whole / "checkpoint.pt").stat().st_size)
            ended = self.server.run(self.place, *arguments, *case.loggers, fault=fault)
            if fault is not None:
                struck.append(f"{only} {at}/{events[only]}: {ended.rc}")
            if (wrong := _unexpected(ended, case.fault if fault else None)) is not None:
                return struck, [wrong]
            if ended.rc == 0 and fault is None:
                break
            resumed = any(directory.glob("checkpoint*.pt")) and (directory / "config.yaml").exists()
            if (
                ended.rc == 0 and (directory / "summary.json").exists()
            ):  # it ended before the fault came
                break
        else:
            return struck, [f"not ended after {ATTEMPTS} attempts: {ended.said}"]
        lost = differences(whole, directory)
        if "wandb.mode=offline" in case.loggers:
            lost += wandb_differences(directory)
        if not lost:
            shutil.rmtree(directory)
        return struck, lost

    def _settings(self, solver: str, directory: Path) -> list[str]:
        return [
            *QUIET,
            *DIGITS[: 4 if solver != "first_order" else 0],
            *SOLVERS[solver],
            *LENGTH,
            f"hydra.run.dir={directory}",
        ]


def _unexpected(ended: Ended, fault: str | None) -> str | None:
    """Return a complaint about how a process ended; None if its fault explains it."""
    expected = {
        None: (0,),
        "kill": (-9, 0),
        "term": (130, 143, 0),
        "interrupt": (130, 0),
        "full": (1, 0),
        "crash": (1, 0),
    }[fault]
    if ended.rc not in expected:
        return f"status {ended.rc} after {fault}: {ended.said}"
    if "Traceback" in ended.said:
        return f"a traceback after {fault}: {ended.said}"
    return None


def differences(whole: Path, other: Path) -> list[str]:
    """Return the differences of two runs without costs: records, final state, summary, refits."""
    found = []
    refits = {run: sorted(p.name for p in run.glob("refit-*")) for run in (whole, other)}
    if refits[whole] != refits[other]:
        found.append(f"refits: {refits[other]} and not {refits[whole]}")
    for name in refits[whole] if not found else ():
        found += [f"{name}: {line}" for line in differences(whole / name, other / name)]
    ours, theirs = (read_metrics(directory / "metrics.jsonl") for directory in (other, whole))
    if without_costs(ours) != without_costs(theirs):
        steps, wanted = ([record["step"] for record in run] for run in (ours, theirs))
        found.append(f"metrics.jsonl: steps {steps} and not {wanted}, or other values")
    ours, theirs = (
        torch.load(directory / "checkpoint.pt", weights_only=True)["state"]
        for directory in (other, whole)
    )
    found += [f"checkpoint: {path}" for path in unequal(without_costs(ours), without_costs(theirs))]
    ours, theirs = (
        json.loads((directory / "summary.json").read_text()) for directory in (other, whole)
    )
    found += [f"summary: {path}" for path in unequal(without_costs(ours), without_costs(theirs))]
    if left := [path.name for path in other.iterdir() if path.name.endswith(".tmp")]:
        found.append(f"left behind: {left}")
    return found


COSTS = ("seconds", "peak_memory", "phases", "evaluating", "loggers", "environment")
"""Entries that differ between equal runs; the commit in the environment may move meanwhile."""


def without_costs(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: without_costs(entry)
            for name, entry in value.items()
            if not str(name).startswith(COSTS)
        }
    return [without_costs(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def unequal(one: Any, other: Any, path: str = "") -> list[str]:
    """Return where two nested states differ, bit by bit."""
    if type(one) is not type(other):
        return [f"{path}: {type(one).__name__} and {type(other).__name__}"]
    if isinstance(one, torch.Tensor):
        same = (one.shape, one.dtype) == (other.shape, other.dtype)
        same = same and one.numpy().tobytes() == other.numpy().tobytes()
        return [] if same else [f"{path}: other values"]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{path}: {sorted(map(str, one.keys() ^ other.keys()))} in one alone"]
        return [
            found for name in one for found in unequal(one[name], other[name], f"{path}.{name}")
        ]
    if isinstance(one, list):
        if len(one) != len(other):
            return [f"{path}: {len(one)} and {len(other)} entries"]
        return [
            found
            for i, pair in enumerate(zip(one, other, strict=True))
            for found in unequal(*pair, f"{path}.{i}")
        ]
    return (
        []
        if one == other or (one != one and other != other)
        else [f"{path}: {one!r} and {other!r}"]
    )


def wandb_differences(directory: Path) -> list[str]:
    """Return what W&B's offline parts lack or have twice; parts set aside do not count."""
    steps, ids = [], set()
    for file in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        if rows := of_kind(read_file(file), "history"):  # a run without a checkpoint began anew
            steps += [row.step.num for row in rows]
            ids.add(file.stem)
    wanted = [record["step"] for record in read_metrics(directory / "metrics.jsonl")]
    found = [] if steps == wanted else [f"W&B has steps {steps} and not {wanted}"]
    return found if len(ids) == 1 else [*found, f"W&B has runs {sorted(ids)}"]


def _folder(solver: str) -> str:
    return solver.replace(", ", "-")


def cases(seed: int) -> Iterator[Case]:
    """Yield every solver with every fault; kills strike up to three times, each seventh has W&B."""
    for i, solver in enumerate(SOLVERS):
        for j, fault in enumerate(FAULTS):
            number = i * len(FAULTS) + j
            loggers = ("wandb.mode=offline",) if number % 7 == 0 else ("wandb.mode=disabled",)
            yield Case(
                solver, fault, seed, 1 + number % 3 if fault in ("kill", "full") else 1, loggers
            )


def main(seed: int, place: Path) -> int:
    """Run the whole matrix and print a table; return 1 if anything was lost."""
    began, strikes, failed = time.monotonic(), 0, 0
    print("| solver | fault | struck at (event, number of all: exit status) | lost |")
    print("|---|---|---|---|", flush=True)
    with serving() as server:
        matrix = Matrix(server, place)
        for case in cases(seed):
            struck, lost = matrix.run(case)
            strikes, failed = strikes + len(struck), failed + bool(lost)
            told = "; ".join(struck), "; ".join(lost) or "nothing"
            print(f"| {case.solver} | {case.fault} | {told[0]} | {told[1]} |", flush=True)
    seconds = time.monotonic() - began
    print(f"\n{strikes} faults, {failed} runs that lost something; {seconds:.0f} s, seed {seed}")
    return min(failed, 1)
