"""Metrics of a problem: values per item or per batch, their weights, and their means."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bilevel.errors import BilevelError
from bilevel.params import widen


@dataclass(frozen=True)
class Weighted:
    """A metric whose mean over a split is Σ weight · value / Σ weight.

    Use it where the mean of a batch is not a mean over examples: `ignore_index`, class weights or
    a mask of tokens. A value with weight 0 does not count, even if it is NaN.

    Args:
        value: the mean of the batch, [], or one value per item, [n, …].
        weight: the sum of the weights in the batch, [], or the weight of each item, [n, …].

    Example:
        >>> import torch.nn.functional as F
        >>> logits, labels = torch.zeros(4, 2), torch.tensor([0, 1, -100, -100])
        >>> Weighted(F.cross_entropy(logits, labels), (labels != -100).sum())
        Weighted(value=tensor(0.6931), weight=tensor(2))
    """

    value: Any
    weight: Any


Reported: TypeAlias = Mapping[str, Tensor | Weighted | float | None]
"""The metrics of a batch by name, as `Problem.metrics` returns them."""


class Means:
    """The means of metrics over the batches of a split.

    A metric of shape [] stands for every example of its batch. Any other metric holds one number
    per item. A metric that is None is left out; one without any item is NaN.

    Args:
        source: the class whose `metrics` is read, for errors.
        device: device of the sums.
    """

    def __init__(self, source: str, device: torch.device) -> None:
        self._source = source
        self._device = device
        self._totals: dict[str, Tensor] = {}
        self._weights: dict[str, Any] = {}

    def add(self, reported: Any, examples: int) -> None:
        """Add the metrics of a batch.

        Raises:
            BilevelError: the metrics are not a mapping, or a value is not a number or an array of
                numbers.
        """
        for name, value in read_metrics(reported, self._source, self._device).items():
            items: Tensor | int
            if isinstance(value, Weighted):
                weight = widen(value.weight)
                terms = torch.where(weight == 0, 0.0, weight * widen(value.value))
                total, items = terms.sum(), weight.sum()
            else:
                number = examples if value.ndim == 0 else 1
                total, items = number * widen(value).sum(), number * value.numel()
            self._totals[name] = self._totals.get(name, 0.0) + total
            self._weights[name] = self._weights.get(name, 0) + items

    def result(self) -> dict[str, float]:
        """Return the means; waits for the device once."""
        if not self._totals:
            return {}
        on_device = [weight for weight in self._weights.values() if isinstance(weight, Tensor)]
        numbers = torch.stack([*self._totals.values(), *on_device]).tolist()
        weights = iter(numbers[len(self._totals) :])
        means = {}
        for (name, weight), total in zip(self._weights.items(), numbers, strict=False):
            divisor = next(weights) if isinstance(weight, Tensor) else weight
            means[name] = total / divisor if divisor else float("nan")
        return means


def read_metrics(reported: Any, source: str, device: torch.device) -> dict[str, Tensor | Weighted]:
    """Return the metrics of a batch as tensors on `device`, without those that are None.

    Args:
        reported: what `metrics` returned.
        source: the class whose `metrics` it is, for errors.
        device: device of the tensors.

    Example:
        >>> reported = {"loss": torch.ones(2), "accuracy": 0.5, "other": None}
        >>> read_metrics(reported, "It", torch.device("cpu"))
        {'loss': tensor([1., 1.]), 'accuracy': tensor(0.5000, dtype=torch.float64)}

    Raises:
        BilevelError: `reported` is not a mapping, or a value is not a number or an array of
            numbers.
    """
    if not isinstance(reported, Mapping):
        raise BilevelError(
            f"{source}.metrics returns a {type(reported).__name__}; return a dict of values by "
            "name, `loss` among them"
        )
    found: dict[str, Tensor | Weighted] = {}
    for name, value in reported.items():
        what = f"the metric `{name}` of {source}"
        if value is None:
            continue
        if not isinstance(value, Weighted):
            found[name] = _numbers(value, what, device)
            continue
        values = _numbers(value.value, f"the value of {what}", device)
        weights = _numbers(value.weight, f"the weight of {what}", device)
        if weights.ndim and weights.shape != values.shape:
            raise BilevelError(
                f"{what} has values of shape {list(values.shape)} and weights of shape "
                f"{list(weights.shape)}; give one weight per value, or one for all"
            )
        found[name] = Weighted(values, weights.expand(values.shape))
    return found


def _numbers(value: Any, what: str, device: torch.device) -> Tensor:
    """Return numbers as a tensor."""
    if not isinstance(value, Tensor):
        try:
            # a copy, since PyTorch takes no array with negative strides and warns of others
            dtype = torch.float64 if isinstance(value, (int, float)) else None
            value = torch.tensor(value.copy() if hasattr(value, "dtype") else value, dtype=dtype)
        except (TypeError, ValueError, RuntimeError):
            value = None
    if not isinstance(value, Tensor) or value.is_complex() or value.is_nested:
        kind = "complex" if isinstance(value, Tensor) else "not a number or an array of numbers"
        raise BilevelError(
            f"{what} is {kind}; return a tensor with one real number per item, or None where there "
            "is none"
        )
    if device.type == "mps" and value.dtype == torch.float64:  # which it does not have
        value = value.float()
    return value.to(device)
