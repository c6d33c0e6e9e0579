"""Notes on the runs of a section: few seeds, runs that did not end in order, and equal seeds."""

from collections.abc import Mapping, Sequence

from bilevel.comparison.runs import Run

LEAST = 3
"""Number of runs of a group below which its spread says little."""


def notes_on(groups: Mapping[str, Sequence[Run]]) -> list[str]:
    """Return the facts about these runs that a reader must consider."""
    notes = _few(groups)
    for label, runs in groups.items():
        for run in runs:
            if run.status == "running":
                notes.append(
                    f"{label}, seed {run.seed}: the run has not ended, or was killed "
                    f"({run.evaluations} evaluations so far)"
                )
            elif run.status != "finished":
                message = str((run.summary or {}).get("message") or run.status)
                notes.append(f"{label}, seed {run.seed}: {message.partition(';')[0]}")
        if refitted := sum(run.refit is not None for run in runs):
            notes.append(
                f"{label}: the result is that of a refit in {refitted} of {len(runs)} runs; tables "
                "show it with the cost of tuning and refits together, and curves show the tuning"
            )
        seeds = [run.seed for run in runs]
        if len(set(seeds)) < len(seeds):
            notes.append(
                f"{label}: several runs have the same seed; n counts them all, and the paired test "
                "uses their mean"
            )
    return notes


def _few(groups: Mapping[str, Sequence[Run]]) -> list[str]:
    """Return a warning about groups with few runs."""
    few = [label for label, runs in groups.items() if len(runs) < LEAST]
    if not few:
        return []
    which = "every group" if len(few) == len(groups) else ", ".join(few)
    return [
        f"fewer than {LEAST} runs in {which}: mean, spread and p say little; repeat them with more "
        "seeds, such as seed=0,1,2,3,4"
    ]
