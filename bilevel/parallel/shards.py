"""Which examples of a batch are a rank's own, and that part of what goes with them."""

from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel.params import Batch, Hypers
from bilevel.space import Space


class Shard(NamedTuple):
    """Examples `start` up to `stop` of a batch of `whole`."""

    start: int
    stop: int
    whole: int

    @property
    def size(self) -> int:
        """How many they are."""
        return self.stop - self.start

    @property
    def weight(self) -> float:
        """What their mean counts in the mean over the batch."""
        return self.size / self.whole

    @property
    def rows(self) -> slice:
        """Where they lie."""
        return slice(self.start, self.stop)

    def of(self, batch: Batch) -> Batch:
        """Their part of a batch; what has no example axis stays whole."""

        def part(x: Any) -> Any:
            return x[self.rows] if isinstance(x, Tensor) and x.ndim and len(x) == self.whole else x

        return pytree.tree_map(part, batch)

    def of_hypers(self, space: Space, hypers: Hypers) -> Hypers:
        """Their rows of the leaves that are given per example, [B, *shape]."""
        return {
            name: leaf[self.rows]
            if name in space and leaf.ndim > len(space[name].shape) and len(leaf) == self.whole
            else leaf
            for name, leaf in hypers.items()
        }


def even_shards(examples: int, world: int) -> list[Shard]:
    """A batch in contiguous parts, whose sizes differ by one at most.

    Example:
        >>> [shard.size for shard in even_shards(8, 3)]
        [3, 3, 2]
    """
    least, more = divmod(examples, world)
    starts = [rank * least + min(rank, more) for rank in range(world + 1)]
    return [Shard(start, stop, examples) for start, stop in pairwise(starts)]
