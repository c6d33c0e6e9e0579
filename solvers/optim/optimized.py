"""Tensors that descend together: leaves, their `torch.optim` optimizer, its schedule, clipping, and the state of all."""

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from bilevel import BilevelError, Params

MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], LRScheduler]


SGD: MakeOptimizer = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
RMSPROP: MakeOptimizer = partial(torch.optim.RMSprop, lr=0.03)


class Optimized:
    """Named leaf tensors and the optimizer that updates them in place.

    Raises:
        BilevelError: the optimizer or the scheduler does not accept its settings.
    """

    def __init__(
        self,
        tensors: Params,
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler | None = None,
        clip_norm: float | None = None,
    ) -> None:
        self.tensors = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
        self.leaves = list(self.tensors.values())
        try:
            self.optimizer = optimizer(self.leaves)
            self.scheduler = None if scheduler is None else scheduler(self.optimizer)
        except (TypeError, ValueError) as error:
            raise BilevelError(
                f"the optimizer or its schedule cannot be made: {error}; give functions of the parameters and of the optimizer "
                "(in YAML: `_target_` with `_partial_: true`) and settings that they accept"
            ) from error
        if isinstance(self.optimizer, (torch.optim.LBFGS, torch.optim.SparseAdam)):
            name = type(self.optimizer).__name__
            raise BilevelError(
                f"{name} needs a closure or sparse gradients, which solvers do not give it; choose another optimizer"
            )
        self.clip_norm = clip_norm

    def detached(self) -> Params:
        """The tensors as constants: later steps change them in place."""
        return {name: t.detach() for name, t in self.tensors.items()}

    def epoch_ended(self, valid_loss: float | None) -> None:
        """Step the schedule."""
        try:
            if isinstance(self.scheduler, ReduceLROnPlateau):
                if valid_loss is not None:
                    self.scheduler.step(valid_loss)
            elif self.scheduler is not None:
                self.scheduler.step()
        except (ValueError, ArithmeticError) as error:
            raise BilevelError(
                f"the learning-rate schedule, stepped once an epoch, fails: {error}; change its settings"
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """Tensors, optimizer and schedule."""
        schedule = None if self.scheduler is None else self.scheduler.state_dict()
        return {
            "tensors": self.detached(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": schedule,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, in place."""
        with torch.no_grad():
            for name, t in self.tensors.items():
                t.copy_(state["tensors"][name])
        self.optimizer.load_state_dict(
            copy.deepcopy(state["optimizer"])
        )  # which would keep the very tensors
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["schedule"])


def descend(loss: Tensor, *groups: Optimized) -> list[Tensor | None]:
    """One optimizer step of each group along the gradient of `loss`; no gradient is formed for anything else.

    Returns:
        The gradients, None for a leaf on which the loss does not depend.
    """
    leaves = [leaf for group in groups for leaf in group.leaves]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    apply_gradients(gradients, *groups)
    return list(gradients)


def apply_gradients(gradients: Sequence[Tensor | None], *groups: Optimized) -> None:
    """One optimizer step of each group along `gradients`, in the order of all their leaves; None leaves a leaf where it is."""
    leaves = [leaf for group in groups for leaf in group.leaves]
    for leaf, gradient in zip(leaves, gradients, strict=True):
        leaf.grad = gradient
    for group in groups:
        if group.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(group.leaves, group.clip_norm)
        group.optimizer.step()
    for leaf in leaves:
        leaf.grad = None
