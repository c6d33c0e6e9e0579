"""The text of the report page: headings, tables, pictures and explanations."""

from collections.abc import Sequence

from bilevel.comparison import html_page
from bilevel.comparison.section import Section
from bilevel.comparison.table import pair_rows

TITLE = "Runs compared"
MANY_GROUPS = (
    "There are many groups, so each is compared with the group of lowest mean alone. "
    "That group was chosen by these same numbers, so p is too small"
)


def document(made: Sequence[Section], faults: Sequence[str]) -> list[str]:
    """Return the parts of the page: title, warnings, sections and explanations."""
    count = sum(len(runs) for section in made for runs in section.groups.values())
    parts = [
        html_page.heading(title(made), 1),
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


def title(made: Sequence[Section]) -> str:
    """Return the title of the report."""
    return (
        f"{TITLE}: "
        f"{', '.join(section.problem for section in made[:3])}{' …' if len(made) > 3 else ''}"
    )


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"
