"""A sweep: which run of how many this is, and the table at its end, of what each solver reached and what it cost."""

import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from bilevel.cli.standard_streams import say
from bilevel.comparison.runs import Run, group_runs, read_runs
from bilevel.comparison.table import SWEEP, rich_table, rows
from bilevel.loggers.logger import Place
from bilevel.run.signals import Interrupts, OutOfTime, time_limit_signals

if TYPE_CHECKING:
    from rich.console import RenderableType

TABLE = "table.txt"
RUNS = "BILEVEL_SWEEP_RUNS"
"""The environment variable in which the processes of a sweep's launcher inherit how many runs there are."""
FAILED = "failed"
"""The folder of a sweep that says why runs of it failed."""
WIDE = 400
"""Columns where nobody looks on: no cell is broken, and no line is longer than its table."""


class SweepTable(Callback):
    """Counts the runs of a sweep before it begins, reads them when all have ended, and prints a table of each problem's, and
    which runs failed.

    Whichever launcher runs them: what it reads are files.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Count the runs, so that each can tell its place, and forget who failed before: who is asked for again will say so."""
        shutil.rmtree(Path(config.hydra.sweep.dir) / FAILED, ignore_errors=True)
        os.environ.pop(RUNS, None)
        if (runs := count(config)) is not None:
            os.environ[RUNS] = str(runs)
        if str(config.hydra.launcher.get("_target_", "")).endswith("JoblibLauncher"):
            _patience.enter_context(Patience())

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print the tables, and write them to `table.txt`."""
        from rich.console import Console

        directory = Path(config.hydra.sweep.dir)
        if not directory.is_dir():
            return  # not one of them began
        runs, failed = read_runs(directory), failures(directory)
        _failed.update(failed)
        if len(runs) + len(failed) < 2:
            return
        told = sweep_tables(runs) + [
            f"failed: {name}: {sentence}" for name, sentence in failed.items()
        ]
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = WIDE
        console.print(*told, sep="\n", markup=False)
        try:
            with open(directory / TABLE, "w", encoding="utf-8") as file:
                Console(file=file, width=WIDE).print(*told, sep="\n", markup=False)
        except OSError as error:
            say(f"bilevel: cannot write {directory / TABLE}: {error.strerror or error}", sys.stdout)
        say(
            f"the runs, and this table: {directory}; more of them: bilevel-compare {directory}",
            sys.stdout,
        )


_failed: dict[str, str] = {}
_patience = ExitStack()


@contextmanager
def counted() -> Iterator[dict[str, str]]:
    """Within it, a sweep gathers its failures, by the name of the run; other processes may have had them."""
    _failed.clear()
    with _patience:
        yield _failed


class Patience:
    """While entered, the first Ctrl-C (or signal of a time limit) lets the workers end their rounds, which have it too.

    The launcher would kill them at once.
    """

    def __enter__(self) -> "Patience":
        self._interrupts = Interrupts(signals=[signal.SIGINT, *time_limit_signals()])
        self._interrupts.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._interrupts.__exit__()
        if self._interrupts.of_time:
            raise OutOfTime
        if self._interrupts.received:
            raise KeyboardInterrupt


def note_failure(sentence: str) -> None:
    """Leave the reason beside the runs of a sweep, for the process that makes the table, and for who looks later."""
    if (file := _failure()) is not None:
        with suppress(OSError):  # it was printed
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(sentence + "\n", encoding="utf-8")


def forget_failure() -> None:
    """This run has ended well."""
    if (file := _failure()) is not None:
        with suppress(OSError):  # it would stand below the table once more
            file.unlink(missing_ok=True)


def failures(directory: Path) -> dict[str, str]:
    """Why runs of a sweep failed, by their names."""
    found = sorted(
        (directory / FAILED).glob("*.txt"),
        key=lambda file: [int(n) for n in re.findall(r"^\d+", file.name)],
    )
    return {file.stem: file.read_text(encoding="utf-8").strip() for file in found}


def _failure() -> Path | None:
    hydra = HydraConfig.get()
    if hydra.mode is not RunMode.MULTIRUN:
        return None
    run = Path(hydra.runtime.output_dir)
    return Path(hydra.sweep.dir).absolute() / FAILED / f"{run.name}.txt"


def sweep_tables(runs: Sequence[Run]) -> list["RenderableType"]:
    """A table for each problem, with a row for each solver (and ablation): mean ± standard deviation over its runs."""
    return [
        rich_table(rows(groups, SWEEP), title=problem)
        for problem, groups in group_runs(runs).items()
    ]


def place() -> Place | None:
    """The place of this run in its sweep; None of a run by itself."""
    hydra = HydraConfig.get()
    if hydra.mode is not RunMode.MULTIRUN or OmegaConf.is_missing(hydra.job, "num"):
        return None
    runs = os.environ.get(RUNS)
    return Place(Path(hydra.sweep.dir).name, hydra.job.num + 1, int(runs) if runs else None)


def count(config: DictConfig) -> int | None:
    """How many runs Hydra's own sweeper will make; None where that is not known beforehand, as of other sweepers."""
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
    except (
        HydraException,
        AssertionError,
    ):  # a range without an end, a glob: the sweeper's own to resolve
        return None
    return math.prod(values.values())
