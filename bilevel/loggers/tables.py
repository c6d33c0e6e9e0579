"""Records and summaries as tables for the terminal."""

from typing import TYPE_CHECKING, Any

from bilevel.loggers.records import Record

if TYPE_CHECKING:
    from rich.console import RenderableType


MOST_ROWS = 10
"""Hyperparameters in a table of the ones that mattered."""


def final_tables(summary: Record, arrow: str = "→", sigma: str = "σ") -> list["RenderableType"]:
    """Return the scores at the best and the last step, and the moves of all hyperparameters.

    Where the sensitivities are known, a third table tells which hyperparameters mattered.
    """
    tables = [
        scores_table(best=summary["best"], last=summary["last"]),
        moves_table(summary["initial"], summary["hypers"], summary["scales"], arrow, sigma, "to"),
    ]
    sensitivities = summary.get("sensitivities") or {}
    if any(entry["hypergradient"] is not None for entry in sensitivities.values()):
        tables.append(sensitivity_table(sensitivities, sigma, "±" if sigma == "σ" else "+-"))
    return tables


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


def sensitivity_table(
    sensitivities: Record, sigma: str = "σ", plus_minus: str = "±"
) -> "RenderableType":
    """Return a table of `bilevel.run.sensitivities`, the largest effects first."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2), header_style="bold", title_justify="left")
    table.title, table.title_style = "  which hyperparameters mattered", "bold"
    columns = ("hyperparameter", f"moved / {sigma}", "dL_V/du", "d²L_V/du²", "effect")
    for column in columns:
        shown = column if sigma == "σ" else column.replace("²", "2")
        table.add_column(shown, justify="left" if column == "hyperparameter" else "right")
    ordered = sorted(sensitivities, key=lambda name: influence(sensitivities[name]), reverse=True)
    for name in ordered[:MOST_ROWS]:
        entry = sensitivities[name]
        moved, slope, error, *others = (
            "" if entry[column] is None else f"{entry[column]:.2g}"
            for column in ("moved", "hypergradient", "standard_error", "curvature", "effect")
        )
        table.add_row(
            Text(name), moved, f"{slope} {plus_minus} {error}" if error else slope, *others
        )
    if (left := len(ordered) - MOST_ROWS) > 0:
        table.add_row(f"and {left} more in summary.json")
    return table


def influence(entry: Record) -> float:
    """Return the number that orders hyperparameters: the effect, or else |dL_V/du|."""
    effect = entry.get("effect")
    return float(effect if effect is not None else abs(entry.get("hypergradient") or 0.0))


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
