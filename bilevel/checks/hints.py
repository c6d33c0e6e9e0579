"""Remedies for errors of PyTorch that a hyperparameter in a loss is known to cause."""

from bilevel.text import describe

HINTS = {
    ("cross_entropy_loss", "label_smoothing"): "bilevel.cross_entropy, whose label_smoothing and "
    "class_weights may be hyperparameters",
    ("nll_loss", "argument 'weight'"): "bilevel.cross_entropy, whose class_weights have a "
    "derivative",
}
"""The function to use instead, by parts of the message of an error."""


def hint(error: BaseException) -> str:
    """Return '; use …' for a known error, or nothing."""
    text = str(error)
    return next(
        (f"; use {use}" for parts, use in HINTS.items() if all(part in text for part in parts)), ""
    )


def described(error: BaseException) -> str:
    """Return the class and the first line of an error, with the remedy if it is known."""
    return describe(error) + hint(error)
