"""The table at the end of a sweep: what each solver reached, and what it cost."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from bilevel.comparison.runs import Run, grouped, read_runs
from bilevel.comparison.table import SWEEP, rich_table, rows

if TYPE_CHECKING:
    from rich.console import RenderableType

TABLE = "table.txt"
WIDE = 400
"""Columns where nobody looks on: no cell is broken, and no line is longer than its table."""


class SweepTable(Callback):
    """Reads the runs of a sweep when all have ended, whichever launcher ran them, and prints a table of each problem's."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print the tables, and write them to `table.txt`."""
        from rich.console import Console

        directory = Path(config.hydra.sweep.dir)
        if not directory.is_dir():
            return  # not one of them began
        runs = read_runs(directory)
        if len(runs) < 2:
            return
        tables = sweep_tables(runs)
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = WIDE
        console.print(*tables, sep="\n")
        try:
            with open(directory / TABLE, "w", encoding="utf-8") as file:
                Console(file=file, width=WIDE).print(*tables, sep="\n")
        except OSError as error:
            print(f"bilevel: cannot write {directory / TABLE}: {error.strerror or error}")
        print(f"the runs, and this table: {directory}; more of them: bilevel-compare {directory}")


def sweep_tables(runs: Sequence[Run]) -> list["RenderableType"]:
    """A table for each problem, with a row for each solver (and ablation): mean ± standard deviation over its runs."""
    return [rich_table(rows(groups, SWEEP), title=problem) for problem, groups in grouped(runs).items()]
