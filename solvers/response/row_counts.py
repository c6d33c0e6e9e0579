"""The rows of an input that belong to each example: found by the dry run, required afterwards.

The first axis of an input may hold B rows, or B·k with the k rows of each example together (tokens,
windows). Or all examples share the input (position ids, tables). The shape alone does not tell
these apart. So `RowCounts` notes every call of a weight in rounds of two sizes of a batch, and
`base/row_check.py` compares the results with those of dense weights.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from bilevel import BilevelError

SHARED = 0
"""The count of an input that all examples share."""

PER_BATCH = "set solver.per_example=false"
"""The remedy that always works: one perturbation for a batch, with plain weights."""


class Call(NamedTuple):
    """A call of a function with a per-example weight: the split, the weight, and its number."""

    split: str
    label: str
    number: int


@dataclass(eq=False)
class RowCounts:
    """The rows for each example of every call; a weight takes its `Counter` from here.

    Attributes:
        split: "train" or "valid", the kind of the present batch.
        closed: whether counts are required; before, they are found.
        found: the count of each call.
        revised: whether a second size of the batch has changed a count.
    """

    split: str = "train"
    closed: bool = False
    found: dict[Call, int] = field(default_factory=dict)
    revised: bool = False
    _sizes: dict[Call, dict[int, int]] = field(default_factory=dict)

    def folds(self) -> bool:
        """Return whether an input of the present split has another count than 1."""
        return any(k != 1 for call, k in self.found.items() if call.split == self.split)

    def count(self, call: Call, rows: int, examples: int, *, may_share: bool) -> int | None:
        """Return k, `SHARED`, or None if `rows` are not those of the examples."""
        if self.closed:
            known = self.found.get(call, 1)
            fits = rows == known * examples or (known == SHARED and (may_share or rows == 1))
            return known if fits else None
        sizes = self._sizes.setdefault(call, {})
        sizes[examples] = rows
        constant = len(sizes) > 1 and set(sizes.values()) == {rows}
        k = guess(rows, examples, may_share=may_share)
        if rows > 1 and constant:
            k = SHARED if may_share else None
        before = self.found.get(call, k)
        if k is None or k not in (before, SHARED):
            return None
        self.revised = self.revised or before != k
        self.found[call] = k
        return k


def guess(rows: int, examples: int, *, may_share: bool) -> int | None:
    """Return the count that a shape suggests."""
    if rows == 1 and examples > 1:
        return SHARED
    if rows and rows % examples == 0:
        return rows // examples
    return SHARED if may_share else None


@dataclass(eq=False)
class Counter:
    """Numbers the calls of one weight in one pass.

    Attributes:
        counts: where they are noted; None accepts whatever the shape suggests.
        calls: the calls so far.
    """

    counts: RowCounts | None = None
    calls: int = 0

    def count(self, label: str, x: Tensor, rows: int, examples: int, *, may_share: bool) -> int:
        """Return k of the next call, or `SHARED`.

        Raises:
            BilevelError: the first axis of `x` is not that of the examples, or the count is another
                one than at set-up.
        """
        if self.counts is None:
            k = guess(rows, examples, may_share=may_share)
        else:
            call = Call(self.counts.split, label, self.calls)
            self.calls += 1
            k = self.counts.count(call, rows, examples, may_share=may_share)
        if k is not None:
            return k
        if self.counts is not None and self.counts.closed:
            raise BilevelError(
                f"`{label}` acts on an input of shape {tuple(x.shape)} for {examples} examples, "
                "but at set-up it had another number of rows for each example; give every batch "
                f"the same shape, without rows that depend on the data, or {PER_BATCH}"
            )
        raise BilevelError(
            f"`{label}` is perturbed for {examples} examples, but its input has the shape "
            f"{tuple(x.shape)}; keep the example axis first, with the rows of each example "
            f"together and as many for all, or {PER_BATCH}"
        )


class Counted:
    """A per-example weight, mixed into a subclass of Tensor.

    Attributes:
        examples: B.
        label: the name of the weight in error messages.
        counter: finds, or requires, the rows of each input that belong to one example.
    """

    examples: int
    label: str
    counter: Counter

    def check_examples(self, x: Tensor) -> int:
        """Return k, the number of rows of the input `x` for each example.

        The first axis of `x` may hold B·k rows, with the k rows of each example together. Or it is
        one row, which all examples share; then k = 1, and the output has B rows by broadcasting.

        Raises:
            BilevelError: the first axis of `x` is not the example axis.
        """
        return max(1, self.count_rows(x, len(x) if x.ndim else 0, may_share=False))

    def count_rows(self, x: Tensor, rows: int, *, may_share: bool) -> int:
        """Return k for an input with `rows` rows, or `SHARED`."""
        return self.counter.count(self.label, x, rows, self.examples, may_share=may_share)
