"""Draws from PyTorch's global generators (`nn.Dropout`), seeded from a given generator."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from bilevel.errors import BilevelError

Result = TypeVar("Result")


@contextmanager
def seeded(generator: torch.Generator | None) -> Iterator[None]:
    """Seed the global generators from `generator` inside; restore them afterwards.

    None leaves them as they are.
    """
    if generator is None:
        yield
        return
    device = generator.device
    on_host = device.type == "cpu"
    with torch.random.fork_rng(
        [] if on_host else [device.index or 0], device_type="cuda" if on_host else device.type
    ):
        if on_host:
            seed = int(torch.randint(2**62, (), generator=generator))
        else:
            # a number drawn on the device would have to be waited for; the state lies on the host
            seed = hash(tuple(generator.get_state().view(torch.int64).tolist())) % 2**62
            _advance(generator)
            _seed_global(device, seed)
        torch.default_generator.manual_seed(seed)
        yield


class GlobalDraws:
    """Calls of a module that are seeded if the module draws from the global generators.

    On CUDA seeding takes as long as launching a layer, and a graph cannot hold it. So the first
    call there records if the module drew. A module that drew nothing is called without seeding from
    then on, and `generator` advances as if it had been seeded. If a later call does draw, it is
    repeated with a seed, and all later calls are seeded.
    """

    def __init__(self) -> None:
        self.draws: bool | None = None

    def __call__(self, run: Callable[[], Result], generator: torch.Generator | None) -> Result:
        """Return `run()`.

        Raises:
            BilevelError: the module draws while it is captured as a graph.
        """
        if generator is None or generator.device.type != "cuda":
            with seeded(generator):
                return run()
        capturing = torch.cuda.is_current_stream_capturing()
        if capturing and self.draws is not False:
            raise BilevelError(
                "the network draws from PyTorch's global generator, which a graph cannot seed; "
                "draw from the generator of `predict`, or set runner.capture=false"
            )
        if self.draws is False:
            if capturing:
                _advance(generator)
                return run()
            before, at = _global_state(generator.device), generator.get_offset()
            _advance(generator)
            result = run()
            if _global_state(generator.device) == before:
                return result
            _restore_global(generator.device, before)
            generator.set_offset(at)
        with seeded(generator):
            began = _global_state(generator.device), torch.get_rng_state()
            result = run()
            if self.draws is not True:
                self.draws = _global_state(generator.device) != began[0] or not torch.equal(
                    torch.get_rng_state(), began[1]
                )
        return result


def _advance(generator: torch.Generator) -> Tensor:
    """Draw once, so that the next seed differs from the last one."""
    return torch.rand((), generator=generator, device=generator.device)


def _global_state(device: torch.device) -> int:
    """Return the offset of the global generator of a CUDA device, which lies on the host."""
    return torch.cuda.default_generators[device.index or 0].get_offset()


def _restore_global(device: torch.device, offset: int) -> None:
    torch.cuda.default_generators[device.index or 0].set_offset(offset)


def _seed_global(device: torch.device, seed: int) -> None:
    """Seed the global generator of `device`, which need not be the current device."""
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    else:
        torch.get_device_module(device).manual_seed(seed)
