"""A report on runs: quality, cost, paired tests and pictures for each problem."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING

from bilevel.comparison import html_page
from bilevel.comparison.cost_table import cost_table
from bilevel.comparison.curves import LOSS, common_target, reached
from bilevel.comparison.figures import pictures
from bilevel.comparison.hyper_table import hyper_table
from bilevel.comparison.mattered import mattered_table
from bilevel.comparison.notes import notes_on
from bilevel.comparison.paired_table import paired_tables
from bilevel.comparison.part import Part
from bilevel.comparison.provenance import origin
from bilevel.comparison.quality_table import quality_table
from bilevel.comparison.report_page import document, title
from bilevel.comparison.runs import Run, Warn, group_runs, label_runs
from bilevel.comparison.section import Section
from bilevel.comparison.settings_table import settings_table
from bilevel.comparison.statistics import paired
from bilevel.comparison.step_table import step_table
from bilevel.comparison.table import MARK_NOTE, rich_table
from bilevel.comparison.wide_table import blocks
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
                tables=_tables(groups, goal, _target_source(groups, target)),
                pairs=tests,
                all_pairs=all_pairs,
                notes=notes_on(groups),
                pictures=pictures(groups, x, best_so_far=best_so_far),
            )
        )
    return made


def _tables(
    groups: Mapping[str, Sequence[Run]], target: float | None, target_source: str
) -> list[Part]:
    """Return the tables of a section in their order; a table without content is None."""
    made = (
        quality_table(groups),
        hyper_table(groups),
        mattered_table(groups),
        cost_table(groups, target, target_source),
        step_table(groups),
        settings_table(groups),
    )
    return [part for part in made if part is not None]


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


def printed(section: Section, width: int) -> list["RenderableType"]:
    """Return the notes and tables of a section for rich, at most `width` letters wide."""
    parts = [*section.tables, *paired_tables(section.pairs, all_pairs=section.all_pairs)]
    found: list[RenderableType] = list(section.notes)
    for part in parts:
        found += printed_part(part, width, f"{section.problem}: ")
    return [*found, MARK_NOTE] if any(part.rows.marks for part in parts) else found


def printed_part(part: Part, width: int, before: str = "") -> list["RenderableType"]:
    """Return the blocks of a table for rich, and its note; `before` begins the titles."""
    words = f"{before}{part.title[:1].lower()}{part.title[1:]}"
    found: list[RenderableType] = [
        rich_table(block, f"{words}{', continued' if number else ''}")
        for number, block in enumerate(blocks(part.rows, width, part.fixed))
    ]
    return [*found, part.note] if part.note else found


def origin_of(made: Sequence[Section], command: str) -> Part:
    """Return the table of the origin of all runs in the sections."""
    return origin([run for s in made for runs in s.groups.values() for run in runs], command)


def write_report(
    made: Sequence[Section],
    out: Path,
    *,
    command: str = "Python",
    faults: Sequence[str] = (),
    warn: Warn,
) -> Path | None:
    """Write `report.html` and the pictures into `out`.

    Args:
        made: the sections.
        out: a directory, which is created where it is missing.
        command: the command line that makes the report.
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
    text = html_page.page(title(made), document(made, origin_of(made, command), faults))
    return out / REPORT if _write(out / REPORT, text.encode(), warn) else None


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
