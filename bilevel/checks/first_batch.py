"""A problem at its first batch and near its initial weights, on which the laws are checked."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel.data.batches import open_batch
from bilevel.data.fields import kind
from bilevel.data.tensor_stream import Data
from bilevel.errors import BilevelError
from bilevel.params import Batch, Carry, Hypers, Params, Prediction, to_device
from bilevel.problem import Problem


@dataclass(frozen=True)
class FirstBatch:
    """A problem at its first batch, with the same draws at every call."""

    problem: Problem
    data: Data
    device: torch.device

    @cached_property
    def batch(self) -> Batch:
        """Return the first batch of the train split, with its containers opened."""
        batch = self.data.train.peek()
        open_batch(batch, "train")
        return batch

    @cached_property
    def u(self) -> Tensor:
        """Return the initial coordinates in the type of the weights, as in solvers."""
        floating = [p.dtype for p in self.start[0].values() if p.is_floating_point()]
        return self.problem.space.init(floating[0] if floating else None).to(self.device)

    @cached_property
    def hypers(self) -> Hypers:
        """Return λ at its initial values, as solvers pass it."""
        return self.problem.space.constrain(self.u)

    @cached_property
    def start(self) -> tuple[Params, Carry]:
        """Return the initial w and carry.

        Raises:
            BilevelError: they are no two dictionaries of tensors.
        """
        made: Any = self.problem.init(torch.Generator().manual_seed(0))
        pair = isinstance(made, (tuple, list)) and len(made) == 2
        if not (pair and _is_named(made[0]) and isinstance(made[1], Mapping)):
            raise BilevelError(
                f"`init` returns {kind(made)}; return two dictionaries of tensors, (params, carry)"
            )
        return to_device(made, self.device)

    @cached_property
    def params(self) -> Params:
        """Return weights near the initial ones, with gradients.

        At the initial weights themselves, layers that start at zero have no effect.
        """
        generator = torch.Generator().manual_seed(1)
        noise = {
            name: 0.05 * torch.randn(p.shape, generator=generator).to(p)
            for name, p in self.start[0].items()
        }
        return {
            name: (p + noise[name]).detach().requires_grad_() for name, p in self.start[0].items()
        }

    @cached_property
    def initial_losses(self) -> dict[str, Any]:
        """Return what both objectives return at the initial weights, by name."""
        w = self.start[0]
        return {
            "inner_objective": self.inner_loss(params=w),
            "outer_objective": self.outer_loss(params=w),
        }

    @cached_property
    def training(self) -> tuple[Prediction, Any]:
        """Return the prediction in training mode and L_T, differentiable in w.

        An error of the objective takes the place of L_T.
        """
        prediction, _ = self.predict(train=True)
        try:
            return prediction, self.problem.inner_objective(
                self.hypers, self.params, prediction, self.batch
            )
        except Exception as error:  # the problem is a user's own code
            return prediction, error

    @property
    def training_loss(self) -> Any:
        """Return L_T in training mode, differentiable in w."""
        _, loss = self.training
        if isinstance(loss, Exception):
            raise loss
        return loss

    def moved(self, name: str) -> Iterator[Hypers]:
        """Yield λ with one hyperparameter moved far, in both directions.

        Its entries move by different amounts, since a simplex does not change under an equal shift.
        """
        space = self.problem.space
        step = {
            key: (2 + torch.linspace(0, 1, leaf.numel()).reshape(leaf.shape)) * (key == name)
            for key, leaf in space.by_name(torch.ones(space.numel)).items()
        }
        direction = torch.cat([leaf.reshape(-1) for leaf in step.values()]).to(self.u)
        for sign in (1, -1):
            yield space.constrain(self.u + sign * direction)

    def predict(
        self,
        *,
        train: bool,
        hypers: Hypers | None = None,
        params: Params | None = None,
        batch: Batch = None,
    ) -> tuple[Prediction, Carry]:
        """Return the prediction in either mode, by default on the train batch."""
        generator = torch.Generator(self.device).manual_seed(0) if train else None
        hypers, params = hypers or self.hypers, params or self.params
        batch = self.batch if batch is None else batch
        return self.problem.predict(
            hypers, params, self.start[1], batch, train=train, generator=generator
        )

    def inner_loss(
        self, *, train: bool = True, hypers: Hypers | None = None, params: Params | None = None
    ) -> Tensor:
        """Return L_T on the train batch."""
        hypers, params = hypers or self.hypers, params or self.params
        prediction, _ = self.predict(train=train, hypers=hypers, params=params)
        return self.problem.inner_objective(hypers, params, prediction, self.batch)

    def outer_loss(self, *, hypers: Hypers | None = None, params: Params | None = None) -> Tensor:
        """Return L_V on the first validation batch."""
        hypers, params = hypers or self.hypers, params or self.params
        return self.problem.outer_loss(hypers, params, self.start[1], self.data.valid.peek())[0]


def _is_named(tree: Any) -> bool:
    return isinstance(tree, Mapping) and all(isinstance(t, Tensor) for t in tree.values())


def has_examples(x: object, examples: int) -> bool:
    """Return whether `x` is a tensor whose first axis has `examples` entries."""
    return isinstance(x, Tensor) and x.ndim > 0 and len(x) == examples


def brief(leaf: Tensor) -> str:
    """Return a number as text, or the shape of a larger tensor."""
    return f"{leaf.item():.4g}" if leaf.numel() == 1 else f"a tensor of shape {list(leaf.shape)}"
