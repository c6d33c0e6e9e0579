"""The weight decay of an optimizer, as the penalty that its steps add to the loss."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel import Hypers, Params, Refused, Space, squared_norm
from bilevel.solvers.linear_solve.base import Product
from bilevel.solvers.optim.optimized import Optimized
from bilevel.solvers.optim.settings import decay_of

KEYS = ("weight_decay", "lambd")
"""Settings that decay weights: that of all optimizers, and the further one of ASGD."""

DIAGONAL = (torch.optim.AdamW, torch.optim.Adam, torch.optim.NAdam)
"""Optimizers that divide by √v̂ + eps, whose decoupled decay has a formula."""

LARGE = 0.3
"""Above this max κ |w|, a decoupled decay moves w*(λ) less than its penalty does."""


class WeightDecay:
    """The penalty ½ Σ_i c_i w_i² by which the minimum of L_T differs from where w comes to rest.

        ∇_w L_T + c ∘ w = 0

    A coupled decay κ (SGD, Adam and most others) adds κ w to the gradient, so that c = κ exactly.
    A decoupled one (AdamW) shrinks w apart from the gradient, which is divided by √v̂ + eps. Then
    c = κ (√v̂ + eps), held constant. This is near the truth where v̂ is the noise of the gradients
    and κ |w| ≪ 1. Each group of parameters has its own κ, which λ may hold.

    Args:
        optimized: w and its optimizer, of which the present settings and state are read.
        space: the hyperparameters.
        present: returns u₀.

    Raises:
        Refused: the optimizer decays weights in another way.
    """

    def __init__(self, optimized: Optimized, space: Space, present: Callable[[], Tensor]) -> None:
        self.optimized = optimized
        self._space = space
        self._present = present
        groups = optimized.optimizer.param_groups
        self._groups = {id(leaf): group for group in groups for leaf in group["params"]}
        self._tuned = {
            id(leaf): decay
            for group in groups
            for leaf in group["params"]
            if (decay := decay_of(group, space)).hyper is not None
        }
        self._decoupled = {
            id(leaf): _is_decoupled(optimized.optimizer, group)
            for group in groups
            for leaf in group["params"]
        }

    @classmethod
    def of(
        cls, optimized: Optimized, space: Space, present: Callable[[], Tensor]
    ) -> "WeightDecay | None":
        """Return the decay of an optimizer, None if it has none."""
        groups = optimized.optimizer.param_groups
        decays = [_decays(optimized.optimizer, group) for group in groups]
        return cls(optimized, space, present) if any(decays) else None

    # --- a decay that λ holds ---

    def take_over(self) -> None:
        """Decay at λ₀ before every step, in place of the optimizer, which takes numbers alone."""
        for leaf in self.optimized.leaves:
            if id(leaf) in self._tuned:
                self._groups[id(leaf)]["weight_decay"] = 0.0
                self.optimized.shrink = self.shrink

    @torch.no_grad()
    def shrink(self) -> None:
        """Take the decay of a step at λ₀: w ← (1 − lr κ) w, or g ← g + κ w if it is coupled."""
        hypers = self.hypers()
        for leaf in self.optimized.leaves:
            if id(leaf) not in self._tuned or leaf.grad is None:
                continue
            κ = self._rate(leaf, hypers)
            if self._decoupled[id(leaf)]:
                leaf.mul_(1 - self._groups[id(leaf)]["lr"] * κ)
            else:
                leaf.grad = leaf.grad + κ * leaf

    def hypers(self, u: Tensor | None = None) -> Hypers:
        """Return the decays that λ holds, at u or at u₀."""
        names = {decay.hyper for decay in self._tuned.values()}
        if not names:
            return {}
        parts = self._space.by_name(self._present() if u is None else u)
        return {
            name: self._space[name].constrain(parts[name], None) for name in parts if name in names
        }

    def _rate(self, leaf: Tensor, hypers: Hypers) -> float | Tensor:
        """Return κ of a leaf."""
        tuned = self._tuned.get(id(leaf))
        return _rate(self._groups[id(leaf)]) if tuned is None else tuned.value(hypers)

    def cross(self, u: Tensor, q: Float[Tensor, " m"]) -> Float[Tensor, " h"]:
        """Return (∂(c ∘ w)/∂u)ᵀ q."""
        if not self._tuned:
            return torch.zeros_like(u)
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            c = self._flat(q, self.hypers(u))
            w = torch.cat([leaf.detach().reshape(-1) for leaf in self.optimized.leaves]).to(q.dtype)
            if not (isinstance(c, Tensor) and c.requires_grad):  # before the first step
                return torch.zeros_like(u)
            return torch.autograd.grad((c * w) @ q, u)[0]

    # --- the penalty ---

    def coefficients(self, hypers: Hypers | None = None) -> list[float | Tensor]:
        """Return c of each leaf: a number, or a tensor [] or of the shape of the leaf.

        Args:
            hypers: the decays that λ holds; None for those at λ₀.
        """
        hypers = self.hypers() if hypers is None else hypers
        return [self._coefficient(leaf, hypers) for leaf in self.optimized.leaves]

    def _coefficient(self, leaf: Tensor, hypers: Hypers) -> float | Tensor:
        group = self._groups[id(leaf)]
        κ = self._rate(leaf, hypers)
        if not self._decoupled[id(leaf)]:
            return κ
        state = self.optimized.optimizer.state.get(leaf)
        if not state or (isinstance(κ, float) and κ == 0):
            return 0.0  # before the first step there is no v̂
        square = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
        steps = torch.as_tensor(state["step"]).to(square.dtype)
        return κ * ((square / (1 - group["betas"][1] ** steps)).sqrt() + group["eps"])

    def times(self, q: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Return c ∘ q."""
        return self._flat(q) * q

    def added_to(self, product: Product, like: Float[Tensor, " m"]) -> Product:
        """Return q ↦ A q + c ∘ q; c is read once.

        Args:
            product: q ↦ A q, which returns a new tensor.
            like: a vector of the type of q.
        """
        c = self._flat(like)
        if isinstance(c, float):
            return lambda q: product(q).add_(q, alpha=c)
        return lambda q: product(q).addcmul_(q, c)

    def _flat(self, like: Tensor, hypers: Hypers | None = None) -> float | Tensor:
        """Return c as one number, or as a vector [m] of the type of `like`."""
        c = self.coefficients(hypers)
        if all(isinstance(part, float) and part == c[0] for part in c):
            return float(c[0])
        parts = zip(c, self.optimized.leaves, strict=True)
        return torch.cat(
            [
                part.to(like.dtype).expand(leaf.shape).reshape(-1)
                if isinstance(part, Tensor)
                else like.new_full((leaf.numel(),), part)
                for part, leaf in parts
            ]
        )

    def penalty(self, params: Params, hypers: Hypers | None = None) -> Tensor:
        """Return ½ Σ_i c_i w_i² at `params`: [], or [B] for per-example weights.

        Args:
            params: the weights.
            hypers: λ, in which the penalty is differentiable; None for λ₀.
        """
        shared: dict[float, Params] = defaultdict(dict)
        terms = []
        for c, (name, p) in zip(self.coefficients(hypers), params.items(), strict=True):
            if isinstance(c, float):
                shared[c][name] = p
            elif c.ndim == 0:
                terms.append(c * squared_norm({name: p}))
            else:
                terms.append(squared_norm({name: p}, c.reshape(-1).to(p.dtype)))
        terms += [c * squared_norm(some) for c, some in shared.items() if c]
        return 0.5 * sum(terms[1:], start=terms[0]) if terms else _nothing(params)

    def warnings(self) -> dict[str, str]:
        """Return a warning if a decoupled decay is too strong for its approximation."""
        hypers = self.hypers()
        sizes = [
            self._rate(leaf, hypers) * leaf.detach().abs().max()
            for leaf in self.optimized.leaves
            if self._decoupled[id(leaf)] and leaf.numel()
        ]
        largest = float(torch.stack(sizes).max()) if sizes else 0.0
        if not largest > LARGE:
            return {}
        name = type(self.optimized.optimizer).__name__
        return {
            "weight_decay": f"inner_optimizer={name} decays weights apart from the gradient, and "
            f"weight_decay · max |w| = {largest:.2g} is above {LARGE:g}, where the hypergradient "
            "is only approximate; lower weight_decay, or set it to 0 and add the penalty to "
            "inner_objective (squared_norm)"
        }


def without_weight_decay(optimizer: torch.optim.Optimizer) -> None:
    """Set the weight decay of an optimizer to 0."""
    for settings in (optimizer.defaults, *optimizer.param_groups):
        settings.update({key: 0.0 for key in KEYS if settings.get(key)})


def _rate(group: dict[str, Any]) -> float:
    """Return κ of a group."""
    return sum(float(group.get(key) or 0.0) for key in KEYS)


def _decays(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Return whether a weight moves without a gradient."""
    if not _first_move(optimizer, group, 1.0):  # the trial says nothing
        return bool(_rate(group))
    return bool(_first_move(optimizer, group, 0.0))


def _is_decoupled(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Return whether c depends on the state of the optimizer.

    A decay is coupled if a weight of 1 rests under the gradient −κ.

    Raises:
        Refused: neither form fits.
    """
    if not _decays(optimizer, group):
        return False
    κ = _rate(group)
    if isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay"):
        if isinstance(optimizer, DIAGONAL):
            return True
    else:
        alone, balanced = (_first_move(optimizer, group, g) for g in (0.0, -κ))
        if alone and balanced is not None and abs(balanced) < 1e-6 * abs(alone):
            return False
    raise Refused(
        f"inner_optimizer.weight_decay={κ:g} of {type(optimizer).__name__} moves the minimum in w "
        "by an amount that has no formula here; set it to 0 and add the penalty to "
        "inner_objective (squared_norm), or choose SGD, Adam or AdamW"
    )


def _first_move(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], gradient: float
) -> float | None:
    """Return how far a first step moves a weight of 1; None if it fails.

    The step is that of a copy of the optimizer with a single weight, on the CPU.
    """
    w = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    w.grad = torch.full_like(w, gradient)
    changed = {"lr": 2**-4, "foreach": False, "fused": False, "capturable": False}
    trial = object.__new__(type(optimizer))
    own = {k: v for k, v in vars(optimizer).items() if k != "step" and not k.endswith("_hooks")}
    vars(trial).update(own | {k: {} for k in vars(optimizer) if k.endswith("_hooks")})
    try:
        trial.param_groups = [
            group | {k: v for k, v in changed.items() if k in group} | {"params": [w]}
        ]
        trial.state = defaultdict(dict)
        trial.step()
    except Exception:  # the code of others may raise anything
        return None
    return float(w.detach()) - 1.0


def _nothing(params: Params) -> Tensor:
    return next(iter(params.values())).new_zeros(())
