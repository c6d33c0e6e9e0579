"""A trial of a batch of each split: what a run does with it, without a gradient."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from bilevel.checks.calls import Calls
from bilevel.checks.data_reasons import Failure, reason
from bilevel.checks.first_batch import FirstBatch
from bilevel.checks.hints import place
from bilevel.checks.missing_names import missing_name
from bilevel.data.batches import open_batch
from bilevel.data.fields import kind, not_finite, tensors
from bilevel.errors import BilevelError
from bilevel.metrics import Means
from bilevel.params import Batch, count_examples
from bilevel.problem_wrapper import class_name
from bilevel.text import describe

UNRELATED = re.compile(
    r"does not require grad|deterministic|allocate memory|out of memory|CUDA error|DataLoader"
)
"""Matches errors of a trial that have other reasons than the data, and sentences of their own."""


@dataclass
class Trial:
    """The trial of one batch.

    Attributes:
        case: the problem, at its initial weights and λ.
        split: `train`, `valid` or `test`.
        batch: the batch.
        whole: the split as one batch, where it lies in memory.
        flaw: a sentence about the batch, or None.
        error: the error that the sentence explains, or None.
        begins: where NaN or infinity begins, in words; None if all numbers are finite, or if the
            trial did not watch for them.
        prediction: the last prediction.
    """

    case: FirstBatch
    split: str
    batch: Batch
    whole: Batch | None = None
    flaw: str | None = None
    error: Exception | None = None
    begins: str | None = None
    prediction: Any = None

    def run(self, passed: dict[str, Batch], *, watch: bool = False) -> "Trial":
        """Compute everything that a run computes of this batch.

        Args:
            passed: batches of other splits that are right, for a comparison.
            watch: also look for the call in which NaN or infinity begins.
        """
        open_batch(self.batch, self.split)
        calls = Calls(self.batch, self.case.start[0], watch=watch)
        stage, results = "", []
        try:
            with torch.no_grad(), calls:
                for name, step in self._steps():
                    stage = name
                    results.append(step())
        except BilevelError as error:  # a sentence, which lacks the split
            odd = [name for name, t in tensors(self.batch).items() if t.is_complex()]
            if odd or stage != "metrics":  # a law of its own is about metrics
                where = f"{self.split} data" + (f", {odd[0]} is complex" if odd else "")
                self.flaw = str(error) if self.split in str(error) else f"{where}: {error}"
                self.error = error
                if calls.failed is not None:  # our own loss, which does not know the fields
                    failure = Failure(self.split, self.batch, stage, error, calls)
                    self.flaw = reason(failure, passed, self.case.start[0]) or self.flaw
        except Exception as error:
            case = self.case
            missing = missing_name(stage, error, case.hypers, case.start[0], self.batch)
            if missing is not None:
                self.flaw, self.error = missing, error
            elif (strange := _odd_prediction(stage, error, self.prediction)) is not None:
                self.flaw, self.error = strange, error
            elif not isinstance(error, MemoryError) and not UNRELATED.search(str(error)):
                failure = Failure(self.split, self.batch, stage, error, calls)
                self.flaw = reason(failure, passed, self.case.start[0])
                self.error = error if self.flaw else None
        else:
            if not all(map(_finite, results)):
                self._look_at_numbers(calls)
        return self

    def _steps(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Yield the calls of the problem, by the name of the method."""
        case = self.case
        problem, batch, hypers = case.problem, self.batch, case.hypers
        params, carry = case.start

        def predict(*, train: bool) -> None:
            draws = torch.Generator(case.device).manual_seed(0) if train else None
            start = carry if train else problem.fresh_carry(carry, batch)
            returned: Any = problem.predict(
                hypers, params, start, batch, train=train, generator=draws
            )
            if not isinstance(returned, tuple) or len(returned) != 2:
                raise BilevelError(
                    f"`predict` returns {kind(returned)}; return the prediction and the carry, "
                    "(prediction, carry)"
                )
            self.prediction = returned[0]

        def metrics() -> float:
            means = Means(class_name(problem), case.device)
            reported = problem.metrics(hypers, params, self.prediction, batch)
            means.add(reported, count_examples(batch))
            return means.result().get("loss", 0.0)

        if self.split == "train":
            yield "predict", lambda: predict(train=True)
            yield (
                "inner_objective",
                lambda: problem.inner_objective(hypers, params, self.prediction, batch),
            )
        yield "predict", lambda: predict(train=False)
        if self.split == "valid":
            yield (
                "outer_objective",
                lambda: problem.outer_objective(hypers, params, self.prediction, batch),
            )
        yield "metrics", metrics

    def _look_at_numbers(self, calls: Calls) -> None:
        """Find the reason of a loss that is not finite: the batch, or the first call of it."""
        known, of = (self.batch, "rows of a batch") if self.whole is None else (self.whole, "rows")
        if not_finite([self.batch]) is not None and (bad := not_finite([known], of)) is not None:
            self.flaw = f"{self.split} data, {bad}"
        elif (call := calls.not_finite) is not None and call.fields:
            field = min(call.fields[-1][1])
            self.begins = f"{self.split} data, {field}: the first result that is not finite is "
            self.begins += f"that of {call.name}"


def _odd_prediction(stage: str, error: Exception, prediction: Any) -> str | None:
    """Return a sentence about a prediction that a loss cannot take, since it is no tensor."""
    name = type(prediction).__name__
    refused = re.search(r"must be Tensor, not (\w+)|'(\w+)' object has no attribute", str(error))
    plain = isinstance(prediction, (tuple, list, Mapping, int, float, NoneType))
    if stage == "predict" or not plain or refused is None or name not in refused.groups():
        return None  # a law of its own is about other objects
    return (
        f"the network returns {kind(prediction)}, where `{stage}` takes a tensor "
        f"({describe(error)}{place(error)}); return a tensor, or take the one that the loss needs"
    )


def _finite(result: Any) -> bool:
    if isinstance(result, Tensor):
        return bool(torch.isfinite(result.detach()).all())
    return not isinstance(result, float) or math.isfinite(result)
