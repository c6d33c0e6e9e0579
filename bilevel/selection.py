"""The rule that makes one evaluation of a run the best one."""

import math
import re
from collections.abc import Mapping
from typing import Any

from bilevel.text import near
from bilevel.validate import wrong

LOWEST = ("loss", "error", "perplexity", "regret", "nll", "mse", "mae", "rmse", "brier", "ece")
"""Parts of the names of metrics of which a low value is good."""

HIGHEST = ("accuracy", "acc", "f1", "auc", "auroc", "precision", "recall", "iou", "dice", "bleu")
"""Parts of the names of metrics of which a high value is good."""


class Selection:
    """The best evaluation is that of the lowest, or of the highest, value of a metric.

    Args:
        select: a metric of the records, such as `valid_accuracy`. Its name says if a high or a low
            value is good; `max NAME` and `min NAME` say it for any other metric.

    Example:
        >>> selection = Selection("valid_accuracy")
        >>> selection.improves({"valid_accuracy": 0.9}, {"valid_accuracy": 0.8})
        True
        >>> Selection("max valid_score").name
        'valid_score'
        >>> Selection("valid_score")
        Traceback (most recent call last):
        bilevel.errors.BilevelError: runner.select='valid_score' does not say if a high value is
        good; write max valid_score or min valid_score

    Raises:
        BilevelError: the direction is unknown.
    """

    def __init__(self, select: str) -> None:
        self._select = select
        direction, _, name = select.partition(" ") if " " in select else ("", "", select)
        parts = re.split("[_.]", name)
        known = dict.fromkeys(LOWEST, "min") | dict.fromkeys(HIGHEST, "max")
        direction = direction or next((known[p] for p in reversed(parts) if p in known), "")
        if direction not in ("min", "max") or not name:
            what = "does not say if a high value is good"
            raise wrong("runner.select", select, what, f"write max {name} or min {name}")
        self.name = name
        self._sign = 1.0 if direction == "min" else -1.0

    def score(self, record: Mapping[str, Any]) -> float:
        """Return a number that is low for a good record; infinity where it is NaN or absent."""
        value = record.get(self.name)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            return math.inf
        return self._sign * value

    def improves(self, record: Mapping[str, Any], best: Mapping[str, Any]) -> bool:
        """Return whether a record is better than the best one so far."""
        return self.score(record) < self.score(best)

    def check(self, record: Mapping[str, Any]) -> None:
        """Raise `BilevelError` if the records do not have the metric."""
        if not isinstance(record.get(self.name), (int, float)):
            measured = [k for k, v in record.items() if k.startswith(("valid_", "exact."))
                        and isinstance(v, (int, float))]  # fmt: skip
            what = f"is not measured{near(self.name, measured)}"
            raise wrong("runner.select", self._select, what, f"choose {', '.join(measured)}")
