"""TensorBoard: event files of a run, beside those of W&B or instead of them."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from bilevel.errors import BilevelError
from bilevel.files import strict_json
from bilevel.loggers.dashboard import comparison_metrics, flat_summary, picture_grid, sections
from bilevel.loggers.logger import Logger, RunInfo
from bilevel.loggers.records import Record

FOLDER = "tensorboard"
SETTINGS = ("problem", "solver", "response", "lr", "trial", "runner")
"""Settings that the HParams page lists."""


@dataclass(kw_only=True)
class TensorBoard(Logger):
    """Writes event files into the directory of a run; `tensorboard --logdir runs` compares runs.

    Scalars have the names of W&B's. Their step is the inner step, and their wall time is training
    time, so the axis RELATIVE shows seconds of training. The step of `by_examples/…` is the number
    of examples. The HParams page has the settings of every finished run, with its best validation
    loss, and the test loss, regret and cost there.

    A resumed run cuts its files at its checkpoint, so no step appears twice.

    Attributes:
        flush_seconds: seconds between writes to disk.

    Raises:
        BilevelError: TensorBoard is not installed.
    """

    flush_seconds: int = 30
    takes_pictures = True

    def __post_init__(self) -> None:
        self._writer: Any = None
        self._pictures: dict[str, Tensor] = {}
        if find_spec("tensorboard") is None:
            raise BilevelError(
                "TensorBoard is not installed; run `pip install "
                "'bilevel[tensorboard]'`, or choose another logger"
            )

    def start(self, run: RunInfo, state: dict[str, Any]) -> None:
        _without_folder()
        from torch.utils.tensorboard import SummaryWriter

        self.info = run
        self.folder = run.directory / FOLDER
        self.began = state.get("began", time.time())
        try:
            _cut(self.folder, state.get("files", {}))
            self._writer = SummaryWriter(str(self.folder), flush_secs=self.flush_seconds)
        except OSError as error:
            raise BilevelError(
                f"cannot write in {self.folder} ({error.strerror or error}); choose another "
                "directory"
            ) from None
        if not state:
            settings = strict_json(dict(run.config), indent=2)
            self._writer.add_text(
                "config", "".join(f"    {line}\n" for line in settings.splitlines()), 0, self.began
            )

    def show_pictures(self, pictures: Mapping[str, Tensor]) -> None:
        self._pictures = {
            f"pictures/{name}": picture_grid(shown) for name, shown in pictures.items()
        }

    def log(self, record: Record) -> None:
        step, now = record["step"], self.began + record["seconds"]
        for name, value in sections(record).items():
            if name != "step":
                self._writer.add_scalar(name, value, step, now)
        for name, value in comparison_metrics(record).items():
            self._writer.add_scalar(f"by_examples/{name}", value, record["examples"], now)
        for name, picture in self._pictures.items():
            self._writer.add_image(name, picture, step, now)
        self._pictures = {}

    def finish(self, summary: Record) -> None:
        results = flat_summary(
            {
                name: summary[name]
                for name in ("best", "seconds", "examples", "outer_steps", "peak_memory_bytes")
            }
        )
        metrics = {
            f"outcome/{name}": float(value)
            for name, value in results.items()
            if isinstance(value, (int, float))
        }
        settings = flat_summary({name: self.info.config.get(name) for name in SETTINGS})
        plain = {
            name: value
            for name, value in settings.items()
            if isinstance(value, (bool, int, float, str))
        }
        # in the folder of the run, or TensorBoard would list a separate run
        self._writer.add_hparams(
            {
                **plain,
                "problem": self.info.problem,
                "solver": self.info.solver,
                "seed": self.info.seed,
            },
            metrics,
            run_name=".",
            global_step=summary["steps"],
        )
        self._writer.flush()  # a run whose summary.json exists counts as finished

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def state(self) -> dict[str, Any]:
        self._writer.flush()
        return {
            "began": self.began,
            "files": {file.name: file.stat().st_size for file in _events(self.folder)},
        }


def _events(folder: Path) -> list[Path]:
    return sorted(folder.glob("events.out.tfevents.*"))


def _without_folder() -> None:
    """Let TensorBoard use its own part of TensorFlow if that is only a folder beside the user.

    Python finds a folder without an `__init__.py` as a package too.
    """
    found = find_spec("tensorflow")
    if found is not None and found.origin is None:
        asked = "tensorboard.compat.notf"  # TensorBoard does without if this module exists
        sys.modules.setdefault(asked, ModuleType(asked))


def _cut(folder: Path, sizes: Mapping[str, int]) -> None:
    """Cut the event files to the sizes of a checkpoint; a new run removes them."""
    for file in _events(folder):
        if file.name not in sizes:
            file.unlink()
        elif file.stat().st_size > sizes[file.name]:
            with open(file, "r+b") as opened:
                opened.truncate(sizes[file.name])
