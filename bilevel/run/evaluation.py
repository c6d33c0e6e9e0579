"""Metrics of a solution over a split."""

import torch
from torch import Tensor

from bilevel.data.tensor_stream import Stream
from bilevel.errors import BilevelError
from bilevel.params import count_examples, widen
from bilevel.problem import Problem
from bilevel.solver import Solution


@torch.no_grad()  # not inference_mode: what a module caches here must still serve training
def evaluate(
    problem: Problem, solution: Solution, stream: Stream, limit: int | None = None
) -> dict[str, float]:
    """`problem.metrics` in evaluation mode, each averaged over the items of the split (its first `limit` examples).

    A value of shape [] stands for every example of its batch; any other is one number per item (per token, say). The carry
    begins fresh, goes from batch to batch, and is dropped at the end. What `problem.derived` makes of the means comes beside
    them. Waits for the device once.

    Raises:
        BilevelError: the problem reports no `loss`.
    """
    totals: dict[str, Tensor] = {}
    items: dict[str, int] = {}
    hypers, params, carry = solution
    for number, batch in enumerate(stream.once(limit)):
        if number == 0:
            carry = problem.fresh_carry(carry, batch)
        prediction, carry = problem.predict(
            hypers, params, carry, batch, train=False, generator=None
        )
        for name, value in problem.metrics(hypers, params, prediction, batch).items():
            weight = count_examples(batch) if value.ndim == 0 else 1
            totals[name] = totals.get(name, 0.0) + weight * widen(value).sum()
            items[name] = items.get(name, 0) + weight * value.numel()
    if "loss" not in totals:
        raise BilevelError(
            f"{type(problem).__name__}.metrics reports no `loss`, by which the best step is judged; add it"
        )
    sums = torch.stack(list(totals.values())).tolist()
    means = {name: total / items[name] for name, total in zip(totals, sums, strict=True)}
    return means | problem.derived(means)
