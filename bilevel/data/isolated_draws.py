"""Iteration of loaders whose random draws follow from a seed and disturb no generator."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from bilevel.params import Batch


def generators_of(loader: Iterable[Batch]) -> list[torch.Generator]:
    """Return the generators that the loader draws from: the global one, its own, its samplers'."""
    batches = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    own = [getattr(owner, "generator", None) for owner in owners]
    return list(
        dict.fromkeys(
            [torch.default_generator, *(g for g in own if isinstance(g, torch.Generator))]
        )
    )


def isolated(
    batches: Iterable[Any], generators: Sequence[torch.Generator], seed: int
) -> Iterator[Any]:
    """Yield the items of `batches`, with all draws from `generators` following from `seed`.

    Between items the generators have the states that they had before. Samplers and workers may draw
    as late as at the first item, so the seed must hold then, not only at `iter`.
    `torch.manual_seed` would seed the generators of the GPU too.
    """
    states = [torch.Generator(g.device).manual_seed(seed).get_state() for g in generators]
    iterator: Iterator[Any] | None = None
    while True:
        outside = [g.get_state() for g in generators]
        for g, state in zip(generators, states, strict=True):
            g.set_state(state)
        try:
            iterator = iter(batches) if iterator is None else iterator
            item = next(iterator)
        except StopIteration:
            return
        finally:
            states = [g.get_state() for g in generators]
            for g, state in zip(generators, outside, strict=True):
                g.set_state(state)
        yield item
