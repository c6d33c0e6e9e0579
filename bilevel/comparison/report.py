"""A report on runs: quality, cost, paired tests and pictures for each problem."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING

from bilevel.comparison import html_page
from bilevel.comparison.curves import LOSS, common_target, reached
from bilevel.comparison.figures import pictures
from bilevel.comparison.report_page import document, title
from bilevel.comparison.runs import Run, Warn, group_runs, label_runs
from bilevel.comparison.section import Section
from bilevel.comparison.statistics import paired
from bilevel.comparison.table import (
    COST,
    QUALITY,
    STEP,
    pair_rows,
    rich_table,
    rows,
    targeted,
)
from bilevel.errors import BilevelError
from bilevel.files import write_atomically
from bilevel.text import describe

if TYPE_CHECKING:
    from rich.console import RenderableType

REPORT = "report.html"
TESTED = {"best validation loss": LOSS, "test loss at that evaluation": "test_loss"}


def sections(
    runs: Sequence[Run],
    *,
    x: str = "seconds",
    target: float | None = None,
    best_so_far: bool = False,
) -> list[Section]:
    """Return a section for each problem.

    Args:
        runs: labelled runs of any problems and solvers; see `read_runs`.
        x: horizontal axis of the curves: `epochs`, `seconds` or `examples`.
        target: the validation loss whose cost is reported; by default the highest of the groups'
            mean best losses.
        best_so_far: draw curves of the running minimum.
    """
    made = []
    for problem, groups in group_runs(runs).items():
        goal = common_target(groups) if target is None else target
        tests = {}
        all_pairs = True
        for words, name in TESTED.items():
            pairs, all_pairs = paired(groups, methodcaller("at_best", name))
            if pairs:
                tests[words] = pairs
        made.append(
            Section(
                problem=problem,
                groups=groups,
                target=goal,
                target_source=_target_source(groups, target),
                quality=rows(groups, QUALITY),
                cost=rows(groups, (*targeted(goal), *COST)),
                step=rows(groups, STEP),
                pairs=tests,
                all_pairs=all_pairs,
                notes=_notes(groups),
                pictures=pictures(groups, x, best_so_far=best_so_far),
            )
        )
    return made


def usable_sections(
    runs: Sequence[Run],
    *,
    x: str = "seconds",
    target: float | None = None,
    best_so_far: bool = False,
    warn: Warn,
) -> list[Section]:
    """Return what `sections` returns, without runs whose files break it; `warn` gets each."""

    def made(of: Sequence[Run]) -> list[Section]:
        return sections(of, x=x, target=target, best_so_far=best_so_far)

    try:
        return made(runs)
    except Exception:  # a damaged run may raise anything, and the others are still reported
        kept = [run for run in runs if _works(partial(made, [run]), run, warn)]
    found = []
    for problem in dict.fromkeys(run.problem for run in kept):
        of = label_runs(run for run in kept if run.problem == problem)
        try:
            found += made(of)
        except Exception as error:
            warn(
                f"the {len(of)} runs on {problem} cannot be compared ({describe(error)}); give "
                "fewer of them"
            )
    return found


def _works(attempt: Callable[[], object], run: Run, warn: Warn) -> bool:
    try:
        attempt()
    except Exception as error:
        warn(f"{run.directory} cannot be used ({describe(error)}); this run is left out")
        return False
    return True


def _target_source(groups: Mapping[str, Sequence[Run]], target: float | None) -> str:
    if target is None:
        return "the highest of the solvers' mean best losses, diverged runs aside"
    is_reached = any(reached(run, target) is not None for runs in groups.values() for run in runs)
    return "as requested" if is_reached else "as requested, and no run has reached it"


def printed(section: Section) -> list["RenderableType"]:
    """Return the tables and notes of a section for rich."""
    tables: list[RenderableType] = [
        rich_table(section.quality, f"{section.problem}: quality"),
        rich_table(section.cost, f"{section.problem}: cost"),
        rich_table(section.step, f"{section.problem}: cost per step"),
    ]
    for words, pairs in section.pairs.items():
        tables.append(
            rich_table(pair_rows(pairs), f"{section.problem}: paired over seeds, {words}")
        )
    return [*tables, *section.notes]


def write_report(
    made: Sequence[Section], out: Path, *, faults: Sequence[str] = (), warn: Warn
) -> Path | None:
    """Write `report.html` and the pictures into `out`.

    Args:
        made: the sections.
        out: a directory, which is created where it is missing.
        faults: warnings about unreadable files, which the page repeats.
        warn: receives warnings about files that cannot be written; the rest is still written.

    Returns:
        The path of the report, or None where it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        warn(f"cannot make {out} ({error.strerror or error}); choose another directory with --out")
        return None
    for section, stem in zip(made, _stems([section.problem for section in made]), strict=True):
        for picture in section.pictures:
            _write(out / f"{stem}-{picture.name}.png", picture.png, warn)
    text = html_page.page(title(made), document(made, faults))
    return out / REPORT if _write(out / REPORT, text.encode(), warn) else None


def _notes(groups: Mapping[str, Sequence[Run]]) -> list[str]:
    """Return the irregularities of these runs."""
    notes = []
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
        seeds = [run.seed for run in runs]
        if len(set(seeds)) < len(seeds):
            notes.append(
                f"{label}: several runs have the same seed; n counts them all, and the paired test "
                "uses their mean"
            )
    return notes


def _write(path: Path, content: bytes, warn: Warn) -> bool:
    try:
        write_atomically(path, lambda file: file.write(content), mode="wb")
    except BilevelError as error:
        warn(str(error))
        return False
    return True


def _stems(names: Sequence[str]) -> list[str]:
    """Return names as beginnings of file names, numbered where two would be equal."""
    stems = [re.sub(r"[^\w.-]+", "-", name)[:60] or "problem" for name in names]
    return [
        f"{stem}-{index}" if stems.count(stem) > 1 else stem for index, stem in enumerate(stems)
    ]
