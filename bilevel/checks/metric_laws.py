"""Laws about metrics: numbers, `loss` among them, and averages over batches that are true."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel.checks.equality import nearly_equal
from bilevel.checks.finding import Finding
from bilevel.checks.first_batch import FirstBatch, has_examples
from bilevel.metrics import Means, read_metrics
from bilevel.params import Batch, count_examples, device_of
from bilevel.problem_wrapper import class_name

FEWEST = 4
"""Number of examples of a batch that is cut in two."""
MOST_BATCHES = 16
"""Number of batches of a split between which the first one and the last one are compared."""


def metrics(case: FirstBatch) -> Iterator[Finding]:
    """`loss` is among the metrics, and all are numbers."""
    with torch.no_grad():
        prediction, _ = case.predict(train=False)
        reported = case.problem.metrics(case.hypers, case.params, prediction, case.batch)
    found = read_metrics(reported, class_name(case.problem), case.device)
    if "loss" not in found:
        yield Finding(
            "error",
            (
                f"`metrics` reports {', '.join(found) or 'nothing'} but no `loss`, which λ "
                "minimizes; add it"
            ),
        )


def split_average(case: FirstBatch) -> Iterator[Finding]:
    """A metric of a validation split is the average over its batches, as `evaluate` takes it.

    Batches of one split may be alike, for example sorted by length or class, so the first one is
    also compared with another one.
    """
    first = last = None
    for last in islice(case.data.valid.once(), MOST_BATCHES):
        first = last if first is None else first
    pairs = [_halves(first)] if first is last else [_halves(first), (first, last)]
    for text in dict.fromkeys(text for pair in pairs for text in _differing(case, pair)):
        yield Finding("note", text)


def batch_average(case: FirstBatch) -> Iterator[Finding]:
    """A metric of the first validation batch is the average over its two parts."""
    for text in _differing(case, _halves(case.data.valid.peek())):
        yield Finding("error", text)


def _differing(case: FirstBatch, pair: tuple[Batch, ...]) -> Iterator[str]:
    """Yield a sentence for every metric whose average over two batches is not that of their union.

    The law does not apply where the batches cannot be joined, or where a smaller batch raises.
    """
    if len(pair) < 2:
        return
    try:
        apart, together = _means(case, pair), _means(case, (_joined(*pair),))
    except Exception:  # the problem is a user's own code
        return
    for name, value in together.items():
        mean = apart.get(name, value)
        if not nearly_equal(*(torch.tensor(x, dtype=case.u.dtype) for x in (value, mean))):
            yield (
                f"the metric `{name}` of two validation batches together is {value:.4g}, but the "
                f"average of the two is {mean:.4g}, so its value of a split depends on the "
                "batches; return bilevel.Weighted(value, weight) in `metrics`, with the sum of the "
                "weights or the number of tokens that count, unless examples are meant to interact"
            )


def _means(case: FirstBatch, batches: tuple[Batch, ...]) -> dict[str, float]:
    problem = case.problem
    means = Means(class_name(problem), device_of(case.params))
    with torch.no_grad():
        for batch in batches:
            carry = problem.fresh_carry(case.start[1], batch)
            prediction, _ = problem.predict(
                case.hypers, case.params, carry, batch, train=False, generator=None
            )
            reported = problem.metrics(case.hypers, case.params, prediction, batch)
            means.add(reported, count_examples(batch))
    return means.result()


def _halves(batch: Batch) -> tuple[Batch, ...]:
    """Return two parts of different sizes, or nothing for a small batch."""
    examples = count_examples(batch)
    if examples < FEWEST:
        return ()
    cut = examples // 2 + 1

    def part(rows: slice) -> Batch:
        return pytree.tree_map(lambda x: x[rows] if has_examples(x, examples) else x, batch)

    return part(slice(cut)), part(slice(cut, None))


def _joined(one: Batch, other: Batch) -> Batch:
    sizes = count_examples(one), count_examples(other)

    def join(a: Any, b: Any) -> Any:
        if has_examples(a, sizes[0]) and isinstance(b, Tensor) and has_examples(b, sizes[1]):
            return torch.cat([a, b])
        return a

    return pytree.tree_map(join, one, other)
