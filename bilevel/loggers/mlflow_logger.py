"""MLflow: runs of an experiment, in a local database or on a tracking server."""

import logging
import os
import posixpath
import re
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from bilevel.errors import BilevelError
from bilevel.files import strict_json
from bilevel.loggers.dashboard import comparison_metrics, flat_summary, picture_grid, sections
from bilevel.loggers.logger import Logger, RunInfo
from bilevel.loggers.mlflow_sender import Sender
from bilevel.loggers.plot import PICTURE
from bilevel.loggers.records import METRICS, SUMMARY, Record, read_metrics
from bilevel.text import first_line, printable, without_password
from bilevel.validate import wrong

DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
}
"""Variables of MLflow during a run, where they are not set; its own defaults wait for minutes."""
REACH_SECONDS = 5.0
FINISH_SECONDS = 60.0
"""Longest wait for the end of a run."""
LONGEST_KEY, LONGEST_PARAM, LONGEST_TAG = 250, 6000, 8000
METRICS_OF_A_BATCH, PARAMS_OF_A_BATCH = 1000, 100
"""Limits of MLflow."""
MARK = "epoch"
"""The metric that is sent last in each step, so that a step with it is whole."""
log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class MLflowLogger(Logger):
    """Logs a run to MLflow; the address is MLflow's own, that of MLFLOW_TRACKING_URI.

    Without one it is `sqlite:///mlflow.db` in the working directory. No setting of a run has the
    address, since a run directory may come from somebody else.

    Metrics have the names of TensorBoard's. Their step is the inner step, and their time is
    training time. The step of `by_examples/…` is the number of examples. The configuration is in
    the parameters, under the names of the command line. The numbers of the summary are
    `outcome/…`. Pictures, `curves.png` and `summary.json` are artifacts. A thread sends the metrics
    of an evaluation in one batch.

    A resumed run continues its run in MLflow: it sends the steps that are missing there, and no
    other. If the server cannot be reached, the run continues without it.

    Attributes:
        experiment: the experiment; None for MLFLOW_EXPERIMENT_NAME, else `bilevel`.
        name: the name of the run; None for solver and seed.

    Raises:
        BilevelError: MLflow is not installed, or a name is empty.
    """

    experiment: str | None = None
    name: str | None = None
    takes_pictures = True

    def __post_init__(self) -> None:
        self._client: Any = None
        self._id: str | None = None
        self._set: list[str] = []
        self._steps: set[int] = set()
        self._pictures: dict[str, Tensor] = {}
        for setting in ("experiment", "name"):
            value = getattr(self, setting)
            if value is not None and not (isinstance(value, str) and value.strip()):
                raise wrong(f"mlflow.{setting}", value, "must be a name", "give one, or null")
        if find_spec("mlflow") is None:
            raise BilevelError(
                "MLflow is not installed; run `pip install "
                "'bilevel[mlflow]'`, or choose another logger"
            )

    def again(self, directory: Path, state: dict[str, Any]) -> dict[str, Any]:
        return state  # `log` sends what is missing

    def start(self, run: RunInfo, state: dict[str, Any]) -> None:
        self._info, self._id = run, state.get("id")
        self._began = state.get("began", time.time())
        self._set = [name for name in DEFAULTS if name not in os.environ]
        os.environ.update({name: DEFAULTS[name] for name in self._set})
        import mlflow

        address = mlflow.get_tracking_uri()
        remote = address.startswith(("http://", "https://"))
        shown = printable(without_password(address))
        reason = _unreachable(shown) if remote else None
        if reason is None:
            try:
                self._client = mlflow.MlflowClient(tracking_uri=address)
                self._begin()
            except Exception as error:  # of MLflow, of its database or of its server
                self._client, reason = None, first_line(error)
        if self._client is not None:
            self._sender = Sender()
        elif remote:
            again = f"bilevel log {shlex.quote(str(run.directory))} logger=mlflow"
            message = "MLflow is left out (%s); the run goes on, and can be logged later with: %s"
            log.warning(message, printable(str(reason)), again)
        else:
            self._restore()
            raise BilevelError(
                f"MLFLOW_TRACKING_URI={shown} cannot be used ({printable(str(reason))}); set it "
                "to sqlite:///mlflow.db, or to the address of a server"
            )
        for record in read_metrics(run.directory / METRICS) if run.resumed else ():
            self.log(record)

    def show_pictures(self, pictures: Mapping[str, Tensor]) -> None:
        self._pictures = {name: picture_grid(shown) for name, shown in pictures.items()}

    def log(self, record: Record) -> None:
        step, pictures, self._pictures = record["step"], self._pictures, {}
        if self._client is None or step in self._steps:
            return
        self._steps.add(step)
        client, run_id = self._client, self._id
        now = round(1000 * (self._began + record["seconds"]))
        repeated = comparison_metrics(record).items()
        found = {f"by_examples/{name}": (value, record["examples"]) for name, value in repeated}
        found |= {name: (value, step) for name, value in sections(record).items() if name != "step"}
        found[MARK] = found.pop(MARK)
        for metrics in _parts(_metrics(found, now), METRICS_OF_A_BATCH):
            self._sender.send(partial(client.log_batch, run_id, metrics=metrics))
        for name, picture in pictures.items():
            file, pixels = f"pictures/{name}-{step}.png", picture.permute(1, 2, 0).numpy()
            self._sender.send(partial(client.log_image, run_id, pixels, artifact_file=file))

    def finish(self, summary: Record) -> None:
        if self._client is None:
            return
        end = (
            "FAILED" if summary["diverged"] else "KILLED" if summary["interrupted"] else "FINISHED"
        )
        self._sender.send(lambda: self._summarize(summary))
        self._sender.send(lambda: self._client.set_terminated(self._id, end))
        if not self._sender.wait(FINISH_SECONDS):
            log.warning(
                "MLflow has not received the run within %g s; log it again with: bilevel log %s",
                FINISH_SECONDS,
                shlex.quote(str(self._info.directory)),
            )

    def close(self) -> None:
        if self._client is not None:
            with suppress(Exception):  # `log` and `finish` raise it where a run ends in order
                self._sender.wait(FINISH_SECONDS)
            self._sender.end()
            self._client = None
        self._restore()

    def state(self) -> dict[str, Any]:
        return {"id": self._id, "began": self._began} if self._id else {}

    # --- the run in MLflow ---

    def _begin(self) -> None:
        """Continue the run of this id, or make a new one."""
        from mlflow.exceptions import MlflowException

        if self._id is not None:
            try:
                history = self._client.get_metric_history(self._id, MARK)
                self._client.update_run(self._id, status="RUNNING")
                self._steps = {metric.step for metric in history}
                return
            except MlflowException:  # it was deleted, or is on another server
                pass
        run = self._info
        made = self._client.create_run(
            self._experiment(),
            run_name=self.name or f"{run.solver}-seed{run.seed}",
            tags={
                "problem": run.problem[:LONGEST_TAG],
                "solver": run.solver[:LONGEST_TAG],
                **({"sweep": f"sweep-{run.place.sweep}"} if run.place else {}),
            },
        )
        self._id = made.info.run_id
        for part in _parts(list(_params({"seed": run.seed, **run.config})), PARAMS_OF_A_BATCH):
            self._client.log_batch(self._id, params=part)

    def _experiment(self) -> str:
        """Return the id of the experiment, which another run may be making too."""
        from mlflow.exceptions import MlflowException

        name = self.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "bilevel"
        if (found := self._client.get_experiment_by_name(name)) is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:
                if (found := self._client.get_experiment_by_name(name)) is None:
                    raise
        return str(found.experiment_id)

    def _summarize(self, summary: Record) -> None:
        """Send the summary, without the numbers that MLflow has already."""
        known = self._client.get_run(self._id).data.metrics
        entries, step = flat_summary(summary).items(), summary["steps"]
        found = {f"outcome/{name}": (value, step) for name, value in entries}
        metrics = [
            metric
            for metric in _metrics(found, round(1000 * (self._began + summary["seconds"])))
            if known.get(metric.key) != metric.value
        ]
        for part in _parts(metrics, METRICS_OF_A_BATCH):
            self._client.log_batch(self._id, metrics=part)
        if (picture := self._info.directory / PICTURE).exists():
            self._client.log_artifact(self._id, str(picture))
        self._client.log_text(self._id, strict_json(summary, indent=1), SUMMARY)

    def _restore(self) -> None:
        for name in self._set:
            os.environ.pop(name, None)
        self._set = []


def key(name: str) -> str:
    """Return a name that MLflow takes: its letters, its length, and no path that leads upwards.

    Example:
        >>> key("hypers/rates[0]"), key("/a//b")
        ('hypers/rates_0_', 'a/b')
    """
    allowed = re.sub(r"[^/\w.\- :]", "_", name)
    return posixpath.normpath(allowed).lstrip("./")[:LONGEST_KEY] or "_"


def _metrics(values: Mapping[str, tuple[Any, int]], now: int) -> list[Any]:
    """Return the numbers as metrics of MLflow; each value has its step."""
    from mlflow.entities import Metric

    return [
        Metric(key(name), float(value), now, step)
        for name, (value, step) in values.items()
        if isinstance(value, (int, float))
    ]


def _params(config: Mapping[str, Any], prefix: str = "") -> Iterator[Any]:
    """Yield the settings as parameters of MLflow, by dotted name."""
    from mlflow.entities import Param

    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _params(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else strict_json(value)
            yield Param(key(f"{prefix}{name}"), text[:LONGEST_PARAM])


def _parts(entries: list[Any], size: int) -> Iterator[list[Any]]:
    for i in range(0, len(entries), size):
        yield entries[i : i + size]


def _unreachable(address: str) -> str | None:
    """Return the reason why a server cannot be reached, without a long wait; or None."""
    try:
        urllib.request.urlopen(address, timeout=REACH_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # an answer of any kind is a connection
    except (OSError, ValueError) as error:
        return f"{address} cannot be reached: {getattr(error, 'reason', error)}"
    return None
