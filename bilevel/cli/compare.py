"""The command `bilevel-compare`: read runs, print tables, and write a report."""

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

WIDE = 400
"""Columns outside a terminal, so that no cell is broken."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare runs, and return the exit status: 0 if a report was made.

    Every file that cannot be used causes one sentence on the standard error.
    """
    given = parser().parse_args(arguments)
    from rich.console import Console

    from bilevel.cli.standard_streams import print_line
    from bilevel.comparison.report import (
        origin_of,
        printed,
        printed_part,
        usable_sections,
        write_report,
    )
    from bilevel.comparison.runs import read_runs

    faults: list[str] = []

    def warn(sentence: str) -> None:
        faults.append(sentence)
        print_line(f"bilevel-compare: {' '.join(sentence.split())}", sys.stderr)

    runs = read_runs(*given.runs, warn=warn)
    if not runs:
        warn("no run can be compared; give the directories of runs, or of sweeps")
        return 1
    made = usable_sections(
        runs, x=given.x, target=given.target, best_so_far=given.best_so_far, warn=warn
    )
    if not made:
        warn("no run can be compared; give the directories of other runs")
        return 1
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDE
    if len(made) > 1:
        names = ", ".join(section.problem for section in made)
        console.print(f"{len(made)} problems, with one section each: {names}")
    command = shlex.join(["bilevel-compare", *(sys.argv[1:] if arguments is None else arguments)])
    parts = [part for section in made for part in printed(section, console.width)]
    for part in [*parts, *printed_part(origin_of(made, command), console.width)]:
        console.print(part, "", sep="\n", soft_wrap=isinstance(part, str), markup=False)
    report = write_report(made, given.out, command=command, faults=faults, warn=warn)
    if report is None:
        return 1
    console.print(f"the report: {report}", markup=False, soft_wrap=True)
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="bilevel-compare",
        description="Compare runs: print tables, and write a report as one HTML file with plots.",
        epilog="Running, diverged and interrupted runs take part, and are marked.",
    )
    made.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="the directory of a run, or one with runs at any depth, such as a sweep",
    )
    made.add_argument(
        "--x",
        choices=("seconds", "examples", "epochs"),
        default="seconds",
        help="the horizontal axis of the curves",
    )
    target = (
        "validation loss whose cost is compared (default: the highest mean best loss of a solver)"
    )
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
        help="the folder of the report (default: report)",
    )
    return made


def _loss(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a loss; give a finite number")
    return value


if __name__ == "__main__":
    sys.exit(main())
