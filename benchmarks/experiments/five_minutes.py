"""Count the lines that tuning adds to one script, and measure what they give."""

import difflib
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from benchmarks.experiments import do_no_harm
from benchmarks.experiments.harness import ROOT, Context, Experiment
from benchmarks.experiments.report import spread, table
from bilevel import BilevelError

SCRIPTS = ROOT / "benchmarks" / "five_minutes"
PLAIN = "plain"
EPOCHS, SEEDS = 60, range(1, 6)
QUICK = 6
"""Epochs at reduced size, with two seeds and two trials."""
DELTA_STN = do_no_harm.trainings(plain=0, warmup=5, tuned=EPOCHS - 5, frozen=0, every=1)


class Way(NamedTuple):
    """One row: a script of `benchmarks/five_minutes`, its trials, cost and label smoothing."""

    title: str
    script: str
    trials: int = 0
    trainings: float = 1
    smoothing: float = 0.1


WAYS = (
    Way("not tuned", PLAIN),
    Way("not tuned, label smoothing 0.005", PLAIN, smoothing=0.005),
    Way("`bilevel`, Δ-STN", "with_bilevel", trainings=DELTA_STN),
    Way("Optuna, TPE", "with_optuna", 3, 3),
    Way("Optuna, TPE", "with_optuna", 20, 20),
    Way("Lightning and Optuna, TPE", "with_lightning", 20, 20),
)


class Job(NamedTuple):
    """One run of a script."""

    script: str
    seed: int
    epochs: int
    trials: int
    smoothing: float = 0.1


def source(script: str) -> str:
    """Return the text of a script."""
    return (SCRIPTS / f"{script}.py").read_text(encoding="utf-8")


def added(script: str) -> list[str]:
    """Return the lines of a script that the plain one lacks, without indentation and empty ones."""
    old, new = ([line.strip() for line in source(s).splitlines()] for s in (PLAIN, script))
    return [line[2:] for line in difflib.ndiff(old, new) if line.startswith("+ ") and line[2:]]


def run(job: Job) -> tuple[float, float]:
    """Run a script in a folder of its own; return its test loss and its CPU seconds.

    Raises:
        BilevelError: the script fails.
    """
    text = re.sub(
        r"^SEED, EPOCHS(, TRIALS)? = .*$",
        lambda m: (
            f"{m[0].partition('=')[0]}= {job.seed}, {job.epochs}"
            + (f", {job.trials}" if m[1] else "")
        ),
        source(job.script).replace("smoothing=0.1", f"smoothing={job.smoothing}"),
        flags=re.MULTILINE,
    )
    with tempfile.TemporaryDirectory() as place:
        script = Path(place) / f"{job.script}.py"
        script.write_text(f"import torch\ntorch.set_num_threads(1)\n{text}", encoding="utf-8")
        start = _children_seconds()
        done = subprocess.run(
            [sys.executable, script.name], cwd=place, capture_output=True, text=True, check=False
        )
        seconds = _children_seconds() - start
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise BilevelError(f"{job.script}.py ends with {done.returncode}: {''.join(last)}")
    return float(re.findall(r"^test loss (\S+)$", done.stdout, re.MULTILINE)[-1]), seconds


def _children_seconds() -> float:
    """Return the CPU time of the processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def report(context: Context) -> str:
    """Return one row for each way."""
    seeds: Sequence[int] = (100, 101) if context.quick else SEEDS
    rows = []
    for way in WAYS:
        epochs, trials = (QUICK, 2) if context.quick else (EPOCHS, way.trials)
        jobs = [Job(way.script, seed, epochs, trials, way.smoothing) for seed in seeds]
        missing = way.script == "with_lightning" and not find_spec("lightning")
        results = [] if missing else context.map(run, jobs)
        losses, seconds = [result[0] for result in results], [result[1] for result in results]
        lines = "" if way.script == PLAIN else str(len(added(way.script)))
        rows.append(
            [
                f"{way.title}, {way.trials} trials" if way.trials else way.title,
                lines,
                f"{way.trainings:.2g}",
                spread(losses, ".3f"),
                spread(seconds, ".1f"),
            ]
        )
    head = ["", "lines that are new or changed", "trainings", "test loss", "CPU seconds"]
    return table(head, rows)


EXPERIMENT = Experiment(page="experiments/five-minutes.md", report=report)
