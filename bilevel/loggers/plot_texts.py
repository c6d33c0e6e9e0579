"""The texts of plots: names as they are, lines that fit, and letters that a font lacks."""

import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LETTERS = 15.0
"""Letters that fit into an inch, at the sizes of the style."""


def plain_names(figure: "Figure") -> None:
    """Show dollar signs in names as they are; the numbers at the axes stay formulas."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if isinstance(text, Text) and "$" in (shown := text.get_text()):
            text.set_parse_math(r"\mathdefault" in shown)


def fit_texts(figure: "Figure") -> None:
    """Break the title, and the titles and names of axes, where they would leave their place."""
    width, height = figure.get_figwidth(), figure.get_figheight()
    if title := figure.get_suptitle():
        figure.suptitle(broken(title, 0.8 * width * LETTERS))
    for ax in figure.axes:
        if (place := ax.get_subplotspec()) is None:
            continue
        rows, columns = place.get_gridspec().get_geometry()
        ax.set_title(broken(ax.get_title(), 0.75 * width / columns * LETTERS))
        ax.set_ylabel(broken(ax.get_ylabel(), 0.75 * height / rows * LETTERS))


def broken(text: str, letters: float) -> str:
    r"""Return a text in at most two lines; the second one ends in … if more is left out.

    Example:
        >>> broken("weight decay of the attention layers", 14)
        'weight decay\nof the attent…'
        >>> broken("decay", 14)
        'decay'
    """
    most = max(8, int(letters))
    first, *others = textwrap.wrap(text, most) or [""]
    if not others:
        return first
    return f"{first}\n{shortened(' '.join(others), most)}"


def shortened(text: str, letters: float, *, tail: int = 0) -> str:
    """Return a text, with … in place of its end or of a part before the last `tail` letters.

    Example:
        >>> shortened("a long name", 7), shortened("a long name (n = 3)", 14, tail=7)
        ('a long…', 'a long…(n = 3)')
    """
    most = int(letters)
    if len(text) <= most:
        return text
    return f"{text[: most - tail - 1]}…{text[len(text) - tail :]}"


@contextmanager
def without_glyph_warnings() -> Iterator[None]:
    """Give no warning about a letter that the font lacks; the picture has a box in its place."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        yield
