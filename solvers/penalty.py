"""F2SA: a penalty method that needs gradients alone.

Source: Kwon, Kwon, Wright & Nowak, ICML 2023 (arXiv 2301.10945), Algorithm 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel import Batch, Carry, Metrics, Need, Params
from bilevel.params import count_examples, detached, to_device
from bilevel.solver import Split
from bilevel.solvers.base.core import Core
from bilevel.solvers.base.descent import Descent
from bilevel.solvers.base.dry_run import refuse_half_weights
from bilevel.solvers.base.method import WrittenHypergradient
from bilevel.solvers.optim.optimized import Optimized, descend
from bilevel.validate import at_least, positive, wrong


@dataclass(kw_only=True, eq=False)
class Penalty(Descent):
    """min_{λ, y} L_V(λ, y) + σ (L_T(λ, y) − min_z L_T(λ, z)): L_V may gain only at a cost in L_T.

        z descends L_T(λ, ·),    y descends L_V(λ, ·)/σ + L_T(λ, ·),
        λ descends ∂_λ L_V(λ, y) + σ (∂_λ L_T(λ, y) − ∂_λ L_T(λ, z))

    With z and y at their minima the last line is the hypergradient up to O(1/σ). The penalty weight
    σ, the paper's λ_k, begins at `weight` and grows by `growth` after every round, up to
    `weight_max`, where a bias of O(1/weight_max) remains. An error of z or y counts σ-fold, so σ
    should grow more slowly than they follow. In float32 the difference of the two gradients loses
    its digits for σ above 1e4.

    z and y descend on the same batches with the same masks, and so do the two gradients in λ. Their
    difference therefore has no noise but that of y − z. y looks at a validation batch at every
    inner step, which is counted; it descends during warm-up too, at the first σ.

    Differences from the paper: the direction of y, ∇L_V + σ∇L_T, is divided by σ. The step size of
    y is then that of z, where the paper's falls as 1/σ. y has an optimizer of its own, made as that
    of z. An optimizer that normalizes its gradient (Adam, RMSprop) moves y and z apart by noise
    that σ multiplies.

    The weights of the solution are z: y was trained on validation data, and would look too good.

    Attributes:
        weight: σ in the first round.
        growth: the gain of σ in a round, the paper's δ_k.
        weight_max: the largest σ.

    Raises:
        BilevelError: `weight` is not positive or above `weight_max`, or `growth` is negative.

    Example:
        >>> from bilevel.problems import Quadratic
        >>> problem, device = Quadratic.random(seed=1), torch.device("cpu")
        >>> solver = Penalty()
        >>> data = problem.data(device, torch.Generator())
        >>> solver.setup(problem, data, device, torch.Generator())
        >>> solver.hypergradient().shape
        torch.Size([3])
    """

    needs = frozenset({Need.OUTER_DERIVATIVE, Need.INNER_DERIVATIVE})

    weight: float = 1.0
    growth: float = 0.1
    weight_max: float = 1e3

    def start(self, core: Core) -> "PenaltyMethod":
        """Return the method with y = z at the initial weights."""
        return PenaltyMethod(self, core)

    def check_settings(self) -> None:
        positive(weight=self.weight)
        at_least(0, growth=self.growth)
        if not self.weight <= self.weight_max:
            why = f"must not exceed weight_max={self.weight_max}"
            raise wrong("weight", self.weight, why, "choose a smaller weight, or a larger maximum")


class PenaltyMethod(WrittenHypergradient):
    """z (`core.weights`) and y (`penalized`), trained side by side.

    Attributes:
        penalized: y and its optimizer.
        penalized_carry: the carry of y.
        sigma: σ of this round.
        recent: the last training batch, and the carries of z and y before it, or None.
    """

    inner_takes: ClassVar[tuple[Split, ...]] = ("train", "valid")

    def __init__(self, settings: Penalty, core: Core) -> None:
        self.settings = settings
        self.core = core
        self.penalized = core.optimized(core.weights.detached(), core.inner_optimizer)
        self.penalized_carry = core.carry
        self.sigma = float(settings.weight)
        self.recent: tuple[Batch, Carry, Carry] | None = None

    def before_dry_run(self) -> None:
        """Refuse weights whose rounding σ would multiply."""
        refuse_half_weights("Penalty", self.core.problem)

    def inner_step(self, *batches: Batch) -> Metrics:
        """Take one step of z, then one of y, with the same masks."""
        batch, valid = batches
        core = self.core
        self.recent = batch, core.carry, self.penalized_carry
        core.data.train.count(count_examples(batch))  # y looks at it too
        masks = core.generator.get_state()  # lies on the host, whatever the device
        metrics = core.descend_inner(core.hypers(), batch)
        core.generator.set_state(masks)
        with core.services.phase("response"):
            return metrics | {"penalized_loss": self.descend_penalized(batch, valid)}

    def descend_penalized(self, batch: Batch, valid: Batch) -> Tensor:
        """Take one step of y on L_T + L_V/σ; return that loss, []."""
        core, y = self.core, self.penalized.tensors
        problem, before = core.problem, self.penalized_carry
        inner, carry = problem.inner_loss(core.hypers(), y, before, batch, core.generator)
        held = problem.space.constrain(core.search.u0)
        start = core.following(held, y, problem.fresh_carry(before, valid), batch)
        with core.without_cudnn():
            outer, _ = problem.outer_loss(held, y, start, valid)
        loss = inner + outer / self.sigma
        core.watch(loss)
        descend(loss, self.penalized)
        self.penalized_carry = detached(carry)
        return loss.detach()

    def differentiate(self, batch: Batch) -> tuple[Tensor, Tensor, Metrics]:
        """Return L_V(λ, y), ∂_λ L_V(λ, y) + σ (∂_λ L_T(λ, y) − ∂_λ L_T(λ, z)), and metrics."""
        core = self.core
        y, z = self.penalized.detached(), core.weights.detached()
        training, z_carry, y_carry = self.recent or (
            core.data.train.peek(),
            core.carry,
            self.penalized_carry,
        )
        loss, _, direct = core.outer_gradients(batch, y, self.penalized_carry, training)
        core.data.train.count(count_examples(training))
        masks = core.generator.get_state()
        of_y, at_y = self.inner_gradient(y, y_carry, training)
        core.generator.set_state(masks)
        of_z, at_z = self.inner_gradient(z, z_carry, training)
        if (decay := core.weight_decay) is not None:
            of_y, of_z = of_y + decay.penalty(y), of_z + decay.penalty(z)
        return loss, direct + self.sigma * (at_y - at_z), {"inner_gap": of_y - of_z}

    def inner_gradient(self, params: Params, carry: Carry, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return L_T and ∂_u L_T, [h]."""
        core = self.core
        u = core.search.u.detach().requires_grad_()
        hypers = core.problem.space.constrain(u, core.generator)
        loss, _ = core.problem.inner_loss(hypers, params, carry, batch, core.generator)
        if not loss.requires_grad:
            return loss, torch.zeros_like(u)
        return loss.detach(), torch.autograd.grad(loss, u, materialize_grads=True)[0]

    def outer_ended(self) -> Metrics:
        """Let σ grow; return the weight of this round."""
        metrics = {"penalty_weight": torch.full((), self.sigma, device=self.core.device)}
        self.sigma = min(self.sigma + self.settings.growth, self.settings.weight_max)
        return metrics

    # --- what the runner asks for ---

    def optimized(self) -> dict[str, Optimized]:
        return {"penalized": self.penalized}

    def warnings(self, metrics: Mapping[str, float]) -> dict[str, str]:
        if metrics.get("inner_gap", 0.0) >= 0:
            return {}
        return {
            "inner_gap": "Penalty: L_T is lower at y, which L_V pulls away, than at z, which "
            "minimizes it, so z is far from its minimum and the penalty multiplies that error; "
            "take more inner_steps, or let the weight grow more slowly"
        }

    def state_dict(self) -> dict[str, Any]:
        return {"penalized_carry": self.penalized_carry, "sigma": self.sigma}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.penalized_carry = to_device(state["penalized_carry"], self.core.device)
        self.sigma, self.recent = state["sigma"], None
