"""`check_problem`: find the errors of a problem, and the solvers that can tune it."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points

import torch

from bilevel.checks import laws
from bilevel.checks.finding import Finding, Law
from bilevel.checks.first_batch import FirstBatch
from bilevel.checks.hints import hint, place, refusal
from bilevel.data.fields import kind
from bilevel.data.tensor_stream import Data
from bilevel.errors import BilevelError, Refused
from bilevel.problem import Problem
from bilevel.problem_wrapper import class_name
from bilevel.solver import Solver
from bilevel.text import describe, first_line

AFTERWARDS = (
    "correct the errors, then check again: the report will list the solvers that can tune it"
)


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
        if not self.ok:
            return "\n".join([*lines, f"  {AFTERWARDS}"])
        lines += [f"  solvers that can tune it: {', '.join(self.tuned_by) or 'none'}"]
        known = {finding.text for finding in self.findings}
        for reason in dict.fromkeys(self.refused_by.values()):
            names = [name for name, given in self.refused_by.items() if given == reason]
            verb = "refuses" if len(names) == 1 else "refuse"
            why = " for the reason above" if reason in known else f": {reason}"
            lines.append(f"  {', '.join(names)} {verb} it{why}")
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
          correct the errors, then check again: the report will list the solvers that can tune it
    """
    report = Report(class_name(problem))
    device = torch.device("cpu")
    try:
        data = problem.data(device, torch.Generator().manual_seed(0))
    except Exception as error:  # the problem is a user's own code
        known = isinstance(error, BilevelError)
        text = str(error) if known else f"`data` raises {describe(error)}{place(error)}"
        report.findings.append(Finding("error", text))
        return report
    if not isinstance(data, Data):
        text = f"`data` returns {kind(data)}; return bilevel.Data, as `bilevel.streams` does"
        report.findings.append(Finding("error", text))
        return report
    case = FirstBatch(problem, data, device)
    found: dict[Law, list[Finding]] = {}
    for law in laws.ALL:
        skipped = any(
            law in after and found.get(first)
            for first, after in (
                (laws.splits, laws.AFTER_SPLITS),
                (laws.prediction_tree, laws.AFTER_PREDICTIONS),
                (laws.purity, laws.AFTER_PURITY),
                (laws.scalar_objectives, laws.AFTER_SCALARS),
                (laws.finite_objectives, laws.AFTER_FINITE),
            )
        )
        found[law] = [] if skipped else _findings(law, case)
        for new in found[law]:
            if not _repeats(new, report.findings):
                report.findings.append(new)
    for name, solver in (_installed(report) if solvers is None else solvers).items():
        needed = [laws.splits, *laws.needed_by(solver)]
        if against := [finding for law in needed for finding in found[law]]:
            report.refused_by[name] = against[0].text
            continue
        try:
            solver.check(problem, data, device)
            report.tuned_by.append(name)
        except BilevelError as error:
            report.refused_by[name] = str(error)
        except Exception as error:
            report.refused_by[name] = refusal(error)
    return report


def _repeats(new: Finding, findings: list[Finding]) -> bool:
    """Return whether a finding, or another sentence about the same error, is in the report."""
    return new in findings or any(
        known.cause and known.cause in f"{new.text} {new.cause}" for known in findings
    )


def _findings(law: Law, case: FirstBatch) -> list[Finding]:
    """Return the findings of a law; an error in a call of the problem is one."""
    found: list[Finding] = []
    try:
        found.extend(law(case))
    except Exception as error:  # the problem is a user's own code
        text = f"a call of the problem raises {describe(error)}{place(error)}{hint(error)}"
        known = isinstance(error, BilevelError)
        found.append(Finding("error", str(error) if known else text, first_line(error)))
    return found


def check_laws(solver: Solver, problem: Problem, data: Data, device: torch.device) -> None:
    """Refuse a problem that violates a law on which this solver relies.

    Raises:
        Refused: the prediction or L_T does not depend on w, an objective is not a finite number of
            shape [], L_V has no gradient and the solver follows it, or the solver perturbs λ per
            example and λ acts on other examples.
    """
    case = FirstBatch(problem, data, device)
    for law in laws.needed_by(solver):
        try:
            findings = list(law(case))
        except Exception:  # the solver's own calls of the problem raise it, with its traceback
            return
        for finding in findings:
            raise Refused(finding.text)


def check_setup(
    problem: Problem, data: Data, device: torch.device, solver: Solver | None = None
) -> None:
    """Check the laws that every run relies on, and those of a solver; warn of others.

    Raises:
        Refused: as in `check_laws`.

    Warns:
        ProblemWarning: a weight has no gradient, a hyperparameter has no effect or no derivative,
            or an objective grows with the batch.
    """
    case = FirstBatch(problem, data, device)
    for law in laws.needed_by(solver):
        for finding in law(case):
            raise Refused(finding.text)
    for law in laws.WARNINGS:
        for finding in _findings(law, case):  # one may raise at a λ that the run never reaches
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
