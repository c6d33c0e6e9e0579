"""Few-shot regression on sinusoids."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from bilevel.problems.few_shot.problem import FewShot
from bilevel.problems.few_shot.tasks import sinusoids
from bilevel.problems.networks.mlp import MLP
from bilevel.validate import whole


def sinusoid(
    hidden: Sequence[int] = (40, 40), shots: int = 10, queries: int = 10, **options: Any
) -> FewShot:
    """Return regression on sinusoids from few points, by an MLP.

    Args:
        hidden: widths of the hidden layers.
        shots: number of support points of a task.
        queries: number of query points of a task.
        options: other arguments of `FewShot`.

    Example:
        >>> sinusoid().space["initialization"].shape
        (1761,)

    Raises:
        BilevelError: a task has no points, or `FewShot` raises it.
    """
    whole(1, shots=shots, queries=queries)
    return FewShot(partial(MLP, [1, *hidden, 1]), sinusoids(shots, queries), **options)
