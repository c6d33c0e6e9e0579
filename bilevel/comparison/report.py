"""A report on runs: for each problem what its solvers reached, at what cost, how sure that is, and its pictures."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    "There are many groups: each is compared with that of lowest mean alone, which was chosen by these same numbers, so that p "
    "flatters it"
)
TESTED = {"best validation loss": LOSS, "test loss at that evaluation": "test_loss"}


@dataclass(frozen=True, kw_only=True)
class Section:
    """What is told of the runs on one problem.

    Attributes:
        problem: its name.
        groups: its runs by label.
        target: the validation loss whose cost is told; None where no run has a loss.
        chosen: where the target comes from.
        quality, cost, step: what was reached, what it cost, and what a step costs.
        pairs: the paired comparisons, by what is compared.
        everyone: whether they are all pairs.
        notes: what a reader must know of these runs.
        pictures: as PNG.
    """

    problem: str
    groups: Mapping[str, Sequence[Run]]
    target: float | None
    chosen: str
    quality: Rows
    cost: Rows
    step: Rows
    pairs: Mapping[str, Sequence[Paired]]
    everyone: bool
    notes: Sequence[str]
    pictures: Sequence[Picture]


def sections(
    runs: Sequence[Run],
    *,
    x: str = "seconds",
    target: float | None = None,
    best_so_far: bool = False,
) -> list[Section]:
    """A section for each problem.

    Args:
        runs: of any problems and solvers, labelled; see `read_runs`.
        x: what curves are drawn against: `epochs`, `seconds` or `examples`.
        target: the validation loss whose cost is told; by default the highest of the groups' mean best losses.
        best_so_far: curves of the running minimum.
    """
    made = []
    for problem, groups in group_runs(runs).items():
        goal = common_target(groups) if target is None else target
        tests = {}
        everyone = True
        for words, name in TESTED.items():
            pairs, everyone = paired(groups, lambda run, name=name: run.at_best(name))  # type: ignore[misc]
            if pairs:
                tests[words] = pairs
        made.append(
            Section(
                problem=problem,
                groups=groups,
                target=goal,
                chosen=_chosen(groups, target),
                quality=rows(groups, QUALITY),
                cost=rows(groups, (*targeted(goal), *COST)),
                step=rows(groups, STEP),
                pairs=tests,
                everyone=everyone,
                notes=_notes(groups),
                pictures=pictures(groups, x, best_so_far=best_so_far),
            )
        )
    return made


def _chosen(groups: Mapping[str, Sequence[Run]], target: float | None) -> str:
    if target is None:
        return "the highest of the solvers' mean best losses, diverged runs aside"
    come = any(reached(run, target) is not None for runs in groups.values() for run in runs)
    return "as asked for" if come else "as asked for, and no run has come down to it"


def printed(section: Section) -> list["RenderableType"]:
    """The tables of a section as rich prints them."""
    told: list[RenderableType] = [
        rich_table(section.quality, f"{section.problem}: what was reached"),
        rich_table(section.cost, f"{section.problem}: what it cost"),
        rich_table(section.step, f"{section.problem}: what a step costs"),
    ]
    for words, pairs in section.pairs.items():
        told.append(rich_table(pair_rows(pairs), f"{section.problem}: paired over seeds, {words}"))
    return [*told, *section.notes]


def write_report(
    made: Sequence[Section], out: Path, *, faults: Sequence[str] = (), warn: Warn
) -> Path | None:
    """Write `report.html` and the pictures into `out`; the report's place, or None where it could not be written.

    Args:
        made: the sections.
        out: a directory, made where it is missing.
        faults: what could not be read, told on the page too.
        warn: hears of what cannot be written; the rest still is.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        warn(f"cannot make {out}: {error.strerror or error}; choose another directory with --out")
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
        parts += [html_page.paragraph("What could not be read:"), html_page.bullets(faults)]
    for section in made:
        parts += _section(section)
    return [*parts, *_reading()]


def _section(section: Section) -> list[str]:
    parts = [html_page.heading(section.problem), html_page.bullets(section.notes)]
    parts += [html_page.heading("What was reached", 3), html_page.table(section.quality)]
    parts += [
        html_page.paragraph(
            "At the evaluation of lowest validation loss of each run; mean ± standard deviation over runs.",
            pale=True,
        )
    ]
    parts += [html_page.heading("What it cost", 3), html_page.table(section.cost)]
    if section.target is not None:
        parts += [
            html_page.paragraph(
                f"The target, {section.target:.4g}, is {section.chosen}.", pale=True
            )
        ]
    parts += [html_page.heading("What a step costs", 3), html_page.table(section.step)]
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
    told = f"{count} {_plural('run', count)} in {solvers} {_plural('group', solvers)}"
    if len(made) > 1:
        told += f" on {len(made)} problems, {', '.join(section.problem for section in made)}: a section each"
    return f"{told}. A group is a solver, with the settings in which its runs differ."


def _tested(section: Section) -> str:
    pairs = "All pairs" if section.everyone else MANY_GROUPS
    return (
        f"{pairs}. Negative: the first is lower. n counts the seeds that both have; t = mean / (std / √n), p is two-sided with "
        "n − 1 degrees of freedom, and the last column is corrected after Holm for the pairs of its table. "
        "Without t: one seed, or no spread."
    )


def _reading() -> list[str]:
    notes = [
        "The lowest of many validation losses is an optimistic figure; the test loss there was not chosen for being low. "
        "The test split is looked at when a run ends: before, there is no test loss.",
        "A run that diverged, was interrupted or has not ended counts with what it had reached, and its row says so.",
        "Targets are reached at an evaluation, not between two. A number followed by (k of n) is of the k runs that have one.",
        "Time is training time, without evaluation and set-up. Examples are those that the solver drew, for training and for "
        "validation.",
        "Peak memory is that of tensors on a GPU. On a CPU it is that of the whole process, which never falls from one run "
        "of a sweep to the next.",
    ]
    return [html_page.heading("How to read this"), html_page.bullets(notes)]


def _notes(groups: Mapping[str, Sequence[Run]]) -> list[str]:
    """What is not as it should be with these runs."""
    notes = []
    for label, runs in groups.items():
        for run in runs:
            if run.status == "running":
                notes.append(
                    f"{label}, seed {run.seed}: has not ended, or was killed ({run.evaluations} evaluations so far)"
                )
            elif run.status != "finished":
                message = str((run.summary or {}).get("message") or run.status)
                notes.append(f"{label}, seed {run.seed}: {message.partition(';')[0]}")
        seeds = [run.seed for run in runs]
        if len(set(seeds)) < len(seeds):
            notes.append(
                f"{label}: several runs have the same seed; n counts them all, the paired test takes their mean"
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
    """Names as the beginning of a file's; numbered where two would be the same."""
    stems = [re.sub(r"[^\w.-]+", "-", name)[:60] or "problem" for name in names]
    return [
        f"{stem}-{index}" if stems.count(stem) > 1 else stem for index, stem in enumerate(stems)
    ]


def _title(made: Sequence[Section]) -> str:
    return f"{TITLE}: {', '.join(section.problem for section in made[:3])}{' …' if len(made) > 3 else ''}"


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"
