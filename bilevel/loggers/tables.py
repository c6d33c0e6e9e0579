"""Records and summaries as tables for the terminal."""

from typing import TYPE_CHECKING, Any

from bilevel.loggers.records import Record

if TYPE_CHECKING:
    from rich.console import RenderableType


def final_tables(summary: Record, arrow: str = "→", sigma: str = "σ") -> list["RenderableType"]:
    """Return the scores at the best and the last step, and the moves of all hyperparameters."""
    return [
        scores_table(best=summary["best"], last=summary["last"]),
        moves_table(summary["initial"], summary["hypers"], summary["scales"], arrow, sigma, "to"),
    ]


def scores_table(**columns: Record) -> "RenderableType":
    """Return a table of losses and accuracies with one column for each record."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("")
    for name, record in columns.items():
        at = (
            f" (step {record['step']:,})"
            if record.get("step") is not None and name != "now"
            else ""
        )
        table.add_column(name + at, justify="right")
    rows = dict.fromkeys(score for record in columns.values() for score in scores(record))
    for row in rows:
        table.add_row(title(row), *(number(row, record.get(row)) for record in columns.values()))
    return table


def moves_table(
    start: Record, now: Record, scales: Record, arrow: str, sigma: str, end: str
) -> "RenderableType":
    """Return a table of hyperparameters: start, end, and σ of the perturbation."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2), header_style="bold")
    for column, justify in (
        ("hyperparameter", "left"),
        ("from", "right"),
        ("", "center"),
        (end, "right"),
        (sigma, "right"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for name, value in now.items():
        table.add_row(
            Text(name), units(start.get(name)), arrow, units(value), units(scales.get(name))
        )
    return table


def scores(record: Record) -> Record:
    """Return the known losses and other scores of a record, by name."""
    scores = {
        name: value
        for name, value in record.items()
        if name.startswith(("train_", "valid_", "test_", "exact."))
    }
    return {name: value for name, value in scores.items() if value is not None}


def title(name: str) -> str:
    """Return the readable name of a score.

    Example:
        >>> title("valid_loss"), title("exact.regret")
        ('valid loss', 'regret')
    """
    return name.removeprefix("exact.").replace("_", " ")


def part(record: Record, prefix: str) -> Record:
    """Return the entries under `prefix`, without the prefix."""
    return {
        name.removeprefix(prefix): value
        for name, value in record.items()
        if name.startswith(prefix)
    }


def number(name: str, value: Any) -> str:
    """Return a score as text; accuracies are in percent.

    Example:
        >>> number("valid_accuracy", 0.9612), number("valid_loss", 0.123456)
        ('96.12 %', '0.1235')
    """
    if value is None:
        return ""
    return f"{100 * value:.2f} %" if name.endswith("accuracy") else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Return seconds as text in suitable units.

    Example:
        >>> duration(7.25), duration(75), duration(7500)
        ('7.2 s', '1 min 15 s', '2 h 05 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def units(value: Any) -> str:
    """Return a hyperparameter as text in its own units; mean and range for many entries."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return f"{value['mean']:.4g} ({value['min']:.4g} to {value['max']:.4g})"
    if not isinstance(value, list):
        return f"{value:.4g}"
    flat = _flat(value)
    if len(flat) <= 4:
        return " ".join(f"{entry:.3g}" for entry in flat)
    return units({"mean": sum(flat) / len(flat), "min": min(flat), "max": max(flat)})


def _flat(value: Any) -> list[float]:
    return (
        [entry for part in value for entry in _flat(part)] if isinstance(value, list) else [value]
    )
