"""Draws from PyTorch's global generators (`nn.Dropout`), seeded from a given generator."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

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
            seed = int(_advance(generator))
        else:
            # a number drawn on the device would have to be waited for; the state lies on the host
            seed = hash(tuple(generator.get_state().view(torch.int64).tolist())) % 2**62
            _advance(generator)
            _seed_global(device, seed)
        torch.default_generator.manual_seed(seed)
        yield


class GlobalDraws:
    """Calls of a module that are seeded if the module draws from the global generators.

    Seeding takes as long as a small layer, and a graph of a device cannot hold it. So the first
    call records if the module drew. A module that drew nothing is called without seeding from then
    on, and `generator` advances as if it had been seeded. If a later call does draw, it is repeated
    with a seed, and all later calls are seeded.

    Args:
        module: the module; PyTorch's own layers without draws need not be looked at in each call.

    Attributes:
        draws: whether the module draws, as its calls so far showed it; None before the first.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        self._never = module is not None and all(map(_never_draws, module.modules()))
        self.draws: bool | None = False if self._never else None

    def __call__(self, run: Callable[[], Result], generator: torch.Generator | None) -> Result:
        """Return `run()`.

        Raises:
            BilevelError: the module draws while it is captured as a graph.
        """
        if generator is None:
            return run()
        if self._never:
            _advance(generator)
            return run()
        if generator is torch.default_generator or generator.device.type not in ("cpu", "cuda"):
            with seeded(generator):
                return run()
        capturing = generator.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing and self.draws is not False:
            raise BilevelError(
                "the network draws from PyTorch's global generator, which a graph cannot seed; "
                "draw from the generator of `predict`, or set runner.capture=false"
            )
        if capturing:
            _advance(generator)
            return run()
        if self.draws is False:
            before = _Before(generator)
            _advance(generator)
            try:
                result = run()
            finally:  # an error leaves the global generators as they were too
                drew = before.drew()
                if drew:
                    before.restore()
            if not drew:
                return result
            before.rewind()
        with seeded(generator):
            before = _Before(generator)
            result = run()
            if self.draws is not True:
                self.draws = before.drew()
        return result


NEVER_DRAW = frozenset(
    {
        *(nn.Identity, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Flatten, nn.Unflatten),
        *(nn.Linear, nn.Bilinear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d),
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Upsample, nn.ZeroPad2d),
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
        *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LocalResponseNorm),
        *(
            nn.CELU,
            nn.ELU,
            nn.GELU,
            nn.GLU,
            nn.Hardsigmoid,
            nn.Hardswish,
            nn.Hardtanh,
            nn.LeakyReLU,
        ),
        *(nn.LogSigmoid, nn.LogSoftmax, nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU),
        *(nn.Sigmoid, nn.Softmax, nn.Softplus, nn.Softsign, nn.Tanh),
        *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
        *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    }
)
"""Layers of PyTorch whose forward pass draws nothing."""


def _never_draws(module: nn.Module) -> bool:
    """Return whether no call of the module itself can draw."""
    hooks = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) in NEVER_DRAW and not hooks


class _Before:
    """The states of the global generators and of `generator`, all of which lie on the host."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.host = torch.default_generator.get_state()
        self.on_device = generator.device.type == "cuda"
        self.own: Any = generator.get_offset() if self.on_device else generator.get_state()
        self.offset = _global_state(generator.device) if self.on_device else 0

    def drew(self) -> bool:
        """Return whether a global generator has moved on."""
        now = torch.default_generator.get_state()
        # as words, which are compared in a quarter of the time of bytes
        return not torch.equal(now.view(torch.int64), self.host.view(torch.int64)) or (
            self.on_device and _global_state(self.generator.device) != self.offset
        )

    def restore(self) -> None:
        """Set the global generators back."""
        torch.default_generator.set_state(self.host)
        if self.on_device:
            _restore_global(self.generator.device, self.offset)

    def rewind(self) -> None:
        """Set `generator` back."""
        if self.on_device:
            self.generator.set_offset(self.own)
        else:
            self.generator.set_state(self.own)


def _advance(generator: torch.Generator) -> Tensor:
    """Draw what `seeded` draws, so that the next seed differs from the last one."""
    if generator.device.type == "cpu":
        return torch.randint(2**62, (), generator=generator)
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
