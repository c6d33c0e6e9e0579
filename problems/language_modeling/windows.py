"""A text as a stream of consecutive windows, for truncated back-propagation."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from bilevel import Batch, BilevelError, Stream
from bilevel.validate import whole


class Windows(Stream):
    """Consecutive windows of a text in rows; each window continues the state of the last one.

    The tokens are cut into `batch_size` rows of equal length. A batch is a window of all rows,

        (tokens [B, T], the tokens that follow them [B, T], whether a row begins here [B])

    and an example is the part of one row. Training leaves out the last, shorter window of the rows.

    Args:
        tokens: tokens of one split.
        batch_size: number of rows.
        length: T, the number of tokens in a window.
        vocabulary: the words; those of a checkpoint must be equal.
        device: device of the batches.
        name: name of the split in errors.
        evaluation_batch_size: number of rows in evaluation. Evaluation predicts every token once,
            except the few that do not fill a column.

    Raises:
        BilevelError: a size is below 1, or there are too few tokens for one window.

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
        whole(1, batch_size=batch_size, bptt=length, evaluation_batch_size=evaluation_batch_size)
        columns = (len(tokens) - 1) // batch_size
        if columns < length:
            raise BilevelError(
                f"the {name} split has {len(tokens):,} tokens, which is too few for {batch_size} "
                f"rows of {length} tokens and one more; lower batch_size or bptt, or give a longer "
                "text"
            )
        self.tokens = tokens.to(device)
        self.batch_size = batch_size
        self.length = length
        self.name = name
        self.evaluation_batch_size = min(evaluation_batch_size, (len(tokens) - 1) // length)
        self.words = len(vocabulary)
        self.digest = hashlib.sha256("\n".join(vocabulary).encode()).hexdigest()
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
            differ = (
                f"{state['words']:,} words and this text {self.words:,} words"
                if state["words"] != self.words
                else "other words than this text"
            )
            raise BilevelError(
                f"the vocabulary of the checkpoint has {differ}; resume the run with the text, the "
                "Python and the vocabulary_size that it started with"
            )
        if state["tokens"] != len(self.tokens):
            raise BilevelError(
                f"the {self.name} split of the checkpoint has {state['tokens']:,} tokens, and this "
                f"one has {len(self.tokens):,}; resume the run with the text that it started with"
            )
        self.examples, self._position = state["examples"], state["position"]

    def _laid_out(self, rows: int) -> tuple[Tensor, Tensor]:
        """Return tokens and the tokens that follow them, [rows, columns] each."""
        columns = (len(self.tokens) - 1) // rows
        inputs, targets = self.tokens[: rows * columns], self.tokens[1 : rows * columns + 1]
        return inputs.view(rows, columns), targets.view(rows, columns)

    def _window(self, position: int) -> Batch:
        window = slice(position * self.length, (position + 1) * self.length)
        return self._rows[0][:, window], self._rows[1][:, window], self._begins[position == 0]
