"""The text of the report page: headings, tables, pictures and explanations."""

from collections.abc import Sequence

from bilevel.comparison import html_page
from bilevel.comparison.paired_table import paired_tables
from bilevel.comparison.part import Part
from bilevel.comparison.section import Section
from bilevel.comparison.table import MARK_NOTE
from bilevel.comparison.wide_table import blocks

TITLE = "Runs compared"
WIDTH = 104
"""Letters in a row of a table, which fit on a screen and on a printed page."""
LABEL = 40
"""Letters of a label after which a browser breaks it into lines."""


def document(made: Sequence[Section], origin: Part, faults: Sequence[str]) -> list[str]:
    """Return the parts of the page: title, warnings, sections, explanations and origin."""
    count = sum(len(runs) for section in made for runs in section.groups.values())
    parts = [
        html_page.heading(title(made), 1),
        html_page.paragraph(_opening(made, count), pale=True),
    ]
    if faults:
        parts += [html_page.paragraph("Files that cannot be read:"), html_page.bullets(faults)]
    for section in made:
        parts += _section(section)
    return [*parts, *_reading(), *_table(origin)]


def _section(section: Section) -> list[str]:
    parts = [html_page.heading(section.problem), html_page.bullets(section.notes)]
    for part in section.tables:
        parts += _table(part)
    parts += [html_page.picture(picture.png, picture.caption) for picture in section.pictures]
    for part in paired_tables(section.pairs, all_pairs=section.all_pairs):
        parts += _table(part)
    return parts


def _table(part: Part) -> list[str]:
    """Return heading, rows and note of a table; a wide one continues below."""
    made = [html_page.heading(part.title, 3)]
    for number, block in enumerate(blocks(part.rows, WIDTH, part.fixed, label=LABEL)):
        if number:
            made.append(html_page.paragraph(f"{part.title}, continued:", pale=True))
        made.append(html_page.table(block, words=part.words))
    notes = [part.note, MARK_NOTE if part.rows.marks else ""]
    text = " ".join(filter(None, notes))
    return [*made, html_page.paragraph(text, pale=True)] if text else made


def _opening(made: Sequence[Section], count: int) -> str:
    solvers = sum(len(section.groups) for section in made)
    text = f"{count} {_plural('run', count)} in {solvers} {_plural('group', solvers)}"
    if len(made) > 1:
        text += (
            f" on {len(made)} problems, {', '.join(section.problem for section in made)}, "
            "each in its own section"
        )
    return f"{text}. A group is a solver, with the settings in which its runs differ."


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


def title(made: Sequence[Section]) -> str:
    """Return the title of the report."""
    return (
        f"{TITLE}: "
        f"{', '.join(section.problem for section in made[:3])}{' …' if len(made) > 3 else ''}"
    )


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"
