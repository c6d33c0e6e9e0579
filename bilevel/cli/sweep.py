"""A sweep: the place of each run in it, and the table of results and costs at its end."""

import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from bilevel.cli.standard_streams import print_line
from bilevel.comparison.runs import Run, group_runs, read_runs
from bilevel.comparison.sweep_table import SWEEP
from bilevel.comparison.table import MARK_NOTE, rich_table, rows
from bilevel.errors import Unwritable
from bilevel.files import write_atomically
from bilevel.loggers.logger import Place
from bilevel.run.signals import Interrupts, OutOfTime, time_limit_signals

if TYPE_CHECKING:
    from rich.console import RenderableType

TABLE = "table.txt"
RUNS = "BILEVEL_SWEEP_RUNS"
"""The environment variable that gives the number of runs to the processes of a launcher."""
FAILED = "failed"
"""The folder of a sweep with the reasons why runs failed."""
WIDE = 400
"""Columns of a table outside a terminal, so that no cell is broken."""


class SweepTable(Callback):
    """Count the runs of a sweep before it starts, and print its tables and failures at its end.

    There is one table for each problem. The tables are made from files, so any launcher may run the
    sweep.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Count the runs, and forget earlier failures of the same sweep."""
        shutil.rmtree(Path(config.hydra.sweep.dir) / FAILED, ignore_errors=True)
        os.environ.pop(RUNS, None)
        if (runs := count(config)) is not None:
            os.environ[RUNS] = str(runs)
        if str(config.hydra.launcher.get("_target_", "")).endswith("JoblibLauncher"):
            # its workers are in the process group of a terminal, and get these signals too
            until_end(WorkersEndFirst([signal.SIGINT, *time_limit_signals()]))

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print the tables, and write them to `table.txt`."""
        from rich.console import Console

        directory = Path(config.hydra.sweep.dir)
        if not directory.is_dir():
            return  # no run began
        runs, failed = read_runs(directory), failures(directory)
        _failed.update(failed)
        if len(runs) + len(failed) < 2:
            return
        lines = [f"failed: {name}: {sentence}" for name, sentence in failed.items()]
        parts = [*sweep_tables(runs), *lines]
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = WIDE
        console.print(*parts, sep="\n", markup=False)
        try:
            write_atomically(
                directory / TABLE,
                lambda file: Console(file=file, width=WIDE).print(*parts, sep="\n", markup=False),
            )
        except Unwritable as error:
            print_line(f"bilevel: {error}", sys.stdout)
        more = f"more tables and plots: bilevel-compare {directory}"
        print_line(f"the runs and this table: {directory}; {more}", sys.stdout)


_failed: dict[str, str] = {}
_contexts = ExitStack()


@contextmanager
def counted() -> Iterator[dict[str, str]]:
    """Collect the failures of a sweep in the context, by the name of the run, of all processes."""
    _failed.clear()
    with _contexts:
        yield _failed


def until_end(context: AbstractContextManager[Any]) -> None:
    """Enter a context that lasts until the end of the sweep."""
    _contexts.enter_context(context)


class WorkersEndFirst:
    """Let the workers of a launcher end their rounds after the first signal.

    Without this context the launcher would kill them at once. The context raises the interruption
    at its end.

    Args:
        signals: the signals to note; the default is all that end a run.
    """

    def __init__(self, signals: Sequence[signal.Signals] | None = None) -> None:
        self._interrupts = Interrupts(signals)

    @property
    def received(self) -> bool:
        """Return whether a signal was received."""
        return self._interrupts.received

    def __enter__(self) -> "WorkersEndFirst":
        self._interrupts.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._interrupts.__exit__()
        if self._interrupts.of_time:
            raise OutOfTime
        if self._interrupts.received:
            raise KeyboardInterrupt


def note_failure(sentence: str, run: str | None = None) -> None:
    """Write the reason of a failure beside the runs of a sweep, for its table and for readers.

    Args:
        sentence: the reason.
        run: the name of the run; the default is the run of this process.
    """
    if (file := _failure(run)) is not None:
        with suppress(OSError):  # the sentence was printed already
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(sentence + "\n", encoding="utf-8")


def forget_failure() -> None:
    """Remove the reason of an earlier failure of a run that has now ended well."""
    if (file := _failure()) is not None:
        with suppress(OSError):  # the table would list it again
            file.unlink(missing_ok=True)


def failures(directory: Path) -> dict[str, str]:
    """Return the reasons why runs of a sweep failed, by the names of the runs."""
    found = sorted(
        (directory / FAILED).glob("*.txt"),
        key=lambda file: [int(n) for n in re.findall(r"^\d+", file.name)],
    )
    return {file.stem: file.read_text(encoding="utf-8").strip() for file in found}


def _failure(run: str | None = None) -> Path | None:
    hydra = HydraConfig.get()
    if hydra.mode is not RunMode.MULTIRUN:
        return None
    name = Path(hydra.runtime.output_dir).name if run is None else run
    return Path(hydra.sweep.dir).absolute() / FAILED / f"{name}.txt"


def sweep_tables(runs: Sequence[Run]) -> list["RenderableType"]:
    """Return a table for each problem, and the explanation of their marks.

    Each solver (and ablation) has a row with mean ± standard deviation over its runs.
    """
    made = {problem: rows(groups, SWEEP) for problem, groups in group_runs(runs).items()}
    tables = [rich_table(content, title=problem) for problem, content in made.items()]
    return [*tables, MARK_NOTE] if any(content.marks for content in made.values()) else [*tables]


def place() -> Place | None:
    """Return the place of this run in its sweep, or None outside a sweep."""
    hydra = HydraConfig.get()
    if hydra.mode is not RunMode.MULTIRUN or OmegaConf.is_missing(hydra.job, "num"):
        return None
    runs = os.environ.get(RUNS)
    return Place(Path(hydra.sweep.dir).name, hydra.job.num + 1, int(runs) if runs else None)


def count(config: DictConfig) -> int | None:
    """Return how many runs Hydra's own sweeper will make, or None if that is not known."""
    if not str(config.hydra.sweeper.get("_target_", "")).endswith("BasicSweeper"):
        return None
    texts = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    try:
        overrides = OverridesParser.create().parse_overrides([*texts, *config.hydra.overrides.task])
        values = {
            override.get_key_element(): len(list(override.sweep_string_iterator()))
            if override.is_sweep_override()
            else 1
            for override in overrides
        }
    except (HydraException, AssertionError):
        return None  # only the sweeper can resolve a glob or a range without an end
    return math.prod(values.values())
