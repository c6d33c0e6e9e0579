"""The table of settings that differ between the groups on one problem."""

from collections.abc import Mapping, Sequence
from typing import Any

from bilevel.comparison.labels import ABSENT, flatten, value_text
from bilevel.comparison.part import Part
from bilevel.comparison.runs import Run
from bilevel.comparison.table import Rows

NONE = "–"
"""Stands where a group has no such setting."""
LONG = 40
"""Letters of a value above which it is cut, with a sign."""
NOTE = (
    "Settings from config.yaml that differ between groups. A setting of the solver is compared "
    f"between the groups that have it; {NONE} stands for the others."
)


def settings_table(groups: Mapping[str, Sequence[Run]]) -> Part | None:
    """Return the table of settings; None where all groups have the same ones.

    Each setting has a row, and each group a column.
    """
    known = {label: [flatten(run.config) for run in runs] for label, runs in groups.items()}
    keys = dict.fromkeys(key for of in known.values() for flat in of for key in flat)
    cells = []
    for key in keys:
        values = {label: _of_group(of, key) for label, of in known.items()}
        if _differs(key, list(values.values())):
            cells.append(
                [
                    key.removesuffix("._target_"),
                    *(_short(values[label]) or NONE for label in groups),
                ]
            )
    if not cells:
        return None
    return Part("Settings that differ", Rows(["setting", *groups], cells), NOTE)


def _of_group(settings: Sequence[Mapping[str, Any]], key: str) -> str:
    """Return the values of a setting in the runs of a group, or nothing without one."""
    found = (flat.get(key, ABSENT) for flat in settings if flat)
    texts = dict.fromkeys(value_text(key, value) for value in found if value is not ABSENT)
    return " or ".join(texts)


def _differs(key: str, values: Sequence[str]) -> bool:
    # another solver has other settings, which its name implies
    compared = [value for value in values if value] if key.startswith("solver.") else values
    return len(set(compared)) > 1


def _short(text: str) -> str:
    return text if len(text) <= LONG else f"{text[: LONG - 2]} …"
