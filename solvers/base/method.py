"""The interface of a method: the mutable part of a `Descent`, which approximates ŵ(λ)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from bilevel import Batch, Carry, Hypers, Metrics, Params
from bilevel.params import count_examples, detached
from bilevel.solver import Split
from bilevel.solvers.base.core import Core
from bilevel.solvers.optim.optimized import Optimized, apply_gradients, descend


class Method(ABC):
    """The state of one method on one problem, made by `Descent.start`.

    A round is `begin_round`, inner steps, `inner_ended`, outer steps, `outer_ended`. The core takes
    the batches, so that a step can also be given one from outside.

    Attributes:
        core: problem, data, weights, search distribution.
        inner_takes: the splits of which an inner step takes a batch each.
        outer_takes: the splits of which an outer step takes a batch each.
        looks_back: whether an outer step also takes the last training batch, where statistics of
            L_V follow w.
        unrolls: whether a hypergradient exists only after the inner steps of a round.
        plain_warmup: whether a round of warm-up is one of plain training; otherwise a frozen round
            takes the steps of the core.
        assumes_minimum: whether w should come near a minimum of L_T, which evaluations then check.
    """

    core: Core
    inner_takes: ClassVar[tuple[Split, ...]] = ("train",)
    outer_takes: ClassVar[tuple[Split, ...]] = ("valid",)
    looks_back: ClassVar[bool] = False
    unrolls: ClassVar[bool] = False
    plain_warmup: ClassVar[bool] = False
    assumes_minimum: bool = True

    @abstractmethod
    def inner_step(self, *batches: Batch) -> Metrics:
        """Train w, and whatever else the inner phase trains, on one batch of each split."""

    @abstractmethod
    def outer_step(self, *batches: Batch) -> Metrics:
        """Move u, on one batch of each split."""

    @abstractmethod
    def outer_loss(self, batch: Batch) -> Tensor:
        """Return L_V on a validation batch; its derivative in u is the hypergradient."""

    # --- hooks ---

    def lighter_step(self) -> Callable[..., Metrics] | None:
        """Return a step that stands for `inner_step` at the present count; None for none."""
        return None

    def outer_loss_at(self, offset: Tensor, batch: Batch) -> Tensor | None:
        """Return L_V at λ(u₀ + offset) and ŵ(u₀ + offset); None where ŵ is known at u₀ alone."""
        return None

    def begin_round(self, steps: int, *, warmup: bool) -> None:
        """Prepare a round of `steps` inner steps; no outer phase follows if `warmup`."""

    def freeze(self) -> None:
        """Prepare a round of steps of w alone: let w be the weights that belong to λ₀."""

    def inner_ended(self) -> Metrics:
        """End the inner phase; return further metrics."""
        return {}

    def outer_ended(self) -> Metrics:
        """End the outer phase; return further metrics."""
        return {}

    def effective_weights(self) -> Params | None:
        """Return the weights that belong to λ₀, detached; None if they are w itself."""
        return None

    def optimized(self) -> dict[str, Optimized]:
        """Return what the inner phase trains beside w, by name; it is scheduled and saved."""
        return {}

    def scales(self) -> Hypers:
        """Return σ of the perturbation of each hyperparameter."""
        return {}

    def extra_tensors(self) -> Params:
        """Return the trained tensors other than w and λ, which must stay finite."""
        return {}

    def warnings(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Return warnings by kind, from mean metrics."""
        return {}

    def rebound(self) -> tuple[str, ...] | None:
        """Return the attributes that a step binds anew; None if steps cannot be captured."""
        return None

    def before_dry_run(self) -> None:
        """Refuse, or become smaller, before the round of the dry run."""

    def after_dry_run(self) -> None:
        """Refuse after the round of the dry run."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state beyond that of the core and of `optimized`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""


class BestResponse(Method):
    """A method that returns ŵ(λ) as a differentiable function; autograd finds the hypergradient.

    dL_V/du = ∂_λ L_V · dλ/du + ∂_w L_V · dŵ/du

    Attributes:
        extends: whether `respond` returns the value of ŵ beside u₀ too, not its derivative alone.
    """

    looks_back: ClassVar[bool] = True
    extends: ClassVar[bool] = False

    @abstractmethod
    def respond(self, offset: Tensor) -> Params:
        """Return ŵ(u₀ + offset), differentiable in offset, [h] or [B, h], alone."""

    def bonus(self) -> dict[str, tuple[float, Tensor]]:
        """Return terms that the outer objective subtracts from L_V: a weight and a value each."""
        return {}

    def outer_metrics(self) -> Metrics:
        """Return further metrics of the outer step that was just taken."""
        return {}

    def outer_loss(self, batch: Batch, training: Batch | None = None) -> Tensor:
        """Return L_V(λ(u₀ + δ), ŵ(u₀ + δ)) at a fresh draw of δ = u − u₀ + ε.

        Statistics follow ŵ as on `training`, by default the last training batch.
        """
        core = self.core
        perturbed = core.search.scale is not None
        offset = core.search.offset(count_examples(batch) if perturbed else 1, core.generator)
        loss, last = self.judged(offset, core.last_outer_carry, batch, training)
        core.last_outer_carry = detached(last)
        return loss

    def judged(
        self, offset: Tensor, before: Carry | None, batch: Batch, training: Batch | None
    ) -> tuple[Tensor, Carry]:
        """Return L_V(λ(u₀ + offset), ŵ(u₀ + offset)) after the carry `before`, and the next one."""
        core = self.core
        hypers = core.problem.space.constrain(core.search.u0 + offset)
        carry = core.problem.outer_carry(core.carry, before, batch)
        params = self.respond(offset)
        carry = core.following(hypers, params, carry, training)
        with core.without_cudnn():
            return core.problem.outer_loss(hypers, params, carry, batch)

    def outer_loss_at(self, offset: Tensor, batch: Batch) -> Tensor | None:
        if not self.extends:
            return None
        draws = self.core.generator.get_state()
        loss, _ = self.judged(offset, None, batch, None)
        self.core.generator.set_state(draws)
        return loss

    def outer_step(self, *batches: Batch) -> Metrics:
        """Take one step of the search distribution on L_V less the bonus terms."""
        loss = self.outer_loss(*batches)
        self.core.watch(loss)
        metrics, objective = {"outer_loss": loss.detach()}, loss
        for name, (weight, value) in self.bonus().items():
            metrics[name], objective = value.detach(), objective - weight * value
        gradient = descend(objective, *self.core.search.trained())[0]
        self.core.search.cap_scale()
        if gradient is not None:
            metrics |= self.core.note_hypergradient(gradient)
        return metrics | self.outer_metrics()


class WrittenHypergradient(Method):
    """A method that writes its hypergradient down; λ follows it, and ŵ is a constant."""

    @abstractmethod
    def differentiate(self, batch: Batch) -> tuple[Tensor, Tensor, Metrics]:
        """Return L_V on a validation batch, the hypergradient [h], and metrics."""

    def outer_loss(self, batch: Batch) -> Tensor:
        """Return L_V with the hypergradient for its derivative in u."""
        loss, gradient, _ = self.differentiate(batch)
        return loss + gradient @ (self.core.search.u - self.core.search.u.detach())

    def outer_step(self, *batches: Batch) -> Metrics:
        """Take one step of u along the hypergradient."""
        loss, gradient, metrics = self.differentiate(*batches)
        self.core.watch(loss + 0 * gradient.sum())  # a gradient that is not finite counts too
        apply_gradients([gradient], self.core.search.mean)
        return metrics | {"outer_loss": loss} | self.core.note_hypergradient(gradient)
