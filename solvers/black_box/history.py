"""The trials of an earlier study, which a search continues from."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bilevel import BilevelError, studies
from bilevel.solvers.black_box.ranges import MARGIN, Ranges
from bilevel.solvers.black_box.samplers import Sampler
from bilevel.solvers.black_box.trials import Past
from bilevel.validate import is_number, wrong


def past_trials(
    history: Sequence[Mapping[str, Any]] | None, box: Ranges, sampler: Sampler
) -> list[Past]:
    """Return the trials of a history as points of the box.

    Args:
        history: `params` by coordinate, in the units of λ, and `value` of each trial.
        box: the ranges of the search. A value up to a thousandth of a range outside counts as its
            end.
        sampler: the sampler of the search.

    Raises:
        BilevelError: the sampler does not learn, a trial lacks its value, or it is no point of the
            box.
    """
    if history is None:
        return []
    if not sampler.learns:
        raise BilevelError(
            f"history has no effect on {type(sampler).__name__}, which does not learn from trials; "
            "choose tpe or gp"
        )
    found = []
    for number, trial in enumerate(history):
        where = f"history[{number}]"
        if not isinstance(trial, Mapping) or not isinstance(trial.get("params"), Mapping):
            raise wrong(where, trial, "must have params and value", "see studies.history")
        value: Any = trial.get("value")
        if not is_number(value) or math.isnan(value):
            raise wrong(f"{where}.value", value, "must be a number", "leave that trial out")
        space = studies.space_at(box.space, trial["params"], where)
        z, margin = box.to_z(space.init(torch.float64)), MARGIN * (box.high - box.low)
        for name, outside in zip(
            box.names, ((z < box.low - margin) | (z > box.high + margin)).tolist(), strict=True
        ):
            if outside:
                raise BilevelError(
                    f"{where}: {name}={trial['params'][name]} lies outside the range of the "
                    f"search; widen solver.ranges.{name.partition('[')[0]}"
                )
        found.append(Past(z.clamp(box.low, box.high).tolist(), float(value)))
    return found
