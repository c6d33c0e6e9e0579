"""A report on runs: quality, cost, paired tests and pictures for each problem."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING

from bilevel.comparison import html_page
from bilevel.comparison.curves import LOSS, common_target, reached
from bilevel.comparison.figures import Picture, pictures
from bilevel.comparison.runs import Run, Warn, group_runs
from bilevel.comparison.statistics import Paired, paired
from bilevel.comparison.table import (
    COST,
    QUALITY,
    STEP,
    Rows,
    pair_rows,
    rich_table,
    rows,
    targeted,
)
from bilevel.errors import BilevelError
from bilevel.files import write_atomically

if TYPE_CHECKING:
    from rich.console import RenderableType

REPORT = "report.html"
TITLE = "Runs compared"
MANY_GROUPS = (
    "There are many groups, so each is compared with the group of lowest mean alone. "
    "That group was chosen by these same numbers, so p is too small"
)
TESTED = {"best validation loss": LOSS, "test loss at that evaluation": "test_loss"}


@dataclass(frozen=True, kw_only=True)
class Section:
    """The results of the runs on one problem.

    Attributes:
        problem: name of the problem.
        groups: its runs by label.
        target: the validation loss whose cost is reported; None where no run has a loss.
        target_source: the choice of the target, in words.
        quality, cost, step: tables of quality, cost, and cost per step.
        pairs: the paired comparisons, by compared quantity.
        all_pairs: True where they are all pairs.
        notes: facts about these runs that a reader must consider.
        pictures: pictures as PNG.
    """

    problem: str
    groups: Mapping[str, Sequence[Run]]
    target: float | None
    target_source: str
    quality: Rows
    cost: Rows
    step: Rows
    pairs: Mapping[str, Sequence[Paired]]
    all_pairs: bool
    notes: Sequence[str]
    pictures: Sequence[Picture]


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
    text = html_page.page(_title(made), _document(made, faults))
    return out / REPORT if _write(out / REPORT, text.encode(), warn) else None


def _document(made: Sequence[Section], faults: Sequence[str]) -> list[str]:
    count = sum(len(runs) for section in made for runs in section.groups.values())
    parts = [
        html_page.heading(_title(made), 1),
        html_page.paragraph(_opening(made, count), pale=True),
    ]
    if faults:
        parts += [html_page.paragraph("Files that cannot be read:"), html_page.bullets(faults)]
    for section in made:
        parts += _section(section)
    return [*parts, *_reading()]


def _section(section: Section) -> list[str]:
    parts = [html_page.heading(section.problem), html_page.bullets(section.notes)]
    parts += [html_page.heading("Quality", 3), html_page.table(section.quality)]
    parts += [
        html_page.paragraph(
            (
                "At the evaluation of lowest validation loss of each run; mean ± standard "
                "deviation over runs."
            ),
            pale=True,
        )
    ]
    parts += [html_page.heading("Cost", 3), html_page.table(section.cost)]
    if section.target is not None:
        parts += [
            html_page.paragraph(
                f"The target, {section.target:.4g}, is {section.target_source}.", pale=True
            )
        ]
    parts += [html_page.heading("Cost per step", 3), html_page.table(section.step)]
    parts += [html_page.picture(picture.png, picture.caption) for picture in section.pictures]
    for words, pairs in section.pairs.items():
        parts += [
            html_page.heading(f"Paired over seeds: {words}", 3),
            html_page.table(pair_rows(pairs), words=(0, 1)),
        ]
    if section.pairs:
        parts += [html_page.paragraph(_tested(section), pale=True)]
    return parts


def _opening(made: Sequence[Section], count: int) -> str:
    solvers = sum(len(section.groups) for section in made)
    text = f"{count} {_plural('run', count)} in {solvers} {_plural('group', solvers)}"
    if len(made) > 1:
        text += (
            f" on {len(made)} problems, {', '.join(section.problem for section in made)}, "
            "each in its own section"
        )
    return f"{text}. A group is a solver, with the settings in which its runs differ."


def _tested(section: Section) -> str:
    pairs = "All pairs" if section.all_pairs else MANY_GROUPS
    return (
        f"{pairs}. A negative difference means that the first is lower. n is the number of "
        "seeds that both have; t = mean / (std / √n); p is two-sided with n − 1 degrees of "
        "freedom. The last column has Holm's correction for the pairs of its table. t is "
        "missing for one seed, and for equal differences."
    )


def _reading() -> list[str]:
    notes = [
        (
            "The lowest of many validation losses is optimistic, while the test loss at that "
            "evaluation was not selected. The test split is used only at the end of a run."
        ),
        (
            "A run that diverged, was interrupted or has not ended counts with its results so far, "
            "and its row names this."
        ),
        (
            "Targets are reached at an evaluation, without interpolation. A number followed by (k "
            "of n) is a mean over the k runs that have one."
        ),
        (
            "Time is training time, without evaluation and set-up. Examples are those that the "
            "solver drew, for training and for validation."
        ),
        (
            "Peak memory is that of tensors on a GPU. On a CPU it is that of the whole process, "
            "which never falls from one run of a sweep to the next."
        ),
    ]
    return [html_page.heading("How to read this"), html_page.bullets(notes)]


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


def _title(made: Sequence[Section]) -> str:
    return (
        f"{TITLE}: "
        f"{', '.join(section.problem for section in made[:3])}{' …' if len(made) > 3 else ''}"
    )


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"
