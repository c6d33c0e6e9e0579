"""Divergence: the test for it, and the sentence that reports it."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel.loggers.records import Record

RATES = "lower a learning rate, clip gradients, or start from other hyperparameters"
"""The remedy where the data explain nothing."""


def diverged(
    bad_step: int | None,
    values: Mapping[str, float],
    step: int,
    good: Record | None,
    flaw: Callable[[], str | None] = lambda: None,
) -> str | None:
    """Return a sentence if a training loss or one of `values` is not finite, else None.

    Args:
        bad_step: the first inner step whose loss was not finite, or None.
        values: numbers to check, by the name that the sentence gives them.
        step: the inner step of `values`.
        good: the record of the last evaluation with finite losses.
        flaw: returns a sentence about data that explain it, or None; called where it diverged.

    Example:
        >>> diverged(None, {"the validation loss": 0.5}, 10, None)
        >>> diverged(None, {"the validation loss": math.nan}, 10, None)[:45]
        'diverged: the validation loss is nan at step '
    """
    bad = [
        f"{name} is {value} at step {step}"
        for name, value in values.items()
        if not math.isfinite(value)
    ]
    if bad_step is not None:
        bad = [f"a loss became NaN or infinite at step {bad_step}"]
    if not bad:
        return None
    before = "no evaluation was finite"
    if good is not None:
        hypers = {name: value for name, value in good.items() if name.startswith("hypers.")}
        listed = ", ".join(
            f"{name.removeprefix('hypers.')}={_short(value)}" for name, value in hypers.items()
        )
        before = (
            f"the last good evaluation, at step {good['step']}, had {listed}; "
            "the last good checkpoint is kept"
        )
    return f"diverged: {bad[0]}; {before}; {flaw() or RATES}"


def not_finite(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Return NaN for every tensor with an entry that is not finite, by `kind` and name."""
    bad = [name for name, leaf in tensors.items() if not bool(torch.isfinite(leaf).all())]
    return {f"{kind} `{name}`": math.nan for name in bad}


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_short(entry) for entry in value) + "]"
    if isinstance(value, dict):  # mean, min and max of a large array
        return f"{_short(value['min'])}…{_short(value['max'])}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
