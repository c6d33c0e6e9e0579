"""The table of cost per step: training time by phase, evaluation and memory."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from bilevel.comparison.part import Part
from bilevel.comparison.runs import Run, finite
from bilevel.comparison.table import Column, memory, plus_minus, rows


def step_table(groups: Mapping[str, Sequence[Run]]) -> Part:
    """Return the table of cost per step."""
    return Part("Cost per step", rows(groups, STEP), NOTE)


def milliseconds(run: Run, *, warmup: bool | None = None) -> float | None:
    """Return the training time per inner step, in ms.

    It is that of the whole run, of its warm-up (inner phase alone), or of the part after it.
    """
    step, seconds, epoch = (run.column(name) for name in ("step", "seconds", "epoch"))
    until = finite(run.description.get("warmup_epochs"))
    if until is None and isinstance(runner := run.config.get("runner"), dict):
        until = finite(runner.get("warmup_epochs", 5))
    kept = np.isfinite(step) & np.isfinite(seconds)
    if warmup is not None:
        if until is None:
            return None
        kept &= (epoch <= until) if warmup else (epoch >= until)
    step, seconds = step[kept], seconds[kept]
    if len(step) < 2 or step[-1] <= step[0]:
        return None
    return 1e3 * float((seconds[-1] - seconds[0]) / (step[-1] - step[0]))


def phase(name: str, run: Run) -> float | None:
    """Return the training time of a phase per inner step over the whole run, in ms.

    The phases are `inner`, `response` and `outer`; one without work has no time.
    """
    step, seconds = run.column("step"), run.column(f"seconds.{name}")
    kept = np.isfinite(step) & np.isfinite(seconds)
    if not kept.any() or (steps := step[kept][-1]) <= 0:
        return None
    total = float(seconds[kept][-1])
    return 1e3 * total / float(steps) if total > 0 else None


def evaluation(run: Run) -> float | None:
    """Return the time per evaluation in ms, which is not part of training time."""
    seconds = run.column("seconds.evaluation")
    seconds = seconds[np.isfinite(seconds)]
    return 1e3 * float(seconds[-1] / len(seconds)) if len(seconds) else None


NOTE = (
    "Training time per inner step in ms, with its phases by the timers of the solver. A phase "
    "without work has no number."
)
STEP = (
    Column("ms per inner step", milliseconds, plus_minus, "low"),
    Column("in warm-up", partial(milliseconds, warmup=True), plus_minus, "low"),
    Column(
        "after it, outer steps included", partial(milliseconds, warmup=False), plus_minus, "low"
    ),
    *(
        Column(f"{name} phase", partial(phase, name), plus_minus)
        for name in ("inner", "response", "outer")
    ),
    Column("ms per evaluation", evaluation, plus_minus, "low"),
    Column("peak memory", lambda run: run.total("peak_memory_bytes"), memory, "low"),
)
