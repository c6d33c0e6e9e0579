"""Weights & Biases: a dashboard that groups runs by problem and compares solvers."""

import logging
import shlex
import threading
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bilevel.errors import BilevelError, FaultWarning, Unwritable
from bilevel.files import write_atomically
from bilevel.loggers.dashboard import (
    SECTIONS,
    comparison_metrics,
    flat_summary,
    picture_grid,
    sections,
)
from bilevel.loggers.logger import Logger, RunInfo
from bilevel.loggers.records import METRICS, Record, read_metrics
from bilevel.loggers.wandb_file import missing_steps
from bilevel.loggers.wandb_network import unreachable, without_error_reports
from bilevel.loggers.wandb_settings import (
    LONGEST_TAG,
    entity_of,
    explained,
    id_from_environment,
    new_id,
    project_of,
    tags_of,
    text,
    unused_variables,
    variable,
)
from bilevel.text import first_line
from bilevel.validate import one_of

MODES = ("offline", "online", "disabled")
AT_EQUAL_COST = {"by_seconds": "seconds", "by_examples": "examples"}
"""Sections that repeat the validation split, with their horizontal axis.

W&B gives a metric one axis, so a second axis needs a second name.
"""
FINISH_SECONDS = 60.0
"""Longest wait for the end of an online run; W&B itself would wait without limit."""
MARK = "last_step"
"""Name of the file in W&B's folder of a run that holds the last step logged there.

Offline it is written when W&B's file holds everything, online with every step.
"""
log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class WandB(Logger):
    """Logs a run to W&B; the default mode `offline` needs no account and no network.

    Runs are grouped by problem, and their type is the solver. Both are tags, and so are the sweep
    of the run and `resumed`. Sections are drawn against the epoch: `train/…`, `valid/…`,
    `hypers/…`, `scales/…`, `seconds/…` by phase, `solver/…` and `pictures/…`; also `exact/…` and
    `hypergradient/…` for a problem with a closed form. The scores of the validation split appear
    again as `by_seconds/…` and `by_examples/…`, which compare solvers at equal cost. The summary
    has the entries of the run's own summary: `best/valid_loss`, `best/test_loss`, `best/regret`,
    `examples` and others.

    A resumed run continues under its id, and no step is logged twice. If an offline run was killed,
    W&B's own process had not written everything. The resumed run then logs these steps again and
    renames the incomplete folder to `killed-…`. Pictures of these steps stay in that folder. An
    online run that was killed can lack its last seconds on the server.

    At its end an offline run reads W&B's file back. If the file lacks records, for example because
    the disk was full, a warning gives the command that logs the run again.

    Attributes:
        mode: `offline` (upload later with `wandb sync`), `online` (offline where that fails) or
            `disabled`.
        project: project in W&B; None for WANDB_PROJECT, else `bilevel`.
        entity: user or team in W&B; None for WANDB_ENTITY, else the default of the account.
        name: name of the run; None for WANDB_NAME, else solver and seed.
        group: group of the run; None for WANDB_RUN_GROUP, else the problem.
        job_type: type of the run; None for WANDB_JOB_TYPE, else the solver.
        tags: further tags, a list or text with commas; those of WANDB_TAGS are added.

    Raises:
        BilevelError: the mode is unknown, or W&B does not take a name or a tag.
    """

    mode: str = "offline"
    project: str | None = None
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: str | float | Sequence[str | float] | None = ()

    def __post_init__(self) -> None:
        one_of(MODES, **{"wandb.mode": self.mode})
        self._names = {
            "project": project_of(self.project),
            "entity": entity_of(self.entity),
            "name": text("wandb.name", self.name, variable_name="WANDB_NAME"),
            "group": text("wandb.group", self.group, variable_name="WANDB_RUN_GROUP"),
            "job_type": text("wandb.job_type", self.job_type, variable_name="WANDB_JOB_TYPE"),
        }
        self._tags = tags_of(self.tags)
        self.takes_pictures = self.mode != "disabled"
        self.run: Any = None
        self._exit_code = 1  # until the run ends in order
        self._pictures: dict[str, Any] = {}
        self._handed_over: list[int] = []  # steps that this part of the run has logged
        self._logged = -1  # the last step that W&B has
        self._id: str | None = None
        self._online = False

    def again(self, directory: Path, state: dict[str, Any]) -> dict[str, Any]:
        if (directory / "wandb").is_symlink():  # it may lead to the folders of another run
            raise BilevelError(
                f"{directory / 'wandb'} is a symbolic link, and folders behind it are not renamed; "
                "replace the link by its target"
            )
        ids = []
        for part in sorted(_parts(directory), key=lambda p: p.name.removeprefix("offline-")):
            ids += [file.stem.removeprefix("run-") for file in part.glob("run-*.wandb")]
            part.rename(part.with_name(f"replaced-{part.name}"))
        return state or ({"id": ids[-1]} if ids else {})

    def start(self, run: RunInfo, state: dict[str, Any]) -> None:
        self._id, self._directory = state.get("id"), run.directory
        if self.mode == "disabled":
            return
        for sentence in unused_variables(self.mode):
            log.warning("%s", sentence)
        with without_error_reports() if self.mode == "offline" else nullcontext():
            self._begin(run)
        for record in read_metrics(run.directory / METRICS) if run.resumed else ():
            self.log(record)

    def _begin(self, run: RunInfo) -> None:
        """Begin the run in W&B, or continue it."""
        import wandb

        continues = self._id is not None
        if self._id is not None:
            self._logged = _complete_until(run.directory, self._id)
        else:
            self._id = id_from_environment(in_sweep=run.place is not None)
        with explained():
            settings = wandb.Settings(silent=True, console="off", init_timeout=30)
            own: Any = variable("WANDB_RESUME") if self._id else None
            settings.resume = "allow" if continues else own
            if self.mode == "offline":  # before `init`, whose telemetry looks up a host
                wandb.setup(wandb.Settings(mode="offline", silent=True))
        names = {"problem": run.problem, "solver": run.solver}
        of_sweep = [] if run.place is None else [f"sweep-{run.place.sweep}"]
        tags = [*names.values(), *of_sweep, *(["resumed"] if run.resumed else [])]
        arguments: dict[str, Any] = {
            **self._names,
            "name": self._names["name"] or f"{run.solver}-seed{run.seed}",
            "group": self._names["group"] or run.problem,
            "job_type": self._names["job_type"] or run.solver,
            "tags": list(dict.fromkeys([*(tag[:LONGEST_TAG] for tag in tags), *self._tags])),
            "config": {
                "seed": run.seed,
                "names": names,
                **run.config,
                **({"sweep": of_sweep[0]} if of_sweep else {}),
            },
            "dir": str(run.directory),
            "id": self._id or new_id(),
            "settings": settings,
        }
        if self.mode == "online" and (problem := unreachable(wandb, settings)) is None:
            try:
                self.run = wandb.init(mode="online", **arguments)
                self._online = True
            except wandb.errors.Error as error:
                problem = first_line(error)
        if self.run is None:
            with explained():
                self.run = wandb.init(mode="offline", **arguments)
            if self.mode == "online":
                later = f"wandb sync {Path(self.run.dir).parent}"
                log.warning(
                    "W&B is offline (%s); the run goes on, and can be uploaded with: %s",
                    problem,
                    later,
                )
        self._id = self.run.id
        self._mark = Path(self.run.dir).parent / MARK
        for axis in ("epoch", *AT_EQUAL_COST.values()):
            self.run.define_metric(axis, hidden=True)
        for section in (*SECTIONS, "pictures"):
            self.run.define_metric(f"{section}/*", step_metric="epoch")
        for section, axis in AT_EQUAL_COST.items():
            self.run.define_metric(f"{section}/*", step_metric=axis)
        for lowest in ("valid/loss", "exact/regret"):
            self.run.define_metric(lowest, step_metric="epoch", summary="min,last")

    def show_pictures(self, pictures: Mapping[str, Tensor]) -> None:
        import wandb

        if self.run is not None:
            sheets = {
                name: picture_grid(shown).permute(1, 2, 0).numpy()
                for name, shown in pictures.items()
            }
            self._pictures = {
                f"pictures/{name}": wandb.Image(pixels) for name, pixels in sheets.items()
            }

    def log(self, record: Record) -> None:
        pictures, self._pictures = self._pictures, {}
        if (
            self.run is None or record["step"] <= self._logged
        ):  # logged by a run that was killed after its last checkpoint
            return
        measured = comparison_metrics(record)
        again = {
            f"{section}/{name}": value
            for section in AT_EQUAL_COST
            for name, value in measured.items()
        }
        self._handed_over.append(record["step"])
        self.run.log({**sections(record), **again, **pictures}, step=record["step"], commit=True)
        self._logged = record["step"]
        if self._online:
            self._mark.write_text(str(self._logged))

    def finish(self, summary: Record) -> None:
        if self.run is not None:
            self.run.summary.update(flat_summary(summary))
        self._exit_code = int(summary["diverged"])
        self.close()  # a run whose summary.json exists counts as finished, so W&B ends before it

    def close(self) -> None:
        if self.run is None:
            return
        run, self.run = self.run, None
        if not self._online:
            folder = Path(run.dir).parent
            try:
                run.finish(exit_code=self._exit_code)
            except Exception:
                if self._is_whole(folder):
                    raise
            else:
                self._is_whole(folder)
            return
        raised: list[Exception] = []

        def leave() -> None:
            try:
                run.finish(exit_code=self._exit_code)
            except Exception as error:
                raised.append(error)

        # `finish` waits for the network without limit
        leaving = threading.Thread(target=leave, daemon=True)
        leaving.start()
        leaving.join(FINISH_SECONDS)
        if raised:
            raise raised[0]
        if leaving.is_alive():
            message = (
                "W&B has not received the run within %g s; the run is complete on disk, "
                "so upload it with: wandb sync %s"
            )
            log.warning(message, FINISH_SECONDS, Path(run.dir).parent)

    def _is_whole(self, folder: Path) -> bool:
        """Return whether W&B's file holds all that was logged: mark it then, and warn otherwise."""
        if not self._directory.is_dir():  # it was moved or removed, which ends the run
            return False
        if (lost := missing_steps(folder, self._handed_over)) is None:
            with suppress(Unwritable):  # without a mark a resumed run logs everything again
                write_atomically(folder / MARK, lambda file: file.write(str(self._logged)))
            return True
        logged = len(self._handed_over)
        what = f"lacks {len(lost)} of {logged} records" if lost else "lacks the end of the run"
        run = shlex.quote(str(self._directory))
        warnings.warn(
            f"W&B's file in {folder} {what}, most often because the disk was full; {METRICS} has "
            f"them, so make room and log the run again with: bilevel log {run}",
            FaultWarning,
            stacklevel=2,
        )
        return False

    def state(self) -> dict[str, Any]:
        return {"id": self._id} if self._id else {}


def _parts(directory: Path) -> list[Path]:
    """Return W&B's folders of a run that were not set aside."""
    found = [*directory.glob("wandb/run-*"), *directory.glob("wandb/offline-run-*")]
    return [part for part in found if part.is_dir() and not part.is_symlink()]


def _complete_until(directory: Path, run_id: str) -> int:
    """Return the last step that W&B holds of a run, -1 for none.

    W&B's process writes an offline file in blocks. If the run is killed, the last block is missing,
    and this function sets the incomplete part aside. Parts of the same second end in -1, -2, …
    """
    for part in directory.glob(f"wandb/offline-run-*-{run_id}*"):
        if not (part / MARK).exists():
            part.rename(part.with_name(f"killed-{part.name}"))
    marks = directory.glob(f"wandb/*run-*-{run_id}*/{MARK}")
    return max((int(mark.read_text() or -1) for mark in marks), default=-1)
