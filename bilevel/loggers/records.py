"""Records of evaluations, the files that hold them, and how they are read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from bilevel.loggers.space_json import LARGE
from bilevel.params import Hypers
from bilevel.untrusted_files import read_bytes

Record: TypeAlias = dict[str, Any]
"""One evaluation: plain numbers by name; see `make_record`."""

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
DESCRIPTION = "run.json"


def environment_of(run: str | Path) -> Record:
    """Return the environment that the files of a run name; {} for one that names none."""
    for name in (SUMMARY, DESCRIPTION):
        try:
            found = json.loads(read_bytes(Path(run) / name))["environment"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue
        if isinstance(found, dict):
            return found
    return {}


def make_record(
    *,
    step: int,
    epoch: float,
    seconds: float,
    examples: int,
    train: Mapping[str, float],
    valid: Mapping[str, float],
    hypers: Hypers,
    scales: Hypers,
    metrics: Mapping[str, float],
    peak_memory_bytes: int | None,
    phases: Mapping[str, float] | None = None,
    exact: Mapping[str, float] | None = None,
    hypergradient: Mapping[str, float] | None = None,
) -> Record:
    """Return one flat record of an evaluation.

    Its entries are `train_loss`, `valid_loss`, …, `hypers.<name>`, `scales.<name>`, the metrics of
    the solver's steps, and `exact.<name>` for a problem with a closed form. `seconds` is the
    training time. `seconds.<phase>` are its parts by the solver's timers; `seconds.evaluation` is
    separate from it. `hypergradient.<name>` compares the solver's hypergradient with the exact one
    (`bilevel.run.hypergradient_error`), and `hypergradient.check_<name>` with finite differences
    (`bilevel.run.hypergradient_check`).

    Example:
        >>> import torch
        >>> record = make_record(
        ...     step=3, epoch=1.0, seconds=0.1, examples=6,
        ...     train={"loss": 1.0}, valid={"loss": 2.0},
        ...     hypers={"decay": torch.tensor(0.5)}, scales={}, metrics={}, peak_memory_bytes=None)
        >>> record["valid_loss"], record["hypers.decay"]
        (2.0, 0.5)
    """
    return {
        "step": step,
        "epoch": epoch,
        "seconds": seconds,
        **{f"seconds.{name}": value for name, value in (phases or {}).items()},
        "examples": examples,
        **{f"train_{name}": value for name, value in train.items()},
        **{f"valid_{name}": value for name, value in valid.items()},
        **{f"hypers.{name}": brief(leaf) for name, leaf in hypers.items()},
        **{f"scales.{name}": brief(leaf) for name, leaf in scales.items()},
        **{f"exact.{name}": value for name, value in (exact or {}).items()},
        **{f"hypergradient.{name}": value for name, value in (hypergradient or {}).items()},
        **metrics,
        "peak_memory_bytes": peak_memory_bytes,
    }


def read_metrics(path: str | Path) -> list[Record]:
    """Return the records of a `metrics.jsonl`; an unfinished last line is skipped."""
    lines = read_bytes(Path(path)).decode().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def own_results(summary: Record) -> Record:
    """Return the `best` and `last` evaluation of `metrics.jsonl`, also where a refit is better.

    Example:
        >>> own_results({"best": {"step": 3}, "last": {"step": 5}})["best"]
        {'step': 3}
    """
    own: Record = summary.get("refit", {}).get("candidates", {}).get("run", summary)
    return own


def brief(leaf: Tensor) -> Any:
    """Return a hyperparameter as a number or nested lists; a large one as mean, min and max."""
    if leaf.numel() <= LARGE:
        return leaf.tolist()
    leaf = leaf.double()
    return {"mean": leaf.mean().item(), "min": leaf.min().item(), "max": leaf.max().item()}
