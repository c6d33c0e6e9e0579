"""Remake the table of `docs/outside.md`: `python -m benchmarks.outside [TEST …] [--data PATH]`."""

import argparse
import datetime
import re
import sys
import time
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.experiments.report import table
from benchmarks.machine import machine
from benchmarks.outside.rows import HEAD, Missing, Options, not_run

ROOT = Path(__file__).parents[2]

TESTS = {
    "TorchOpt": "torchopt_ridge",
    "hypertorch": "hypertorch_logistic",
    "higher": "higher_settings",
    "diabetes": "diabetes",
    "simulated": "simulated",
    "cleaning": "data_cleaning",
    "distillation": "distillation",
}
"""The module of each test."""

BLOCK = re.compile(
    r"(<!-- made by: python -m benchmarks\.outside -->\n)(.*?)(<!-- end -->)", re.DOTALL
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run tests and write their rows; return 1 if a test raised, 2 for a wrong name, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.outside", description=__doc__)
    parser.add_argument("tests", nargs="*", metavar="TEST", help=f"some of {', '.join(TESTS)}")
    parser.add_argument("--data", type=Path, help="folder with MNIST/raw")
    parser.add_argument(
        "--quick", action="store_true", help="run at reduced size, print, and write nothing"
    )
    parser.add_argument(
        "--full", action="store_true", help="run distillation at the published length (hours)"
    )
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "outside.md")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.tests if name not in TESTS]:
        print(f"TEST={unknown[0]} is unknown; choose from {', '.join(TESTS)}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the peers
    status = 0
    for name in options.tests or TESTS:
        lines = rows(name, Options(options.data, options.quick, options.full))
        status = max(status, int(lines is None))
        for line in lines or ():
            print("  ".join(cell for cell in line if cell), flush=True)
        if lines and not options.quick:
            write(options.page, name, lines)
    return status


def rows(name: str, options: Options) -> list[list[str]] | None:
    """Return the lines of a test; one line if it cannot run here, None if it raised."""
    begin = time.monotonic()
    try:
        found = import_module(f"benchmarks.outside.{TESTS[name]}").run(options)
    except Missing as reason:
        return [not_run("all", str(reason)).cells(name)]
    except Exception as error:  # the other tests still run
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        return None
    print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
    return [row.cells(name) for row in found]


def write(page: Path, name: str, lines: list[list[str]]) -> None:
    """Replace the lines of one test in the table of the page; the other lines stay."""
    text = page.read_text(encoding="utf-8")
    found = BLOCK.search(text)
    if found is None:
        raise SystemExit(f"{page} has no block made by benchmarks.outside; write its two comments")
    old = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in found[2].splitlines()
        if line.startswith("| ") and not line.startswith("| test |")
    ]
    kept = {test: [line for line in old if line[0] == test] for test in TESTS} | {name: lines}
    place = f"{machine(torch.device('cpu'))}, PyTorch {torch.__version__}"
    made = f"*Last written: {name}, {datetime.date.today()}; {place}.*"
    content = table(HEAD, [line for test in TESTS for line in kept[test]])
    page.write_text(BLOCK.sub(lambda m: f"{m[1]}{content}\n\n{made}\n{m[3]}", text), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
