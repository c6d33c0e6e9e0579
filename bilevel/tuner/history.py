"""The measurements of a user's loop: means of step metrics, records, and the best solution."""

import math
import time
import warnings
from collections.abc import Mapping

from torch import Tensor

from bilevel.loggers.records import Record, make_record
from bilevel.params import Metrics
from bilevel.run.loop import SolverWarning, on_cpu
from bilevel.solver import Solution, Solver


class History:
    """The records of evaluations, and what they are made of.

    Attributes:
        records: one for each evaluation.
        best: the record and the solution of the lowest validation loss, or None.
    """

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.best: tuple[Record, Solution] | None = None
        self._began = time.perf_counter()
        self._sums: dict[str, tuple[Tensor | float, int]] = {}
        self._warned: set[str] = set()

    def note(self, metrics: Metrics) -> None:
        """Add the metrics of a step to the means of the next record."""
        for name, value in metrics.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + value.detach(), count + 1

    def add(
        self,
        solver: Solver,
        solution: Solution,
        measured: Mapping[str, Mapping[str, float]],
        *,
        examples: int,
        set_up: bool,
    ) -> Record:
        """Add a record, keep the best solution, and give each kind of warning once.

        Args:
            solver: the solver.
            solution: the present λ and weights.
            measured: their metrics on the splits `train` and `valid`.
            examples: the number of examples that the steps have taken.
            set_up: whether the solver is set up.
        """
        means = {name: float(total) / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        record = make_record(
            step=solver.inner_count,
            epoch=float(len(self.records) + 1),
            seconds=time.perf_counter() - self._began,
            examples=examples,
            train=measured.get("train", {}),
            valid=measured["valid"],
            hypers=solution.hypers,
            scales=solver.scales() if set_up else {},
            metrics=means,
            peak_memory_bytes=None,
        )
        self.records.append(record)
        lowest = math.inf if self.best is None else self.best[0]["valid_loss"]
        if record["valid_loss"] < lowest:  # a loss of NaN is none
            self.best = record, on_cpu(solution)
        for kind, sentence in (solver.warnings(means) if set_up else {}).items():
            if kind not in self._warned:
                self._warned.add(kind)
                warnings.warn(sentence, SolverWarning, stacklevel=3)
        return record
