"""Metrics of a solution over a data split."""

import torch
from torch import Tensor

from bilevel.data.tensor_stream import Stream
from bilevel.errors import BilevelError
from bilevel.params import count_examples, widen
from bilevel.problem import Problem
from bilevel.solver import Solution


# no_grad rather than inference_mode: tensors that a module caches here must still serve training
@torch.no_grad()
def evaluate(
    problem: Problem, solution: Solution, stream: Stream, limit: int | None = None
) -> dict[str, float]:
    """Return `problem.metrics` in evaluation mode, averaged over the items of a split.

    A metric of shape [] stands for every example of its batch. Any other metric holds one number
    per item (per token, for example). The carry starts fresh, passes from batch to batch, and is
    dropped at the end. The result also holds what `problem.derived` makes of the means. The
    function waits for the device once.

    Args:
        problem: the problem.
        solution: hyperparameters, weights and carry.
        stream: the split.
        limit: the number of examples from the start of the split; None for all.

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
            f"{type(problem).__name__}.metrics reports no `loss`, which selects the best step; "
            "add it"
        )
    sums = torch.stack(list(totals.values())).tolist()
    means = {name: total / items[name] for name, total in zip(totals, sums, strict=True)}
    return means | problem.derived(means)
