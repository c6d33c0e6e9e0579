"""Errors of a user's own code: their place, and remedies for known ones of PyTorch."""

import re
import sysconfig
import traceback
from pathlib import Path

import torch

from bilevel.text import describe, first_line

HINTS = {
    ("cross_entropy_loss", "label_smoothing"): "bilevel.cross_entropy, whose label_smoothing and "
    "class_weights may be hyperparameters",
    ("nll_loss", "argument 'weight'"): "bilevel.cross_entropy, whose class_weights have a "
    "derivative",
}
"""The function to use instead, by parts of the message of an error."""
OTHERS = (
    Path(torch.__file__).parents[1],  # its site-packages, which a venv may borrow
    Path(__file__).parents[1],
    *(Path(sysconfig.get_path(name)) for name in ("stdlib", "platlib")),
)
"""Folders of code that is no user's own."""


def hint(error: BaseException) -> str:
    """Return '; use …' for a known error, or nothing."""
    text = str(error)
    return next(
        (f"; use {use}" for parts, use in HINTS.items() if all(part in text for part in parts)), ""
    )


def described(error: BaseException) -> str:
    """Return the class and the first line of an error, with the remedy if it is known."""
    return describe(error) + hint(error)


def without_hint(error: BaseException) -> str:
    """Return the message of an error without PyTorch's advice at its end."""
    return re.split(r"\.? Hint:|\.$", first_line(error))[0]


def remedy_of(error: BaseException) -> str:
    """Return what to use in place of an operation that autograd refuses, or nothing."""
    return " (x * 2, not x.mul_(2))" if "inplace operation" in str(error) else ""


def refusal(error: BaseException) -> str:
    """Return why a solver cannot take a step, with what to do."""
    change = "change that call"
    if "inplace" in str(error):
        change = "write to no tensor in place (x * 2, not x.mul_(2))"
    where = place(error)
    reason = f"a step of it raises {describe(error)}{where}"
    if not where:  # PyTorch itself, where it computes a derivative
        reason = f"a step of it fails ({type(error).__name__}: {without_hint(error)})"
    return f"{reason}; {change}, or use another solver"


def place(error: BaseException) -> str:
    """Return ' (FILE, line N)' of the last call in a user's own code, or nothing.

    Code of PyTorch, of Python and of this package is no user's own.
    """
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if frame.filename.startswith("<"):  # a session, or a notebook
            return f" (line {frame.lineno})"
        if not any(folder in file.parents for folder in OTHERS):
            return f" ({file.name}, line {frame.lineno})"
    return ""
