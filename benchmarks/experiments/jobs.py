"""Expand a `bilevel -m` command line by Hydra's own rules, and run one job per run."""

import hashlib
import itertools
import json
import re
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf, open_dict

from bilevel.cli.app import main, prepared
from bilevel.cli.input_errors import parse
from bilevel.comparison.labels import flatten
from bilevel.loggers.records import SUMMARY

SETTINGS = (
    *("runner.threads=1", "runner.device=cpu", "runner.checkpoint_every=1000000"),
    *("runner.progress=none", "runner.picture=false", "wandb.mode=disabled"),
)
JOB = "job.json"


DATA_SETS = {"mnist": "MNIST", "cifar10": "CIFAR-10"}
"""Data sets that are not embedded, by the names of the functions that read them."""
ARCHIVE = "cifar10_jpeg.npz"
"""An archive of JPEG files that may replace torchvision's CIFAR-10."""


class Job(NamedTuple):
    """One run: its overrides, its directory (a digest of its configuration), and its data set."""

    overrides: tuple[str, ...]
    directory: Path
    data: str | None


class Outcome(NamedTuple):
    """The wall time of a job, and the error sentence of a job that left no run."""

    wall_seconds: float
    failure: str | None


def expand(overrides: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the overrides of each run of `bilevel -m OVERRIDES`, with those of an experiment.

    Example:
        >>> expand(["problem=ridge", "solver=stn,delta_stn", "seed=range(0,2)"])[1:3]
        [('problem=ridge', 'solver=stn', 'seed=1'), ('problem=ridge', 'solver=delta_stn', 'seed=0')]
    """
    prepared(["-m", *overrides])
    single = [text for text in overrides if not parse(text).is_sweep_override()]
    params = _composed(single).hydra.sweeper.get("params") or {}
    choices: dict[str, list[str]] = {}
    for text in [*(f"{key}={value}" for key, value in params.items()), *overrides]:
        override = parse(text)
        key = override.get_key_element()
        swept = override.is_sweep_override()
        choices[key] = (
            [f"{key}={value}" for value in override.sweep_string_iterator()] if swept else [text]
        )
    return list(itertools.product(*choices.values()))


def replaced(overrides: Iterable[str], by: Iterable[str]) -> tuple[str, ...]:
    """Return the overrides with those of `by`, which replace overrides of the same key.

    Example:
        >>> replaced(["solver=stn", "seed=0,1,2"], ["seed=100", "runner.epochs=2"])
        ('solver=stn', 'seed=100', 'runner.epochs=2')
    """
    new = {parse(text).key_or_group: text for text in by}
    kept = {parse(text).key_or_group: text for text in overrides}
    return tuple((kept | new).values())


def job(overrides: Sequence[str], folder: Path) -> Job:
    """Return the job; its directory changes with its configuration, so kept runs are valid."""
    config = _composed(overrides)
    with open_dict(config):
        choices = config.pop("hydra").runtime.choices
    # A setting that changes no number, such as the place of the data, does not repeat the runs.
    settings = {"seed": config.seed, **flatten(OmegaConf.to_container(config))}
    digest = hashlib.sha256(
        f"{choices.problem} {choices.solver} {json.dumps(settings, sort_keys=True)}".encode()
    )
    shown = [
        text
        for text in overrides
        if parse(text).key_or_group not in ("experiment", "seed", "problem", "solver")
    ]
    readable = re.sub(r"[^\w.-]+", "-", "-".join(shown))[:60]
    name = f"{choices.problem}-{choices.solver}-seed{config.seed}-{readable}".rstrip("-")
    text = OmegaConf.to_yaml(config.problem).lower()
    data = next((needed for function, needed in DATA_SETS.items() if function in text), None)
    return Job(tuple(overrides), folder / f"{name}-{digest.hexdigest()[:8]}", data)


def where(data: Path | None, needed: str | None) -> tuple[str, ...] | None:
    """Return the overrides for the place of the data, or None if the data are not there."""
    folder = (data or Path("data")).resolve()
    if needed == "CIFAR-10" and (folder / ARCHIVE).is_file():
        return (f"problem.data.archive='{folder / ARCHIVE}'",)
    files = {"MNIST": "MNIST/raw/*", "CIFAR-10": "cifar-10-batches-py/*"}.get(needed or "")
    if files and not any(folder.glob(files)):  # a download that failed leaves an empty folder
        return None
    return () if data is None else (f"data.root='{folder}'", "data.download=false")


def ended(directory: Path) -> bool:
    """Return whether the directory holds a finished or diverged run."""
    try:
        return not json.loads((directory / SUMMARY).read_text(encoding="utf-8"))["interrupted"]
    except (OSError, ValueError, KeyError):
        return False


def run_job(job: Job, data: Path | None = None) -> Outcome:
    """Run the job in this process; write output to `log.txt` and outcome to `job.json`."""
    import torch

    torch.set_num_threads(1)
    shutil.rmtree(job.directory, ignore_errors=True)
    job.directory.parent.mkdir(parents=True, exist_ok=True)
    place = str(job.directory.resolve()).replace("'", r"\'")
    start, errors, out = time.perf_counter(), StringIO(), StringIO()
    with redirect_stderr(errors), redirect_stdout(out):
        main(
            [*job.overrides, *SETTINGS, *(where(data, job.data) or ()), f"hydra.run.dir='{place}'"]
        )
    sys.stdout.flush()
    messages = [
        line.removeprefix("bilevel: ")
        for line in errors.getvalue().splitlines()
        if line.startswith("bilevel: ")
    ]
    failure = None
    if not ended(job.directory):
        failure = next(
            (line for line in reversed(messages) if not line.startswith("warning: ")),
            "it left no summary and no error message",
        )
    outcome = Outcome(time.perf_counter() - start, failure)
    job.directory.mkdir(parents=True, exist_ok=True)
    (job.directory / "log.txt").write_text(errors.getvalue() + out.getvalue(), encoding="utf-8")
    (job.directory / JOB).write_text(
        json.dumps({"overrides": job.overrides, **outcome._asdict()}, indent=1), encoding="utf-8"
    )
    return outcome


def outcome_of(job: Job) -> Outcome | None:
    """Return the outcome of a job that has ended, or None if its run must be repeated."""
    path = job.directory / JOB
    if not (ended(job.directory) and path.exists()):
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return Outcome(record["wall_seconds"], record["failure"])


def _composed(overrides: Sequence[str]) -> DictConfig:
    with initialize_config_module("bilevel.conf", version_base="1.3"):
        return compose("config", prepared(overrides), return_hydra_config=True)
