"""The best-response Jacobian Θ: how far each weight moves, ΔW(ε) = Θε, when the hyperparameters do."""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bilevel import Params, Problem
from bilevel.params import Batch, Carry, Hypers
from bilevel.solvers.response.per_example_weight import ResponseWeight


class Response(ABC):
    """Θ in some parametrization; its `tensors` are trained by the solver."""

    per_example: bool
    """Whether ε may be [B, h]; otherwise it is [h]."""

    @abstractmethod
    def init(
        self, params: Params, hypers: int, axes: dict[str, int], generator: torch.Generator
    ) -> Params:
        """The tensors that hold Θ = 0 for the weights `params` and `hypers` coordinates, drawn from `generator` (CPU)."""

    @abstractmethod
    def weights(self, tensors: Params, base: Params, offset: Tensor, *, tangent: bool) -> Params:
        """w₀ + Θ·offset; as forward-mode duals (w₀, Θ·offset) when `tangent`, within a `dual_level`."""

    @abstractmethod
    def size(self, params: Params, hypers: int) -> int:
        """How many numbers hold Θ."""


class Structured(Response):
    """ΔW(ε) = diag(Uε) W₁ and Δb(ε) = (Vε) ∘ b₁ for every layer (the papers' response).

    U and V of all layers are stacked into one bias-free linear map R^h → R^N ("rows"), so that one product serves them all.
    They begin at zero; W₁ begins as U(±1/√fan_in), and vectors as U(±1/√n).

    Source: STN eq. 3.7, Δ-STN eq. 4.12.
    """

    per_example = True

    def init(
        self, params: Params, hypers: int, axes: dict[str, int], generator: torch.Generator
    ) -> Params:
        self.axes = {name: axes.get(name, 0) for name in params}
        self.rows = {name: p.shape[self.axes[name]] if p.ndim else 1 for name, p in params.items()}
        like = next(iter(params.values()))
        tensors = {
            "rows": torch.zeros(
                sum(self.rows.values()), hypers, dtype=like.dtype, device=like.device
            )
        }
        for name, p in params.items():
            bound = 1 / math.sqrt(max(1, p.numel() // p.shape[0] if p.ndim > 1 else p.numel()))
            drawn = torch.empty(p.shape, dtype=p.dtype).uniform_(-bound, bound, generator=generator)
            tensors[f"weights.{name}"] = drawn.to(p.device)
        return tensors

    def weights(self, tensors: Params, base: Params, offset: Tensor, *, tangent: bool) -> Params:
        scales = dict(
            zip(
                self.rows,
                (offset @ tensors["rows"].T).split(list(self.rows.values()), dim=-1),
                strict=True,
            )
        )
        out: Params = {}
        for name, w in base.items():
            response, scale, axis = tensors[f"weights.{name}"], scales[name], self.axes[name]
            if offset.ndim == 2:
                out[name] = ResponseWeight.of(w, response, scale, axis, tangent=tangent, label=name)
            else:
                shape = [1] * max(w.ndim, 1)
                shape[axis] = -1
                out[name] = displaced(
                    w, (scale.reshape(shape) * response).reshape(w.shape), tangent=tangent
                )
        return out

    def size(self, params: Params, hypers: int) -> int:
        rows = sum(p.shape[0] if p.ndim else 1 for p in params.values())
        return rows * hypers + sum(p.numel() for p in params.values())


class Dense(Response):
    """ΔW(ε) = Θε with every entry of Θ free: [*shape, h] per weight, for small problems and for theory."""

    per_example = False

    def init(
        self, params: Params, hypers: int, axes: dict[str, int], generator: torch.Generator
    ) -> Params:
        return {name: p.new_zeros(*p.shape, hypers) for name, p in params.items()}

    def weights(self, tensors: Params, base: Params, offset: Tensor, *, tangent: bool) -> Params:
        return {
            name: displaced(w, tensors[name] @ offset, tangent=tangent) for name, w in base.items()
        }

    def size(self, params: Params, hypers: int) -> int:
        return hypers * sum(p.numel() for p in params.values())


def displaced(base: Tensor, change: Tensor, *, tangent: bool) -> Tensor:
    """Base + change, or the dual (base, change)."""
    return forward_ad.make_dual(base, change) if tangent else base + change


class CallRecorder(TorchFunctionMode):
    """What a network does with its weights: looks on while `predict` runs once, in training.

    Attributes:
        functions: the torch functions that were called.
        axes: weights that were looked up as an embedding: their scale lies on the columns (axis 1), not on the vocabulary.
    """

    def __init__(
        self,
        problem: Problem,
        hypers: Hypers,
        params: Params,
        carry: Carry,
        batch: Batch,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.functions: set[Any] = set()
        self.axes: dict[str, int] = {}
        self._names = {id(p): name for name, p in params.items()}
        with torch.no_grad(), self:
            problem.predict(hypers, params, carry, batch, train=True, generator=generator)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.functions.add(func)
        if (
            func is F.embedding
            and id(table := args[1] if len(args) > 1 else kwargs["weight"]) in self._names
        ):
            self.axes[self._names[id(table)]] = 1
        return func(*args, **kwargs)
