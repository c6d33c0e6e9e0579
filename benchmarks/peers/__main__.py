"""Compare the time of one hypergradient with other libraries, at the same value.

python -m benchmarks.peers [--quick] [--seconds 20] [--sizes 0 1 2 3] [--rows CG reverse]

Everything runs on one thread of the CPU. A library that is not installed is left out with a reason.
"""

import argparse
import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.peers import oracle
from benchmarks.peers.libraries import LIBRARIES, Library
from benchmarks.peers.measure import Ratio, in_turn, paired_ratio
from benchmarks.peers.ours import OURS
from benchmarks.peers.workloads import EXAMPLES, SIZES, K, Work, prepare


class Line(NamedTuple):
    """A library on one size and one method.

    Attributes:
        size: the name of the size.
        row: the name of the method.
        library: the name of the library.
        error: ‖g − g*‖/‖g*‖ against the oracle.
        own_error: the same of this package.
        milliseconds: the median time of this package.
        ratio: the library's time over that of this package.
    """

    size: str
    row: str
    library: str
    error: float
    own_error: float
    milliseconds: float
    ratio: Ratio


def compare(
    size: str,
    row: str,
    seconds: float,
    libraries: dict[str, Library],
    work: Work,
    found: oracle.Oracle,
) -> list[Line]:
    """Check the values of one method on one size, then take the times in turn."""
    exact = oracle.ROWS[row](found)
    calls: dict[str, Callable[[], Tensor]] = {"bilevel": OURS[row](work)}
    for name, library in libraries.items():
        if row in library.rows:
            calls[name] = library.rows[row](work)
    errors = {name: error(call(), exact) for name, call in calls.items()}
    taken = in_turn(calls, seconds)
    own = taken.pop("bilevel")
    middle = 1e3 * sorted(own)[len(own) // 2]
    return [
        Line(size, row, name, errors[name], errors["bilevel"], middle, paired_ratio(times, own))
        for name, times in taken.items()
    ]


def error(value: Tensor, exact: Tensor) -> float:
    """Return ‖value − exact‖/‖exact‖."""
    difference = value.detach().double().reshape(-1) - exact.reshape(-1)
    return float(difference.norm() / exact.norm())


HEAD = (
    "| size | method | library | its error | own error | own ms | × own time | lower bound "
    "| quartiles | n |\n|---|---|---|---|---|---|---|---|---|---|"
)


def as_row(line: Line) -> str:
    """Return a line as a row of the Markdown table."""
    low, high = line.ratio.quartiles
    cells = [
        *(line.size, line.row, line.library, f"{line.error:.0e}", f"{line.own_error:.0e}"),
        *(f"{line.milliseconds:.2f}", f"{line.ratio.median:.2f}", f"{line.ratio.low:.2f}"),
        *(f"{low:.2f}–{high:.2f}", str(line.ratio.rounds)),
    ]
    return f"| {' | '.join(cells)} |"


def below(lines: list[Line], libraries: dict[str, Library]) -> list[str]:
    """Return the lines below the aim of their library, as text."""
    return [
        f"{line.library}, {line.row}, {line.size}: {line.ratio.low:.2f}"
        for line in lines
        if (aim := libraries[line.library].aim) is not None and line.ratio.low < aim
    ]


def one_thread() -> None:
    """Use one core of the CPU, by PyTorch and by JAX."""
    torch.set_num_threads(1)
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if hasattr(os, "sched_setaffinity"):  # JAX has more threads than its flags reach
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the smallest size, five rounds")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="seconds for each size and method"
    )
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=None, help=f"numbers of {list(SIZES)}, from 0"
    )
    parser.add_argument("--rows", nargs="*", default=list(OURS), choices=list(OURS))
    options = parser.parse_args()
    one_thread()
    warnings.simplefilter("ignore")
    names = list(SIZES)
    numbers = options.sizes or (range(1) if options.quick else range(len(names)))
    seconds = 0.0 if options.quick else options.seconds
    print(
        f"{machine(torch.device('cpu'))}; torch {torch.__version__}; K = {K}, {EXAMPLES} examples"
    )
    installed = {}
    for name, library in LIBRARIES.items():
        reason = library.missing()
        print(f"{name}: {library.versions() if reason is None else f'left out, {reason}'}")
        if reason is None:
            installed[name] = library
    print(f"\n{HEAD}")
    lines: list[Line] = []
    for i in numbers:
        work = prepare(SIZES[names[i]])
        found = oracle.Oracle(work)
        for row in options.rows:
            more = compare(names[i], row, seconds, installed, work, found)
            print("\n".join(map(as_row, more)), flush=True)
            lines += more
    print("\nbelow the aim: " + ("; ".join(below(lines, installed)) or "none"))


if __name__ == "__main__":
    main()
