"""The best-response Jacobian Θ, by which the weights follow the hyperparameters: ΔW(ε) = Θε."""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from bilevel import Params
from bilevel.half_weights import wide
from bilevel.solvers.response.per_example_weight import ResponseWeight
from bilevel.solvers.response.row_counts import Counter, RowCounts
from bilevel.validate import one_of


class Response(ABC):
    """A parametrization of Θ; the solver trains its tensors, which are in float32 at least."""

    per_example: bool
    """True if ε may be [B, h]; otherwise ε is [h]."""
    row_counts: RowCounts | None = None
    """The record of the calls of per-example weights; None keeps no record."""

    @abstractmethod
    def init(
        self, params: Params, hypers: int, axes: dict[str, int], generator: torch.Generator
    ) -> Params:
        """Return the tensors of Θ = 0.

        Args:
            params: the weights.
            hypers: h, the number of coordinates of ε.
            axes: the axis of the scale, by weight; 0 for a weight without an entry.
            generator: on the CPU, for random initial values.
        """

    @abstractmethod
    def weights(self, tensors: Params, base: Params, offset: Tensor, *, tangent: bool) -> Params:
        """Return w₀ + Θ·offset, or with `tangent` the forward-mode duals (w₀, Θ·offset).

        Args:
            tensors: the tensors of Θ.
            base: w₀.
            offset: ε, [h] or [B, h].
            tangent: return duals; this needs an open `dual_level`.
        """

    def hold_rows(self, tensors: Params, rows: dict[str, int]) -> None:
        """Set to zero the part of Θ for a row of some weights, by name, that is never trained."""

    @abstractmethod
    def clear(self, tensors: Params) -> None:
        """Set Θ = 0, in place."""

    @abstractmethod
    def size(self, params: Params, hypers: int) -> int:
        """Return the number of entries of the tensors of Θ."""


class Structured(Response):
    """The response of the papers: ΔW(ε) = diag(Uε) W₁ and Δb(ε) = (Vε) ∘ b₁ for every layer.

    U and V of all layers are stacked into one bias-free linear map R^h → R^N ("rows"), so that one
    matrix product serves all layers. They start at zero.

    Args:
        init: the uniform distribution from which W₁ is drawn. "weights": its root mean square is
            that of the initial W₀, or as with "fan_in" if that is 0. "fan_in": U(±1/√fan_in).
            A vector of n entries starts as U(±1/√n) in both cases.

    Raises:
        BilevelError: an unknown `init`.

    Source: Bae & Grosse, NeurIPS 2020, eq. 3.7 (STN, at λ) and eq. 4.12 (Δ-STN, at λ − λ₀).
    """

    per_example = True

    def __init__(self, init: Literal["weights", "fan_in"] = "weights") -> None:
        one_of(["weights", "fan_in"], init=init)
        self.initial = init

    def init(
        self, params: Params, hypers: int, axes: dict[str, int], generator: torch.Generator
    ) -> Params:
        self.axes = {name: axes.get(name, 0) for name in params}
        self.rows = {name: p.shape[self.axes[name]] if p.ndim else 1 for name, p in params.items()}
        like = next(iter(params.values()))
        kind = wide(like.dtype)
        rows = torch.zeros(sum(self.rows.values()), hypers, dtype=kind, device=like.device)
        tensors = {"rows": rows}
        for name, p in params.items():
            bound = self.bound(p)
            drawn = torch.empty(p.shape, dtype=kind).uniform_(-bound, bound, generator=generator)
            tensors[f"weights.{name}"] = drawn.to(p.device)
        return tensors

    def bound(self, weight: Tensor) -> float:
        """Return b of the distribution U(±b) of W₁ for an initial W₀."""
        if self.initial == "weights" and weight.ndim > 1:
            # on the CPU and in float64, so that it is the same on any device
            norm = float(torch.linalg.vector_norm(weight.detach().cpu(), dtype=torch.float64))
            if 0 < norm < math.inf:
                return norm * math.sqrt(3 / weight.numel())
        fan_in = weight.numel() // weight.shape[0] if weight.ndim > 1 else weight.numel()
        return 1 / math.sqrt(max(1, fan_in))

    def hold_rows(self, tensors: Params, rows: dict[str, int]) -> None:
        for name, row in rows.items():
            tensors[f"weights.{name}"][row] = 0

    def clear(self, tensors: Params) -> None:
        with torch.no_grad():
            tensors["rows"].zero_()

    def weights(self, tensors: Params, base: Params, offset: Tensor, *, tangent: bool) -> Params:
        parts = (offset @ tensors["rows"].T).split(list(self.rows.values()), dim=-1)
        scales = dict(zip(self.rows, parts, strict=True))
        out: Params = {}
        for name, w in base.items():
            response, scale = tensors[f"weights.{name}"].to(w.dtype), scales[name].to(w.dtype)
            axis = self.axes[name]
            if offset.ndim == 2:
                counter = Counter(self.row_counts)
                out[name] = ResponseWeight.of(
                    w, response, scale, axis, tangent=tangent, label=name, counter=counter
                )
            else:
                shape = [1] * max(w.ndim, 1)
                shape[axis] = -1
                change = (scale.reshape(shape) * response).reshape(w.shape)
                out[name] = displaced(w, change, tangent=tangent)
        return out

    def size(self, params: Params, hypers: int) -> int:
        rows = sum(p.shape[0] if p.ndim else 1 for p in params.values())
        return rows * hypers + sum(p.numel() for p in params.values())


class Dense(Response):
    """The full Θ: ΔW(ε) = Θε with one tensor [*shape, h] per weight.

    It is for small problems and for the theory.
    """

    per_example = False

    def init(
        self, params: Params, hypers: int, axes: dict[str, int], generator: torch.Generator
    ) -> Params:
        return {
            name: p.new_zeros(*p.shape, hypers, dtype=wide(p.dtype)) for name, p in params.items()
        }

    def clear(self, tensors: Params) -> None:
        with torch.no_grad():
            for tensor in tensors.values():
                tensor.zero_()

    def weights(self, tensors: Params, base: Params, offset: Tensor, *, tangent: bool) -> Params:
        return {
            name: displaced(w, (tensors[name] @ offset).to(w.dtype), tangent=tangent)
            for name, w in base.items()
        }

    def size(self, params: Params, hypers: int) -> int:
        return hypers * sum(p.numel() for p in params.values())


def displaced(base: Tensor, change: Tensor, *, tangent: bool) -> Tensor:
    """Return base + change, or with `tangent` the dual (base, change)."""
    return forward_ad.make_dual(base, change) if tangent else base + change
