"""Linear regression with a tuned penalty: data, losses and closed forms without the penalty."""

import math
from abc import abstractmethod
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bilevel import (
    Batch,
    BilevelError,
    Carry,
    Data,
    Hypers,
    Metrics,
    Params,
    Prediction,
    Problem,
    Space,
    streams,
)
from bilevel.problems.closed_form import linear_data
from bilevel.problems.closed_form.linear_data import Split
from bilevel.problems.dtypes import DType

Made = TypeVar("Made", bound="Linear")


class Linear(Problem):
    """Least squares for a linear map, with a penalty in L_T that λ controls.

        L_T(λ, w) = 1/(2n) ‖Xw − y‖² + penalty(λ, w)
        L_V(w)    = 1/(2n_v) ‖X_v w − y_v‖²

    A subclass defines L_T and its minimizer. The weight `weight` is [1, d], as in `nn.Linear`.
    Closed forms are float64 on the CPU. h counts the tuned entries of λ in the order of the space;
    frozen hyperparameters are constants.

    Args:
        train: X [n, d] and y [n].
        valid: X_v [n_v, d] and y_v [n_v].
        test: X and y of the test split, or None.
        batch_size: number of examples in a batch; None takes a whole split.

    Attributes:
        gram: H = XᵀX/n, [d, d] in float64.
        moment: b = Xᵀy/n, [d] in float64.
    """

    penalized: ClassVar[tuple[str, ...]]
    """Hyperparameters of the penalty, all real; the space may hold optimizer settings too."""

    def __init__(
        self,
        train: Split,
        valid: Split,
        test: Split | None = None,
        *,
        batch_size: int | None = None,
    ) -> None:
        self.batch_size = batch_size
        self._splits = (train, valid, test)
        self._valid = (valid[0].double(), valid[1].double())
        X, y = train[0].double(), train[1].double()
        self.gram, self.moment = X.T @ X / len(X), X.T @ y / len(X)

    @classmethod
    def synthetic(
        cls: type[Made],
        examples: int = 60,
        features: int = 10,
        condition: float = 10.0,
        noise: float = 1.0,
        data_seed: int = 0,
        *,
        active: int | None = None,
        dtype: DType = None,
        **options: Any,
    ) -> Made:
        """Return the problem on the data of `linear_data.synthetic`."""
        data = linear_data.synthetic(
            examples, features, condition, noise, data_seed, active=active, dtype=dtype
        )
        return cls(*data, **options)

    @classmethod
    def diabetes(
        cls: type[Made], data_seed: int = 1, *, dtype: DType = None, **options: Any
    ) -> Made:
        """Return the problem on the data of `linear_data.diabetes`."""
        return cls(*linear_data.diabetes(data_seed, dtype=dtype), **options)

    @classmethod
    def linnerud(
        cls: type[Made], data_seed: int = 0, *, dtype: DType = None, **options: Any
    ) -> Made:
        """Return the problem on the data of `linear_data.linnerud`."""
        return cls(*linear_data.linnerud(data_seed, dtype=dtype), **options)

    @classmethod
    def wine(cls: type[Made], data_seed: int = 1, *, dtype: DType = None, **options: Any) -> Made:
        """Return the problem on the data of `linear_data.wine`."""
        return cls(*linear_data.wine(data_seed, dtype=dtype), **options)

    def init(self, generator: torch.Generator) -> tuple[Params, Carry]:
        X = self._splits[0][0]
        weight = torch.randn((1, X.shape[1]), generator=generator, dtype=X.dtype)
        return {"weight": weight / math.sqrt(X.shape[1])}, {}

    def data(self, device: torch.device, generator: torch.Generator) -> Data:
        return streams(
            *self._splits, batch_size=self.batch_size, device=device, generator=generator
        )

    def predict(
        self,
        hypers: Hypers,
        params: Params,
        carry: Carry,
        batch: Batch,
        *,
        train: bool,
        generator: torch.Generator | None,
    ) -> tuple[Prediction, Carry]:
        return F.linear(batch[0], params["weight"]).squeeze(-1), carry

    def outer_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        return squared_error(prediction, batch)

    # --- closed forms ---

    @abstractmethod
    def minimizer(self, hypers: Hypers) -> Float[Tensor, " d"]:
        """Return w*(λ) as a vector, twice differentiable in λ."""

    @abstractmethod
    def response_columns(
        self, hypers: Hypers, w: Float[Tensor, " d"]
    ) -> dict[str, Float[Tensor, "d columns"]]:
        """Return ∂w*/∂λ at w = w*(λ) for each hyperparameter of the penalty."""

    @abstractmethod
    def starts(self, h: int) -> Float[Tensor, "starts h"]:
        """Return the points where the search for λ* starts."""

    def best_response(self, hypers: Hypers) -> Params:
        """Return `minimizer` as parameters."""
        return {"weight": self.minimizer(hypers)[None]}

    def linear_map(self, params: Params) -> Float[Tensor, " d"]:
        """Return the vector w of the closed forms."""
        return params["weight"][0]

    def best_response_jacobian(self, hypers: Hypers) -> Float[Tensor, "d h"]:
        """Return ∂w*/∂λ = −(∂²L_T/∂w²)⁻¹ ∂²L_T/∂w∂λ, by the implicit function theorem."""
        return self._jacobian(hypers, self.minimizer(hypers))

    def hypergradient(self, hypers: Hypers) -> Float[Tensor, " h"]:
        """Return dL_V(w*(λ))/dλ = (∂w*/∂λ)ᵀ X_vᵀ(X_v w* − y_v)/n_v."""
        return self._hypergradient(hypers, self.minimizer(hypers))

    def optimum(self) -> Hypers:
        """Return λ* with a hypergradient below 1e-10, by Newton's method from the best of `starts`.

        Raises:
            BilevelError: an entry of λ diverges, because validation prefers no penalty or an
                infinite one.
        """
        space = self._penalized_space()

        def loss(u: Tensor) -> Tensor:
            return self._outer(self.minimizer(space.constrain(u)))

        u = min(self.starts(space.numel), key=lambda start: float(loss(start)))
        if not space.numel:
            return space.constrain(u)
        for _ in range(200):
            gradient = self.hypergradient(space.constrain(u))
            eigenvalues, vectors = torch.linalg.eigh(torch.autograd.functional.hessian(loss, u))
            if gradient.abs().max() < 1e-13 or u.abs().max() > 20:
                break
            step = -vectors @ (vectors.T @ gradient / eigenvalues.abs().clamp_min(1e-8))
            step = step / max(1.0, float(step.abs().max()))
            while loss(u + step) > loss(u) and step.abs().max() > 1e-9:
                step = step / 2
            u = u + step
        # If an entry diverges, the gradient and the curvature vanish too.
        if u.abs().max() > 20 or gradient.abs().max() > 1e-10 or eigenvalues.min() < 1e-8 * loss(u):
            raise BilevelError(
                "there is no λ*, because validation is best with no penalty or an infinite penalty "
                "on some feature; use other data, or freeze that hyperparameter"
            )
        return space.constrain(u)

    def exact(self, hypers: Hypers) -> Metrics:
        """Return `regret` L_V(w*(λ)) − L_V(w*(λ*)) and `hypergradient_norm` ‖dL_V(w*(λ))/dλ‖.

        λ* is the optimum over the tuned entries. There is no `regret` if there is no λ*. Values are
        float64 on the CPU; they are NaN if λ is so large that w*(λ) cannot be computed.
        """
        own = {name: hypers[name].detach().to("cpu", torch.float64) for name in self.penalized}
        least, nan = self._least, torch.tensor(math.nan, dtype=torch.float64)
        with torch.no_grad():
            try:
                w = self.minimizer(own)
                loss, norm = self._outer(w), self._hypergradient(own, w).norm()
            except (BilevelError, torch.linalg.LinAlgError):
                loss, norm = nan, nan
            return ({} if least is None else {"regret": loss - least}) | {
                "hypergradient_norm": norm
            }

    def exact_hypergradient(self, hypers: Hypers) -> Tensor | None:
        """Return `hypergradient` in float64 on the CPU, or None if w*(λ) cannot be computed."""
        own = {name: hypers[name].detach().to("cpu", torch.float64) for name in self.penalized}
        try:
            with torch.no_grad():
                return self.hypergradient(own)
        except (BilevelError, torch.linalg.LinAlgError):
            return None

    @cached_property
    def _least(self) -> Tensor | None:
        """Return L_V(w*(λ*)), or None if there is no λ*."""
        try:
            with torch.enable_grad():
                best = self.optimum()
        except BilevelError:
            return None
        return self._outer(self.minimizer(best))

    def _outer(self, w: Tensor) -> Tensor:
        return 0.5 * F.mse_loss(self._valid[0] @ w, self._valid[1])

    def _jacobian(self, hypers: Hypers, w: Tensor) -> Tensor:
        columns = self.response_columns(hypers, w)
        tuned = [columns[name] for name in self._penalized_space().tuned]
        return torch.cat([w.new_zeros(len(w), 0), *tuned], dim=1)

    def _hypergradient(self, hypers: Hypers, w: Tensor) -> Tensor:
        X, y = self._valid
        return self._jacobian(hypers, w).T @ (X.T @ (X @ w - y)) / len(X)

    def _penalized_space(self) -> Space:
        return Space(**{name: self.space[name] for name in self.penalized})


def squared_error(prediction: Float[Tensor, " n"], batch: Batch) -> Tensor:
    """Return ½ mean (f(x) − y)², []."""
    return 0.5 * F.mse_loss(prediction, batch[1])
