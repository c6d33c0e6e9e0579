"""The problem that `attach` makes of a module and of plain functions."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.errors import BilevelError
from bilevel.module_problem import ModuleProblem
from bilevel.params import Batch, Hypers, Params, Prediction
from bilevel.space import Space


class AttachedProblem(ModuleProblem):
    """A module with losses that are plain functions; it has no data of its own.

        L_T = train_loss(y, batch, λ) + penalty(λ, w),    L_V = loss(y, batch)

    Args:
        module: the module, with the initial w.
        space: the hyperparameters.
        loss: returns L_V, [], of a prediction and a batch.
        train_loss: returns the data term of L_T, [], with λ; None for `loss`.
        penalty: returns the penalty, [] or [B], of λ and w; None for no penalty.
        arguments: returns the arguments of the module, as `ModuleProblem.inputs`; None for the
            first entry of the batch.
    """

    def __init__(
        self,
        module: nn.Module,
        space: Space,
        *,
        loss: Callable[..., Tensor],
        train_loss: Callable[..., Tensor] | None = None,
        penalty: Callable[..., Tensor] | None = None,
        arguments: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]] | None = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise BilevelError(
                f"model={type(module).__name__} must be an nn.Module; pass the module itself"
            )
        _check_call("loss", loss, "prediction", "batch")
        _check_call("train_loss", train_loss, "prediction", "batch", "hypers")
        _check_call("penalty", penalty, "hypers", "params")
        _check_call("inputs", arguments, "hypers", "batch", train=True, generator=None)
        super().__init__(module, space, train=None, valid=None)
        self.loss = loss
        self.train_loss = train_loss
        self.penalty = penalty
        self.arguments = arguments

    def inputs(
        self, hypers: Hypers, batch: Batch, *, train: bool, generator: torch.Generator | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.arguments is not None:
            return self.arguments(hypers, batch, train=train, generator=generator)
        if isinstance(batch, Mapping):
            raise BilevelError(
                f"the batch is a {type(batch).__name__}, so the inputs of the model are unknown; "
                "pass inputs=, a function that returns its arguments"
            )
        return (batch if isinstance(batch, Tensor) else batch[0],), {}

    def inner_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        if self.train_loss is None:
            loss = _tensor("loss", self.loss(prediction, batch))
        else:
            loss = _tensor("train_loss", self.train_loss(prediction, batch, hypers))
        if self.penalty is None:
            return loss
        return loss + _tensor("penalty", self.penalty(hypers, params)).mean()

    def outer_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        return _tensor("loss", self.loss(prediction, batch))


def _tensor(setting: str, value: Any) -> Tensor:
    """Return what a function of the user returned, or raise `BilevelError` if it is no tensor."""
    if not isinstance(value, Tensor):
        raise BilevelError(
            f"{setting} returns a {type(value).__name__}; return a tensor of shape [], without "
            "item() or float()"
        )
    return value


def _check_call(setting: str, function: Any, *arguments: Any, **keywords: Any) -> None:
    """Raise `BilevelError` if a function is none, or does not take the arguments."""
    if function is None and setting != "loss":
        return
    shown = ", ".join([*arguments, *(["*", *keywords] if keywords else [])])
    advice = f"pass a function ({shown})"
    if not callable(function):
        raise BilevelError(f"{setting}={function!r} cannot be called; {advice}")
    try:
        inspect.signature(function).bind(*arguments, **keywords)
    except TypeError as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise BilevelError(f"{setting}={name} does not fit: {error}; {advice}") from None
    except ValueError:  # a builtin without a signature
        return
