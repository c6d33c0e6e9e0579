"""A cheaper response: its pass at every n-th inner step, or on a part of the batch."""

import math
from dataclasses import dataclass

from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel import Batch, Carry, Problem, Refused
from bilevel.params import count_examples
from bilevel.validate import is_number, whole, wrong

ROUNDING = 1e-9
"""A product of a fraction and a number of examples that is this near a whole number is one."""


@dataclass(frozen=True)
class CheaperPass:
    """The inner steps and the examples of the response pass.

    Attributes:
        every: n; the pass belongs to the first inner step, and then to every n-th one.
        fraction: f; the pass takes the first ⌈f·B⌉ examples of a batch of B.
    """

    every: int = 1
    fraction: float = 1.0

    def check(self, *, separate: bool) -> None:
        """Raise if a setting is wrong, or if w₀ and Θ have no separate steps.

        Raises:
            BilevelError: that.
        """
        whole(1, response_every=self.every)
        if not (is_number(self.fraction) and 0 < self.fraction <= 1):
            what, remedy = "must be above 0 and at most 1", "0.5 takes half of every batch"
            raise wrong("response_fraction", self.fraction, what, remedy)
        for name, value in (("every", self.every), ("fraction", self.fraction)):
            if value != 1 and not separate:
                why = "needs regularized_w0=True, because otherwise w₀ and Θ take one joint step"
                raise wrong(
                    f"response_{name}", value, why, f"set response_{name}=1 or regularized_w0=true"
                )

    @property
    def whole(self) -> bool:
        """Return whether every inner step has the pass, on the whole batch."""
        return self.every == 1 and self.fraction == 1

    def due(self, count: int) -> bool:
        """Return whether the inner step of this number, from 1, has the pass."""
        return (count - 1) % self.every == 0

    def part(self, batch: Batch) -> Batch:
        """Return the examples of the pass."""
        examples = count_examples(batch)
        kept = max(1, math.ceil(self.fraction * examples - ROUNDING))
        if kept == examples:
            return batch
        return pytree.tree_map(
            lambda x: x[:kept] if isinstance(x, Tensor) and x.ndim and len(x) == examples else x,
            batch,
        )

    def carry(self, problem: Problem, carry: Carry, batch: Batch, part: Batch) -> Carry:
        """Return the carry of a batch for a part of it: rows of examples are cut as they are.

        Raises:
            Refused: the shape does not show which axis holds the examples.
        """
        examples, kept = count_examples(batch), count_examples(part)
        if not carry or kept == examples:
            return carry
        fresh = problem.fresh_carry(carry, part)
        return {n: self._cut(n, t, fresh[n].shape, examples, kept) for n, t in carry.items()}

    def _cut(
        self, name: str, tensor: Tensor, shape: tuple[int, ...], examples: int, kept: int
    ) -> Tensor:
        if tuple(tensor.shape) == tuple(shape):
            return tensor
        axes = [i for i in range(tensor.ndim) if tensor.shape[i] != shape[i]]
        fits = tensor.ndim == len(shape) and len(axes) == 1
        if fits and (tensor.shape[axes[0]], shape[axes[0]]) == (examples, kept):
            return tensor.narrow(axes[0], 0, kept)
        raise Refused(
            f"response_fraction={self.fraction:g} needs a carry with an axis of examples, and "
            f"`{name}` of shape {tuple(tensor.shape)} becomes {tuple(shape)} for {kept} of "
            f"{examples} examples; set response_fraction=1 (response_every=2 saves as much)"
        )

    @property
    def step(self) -> int:
        """Return by how many examples a batch must differ, so that its part surely differs."""
        return math.ceil(1 / self.fraction)
