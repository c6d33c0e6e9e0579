"""Make the table of docs/coverage.md: which architectures run, and how exactly.

    python -m benchmarks.coverage                 # all architectures, and write the page
    python -m benchmarks.coverage BERT "nn.GRU"   # print some rows

A number is the largest error in float64. Per example, it compares each row with the network that
has that example's dense weights: in training linearized by forward mode, linearized by two backward
passes, and not linearized, and in evaluation. It is relative to the largest change of an output.
Per batch, it compares the two linearizations.
"""

import argparse
import importlib.util
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks.architectures import ARCHITECTURES, Architecture, Trained
from bilevel import BilevelError, Solver
from bilevel.solvers import SelfTuning, Unrolled, implicit_cg
from bilevel.solvers.autodiff.linearization import double_backward, forward_mode
from bilevel.solvers.base.row_check import predictor

PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
BLOCK = re.compile(r"(<!-- made by: python -m benchmarks\.coverage -->\n).*(<!-- end -->)", re.S)
COLUMNS: dict[str, Callable[[], Solver]] = {
    "Δ-STN per example": SelfTuning,
    "Δ-STN per batch": lambda: SelfTuning(per_example=False),
    "`implicit_cg`": implicit_cg,
    "`unrolled`": Unrolled,
}


def cell(architecture: Architecture, make: Callable[[], Solver]) -> str:
    """Return "runs", with the error if it was measured, or the sentence of the refusal."""
    problem, device = Trained(architecture), torch.device("cpu")
    data = problem.data(device, torch.Generator().manual_seed(0))
    solver = make()
    try:
        solver.setup(problem, data, device, torch.Generator().manual_seed(0))
        solver.step()
    except BilevelError as refusal:
        return f"refused: {refusal}"
    if not isinstance(solver, SelfTuning):
        return "runs"
    error = error_per_example(solver) if solver.per_example else error_per_batch(solver)
    return f"runs, {error:.0e}"


def error_per_example(solver: SelfTuning) -> float:
    """Return the largest error of a row against dense weights, relative to the largest change."""
    core, response = solver.core, solver.method.response
    forward = partial(forward_mode, functions=core.functions)
    worst = 0.0
    for train, linearize in ((True, forward), (True, double_backward), (True, None), (False, None)):
        batch = (core.data.train if train else core.data.valid).peek()
        solver.row_counts.split = "train" if train else "valid"
        run, offset, batch = predictor(core, response, linearize, batch, train, torch.float64)
        ours, still = output(run(offset, batch)), output(run(0 * offset[0], batch))
        alone = torch.stack([output(run(at, batch))[b] for b, at in enumerate(offset)])
        worst = max(worst, relative(ours - alone, alone - still))
    return worst


def error_per_batch(solver: SelfTuning) -> float:
    """Return the difference between the two linearizations, relative to the change."""
    core, method = solver.core, solver.method
    batch, generator = core.data.train.peek(), core.generator
    hypers, w0 = core.hypers(), core.weights.detached()
    offset = torch.ones_like(core.search.u0)
    theta = {name: t + 0.1 for name, t in method.theta.detached().items()}
    weights = partial(method.response.weights, theta, w0)
    state = generator.get_state()

    def predict(params: Any) -> Any:
        generator.set_state(state)
        return core.predict(hypers, core.carry, batch, params)

    still = output(predict(w0)[0])
    one = output(forward_mode(predict, weights, offset, core.functions)[0])
    other = output(double_backward(predict, weights, offset)[0])
    return relative(one - other, other - still)


def output(prediction: Any) -> Tensor:
    """Return the tensor of a prediction, detached."""
    return pytree.tree_leaves(prediction)[0].detach()


def relative(error: Tensor, change: Tensor) -> float:
    """Return the largest error divided by the largest change."""
    return float(error.abs().max() / change.abs().max())


def row(name: str) -> str:
    """Return a row of the table."""
    architecture = ARCHITECTURES[name]
    if importlib.util.find_spec(architecture.package) is None:
        raise BilevelError(f"{name} needs {architecture.package}; install bilevel[models]")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return f"| {name} | {' | '.join(cell(architecture, make) for make in COLUMNS.values())} |"


def rows(page: str) -> dict[str, list[str]]:
    """Return the cells of the table on a page, by architecture."""
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return {name: cells for name, *cells in lines if name in ARCHITECTURES}


def main() -> None:
    """Print rows; write the page if all of them were made."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures; all by default")
    names = parser.parse_args().names
    table = [f"| | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name in names or ARCHITECTURES:
        table.append(row(name))
        print(table[-1], flush=True)
    if not names:
        text = PAGE.read_text(encoding="utf-8")
        made = "\n".join(table) + "\n"
        PAGE.write_text(BLOCK.sub(lambda m: m[1] + made + m[2], text), encoding="utf-8")


if __name__ == "__main__":
    main()
