"""Optimized tensors: leaves with their optimizer, learning-rate schedule, clipping and state."""

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from bilevel import BilevelError, Params
from bilevel.text import first_line

MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], LRScheduler]

SGD: MakeOptimizer = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
RMSPROP: MakeOptimizer = partial(torch.optim.RMSprop, lr=0.03)


class Optimized:
    """Named leaf tensors and the optimizer that updates them in place.

    Args:
        tensors: the initial values, which are copied, or leaves to train in place.
        optimizer: makes the optimizer from the leaves.
        scheduler: makes the learning-rate schedule from the optimizer; None for no schedule.
        clip_norm: the largest norm of the gradient; None for no clipping.
        in_place: train `tensors` themselves.

    Attributes:
        shrink: applies a weight decay that λ holds, just before a step of the optimizer; None
            where the optimizer has all of its settings.

    Raises:
        BilevelError: the optimizer or the scheduler does not accept its settings, or an option of
            the optimizer does not work here.
    """

    def __init__(
        self,
        tensors: Params,
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler | None = None,
        clip_norm: float | None = None,
        *,
        in_place: bool = False,
    ) -> None:
        self.tensors = {
            name: t if in_place else t.detach().clone().requires_grad_()
            for name, t in tensors.items()
        }
        self.leaves = list(self.tensors.values())
        try:
            self.optimizer = optimizer(self.leaves)
            self.scheduler = None if scheduler is None else scheduler(self.optimizer)
        except (TypeError, ValueError) as error:
            raise BilevelError(
                f"the optimizer or its schedule cannot be made: {first_line(error)}; give "
                "functions of the parameters and of the optimizer (in YAML: `_target_` with "
                "`_partial_: true`) and settings that they accept"
            ) from error
        if not hasattr(self.optimizer, "param_groups"):
            raise BilevelError(
                f"the function of an optimizer returns a {type(self.optimizer).__name__}; return "
                "an optimizer of PyTorch, such as torch.optim.SGD(params, lr=0.1)"
            )
        if getattr(self.scheduler, "optimizer", self.optimizer) is not self.optimizer:
            raise BilevelError(
                "the learning-rate schedule is one of another optimizer; give a function that "
                "makes it from its argument, such as lambda optimizer: StepLR(optimizer, 10)"
            )
        self.clip_norm = clip_norm
        self.shrink: Callable[[], None] | None = None
        check_optimizer(self.optimizer, self.leaves)

    def detached(self) -> Params:
        """Return the tensors as constants; later steps change them in place."""
        return {name: t.detach() for name, t in self.tensors.items()}

    def epoch_ended(self, valid_loss: float | None) -> None:
        """Step the learning-rate schedule.

        Args:
            valid_loss: the validation loss, for a schedule that depends on it; None if unknown.
        """
        try:
            if isinstance(self.scheduler, ReduceLROnPlateau):
                if valid_loss is not None:
                    self.scheduler.step(valid_loss)
            elif self.scheduler is not None:
                self.scheduler.step()
        except (ValueError, ArithmeticError) as error:
            raise BilevelError(
                f"the learning-rate schedule fails at the end of an epoch: {first_line(error)}; "
                "change its settings"
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors and the states of the optimizer and of the schedule."""
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
        # without a copy, the optimizer would change the tensors of `state` in place
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["schedule"])


def check_optimizer(optimizer: torch.optim.Optimizer, leaves: Sequence[Tensor]) -> None:
    """Raise `BilevelError` if an option of the optimizer does not work on trained tensors.

    They get dense gradients of a loss that descends, without a closure.
    """
    name = type(optimizer).__name__
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    needs_closure = closure is not None and closure.default is inspect.Parameter.empty
    if needs_closure or isinstance(optimizer, torch.optim.SparseAdam):
        raise BilevelError(
            f"{name} needs a closure or sparse gradients, which no solver provides; choose another "
            "optimizer"
        )
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        raise BilevelError(
            f"{name} keeps other weights for evaluation (its train() and eval()), and every outer "
            "step evaluates; choose an optimizer without them, such as AdamW with a schedule"
        )
    on_host = any(leaf.device.type in ("cpu", "mps") for leaf in leaves)
    wrong_on = {
        "maximize": "climbs the loss, and solvers descend it",
        "differentiable": "cannot change trained tensors in place; solver=unrolled differentiates "
        "the steps of the plain optimizer",
    } | ({"capturable": "needs tensors on a GPU, and these are not"} if on_host else {})
    for option, why in wrong_on.items():
        if any(group.get(option) for group in optimizer.param_groups):
            raise BilevelError(f"{option}=True of {name} {why}; leave {option} out")


def check_all_trained(weights: Optimized) -> None:
    """Raise `BilevelError` if the optimizer of w trains a part of w alone.

    Solvers would let the other part follow λ too.
    """
    groups = weights.optimizer.param_groups
    rates = [float(group.get("initial_lr", group.get("lr", 1.0))) for group in groups]
    moving = {
        id(leaf)
        for group, rate in zip(groups, rates, strict=True)
        for leaf in group["params"]
        if rate or not any(rates)
    }
    if idle := [name for name, leaf in weights.tensors.items() if id(leaf) not in moving]:
        raise BilevelError(
            f"inner_optimizer does not train `{idle[0]}` (it is left out, or its lr is 0), but w "
            "holds it; give the optimizer all parameters, or freeze it in the module "
            "(requires_grad=False)"
        )


def descend(loss: Tensor, *groups: Optimized) -> list[Tensor | None]:
    """Take one optimizer step of each group along the gradient of `loss`.

    No other gradient is computed.

    Returns:
        The gradients of all leaves; None for a leaf on which the loss does not depend.
    """
    leaves = [leaf for group in groups for leaf in group.leaves]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    apply_gradients(gradients, *groups)
    return list(gradients)


def apply_gradients(gradients: Sequence[Tensor | None], *groups: Optimized) -> None:
    """Take one optimizer step of each group along `gradients`.

    Args:
        gradients: one for each leaf of all groups, in order; None for a leaf that does not move.
        groups: the tensors to update.
    """
    leaves = [leaf for group in groups for leaf in group.leaves]
    for leaf, gradient in zip(leaves, gradients, strict=True):
        leaf.grad = gradient
    for group in groups:
        if group.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(group.leaves, group.clip_norm)
        if group.shrink is not None:
            group.shrink()
        group.optimizer.step()
    for leaf in leaves:
        leaf.grad = None
