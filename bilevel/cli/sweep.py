"""The table at the end of a sweep: what each solver reached, and what it cost."""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from bilevel.records import METRICS, SUMMARY, Record, read_metrics
from bilevel.tables import duration, number

if TYPE_CHECKING:
    from rich.table import Table

TABLE = "table.txt"
REGRET = "exact.regret"
WIDE = 160
PART = 0.1
"""Of its initial regret: the examples that a run needs to come down to it are told."""


class SweepTable(Callback):
    """Reads the runs of a sweep when all have ended, whichever launcher ran them, and prints one table of them."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print the table, and write it to `table.txt`."""
        from rich.console import Console

        directory = Path(config.hydra.sweep.dir)
        runs = read_runs(directory)
        if len(runs) < 2:
            return
        table = sweep_table(runs)
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = WIDE
        console.print(table)
        try:
            with open(directory / TABLE, "w", encoding="utf-8") as file:
                Console(file=file, width=WIDE).print(table)
        except OSError as error:
            print(f"bilevel: cannot write {directory / TABLE}: {error.strerror or error}")
        print(f"the runs, and this table: {directory}")


def read_runs(directory: Path) -> list[Record]:
    """The summaries of a sweep's runs in the order in which they were started, each with `label` and `examples_to_part`."""
    runs = []
    for place in sorted(directory.iterdir(), key=lambda place: (len(place.name.partition("-")[0]), place.name)):
        try:
            summary = json.loads((place / SUMMARY).read_text(encoding="utf-8"))
            records = read_metrics(place / METRICS)
        except (OSError, ValueError):
            continue  # no run, or one that did not come to its end
        ablation = place.name.partition(f"-seed{summary['seed']}")[2].removeprefix("-")
        runs.append(
            {**summary, "label": f"{summary['solver']} {ablation}".strip(), "examples_to_part": examples_to(records, PART)}
        )
    return runs


def examples_to(records: Sequence[Record], part: float) -> int | None:
    """The examples consumed when regret first came down to `part` of the initial one; None where it is unknown or never did.

    Example:
        >>> examples_to([{"examples": 0, "exact.regret": 2.0}, {"examples": 60, "exact.regret": 0.1}], 0.1)
        60
    """
    if not records or (start := records[0].get(REGRET)) is None:
        return None
    reached = (r["examples"] for r in records if r.get(REGRET) is not None and r[REGRET] <= part * start)
    return next(reached, None)


def sweep_table(runs: Sequence[Record]) -> "Table":
    """One row for each problem and solver (and ablation), mean ± standard deviation over its runs."""
    from rich.table import Table
    from rich.text import Text

    groups: dict[tuple[str, str], list[Record]] = {}
    for run in runs:
        groups.setdefault((run["problem"], run["label"]), []).append(run)
    columns = [(title, of, form) for title, of, form in COLUMNS if any(of(run) is not None for run in runs)]
    table = Table(box=None, padding=(0, 1), header_style="bold")
    table.add_column("problem", no_wrap=True)
    table.add_column("solver", no_wrap=True)
    for title in ("n", *(title for title, _, _ in columns)):
        table.add_column(title, justify="right")
    table.add_column("")
    for (problem, label), members in groups.items():
        cells = [spread((of(run) for run in members), form) for _, of, form in columns]
        table.add_row(Text(problem), Text(label), str(len(members)), *cells, trouble(members))
    return table


def spread(values: Iterable[float | None], form: Callable[[float], str]) -> str:
    """Mean ± standard deviation of the values that are known; how many they are, where some are not.

    Example:
        >>> spread([1.0, 3.0], "{:.2g}".format), spread([2.0, None], "{:.2g}".format), spread([None], str)
        ('2 ± 1.4', '2 (1 of 2)', '')
    """
    given = list(values)
    known = [value for value in given if value is not None]
    if not known:
        return ""
    text = form(statistics.mean(known))
    if len(known) > 1:
        text += f" ± {form(statistics.stdev(known))}"
    return text if len(known) == len(given) else f"{text} ({len(known)} of {len(given)})"


def trouble(runs: Sequence[Record]) -> str:
    """How many of the runs did not end in order."""
    told = [f"{n} {word}" for word in ("diverged", "interrupted") if (n := sum(run[word] for run in runs))]
    return ", ".join(told)


def _outcome(when: str, name: str) -> Callable[[Record], float | None]:
    return lambda run: run[when].get(name)


def _short(value: float) -> str:
    return f"{value:.3g}"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


COLUMNS: tuple[tuple[str, Callable[[Record], float | None], Callable[[float], str]], ...] = (
    ("best valid loss", _outcome("best", "valid_loss"), _short),
    ("test loss there", _outcome("best", "test_loss"), _short),
    ("test accuracy", _outcome("best", "test_accuracy"), lambda value: number("accuracy", value)),
    ("regret of last λ", _outcome("last", REGRET), _short),
    ("examples to ⅒ of it", lambda run: run["examples_to_part"], _whole),
    ("time", lambda run: run["seconds"], duration),
    ("examples", lambda run: run["examples"], _whole),
    ("outer steps", lambda run: run["outer_steps"], _whole),
)
"""Title, value of a run, and how a number is written; a column without any value is left out."""
