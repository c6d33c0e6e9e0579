"""Tuning in the first part of a run alone: what a solver must offer, and what a resumed run may."""

import inspect
from collections.abc import Mapping
from typing import Any

from bilevel.errors import BilevelError
from bilevel.run.settings import RunSettings
from bilevel.solver import Solver

KEY = "tuned_steps"
"""The entry of a checkpoint with the inner step from which λ is constant."""


def check_phases(settings: RunSettings, solver: Solver) -> None:
    """Check that a solver can train w alone at constant λ, if it should.

    Raises:
        BilevelError: its `step` takes no `frozen`, as that of a search.
    """
    for name, none in (("plain_epochs", 0), ("tune_fraction", 1)):
        value = getattr(settings, name)
        if value != none and "frozen" not in inspect.signature(solver.step).parameters:
            raise BilevelError(
                f"runner.{name}={value:g} cannot hold the λ of {type(solver).__name__}, whose step "
                f"takes no `frozen`; set it to {none}"
            )


def check_tuned_steps(state: Mapping[str, Any], now: int | None) -> None:
    """Check that a resumed run ends its tuning where it did, unless it has not come so far.

    Args:
        state: the state of the checkpoint.
        now: the inner step from which λ would be constant; None for a λ that moves to the end.

    Raises:
        BilevelError: λ was constant in steps in which it would now have moved, or the reverse.
    """
    ends, step = (state.get(KEY), now), state["step"]
    reached = any(end is not None and step > end for end in ends)
    if ends[0] != ends[1] and reached:
        before, after = ("at its end" if end is None else f"after step {end}" for end in ends)
        raise BilevelError(
            f"the run is at step {step}, and its tuning ended {before}, not {after}; resume it "
            "with its own runner.epochs and runner.tune_fraction, or start a new run"
        )
