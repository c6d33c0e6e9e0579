"""Weights & Biases: a dashboard that groups runs by problem and compares solvers."""

import logging
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilevel.errors import BilevelError, near
from bilevel.records import Logger, Record, RunInfo

MODES = ("offline", "online", "disabled")
AXES = {"": "epoch", "by_seconds/": "seconds", "by_examples/": "examples"}
"""The x-axis of the metrics under each prefix; W&B gives a metric one axis, so that a second axis needs a second name."""
REACH_SECONDS = 5.0

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class WandB(Logger):
    """Logs a run to W&B; `offline` by default, which needs no account and no network.

    Runs are grouped by problem and typed by solver, and both are tags. `train/…`, `valid/…`, `hypers/…`, `scales/…` and
    `solver/…` are drawn against the epoch; what was measured on the validation split is there again as `by_seconds/…` and
    `by_examples/…`, so that solvers which spend differently are compared at equal cost.

    Attributes:
        mode: `offline` (upload it later with `wandb sync`), `online` (offline where that fails) or `disabled`.
        project: of W&B.
        entity: of W&B; None is the account's default.
        name: of the run; None is solver and seed.
        tags: besides problem and solver.

    Raises:
        BilevelError: an unknown mode.
    """

    mode: str = "offline"
    project: str = "bilevel"
    entity: str | None = None
    name: str | None = None
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise BilevelError(f"wandb.mode={self.mode!r}{near(str(self.mode), MODES)} is none of {', '.join(MODES)}")
        self.run: Any = None
        self._exit_code = 1  # until the run ends in order

    def start(self, run: RunInfo, state: dict[str, Any]) -> None:
        if self.mode == "disabled":
            return
        import wandb

        settings = wandb.Settings(silent=True, console="off", init_timeout=30)
        arguments: dict[str, Any] = {
            "project": self.project,
            "entity": self.entity,
            "name": self.name or f"{run.solver}-seed{run.seed}",
            "group": run.problem,
            "job_type": run.solver,
            "tags": list(dict.fromkeys((run.problem, run.solver, *self.tags))),
            "config": {"seed": run.seed, "names": {"problem": run.problem, "solver": run.solver}, **run.config},
            "dir": str(run.directory),
            "id": state.get("id"),
            "resume": "allow" if state else None,  # the same run goes on, under its id
            "settings": settings,
        }
        if self.mode == "online" and (problem := _unreachable(wandb, settings)) is None:
            try:
                self.run = wandb.init(mode="online", **arguments)
            except wandb.errors.Error as error:
                problem = str(error).splitlines()[0]
        if self.run is None:
            self.run = wandb.init(mode="offline", **arguments)
            if self.mode == "online":
                later = f"wandb sync {Path(self.run.dir).parent}"
                log.warning("W&B is offline (%s); the run goes on, and can be uploaded with: %s", problem, later)
        for prefix, axis in AXES.items():
            self.run.define_metric(axis, hidden=True)
            for section in (f"{prefix}*",) if prefix else ("train/*", "valid/*", "hypers/*", "scales/*", "exact/*", "solver/*"):
                self.run.define_metric(section, step_metric=axis)
        self.run.define_metric("valid/loss", step_metric="epoch", summary="min,last")

    def log(self, record: Record) -> None:
        if self.run is not None:
            self.run.log(_sections(record), step=record["step"])

    def finish(self, summary: Record) -> None:
        if self.run is not None:
            self.run.summary.update({name: value for name, value in summary.items() if value is not None})
        self._exit_code = int(summary["diverged"])

    def close(self) -> None:
        if self.run is not None:
            self.run.finish(exit_code=self._exit_code)
            self.run = None

    def state(self) -> dict[str, Any]:
        return {} if self.run is None else {"id": self.run.id}


def _sections(record: Record) -> dict[str, float]:
    """The names under which W&B shows a record: a section per kind, an entry per number."""
    shown: dict[str, float] = {}
    for name, value in record.items():
        kind, _, rest = (
            name.replace("_", "/", 1).partition("/") if name.startswith(("train_", "valid_")) else name.partition(".")
        )
        if kind in ("train", "valid", "hypers", "scales", "exact"):
            shown |= _entries(f"{kind}/{rest}", value)
        elif name in ("step", "epoch", "seconds", "examples", "peak_memory_bytes"):
            shown |= _entries(name, value)
        else:
            shown |= _entries(f"solver/{name}", value)
        if kind in ("valid", "exact"):
            for prefix in ("by_seconds", "by_examples"):
                shown |= _entries(f"{prefix}/{name}", value)
    return shown


def _entries(name: str, value: Any) -> dict[str, float]:
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return {entry: v for key, part in value.items() for entry, v in _entries(f"{name}/{key}", part).items()}
    if isinstance(value, list):
        return _entries(name, dict(enumerate(value)))
    return {name: value}


def _unreachable(wandb: Any, settings: Any) -> str | None:
    """Why W&B cannot be used online, found out without a prompt and without a long wait; None where it can."""
    url = wandb.setup(settings=settings).settings.base_url
    try:
        urllib.request.urlopen(url, timeout=REACH_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # an answer of any kind is a connection
    except OSError as error:
        return f"{url} cannot be reached: {getattr(error, 'reason', error)}"
    try:
        known = wandb.login(prompt=False)
    except TypeError:  # an older wandb, whose login would ask
        known = wandb.api.api_key is not None
    except wandb.errors.Error as error:
        return str(error).splitlines()[0]
    return None if known else "there is no API key here; run `wandb login` first"
