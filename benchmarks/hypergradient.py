"""Measure the cost of a hypergradient.

python -m benchmarks.hypergradient [cost|scaling|bias] [--json] [--threads 1] [--seconds 60]

One thread of the CPU is the default, so that ratios are valid on a shared machine.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.bias import bias
from benchmarks.decays import decays
from benchmarks.machine import machine
from benchmarks.measure import Step, alternating, median_ratio, peak_growth
from benchmarks.workloads import set_up
from bilevel import Problem, solvers
from bilevel.device.device import choose_device
from bilevel.solvers.base.descent import Descent

K = 10
"""Number of Neumann terms, of CG iterations and of unrolled steps."""
KS = (1, 10, 40)
MANY = 1000
"""Number of λ from which the cases for few hyperparameters are left out."""
MEMORY_ROUNDS = 2
WEIGHED = (
    "implicit, CG",
    "unrolled, reverse",
    "unrolled, reverse, checkpointed",
    "unrolled, forward",
)
"""Cases whose memory is measured against K."""


class Case(NamedTuple):
    """A solver and how it is timed.

    Attributes:
        make: Makes the solver.
        whole: Time a whole round of K differentiated steps; otherwise `hypergradient` alone.
        most: The aim in plain gradients per hypergradient, from K and h; None without an aim.
        memory: The aim for peak memory in multiples of plain training; `math.inf` measures it
            without an aim, None does not measure it.
        few: Leave the case out for many λ.
    """

    make: Callable[[], Descent]
    whole: bool = False
    most: Callable[[int, int], float] | None = None
    memory: float | None = None
    few: bool = False


def _products(k: int, h: int) -> float:
    return 2.5 * k + 5


def _implicit(linear_solve: Any, **options: Any) -> Callable[[], Descent]:
    return partial(solvers.Implicit, linear_solve=linear_solve, **options)


CASES: dict[str, Case] = {
    "implicit, CG": Case(_implicit(solvers.CG(iterations=K)), most=_products, memory=3.0),
    "implicit, CG, Gauss–Newton": Case(
        _implicit(solvers.CG(iterations=K), curvature=solvers.GaussNewton(damping=1e-3)),
        most=_products,
        memory=3.0,
    ),
    "implicit, Neumann": Case(_implicit(solvers.Neumann(terms=K)), most=_products, memory=3.0),
    "implicit, fixed point": Case(_implicit(solvers.FixedPoint(iterations=K)), most=_products),
    "implicit, Nyström": Case(_implicit(solvers.Nystrom(rank=K)), memory=3.0),
    "implicit, identity": Case(_implicit(solvers.Identity())),
    "SAMA": Case(solvers.SAMA),
    "SOBA": Case(solvers.SOBA),
    "penalty": Case(solvers.Penalty),
    "unrolled, reverse": Case(
        partial(solvers.Unrolled, inner_steps=K),
        whole=True,
        most=lambda k, h: 4 * k,
        memory=math.inf,
    ),
    "unrolled, reverse, checkpointed": Case(
        partial(solvers.Unrolled, inner_steps=K, mode=solvers.Reverse(checkpoint=True)),
        whole=True,
        memory=math.inf,
    ),
    "unrolled, forward": Case(
        partial(solvers.Unrolled, inner_steps=K, mode=solvers.Forward()),
        whole=True,
        most=lambda k, h: (2 * h + 1.5) * k,
        few=True,
    ),
    "evolution strategies": Case(
        partial(solvers.EvolutionStrategies, inner_steps=K), whole=True, few=True
    ),
    "Δ-STN": Case(solvers.delta_stn, few=True),
}

LAMBDAS: dict[str, Callable[[], Problem]] = {
    "few λ": partial(decays, 4),
    "a decay per weight": partial(decays, None),
}


def ready(case: str, hypers: int | None, device: torch.device, **changes: Any) -> Descent:
    """Return the solver of a case after two rounds, which fill momentum and warm starts."""
    problem = decays(hypers)
    solver = CASES[case].make(**changes)  # type: ignore[call-arg]
    set_up(solver, problem, device)
    solver.step()
    solver.step()
    return solver


def hypergradient(case: str, solver: Descent) -> Step:
    """Return one hypergradient as a step, or a whole round if the round is differentiated."""
    if CASES[case].whole:
        return solver.step
    batch = solver.core.data.valid.peek()
    return lambda: solver.hypergradient(batch)


def plain_gradient(solver: Descent) -> Step:
    """Compute ∇_w L_T on one batch: one forward and one backward pass."""
    problem, batch, carry = solver.core.problem, solver.core.data.train.peek(), solver.core.carry
    params = {name: p.detach().requires_grad_() for name, p in solver.core.weights.tensors.items()}
    hypers = problem.space.constrain(solver.core.search.u0)

    def step() -> None:
        loss, _ = problem.inner_loss(hypers, params, carry, batch, solver.core.generator)
        torch.autograd.grad(loss, list(params.values()))

    return step


def peak_memory(
    case: str | None, hypers: int | None, device: torch.device, changes: dict[str, Any]
) -> int:
    """Return the bytes by which set-up and two rounds raise the peak; None is plain training.

    On the CPU, a new process measures this after the same work on a tiny problem.
    """
    work = partial(_work, case, hypers, changes)
    return peak_growth(work, partial(_warm, case, hypers, changes), device)


def _warm(
    case: str | None, hypers: int | None, changes: dict[str, Any], device: torch.device
) -> None:
    torch.set_num_threads(1)
    _work(case, hypers, changes, device, sizes=(784, 16, 10))


def _work(
    case: str | None, hypers: int | None, changes: dict[str, Any], device: torch.device, **size: Any
) -> None:
    problem = decays(None if hypers is None else min(hypers, 4) if size else hypers, **size)
    make = solvers.Fixed if case is None else partial(CASES[case].make, **changes)
    solver = make()
    set_up(solver, problem, device)
    for _ in range(MEMORY_ROUNDS):
        solver.step()


def cost(seconds: float, device: torch.device) -> dict[str, Any]:
    """Measure every case against one plain gradient, with few λ and with one per weight."""
    sizes = {
        title: None if make().space.numel > MANY else make().space.numel
        for title, make in LAMBDAS.items()
    }
    cases = {
        title: [name for name, case in CASES.items() if h is not None or not case.few]
        for title, h in sizes.items()
    }
    # Memory comes first: a new process inherits the peak of its parent.
    weighed = {
        title: [name for name in cases[title] if CASES[name].memory is not None] for title in sizes
    }
    memory = {
        title: {name: peak_memory(name, h, device, {}) for name in [None, *weighed[title]]}
        for title, h in sizes.items()
    }
    report = {}
    for title, hypers in sizes.items():
        made = {name: ready(name, hypers, device) for name in cases[title]}
        steps: dict[str, Step] = {"plain": plain_gradient(next(iter(made.values())))}
        steps |= {name: hypergradient(name, solver) for name, solver in made.items()}
        taken = alternating(steps, seconds, device)
        h, plain = LAMBDAS[title]().space.numel, memory[title][None]
        report[title] = {
            "h": h,
            "plain_milliseconds": 1e3 * statistics.median(taken["plain"]),
            "plain_bytes": plain,
            "rounds": len(taken["plain"]),
            "cases": {
                name: _row(
                    name,
                    h,
                    median_ratio(taken[name], taken["plain"]),
                    _over(memory[title].get(name), plain),
                )
                for name in made
            },
        }
    return report


def _over(memory: int | None, plain: int) -> float | None:
    return None if memory is None else memory / plain


def _row(name: str, h: int, time: float, memory: float | None) -> dict[str, Any]:
    case = CASES[name]
    return {
        "plain_gradients": time,
        "at_most": None if case.most is None else case.most(K, h),
        "memory_of_plain": memory,
        "memory_at_most": None if case.memory == math.inf else case.memory,
    }


def scaling(seconds: float, device: torch.device) -> dict[str, Any]:
    """Measure time and memory against the number of hyperparameters, and against K."""

    def solves(make: Callable[[int], Any]) -> list[tuple[int, dict[str, Any]]]:
        return [(4, {"linear_solve": make(k)}) for k in KS]

    steps: list[tuple[int, dict[str, Any]]] = [(4, {"inner_steps": k}) for k in KS]
    plans: dict[str, dict[str, list[tuple[int, dict[str, Any]]]]] = {
        "h": {
            "implicit, CG": [(10**n, {}) for n in (0, 2, 4, 6)],
            "unrolled, reverse": [(10**n, {}) for n in (0, 3, 6)],
            "unrolled, forward": [(2**n, {}) for n in range(3)],
        },
        "K": {
            "implicit, CG": solves(lambda k: solvers.CG(iterations=k)),
            "implicit, Neumann": solves(lambda k: solvers.Neumann(terms=k)),
            "unrolled, reverse": steps,
            "unrolled, reverse, checkpointed": steps,
            "unrolled, forward": steps,
        },
    }
    plain = peak_memory(None, 4, device, {})
    memory = {
        (case, i): peak_memory(case, h, device, changes) / plain
        for case in WEIGHED
        for i, (h, changes) in enumerate(plans["K"][case])
    }
    each = seconds / sum(len(sweep) for plan in plans.values() for sweep in plan.values())
    return {
        axis: {
            case: [
                {
                    "h": h,
                    "K": _k(changes),
                    "plain_gradients": _time(case, h, changes, each, device),
                    "memory_of_plain": memory.get((case, i)) if axis == "K" else None,
                }
                for i, (h, changes) in enumerate(sweep)
            ]
            for case, sweep in plan.items()
        }
        for axis, plan in plans.items()
    }


def _time(
    case: str, hypers: int, changes: dict[str, Any], seconds: float, device: torch.device
) -> float:
    solver = ready(case, hypers, device, **changes)
    taken = alternating(
        {"plain": plain_gradient(solver), case: hypergradient(case, solver)}, seconds, device
    )
    return median_ratio(taken[case], taken["plain"])


def _k(changes: dict[str, Any]) -> int:
    solve = changes.get("linear_solve")
    return int(
        changes.get("inner_steps")
        or getattr(solve, "iterations", None)
        or getattr(solve, "terms", None)
        or K
    )


def main() -> None:
    """Measure, and print tables or JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hypergradient", description=__doc__)
    parser.add_argument("what", nargs="?", default="cost", choices=["cost", "scaling", "bias"])
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, …")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="seconds of measurement for each table"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    measure = {"cost": cost, "scaling": scaling, "bias": lambda seconds, device: bias()}[
        options.what
    ]
    report = {
        "machine": machine(device),
        "torch": torch.__version__,
        options.what: measure(options.seconds, device),
    }
    print(
        json.dumps(report, indent=2)
        if options.json
        else f"{machine(device)}, torch {torch.__version__}\n{TABLES[options.what](report)}"
    )


def cost_table(report: dict[str, Any]) -> str:
    """Return the costs as text."""
    lines = []
    for title, part in report["cost"].items():
        lines.append(
            f"\n{title} (h = {part['h']:,}), K = {K}; "
            f"plain gradient {part['plain_milliseconds']:.1f} ms, plain training "
            f"{part['plain_bytes'] / 2**20:.0f} MiB; {part['rounds']} rounds"
        )
        lines.append(
            f"{'':34} {'plain gradients':>16} {'wanted':>8} {'memory × plain':>15} {'wanted':>7}"
        )
        for name, row in part["cases"].items():
            wanted = "" if row["at_most"] is None else f"≤ {row['at_most']:g}"
            memory = "" if row["memory_at_most"] is None else f"≤ {row['memory_at_most']:g}"
            peak = "" if row["memory_of_plain"] is None else f"{row['memory_of_plain']:.2f}"
            lines.append(
                f"{name:34} {row['plain_gradients']:16.1f} {wanted:>8} {peak:>15} {memory:>7}"
            )
    return "\n".join(lines)


def scaling_table(report: dict[str, Any]) -> str:
    """Return the scaling as text."""
    lines = []
    for axis, part in report["scaling"].items():
        lines.append(f"\nagainst {axis}: plain gradients (memory × plain)")
        for name, rows in part.items():
            cells = [
                f"{row[axis]:,}: {row['plain_gradients']:.1f}"
                + ("" if row["memory_of_plain"] is None else f" ({row['memory_of_plain']:.2f})")
                for row in rows
            ]
            lines.append(f"{name:34} " + "   ".join(cells))
    return "\n".join(lines)


def bias_table(report: dict[str, Any]) -> str:
    """Return the errors as text."""
    lines = []
    for title, rows in report["bias"].items():
        lines.append(f"\n{title}\n{'':34} {'relative error':>15} {'of the mean':>12} {'cosine':>8}")
        for name, row in rows.items():
            lines.append(
                f"{name:34} {row['error']:15.2g} {row['error_of_mean']:12.2g} {row['cosine']:8.4f}"
            )
    return "\n".join(lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "cost": cost_table,
    "scaling": scaling_table,
    "bias": bias_table,
}


if __name__ == "__main__":
    main()
