"""When a run has diverged, and the sentence that says so."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel.loggers.records import Record


def diverged(
    bad_step: int | None, values: Mapping[str, float], step: int, good: Record | None
) -> str | None:
    """The sentence, where a loss of training, or one of `values`, is not finite; None where all are.

    Args:
        bad_step: the first step whose loss was not.
        values: by what the sentence calls them.
        step: at which they were found.
        good: the record of the last evaluation whose losses were finite.

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
        before = f"at step {good['step']}, the last good evaluation, {listed}; the last good checkpoint is kept"
    return f"diverged: {bad[0]}; {before}; lower a learning rate, clip gradients, or start from other hyperparameters"


def not_finite(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Those that are not, said to be NaN."""
    bad = [name for name, leaf in tensors.items() if not bool(torch.isfinite(leaf).all())]
    return {f"{kind} `{name}`": math.nan for name in bad}


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_short(entry) for entry in value) + "]"
    if isinstance(value, dict):  # of a large array
        return f"{_short(value['min'])}…{_short(value['max'])}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
