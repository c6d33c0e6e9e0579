"""A text as a stream of windows that continue each other, for truncated back-propagation."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from bilevel import Batch, BilevelError, Stream


class Windows(Stream):
    """Consecutive windows of a text that is laid out in rows, so that the state after one window is the state before the next.

    The tokens are cut into `batch_size` rows of equal length; a batch is a window of all rows,

        (tokens [B, T], the tokens that follow them [B, T], whether a row begins here [B])

    and an example is a row's part of it. At the end of the rows the last, shorter window is left out of training.

    Args:
        tokens: of one split.
        batch_size: rows.
        length: T, the tokens of a window.
        vocabulary: the words, which a checkpoint must agree with.
        name: what errors call this split.
        evaluation_batch_size: rows in evaluation, where every token but the few that do not fill a column is predicted once.

    Raises:
        BilevelError: there are too few tokens for one window.

    Example:
        >>> stream = Windows(torch.arange(13), 2, 3, evaluation_batch_size=1)
        >>> tokens, targets, begins = stream.next()
        >>> tokens.tolist(), targets.tolist(), begins.tolist()
        ([[0, 1, 2], [6, 7, 8]], [[1, 2, 3], [7, 8, 9]], [True, True])
        >>> stream.next()[0].tolist(), stream.steps_per_epoch
        ([[3, 4, 5], [9, 10, 11]], 2)
    """

    def __init__(
        self,
        tokens: Int[Tensor, " n"],
        batch_size: int,
        length: int,
        *,
        vocabulary: Sequence[str] = (),
        device: torch.device | str = "cpu",
        name: str = "train",
        evaluation_batch_size: int = 10,
    ) -> None:
        for option, value in (
            ("batch_size", batch_size),
            ("bptt", length),
            ("evaluation_batch_size", evaluation_batch_size),
        ):
            if value < 1:
                raise BilevelError(f"{option}={value} is below 1; choose {option} ≥ 1")
        columns = (len(tokens) - 1) // batch_size
        if columns < length:
            raise BilevelError(
                f"the {name} split has {len(tokens):,} tokens, too few for {batch_size} rows of {length} and the token that "
                "follows; lower batch_size or bptt, or give a longer text"
            )
        self.tokens = tokens.to(device)
        self.batch_size, self.length, self.name = batch_size, length, name
        self.evaluation_batch_size = min(evaluation_batch_size, (len(tokens) - 1) // length)
        self.words, self.digest = (
            len(vocabulary),
            hashlib.sha256("\n".join(vocabulary).encode()).hexdigest(),
        )
        self.steps_per_epoch = columns // length
        self.size = batch_size * self.steps_per_epoch
        self.examples = 0
        self._position = 0
        self._rows = self._laid_out(batch_size)
        self._begins = {
            first: torch.full((batch_size,), first, device=device) for first in (True, False)
        }

    def next(self) -> Batch:
        self._position = self._position % self.steps_per_epoch + 1
        self.examples += self.batch_size
        return self._window(self._position - 1)

    def peek(self) -> Batch:
        return self._window(0)

    def once(self, limit: int | None = None) -> Iterator[Batch]:
        inputs, targets = self._laid_out(self.evaluation_batch_size)
        rows, columns = inputs.shape
        for start in range(0, columns, self.length):
            if limit is not None and start // self.length * rows >= limit:
                return
            window = slice(start, start + self.length)
            begins = torch.full((rows,), start == 0, device=inputs.device)
            yield inputs[:, window], targets[:, window], begins

    def state_dict(self) -> dict[str, Any]:
        position = {"examples": self.examples, "position": self._position}
        return position | {
            "tokens": len(self.tokens),
            "words": self.words,
            "vocabulary": self.digest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["vocabulary"] != self.digest:
            differ = f"{state['words']:,} words and this text {self.words:,}"
            raise BilevelError(
                f"the checkpoint's vocabulary is another: it has {differ if state['words'] != self.words else 'other words'}; "
                "resume it with the text, the Python and the vocabulary_size that it was started with"
            )
        if state["tokens"] != len(self.tokens):
            raise BilevelError(
                f"the checkpoint's {self.name} split has {state['tokens']:,} tokens, this one has {len(self.tokens):,}: "
                "the text changed"
            )
        self.examples, self._position = state["examples"], state["position"]

    def _laid_out(self, rows: int) -> tuple[Tensor, Tensor]:
        """Tokens and those that follow, [rows, columns] each."""
        columns = (len(self.tokens) - 1) // rows
        inputs, targets = self.tokens[: rows * columns], self.tokens[1 : rows * columns + 1]
        return inputs.view(rows, columns), targets.view(rows, columns)

    def _window(self, position: int) -> Batch:
        window = slice(position * self.length, (position + 1) * self.length)
        return self._rows[0][:, window], self._rows[1][:, window], self._begins[position == 0]
