"""Findings about a problem, and the type of the laws that yield them."""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from bilevel.checks.first_batch import FirstBatch


class Finding(NamedTuple):
    """One sentence about a problem; an `error` will spoil runs, a `note` may be intended.

    Attributes:
        level: `error` or `note`.
        text: the sentence.
        cause: the message of the error that it explains; empty without one.
    """

    level: Literal["error", "note"]
    text: str
    cause: str = ""


Law = Callable[[FirstBatch], Iterator[Finding]]
"""Yields a finding for every violation of one property."""
