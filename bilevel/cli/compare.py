"""The command `bilevel-compare`: runs read back, tables printed, and a report written."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

WIDE = 400
"""Columns where the output is no terminal: no cell is broken."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare runs; the exit status, 0 if a report was made of at least one.

    What cannot be used is told in a sentence each on the standard error.
    """
    given = parser().parse_args(arguments)
    from rich.console import Console

    from bilevel.comparison.report import printed, sections, write_report
    from bilevel.comparison.runs import read_runs

    faults: list[str] = []

    def warn(sentence: str) -> None:
        faults.append(sentence)
        print(f"bilevel-compare: {' '.join(sentence.split())}", file=sys.stderr, flush=True)

    runs = read_runs(*given.runs, warn=warn)
    if not runs:
        warn("there is no run to compare; give the directories of runs, or of sweeps")
        return 1
    made = sections(runs, x=given.x, target=given.target, best_so_far=given.best_so_far)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDE
    if len(made) > 1:
        console.print(
            f"{len(made)} problems, a section each: {', '.join(section.problem for section in made)}"
        )
    for section in made:
        for told in printed(section):
            console.print(told, "", sep="\n", soft_wrap=isinstance(told, str), markup=False)
        if section.target is not None:
            console.print(
                f"the target, {section.target:.4g}, is {section.target_source}",
                "",
                sep="\n",
                markup=False,
            )
    report = write_report(made, given.out, faults=faults, warn=warn)
    if report is None:
        return 1
    console.print(f"the report: {report}", markup=False, soft_wrap=True)
    return 0


def parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    made = argparse.ArgumentParser(
        prog="bilevel-compare",
        description="Compare runs: tables on the terminal, and a report of one HTML file with the pictures beside it.",
        epilog="Runs that are still going, diverged or were interrupted take part, and are marked.",
    )
    made.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="the directory of a run, or one with runs at any depth (a sweep's)",
    )
    made.add_argument(
        "--x",
        choices=("seconds", "examples", "epochs"),
        default="seconds",
        help="what curves are drawn against",
    )
    target = "validation loss whose cost is told; by default the highest of the solvers' mean best losses"
    made.add_argument("--target", type=_loss, metavar="LOSS", help=target)
    made.add_argument(
        "--best-so-far",
        action="store_true",
        help="draw the lowest loss so far in place of the loss",
    )
    made.add_argument(
        "--out",
        type=Path,
        default=Path("report"),
        metavar="DIR",
        help="where the report goes (default: report)",
    )
    return made


def _loss(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no loss; give a finite number")
    return value


if __name__ == "__main__":
    sys.exit(main())
