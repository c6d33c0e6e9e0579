"""Tables of groups of runs: quality and cost as mean ± standard deviation over runs."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bilevel.comparison.curves import LOSS, reached
from bilevel.comparison.runs import Run, finite
from bilevel.comparison.statistics import Paired, mean_std
from bilevel.loggers.tables import duration, number

if TYPE_CHECKING:
    from rich.table import Table

REGRET = "exact.regret"
PART = 0.1
"""Part of the initial regret down to which the number of examples is reported."""


class Column(NamedTuple):
    """A column: title, value of a run, and the text of mean and standard deviation."""

    title: str
    of: Callable[[Run], float | None]
    form: Callable[[float, float | None], str]


class Rows(NamedTuple):
    """A table as text: titles, and a row of cells for each group."""

    titles: list[str]
    cells: list[list[str]]


def rows(groups: Mapping[str, Sequence[Run]], columns: Sequence[Column]) -> Rows:
    """Return a row for each group: label, n, the columns with any value, and failures.

    Failures count the runs that did not end in order.
    """
    kept = [
        column
        for column in columns
        if any(column.of(run) is not None for runs in groups.values() for run in runs)
    ]
    cells = [
        [label, str(len(runs)), *(_cell(column, runs) for column in kept), failures(runs)]
        for label, runs in groups.items()
    ]
    titles = ["solver", "n", *(column.title for column in kept), ""]
    if not any(row[-1] for row in cells):
        titles, cells = titles[:-1], [row[:-1] for row in cells]
    return Rows(titles, cells)


def pair_rows(pairs: Sequence[Paired]) -> Rows:
    """Return a row for each paired comparison."""
    titles = ["", "", "n", "mean difference ± std", "t", "p", "p (Holm)"]
    return Rows(
        titles,
        [
            [
                pair.first,
                f"− {pair.second}",
                str(pair.n),
                plus_minus(pair.difference, pair.std if pair.n > 1 else None),
                "" if pair.t is None else f"{pair.t:.2f}",
                _probability(pair.p),
                _probability(pair.adjusted),
            ]
            for pair in pairs
        ],
    )


def rich_table(content: Rows, title: str | None = None) -> "Table":
    """Return the rows as a table of rich."""
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=None,
        padding=(0, 1),
        header_style="bold",
        title=title,
        title_justify="left",
        title_style="bold",
    )
    for index, name in enumerate(content.titles):
        left = index == 0 or not name
        table.add_column(name, justify="left" if left else "right", no_wrap=index == 0)
    for row in content.cells:
        table.add_row(*(Text(cell) for cell in row))
    return table


def failures(runs: Sequence[Run]) -> str:
    """Return the number of runs that did not end in order, as text."""
    words = {"diverged": "diverged", "interrupted": "interrupted", "running": "not ended"}
    return ", ".join(
        f"{n} {word}"
        for status, word in words.items()
        if (n := sum(run.status == status for run in runs))
    )


def plus_minus(mean: float, std: float | None = None) -> str:
    """Return a mean with its standard deviation, to two digits of the latter.

    Example:
        >>> plus_minus(0.646, 0.00131), plus_minus(2.51e-05, 4.08e-05)
        ('0.6460 ± 0.0013', '(2.5 ± 4.1)e-05')
        >>> plus_minus(142800.0, 2078.0), plus_minus(0.5)
        ('142,800 ± 2,078', '0.5')
    """
    if std is None:
        return _plain(mean)
    size = max(abs(mean), std)
    if std == 0 or not math.isfinite(size) or size > 2e4 * std:
        return f"{_plain(mean, digits=5)} ± {std:.1g}"
    exponent = math.floor(math.log10(size))
    if -4 <= exponent < 9:
        decimals = max(0, 1 - math.floor(math.log10(std)))
        return f"{mean:,.{decimals}f} ± {std:,.{decimals}f}"
    decimals = max(0, 1 - math.floor(math.log10(std / 10**exponent)))
    return (
        f"({mean / 10**exponent:.{decimals}f} ± {std / 10**exponent:.{decimals}f})e{exponent:+03d}"
    )


def part_of_regret(run: Run) -> float | None:
    """Return the examples consumed when regret first fell to a tenth of its initial value.

    Returns None where regret is unknown.
    """
    column = run.column(REGRET)
    if not column.size or not np.isfinite(column[0]):
        return None
    cost = reached(run, PART * float(column[0]), REGRET)
    return None if cost is None else cost.examples


def milliseconds(run: Run, *, warmup: bool | None = None) -> float | None:
    """Return the training time per inner step, in ms.

    It is that of the whole run, of its warm-up (inner phase alone), or of the part after it.
    """
    step, seconds, epoch = (run.column(name) for name in ("step", "seconds", "epoch"))
    until = finite(run.description.get("warmup_epochs"))
    if until is None and isinstance(runner := run.config.get("runner"), dict):
        until = finite(runner.get("warmup_epochs", 5))
    kept = np.isfinite(step) & np.isfinite(seconds)
    if warmup is not None:
        if until is None:
            return None
        kept &= (epoch <= until) if warmup else (epoch >= until)
    step, seconds = step[kept], seconds[kept]
    if len(step) < 2 or step[-1] <= step[0]:
        return None
    return 1e3 * float((seconds[-1] - seconds[0]) / (step[-1] - step[0]))


def phase(name: str, run: Run) -> float | None:
    """Return the training time of a phase per inner step over the whole run, in ms.

    The phases are `inner`, `response` and `outer`.
    """
    step, seconds = run.column("step"), run.column(f"seconds.{name}")
    kept = np.isfinite(step) & np.isfinite(seconds)
    if not kept.any() or (steps := step[kept][-1]) <= 0:
        return None
    return 1e3 * float(seconds[kept][-1] / steps)


def evaluation(run: Run) -> float | None:
    """Return the time per evaluation in ms, which is not part of training time."""
    seconds = run.column("seconds.evaluation")
    seconds = seconds[np.isfinite(seconds)]
    return 1e3 * float(seconds[-1] / len(seconds)) if len(seconds) else None


def targeted(target: float | None) -> tuple[Column, ...]:
    """Return the columns with the cost of reaching a target."""
    if target is None:
        return ()

    def seconds(run: Run) -> float | None:
        cost = reached(run, target)
        return None if cost is None else cost.seconds

    def examples(run: Run) -> float | None:
        cost = reached(run, target)
        return None if cost is None else cost.examples

    return Column(f"time to {target:.4g}", seconds, _seconds), Column(
        f"examples to {target:.4g}", examples, plus_minus
    )


def _plain(value: float, digits: int = 4) -> str:
    return f"{value:,.0f}" if abs(value) >= 1e3 and value == round(value) else f"{value:.{digits}g}"


def _percent(mean: float, std: float | None = None) -> str:
    return number("accuracy", mean) if std is None else f"{100 * mean:.2f} ± {100 * std:.2f} %"


def _seconds(mean: float, std: float | None = None) -> str:
    if mean >= 60:
        return duration(mean) if std is None else f"{duration(mean)} ± {duration(std)}"
    return f"{mean:.2f} s" if std is None else f"{mean:.2f} ± {std:.2f} s"


def _memory(mean: float, std: float | None = None) -> str:
    mib = 1024.0**2
    return f"{mean / mib:,.0f} MiB" if std is None else f"{mean / mib:,.0f} ± {std / mib:,.0f} MiB"


def _probability(p: float | None) -> str:
    if p is None:
        return ""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def _cell(column: Column, runs: Sequence[Run]) -> str:
    summary = mean_std(column.of(run) for run in runs)
    if summary is None:
        return ""
    text = column.form(summary.mean, summary.std if summary.n > 1 else None)
    return text if summary.n == summary.of else f"{text} ({summary.n} of {summary.of})"


BEST = Column("best valid loss", lambda run: run.at_best(LOSS), plus_minus)
TEST = Column("test loss there", lambda run: run.at_best("test_loss"), plus_minus)
ACCURACY = Column("test accuracy", lambda run: run.at_best("test_accuracy"), _percent)
LAST_REGRET = Column("regret of last λ", lambda run: run.at_end(REGRET), plus_minus)
TO_PART = Column("examples to ⅒ of it", part_of_regret, plus_minus)
TIME = Column("time", lambda run: run.total("seconds"), _seconds)
EXAMPLES = Column("examples", lambda run: run.total("examples"), plus_minus)
OUTER = Column("outer steps", lambda run: run.total("outer_steps"), plus_minus)

SWEEP = (BEST, TEST, ACCURACY, LAST_REGRET, TO_PART, TIME, EXAMPLES, OUTER)
QUALITY = (
    *(
        BEST,
        Column("valid accuracy", lambda run: run.at_best("valid_accuracy"), _percent),
        TEST,
        ACCURACY,
    ),
    *(Column("regret there", lambda run: run.at_best(REGRET), plus_minus), LAST_REGRET),
)
COST = (TIME, EXAMPLES, OUTER)
STEP = (
    Column("ms per inner step", milliseconds, plus_minus),
    Column("in warm-up", lambda run: milliseconds(run, warmup=True), plus_minus),
    Column(
        "after it, outer steps included", lambda run: milliseconds(run, warmup=False), plus_minus
    ),
    *(
        Column(f"{name} phase", partial(phase, name), plus_minus)
        for name in ("inner", "response", "outer")
    ),
    Column("ms per evaluation", evaluation, plus_minus),
    Column("peak memory", lambda run: run.total("peak_memory_bytes"), _memory),
)
