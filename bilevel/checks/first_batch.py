"""A problem at its first batch, as the laws look at it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bilevel.data.tensor_stream import Data
from bilevel.params import Batch, Carry, Hypers, Params, Prediction, to_device
from bilevel.problem import Problem


@dataclass(frozen=True)
class FirstBatch:
    """A problem at its first batch, with draws that are the same at every call."""

    problem: Problem
    data: Data
    device: torch.device

    @cached_property
    def batch(self) -> Batch:
        """Of the train split."""
        return self.data.train.peek()

    @cached_property
    def u(self) -> Tensor:
        """The initial coordinates, in the type of the weights, as solvers hold them."""
        floating = [p.dtype for p in self.start[0].values() if p.is_floating_point()]
        return self.problem.space.init(floating[0] if floating else None).to(self.device)

    @cached_property
    def hypers(self) -> Hypers:
        """λ at its initial values, as solvers pass it."""
        return self.problem.space.constrain(self.u)

    @cached_property
    def start(self) -> tuple[Params, Carry]:
        """Initial w and carry."""
        return to_device(self.problem.init(torch.Generator().manual_seed(0)), self.device)

    @cached_property
    def params(self) -> Params:
        """Weights a little away from the initial ones, at which a layer that begins at zero says nothing; with gradients."""
        generator = torch.Generator().manual_seed(1)
        noise = {
            name: 0.05 * torch.randn(p.shape, generator=generator).to(p)
            for name, p in self.start[0].items()
        }
        return {
            name: (p + noise[name]).detach().requires_grad_() for name, p in self.start[0].items()
        }

    def moved(self, name: str) -> Iterator[Hypers]:
        """λ with one hyperparameter moved far, either way; unevenly, because a simplex does not see a shift."""
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
        """The prediction in either mode, on the train batch unless another is given."""
        generator = torch.Generator(self.device).manual_seed(0) if train else None
        hypers, params, batch = (
            hypers or self.hypers,
            params or self.params,
            self.batch if batch is None else batch,
        )
        return self.problem.predict(
            hypers, params, self.start[1], batch, train=train, generator=generator
        )

    def inner_loss(
        self, *, train: bool = True, hypers: Hypers | None = None, params: Params | None = None
    ) -> Tensor:
        """L_T on the train batch."""
        hypers, params = hypers or self.hypers, params or self.params
        prediction, _ = self.predict(train=train, hypers=hypers, params=params)
        return self.problem.inner_objective(hypers, params, prediction, self.batch)

    def outer_loss(self, *, hypers: Hypers | None = None, params: Params | None = None) -> Tensor:
        """L_V on the first validation batch."""
        hypers, params = hypers or self.hypers, params or self.params
        return self.problem.outer_loss(hypers, params, self.start[1], self.data.valid.peek())[0]
