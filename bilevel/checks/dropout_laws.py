"""Laws about dropout with tuned rates: the rates arrive at functions that drop."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from bilevel.checks.finding import Finding
from bilevel.checks.first_batch import FirstBatch
from bilevel.dropout.calls import CALLS, RECURRENT, rate_of_call
from bilevel.dropout.sites import Rate, dropout_sites
from bilevel.module_problem import ModuleProblem
from bilevel.problem import Problem
from bilevel.problem_wrapper import ProblemWrapper


def dropout_rates(case: FirstBatch) -> Iterator[Finding]:
    """Every tuned rate arrives at a dropout function; one that no layer holds cannot be tuned."""
    module_problem = _module_problem(case.problem)
    if module_problem is None or (tuned := module_problem.tuned_dropout) is None:
        return
    with torch.no_grad(), _Unowned(module_problem.module) as unowned:
        case.predict(train=True)
    level: Any = "error" if tuned.whole else "note"
    for place, rate in unowned.found.items():
        yield Finding(
            level,
            f"a dropout in {place} takes a rate of {rate:g} that no layer holds, so it is not "
            "tuned; hold the rate in an nn.Dropout, or in an attribute with `drop` in its name",
        )
    if idle := [site for site in tuned.sites if site not in tuned.reached]:
        yield Finding(
            "note",
            f"the rate of `{idle[0]}` arrives at no dropout function in the first training pass, "
            "so it is not tuned; leave it out of the patterns of `dropout`",
        )


def remedy_of_unused(problem: Problem, name: str) -> str:
    """Return what to do about a hyperparameter without any effect."""
    module_problem = _module_problem(problem)
    if module_problem is None or "drop" not in name or module_problem.tuned_dropout is not None:
        return "use it, or remove it"
    if not (sites := dropout_sites(module_problem.module)):
        return "use it, or remove it"
    layers = "the dropout layer" if len(sites) == 1 else f"the {len(sites)} dropout layers"
    return (
        f"pass dropout={ {name: '*'} } to the problem, so that it sets the rate of {layers} of the "
        "module (bilevel.tuned_dropout), or remove it"
    )


def _module_problem(problem: Problem) -> ModuleProblem | None:
    """Return the problem of a module below its wrappers, or None."""
    while isinstance(problem, ProblemWrapper):
        problem = problem.problem
    return problem if isinstance(problem, ModuleProblem) else None


class _Unowned(TorchFunctionMode):
    """A mode that finds dropout with a rate that is a plain number.

    Attributes:
        found: the rates, by the place of the call.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.found: dict[str, float] = {}
        self._names = {id(layer): name for name, layer in module.named_modules()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in CALLS or func in RECURRENT:
            rate = rate_of_call(func, args, kwargs)
            if rate and not isinstance(rate, Rate):
                self.found.setdefault(self._place(), rate)
        return func(*args, **kwargs)

    def _place(self) -> str:
        """Return the layer and the line that called the present function."""
        frame: Any = sys._getframe(2)
        while frame is not None:
            layer = frame.f_locals.get("self")
            if id(layer) in self._names:
                name = self._names[id(layer)]
                where = f"`{name}`" if name else "the module"
                return f"{where} ({type(layer).__name__}, line {frame.f_lineno} of its file)"
            frame = frame.f_back
        return "the module"
