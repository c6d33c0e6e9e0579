"""`check_problem`: find the errors of a problem, and the solvers that can tune it."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points

import torch

from bilevel.checks import laws
from bilevel.checks.finding import Finding
from bilevel.checks.first_batch import FirstBatch
from bilevel.data.tensor_stream import Data
from bilevel.errors import BilevelError, Refused
from bilevel.problem import Problem
from bilevel.solver import Solver
from bilevel.text import describe


class ProblemWarning(UserWarning):
    """A flaw of a problem that does not end a run and may waste it."""


@dataclass(frozen=True)
class Report:
    """The result of `check_problem`; print it.

    Attributes:
        problem: class name of the problem.
        findings: errors and notes, in the order of the laws.
        tuned_by: names of the solvers that can tune it.
        refused_by: the reason of every other solver.
    """

    problem: str
    findings: list[Finding] = field(default_factory=list)
    tuned_by: list[str] = field(default_factory=list)
    refused_by: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Return whether there is no error."""
        return all(finding.level != "error" for finding in self.findings)

    def __str__(self) -> str:
        lines = [f"{self.problem}: {'nothing is wrong' if self.ok else 'there are errors'}"]
        lines += [f"  {finding.level}: {finding.text}" for finding in self.findings]
        lines += [f"  solvers that can tune it: {', '.join(self.tuned_by) or 'none'}"]
        lines += [f"  {name} refuses it: {reason}" for name, reason in self.refused_by.items()]
        return "\n".join(lines)


def check_problem(problem: Problem, solvers: Mapping[str, Solver] | None = None) -> Report:
    """Check a problem against the laws that solvers rely on, and find the solvers that can tune it.

    The laws cover purity, shapes, gradients and response rules. The check runs on the CPU, on the
    first batch, at weights near the initial ones.

    Args:
        problem: any problem.
        solvers: solvers by name; by default all installed ones (entry points of the group
            `bilevel.solvers`).

    Example:
        >>> from bilevel import ModuleProblem, Positive, Space
        >>> class Forgetful(ModuleProblem):
        ...     def inner_objective(self, hypers, params, prediction, batch):
        ...         return prediction.square().mean()
        ...
        ...     outer_objective = inner_objective
        >>> x, space = torch.randn(4, 3), Space(decay=Positive(init=0.1))
        >>> problem = Forgetful(torch.nn.Linear(3, 1), space, train=(x,), valid=(x,))
        >>> print(check_problem(problem, solvers={}))
        Forgetful: there are errors
          error: the hyperparameter `decay` changes neither objective; use it, or remove it
          solvers that can tune it: none
    """
    report = Report(type(problem).__name__)
    device = torch.device("cpu")
    try:
        data = problem.data(device, torch.Generator().manual_seed(0))
    except Exception as error:  # the problem is a user's own code
        report.findings.append(Finding("error", f"`data` raises {describe(error)}"))
        return report
    case = FirstBatch(problem, data, device)
    for law in laws.ALL:
        before = len(report.findings)
        try:
            report.findings.extend(law(case))
        except Exception as error:
            finding = Finding("error", f"a call of the problem raises {describe(error)}")
            if finding not in report.findings:
                report.findings.append(finding)
        if law is laws.prediction_tree and len(report.findings) > before:
            break  # the other laws look for the tensors of the prediction
    for name, solver in (_installed(report) if solvers is None else solvers).items():
        try:
            solver.check(problem, data, device)
            report.tuned_by.append(name)
        except Refused as refusal:
            report.refused_by[name] = str(refusal)
        except Exception as error:
            report.refused_by[name] = describe(error)
    return report


def check_setup(problem: Problem, data: Data, device: torch.device) -> None:
    """Check the few laws that every run relies on, and warn of others.

    Raises:
        BilevelError: the prediction does not depend on w, or an objective is not [].

    Warns:
        ProblemWarning: a weight has no gradient, or a hyperparameter has no effect or no
            derivative.
    """
    case = FirstBatch(problem, data, device)
    for law in laws.AT_SETUP:
        for finding in law(case):
            raise BilevelError(finding.text)
    for law in laws.WARNINGS:
        try:
            findings = list(law(case))
        except Exception as error:  # at a distant λ, which the run may never reach
            findings = [Finding("error", f"a call of the problem raises {describe(error)}")]
        for finding in findings:
            if finding.level == "error":
                warnings.warn(finding.text, ProblemWarning, stacklevel=2)


def _installed(report: Report) -> dict[str, Solver]:
    """Return the installed solvers with their defaults; note those that cannot be made."""
    made: dict[str, Solver] = {}
    for entry in entry_points(group="bilevel.solvers"):
        try:
            made[entry.name] = entry.load()()
        except Exception as error:  # code of another package
            report.findings.append(
                Finding(
                    "note",
                    (
                        f"the installed solver `{entry.name}` cannot be made ({describe(error)}); "
                        "update its package"
                    ),
                )
            )
    return made
