"""Shards: the examples of a batch that one rank computes, and their part of its tensors."""

from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel.params import Batch, Hypers
from bilevel.space import Space


class Shard(NamedTuple):
    """Examples `start` up to `stop` of a batch of `whole` examples."""

    start: int
    stop: int
    whole: int

    @property
    def size(self) -> int:
        """Return the number of examples."""
        return self.stop - self.start

    @property
    def weight(self) -> float:
        """Return the weight of their mean in the mean over the batch."""
        return self.size / self.whole

    @property
    def rows(self) -> slice:
        """Return the slice of the examples."""
        return slice(self.start, self.stop)

    def of(self, batch: Batch) -> Batch:
        """Return their part of a batch; leaves without an example axis stay whole."""

        def part(x: Any) -> Any:
            return x[self.rows] if isinstance(x, Tensor) and x.ndim and len(x) == self.whole else x

        return pytree.tree_map(part, batch)

    def of_hypers(self, space: Space, hypers: Hypers) -> Hypers:
        """Return λ with their rows of the leaves that are given per example, [B, *shape]."""
        return {
            name: leaf[self.rows]
            if name in space and leaf.ndim > len(space[name].shape) and len(leaf) == self.whole
            else leaf
            for name, leaf in hypers.items()
        }


def even_shards(examples: int, world: int) -> list[Shard]:
    """Cut a batch into contiguous shards, whose sizes differ by at most one.

    Example:
        >>> [shard.size for shard in even_shards(8, 3)]
        [3, 3, 2]
    """
    least, more = divmod(examples, world)
    starts = [rank * least + min(rank, more) for rank in range(world + 1)]
    return [Shard(start, stop, examples) for start, stop in pairwise(starts)]
