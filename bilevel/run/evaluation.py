"""Metrics of a solution over a data split."""

import torch

from bilevel.data.tensor_stream import Stream
from bilevel.errors import BilevelError
from bilevel.half_weights import for_weights
from bilevel.metrics import Means
from bilevel.params import count_examples, device_of
from bilevel.problem import Problem
from bilevel.problem_wrapper import class_name
from bilevel.solver import Solution


# no_grad rather than inference_mode: tensors that a module caches here must still serve training
@torch.no_grad()
def evaluate(
    problem: Problem, solution: Solution, stream: Stream, limit: int | None = None
) -> dict[str, float]:
    """Return `problem.metrics` in evaluation mode, averaged over the items of a split.

    A metric of shape [] stands for every example of its batch. Any other metric holds one number
    per item (per token, for example). A `Weighted` metric is Σ weight · value / Σ weight. The carry
    starts fresh, passes from batch to batch, and is dropped at the end. The result also holds what
    `problem.derived` makes of the means. The function waits for the device once.

    Args:
        problem: the problem.
        solution: hyperparameters, weights and carry.
        stream: the split.
        limit: the number of examples from the start of the split; None for all.

    Raises:
        BilevelError: the problem reports no `loss`, or a metric that is not made of numbers.
    """
    hypers, params, carry = solution
    source = class_name(problem)
    means = Means(source, device_of(params))
    problem = for_weights(problem, params)
    for number, batch in enumerate(stream.once(limit)):
        if number == 0:
            carry = problem.fresh_carry(carry, batch)
        prediction, carry = problem.predict(
            hypers, params, carry, batch, train=False, generator=None
        )
        means.add(problem.metrics(hypers, params, prediction, batch), count_examples(batch))
    found = means.result()
    if "loss" not in found:
        raise BilevelError(
            f"{source}.metrics reports no `loss`, which selects the best step; add it"
        )
    return found | problem.derived(found)
