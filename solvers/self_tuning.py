"""Self-tuning networks: STN, centered STN and Δ-STN, as three flags of one solver.

The problem is min_λ L_V(λ, w*(λ)), where w*(λ) minimizes L_T(λ, ·). Near the current λ₀ the best
response w* is approximated by a linear function with trained weights w₀ and a trained Jacobian Θ:

    STN            ŵ(λ) = w₀ + Θλ           w₀ and Θ together: min E_ε L_T(λ₀ + ε, ŵ(λ₀ + ε))
    centered STN   ŵ(λ) = w₀ + Θ(λ − λ₀)    first w₀: min L_T(λ₀, w₀)
                                            then Θ: min E_ε L_T(λ₀ + ε, w₀ + Θε), w₀ constant
    Δ-STN          ŵ(λ) = w₀ + Θ(λ − λ₀)    the same, with Θ fitted to the linearized prediction
                                            f(x; λ₀ + ε, w₀) + J_w f(x; λ₀ + ε, w₀) · Θε

A round has `inner_steps` such steps (T_train), and then `outer_steps` outer steps (T_valid). In an
outer step w₀ and Θ are constants, and λ and σ descend

    E_ε L_V(λ + ε, ŵ(λ + ε)) − τ H[N(λ, diag σ²)],    ε ~ N(0, diag σ²).

At the end of the round, λ₀ ← λ.

From paper to code: λ, λ₀ in unconstrained coordinates are `search.u`, `search.u0`; σ = softplus(s)
is `search.sigma`; w₀ is `core.weights`; Θ is `theta`, and ΔW(ε) = Θε is `response.weights`.
The papers hold Θ layer by layer, as ΔW(ε) = diag(Uε) W₁ (`response/jacobian.py`). The draw of ε and
H are in `base/search_distribution.py`, the outer step is in `base/method.py`, the round is in
`base/descent.py`.

Sources: MacKay, Vicol, Lorraine, Duvenaud & Grosse, ICLR 2019 (STN); Bae & Grosse, NeurIPS 2020
(Δ-STN), whose equation numbers stand below. `docs/decisions.md` has the departures from their code.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bilevel import Batch, Carry, Hypers, Metrics, Need, Params, Prediction, Problem, Space
from bilevel.params import count_examples, detached, to_device
from bilevel.requirements import Trait
from bilevel.solver import on_cpu
from bilevel.solvers.autodiff.linearization import Predict, Weights, double_backward, forward_mode
from bilevel.solvers.base.constant_statistics import ConstantStatistics
from bilevel.solvers.base.core import Core
from bilevel.solvers.base.descent import Descent
from bilevel.solvers.base.dry_run import (
    check_part,
    check_response,
    large_response,
    takes,
    without_last,
)
from bilevel.solvers.base.method import BestResponse
from bilevel.solvers.base.row_check import check_rows
from bilevel.solvers.optim.optimized import RMSPROP, MakeOptimizer, Optimized, descend
from bilevel.solvers.optim.weight_decay import without_weight_decay
from bilevel.solvers.response.cheaper_pass import CheaperPass
from bilevel.solvers.response.jacobian import Dense, Response, Structured
from bilevel.solvers.response.row_counts import RowCounts
from bilevel.solvers.response.settled import Settled
from bilevel.validate import at_least, positive, wrong


@dataclass(kw_only=True, eq=False)
class SelfTuning(Descent):
    """Train w₀ and the response Θ of the weights to λ, and tune λ through Θ.

    | | centered | regularized_w0 | linearize |
    |---|---|---|---|
    | Δ-STN | yes | yes | yes |
    | centered STN | yes | yes | no |
    | STN | no | no | no |

    Weight decay of the optimizer of w₀ is a part of L_T here, and λ may hold it. Θ has none: its
    optimizer would draw the response to 0.

    Attributes:
        centered: take the response at ε = u − u₀; otherwise at u.
        regularized_w0: w₀ descends L_T(λ₀, w₀) alone, and then Θ takes its own step, with w₀
            constant; otherwise both take one joint step at a perturbed λ.
        linearize: fit Θ through the prediction linearized at w₀, under the convex objective.
        response: the parametrization of Θ; `Structured()` by default.
        response_optimizer: for Θ; by default as for w₀. The schedule and the clipping are those of
            w₀.
        scale_optimizer: for s, where σ = softplus(s).
        tune_scale: train σ; otherwise the outer steps draw no perturbation.
        max_scale: the largest σ, in unconstrained coordinates; None for no limit.
        entropy_weight: τ.
        response_every: n; Θ takes its step at every n-th inner step, and a separate w₀ at each.
        response_fraction: f; Θ's step takes the first ⌈f·B⌉ examples of a batch of B. With batches
            of all examples that is always the same part.
        per_example: draw ε anew for every example, where the space allows that; otherwise one ε
            serves a batch, and any differentiable network runs.
        row_counts: the rows of each example in every call of a weight, as the dry run found them.

    Raises:
        BilevelError: `linearize` without `centered`, or a cheaper response without
            `regularized_w0`.
    """

    needs = frozenset({Need.OUTER_DERIVATIVE})
    traits = frozenset({Trait.TUNES_DECAY})

    centered: bool = True
    regularized_w0: bool = True
    linearize: bool = True
    response: Response | None = None
    response_optimizer: MakeOptimizer | None = None
    scale_optimizer: MakeOptimizer = RMSPROP
    tune_scale: bool = True
    max_scale: float | None = None
    entropy_weight: float = 1e-3
    response_every: int = 1
    response_fraction: float = 1.0
    per_example: bool = True
    row_counts: RowCounts = field(default_factory=RowCounts, init=False, repr=False)

    def start(self, core: Core) -> "SelfTuningMethod":
        """Return the method with Θ = 0."""
        return SelfTuningMethod(self, core)

    def check_settings(self) -> None:
        at_least(0, entropy_weight=self.entropy_weight)
        if self.max_scale is not None:
            positive("set it to null for no limit", max_scale=self.max_scale)
            if not self.tune_scale:
                why = "needs tune_scale=True, because σ stays at its initial value otherwise"
                raise wrong("max_scale", self.max_scale, why, "set tune_scale=true or leave it out")
        self.response_pass.check(separate=self.regularized_w0)
        if self.linearize and not self.centered:
            why = "needs centered=True, because the linearization holds near w₀ alone"
            raise wrong("linearize", True, why, "set linearize=false or centered=true")
        if self.per_example and (self.response or Structured()).per_example:
            self.traits = self.traits | {Trait.PER_EXAMPLE}

    def fits(self, problem: Problem, device: torch.device) -> None:
        self.row_counts = RowCounts()  # the dry run fills it
        check_response(problem, self.response or Structured(), device)

    @property
    def response_pass(self) -> CheaperPass:
        """The inner steps and the examples from which Θ learns."""
        return CheaperPass(self.response_every, self.response_fraction)

    def lacking(self) -> str | None:
        sentence = (
            "linearize=true needs derivatives that PyTorch lacks for a layer of this network "
            "({error}); compose that layer from elementary operations, or set linearize=false "
            "(centered STN)"
        )
        return sentence if self.linearize else None

    def memory_settings(self, space: Space) -> list[str]:
        dense = ["response=null (Dense holds Θ as h copies of w)"]
        fewer = f"fewer hyperparameters (now h = {space.numel}, and Θ grows with it)"
        return [*(dense if isinstance(self.response, Dense) else []), fewer]


class SelfTuningMethod(BestResponse):
    """The base weights w₀ and the response Θ, in training.

    Attributes:
        settings: the flags.
        response: maps ε to w₀ + Θε.
        theta: Θ and its optimizer.
        response_carry: the carry of the perturbed passes; a cheaper response continues from that
            of w₀ instead.
        settled: watches whether a dense Θ settles; None for a structured one.
        varies_per_example: whether ε is [B, h].
    """

    extends = True

    def __init__(self, settings: SelfTuning, core: Core) -> None:
        self.settings = settings
        self.core = core
        self.space = core.problem.space
        self.response = copy.copy(settings.response or Structured())
        self.row_counts = self.response.row_counts = settings.row_counts
        self.response_carry = core.carry
        self.response_pass = settings.response_pass
        self.settled = Settled() if isinstance(self.response, Dense) else None
        w0, draws = core.weights.detached(), on_cpu(core.generator, 1)
        theta = self.response.init(w0, self.space.numel, core.calls.axes, draws)
        self.response.hold_rows(theta, core.calls.padding)
        self.theta = core.optimized(theta, settings.response_optimizer or settings.inner_optimizer)
        without_weight_decay(self.theta.optimizer)
        core.tune_weight_decay()
        if settings.tune_scale:
            core.search.train_scale(settings.scale_optimizer, settings.max_scale)
        varies = settings.per_example and self.response.per_example
        self.varies_per_example = varies and bool(self.space.per_example.any())
        if self.varies_per_example:
            core.search.vary_per_example()
        constant = core.follows and core.search.varies_per_example
        self.constant_statistics = ConstantStatistics(core, self.respond) if constant else None
        core.follows = core.follows and not constant

    # --- the best response: ŵ(λ) = w₀ + Θλ, or centered w₀ + Θ(λ − λ₀) ---

    def respond(self, offset: Tensor) -> Params:
        """Return ŵ(u₀ + offset) for an outer step, in which w₀ and Θ are constants."""
        at = offset if self.settings.centered else self.core.search.u0 + offset
        theta, w0 = self.theta.detached(), self.core.weights.detached()
        self.row_counts.split = "valid"
        return self.response.weights(theta, w0, at, tangent=False)

    def unperturbed_weights(self) -> Params:
        """Return ŵ(u₀), differentiable in w₀: w₀ itself, or w₀ + Θu₀ uncentered."""
        w0, theta = self.core.weights.tensors, self.theta.detached()
        if self.settings.centered:
            return w0
        return self.response.weights(theta, w0, self.core.search.u0, tangent=False)

    def freeze(self) -> None:
        """Uncentered, move Θu₀ from the response into w₀: w₀ ← w₀ + Θu₀, Θ ← 0."""
        if not self.settings.centered:
            with torch.no_grad():
                for name, w in self.unperturbed_weights().items():
                    self.core.weights.tensors[name].copy_(w)
                self.response.clear(self.theta.tensors)

    # --- the inner step, on one training batch ---

    def inner_step(self, *batches: Batch) -> Metrics:
        step = self.separate_step if self.settings.regularized_w0 else self.joint_step
        return step(*batches)

    def lighter_step(self) -> Callable[..., Metrics] | None:
        return None if self.response_pass.due(self.core.inner_count) else self.weights_step

    def joint_step(self, batch: Batch) -> Metrics:
        """STN: w₀ and Θ descend E_ε L_T(λ₀ + ε, ŵ(λ₀ + ε)) together.

        Where λ enters L_T non-linearly, this w₀ is biased (appendix E of the Δ-STN paper).
        """
        core = self.core
        loss, carry = self.perturbed_loss(core.weights.tensors, core.carry, batch)
        descend(loss, core.weights, self.theta)
        core.watch(loss)
        core.carry = self.response_carry = carry
        return {"inner_loss": loss.detach()}

    def separate_step(self, batch: Batch) -> Metrics:
        """Δ-STN: w₀ descends L_T(λ₀, w₀); then Θ descends E_ε L_T(λ₀ + ε, w₀ + Θε), w₀ held.

        On a joint quadratic, Θ tends to the exact Jacobian −A⁻¹B from any w₀ (theorem 3).
        Batch-norm statistics come from the first pass. Each pass keeps its own recurrent state.
        """
        core, cheaper, before = self.core, self.response_pass, self.core.carry
        loss = self.descend_weights(batch)
        with core.services.phase("response"):
            w0, part, start = core.weights.detached(), batch, self.response_carry
            if not cheaper.whole:
                part = cheaper.part(batch)
                start = cheaper.carry(core.problem, before, batch, part)
            response_loss, end = self.perturbed_loss(w0, start, part)
            descend(response_loss, self.theta)
        core.watch(loss + response_loss.detach())
        if cheaper.whole:
            self.response_carry = end
        return {"inner_loss": loss, "response_loss": response_loss.detach()}

    def weights_step(self, batch: Batch) -> Metrics:
        """Take the step of w₀ alone, between two steps of Θ."""
        loss = self.descend_weights(batch)
        self.core.watch(loss)
        return {"inner_loss": loss}

    def descend_weights(self, batch: Batch) -> Tensor:
        """Take the step of w₀ on L_T(λ₀, w₀); return that loss, []."""
        core = self.core
        hypers, w = core.hypers(), self.unperturbed_weights()
        loss, carry = core.problem.inner_loss(hypers, w, core.carry, batch, core.generator)
        descend(self.decayed(loss, w, core.weights.tensors), core.weights)
        core.carry = detached(carry)
        return loss.detach()

    def decayed(
        self, loss: Tensor, params: Params, w0: Params, hypers: Hypers | None = None
    ) -> Tensor:
        """Return the loss with the penalty of weight decay at `params` and λ, by default at λ₀.

        The penalty at w₀ and λ₀ is subtracted, because the optimizer of w₀ has its gradient.
        """
        decay = self.core.weight_decay
        if decay is None or params is w0:
            return loss
        return loss + (decay.penalty(params, hypers) - decay.penalty(w0)).mean()

    def perturbed_loss(self, w0: Params, carry: Carry, batch: Batch) -> tuple[Tensor, Carry]:
        """Return L_T(λ₀ + ε, ŵ(λ₀ + ε)) at a draw of ε, on the prediction or its linearization."""
        core, flags = self.core, self.settings
        noise = core.search.perturbation(count_examples(batch), core.generator)
        perturbed = core.search.u0 + noise
        offset = noise if flags.centered else perturbed
        hypers = self.space.constrain(perturbed, core.generator)
        self.row_counts.split = "train"
        params = self.response.weights(self.theta.tensors, w0, offset, tangent=False)
        if flags.linearize:
            prediction, carry = self.linearized(hypers, w0, offset, carry, batch)
        else:
            prediction, carry = core.predict(hypers, carry, batch, params)
        loss = core.problem.inner_objective(hypers, params, prediction, batch)
        return self.decayed(loss, params, w0, hypers), detached(carry)

    def linearized(
        self, hypers: Hypers, w0: Params, offset: Tensor, carry: Carry, batch: Batch
    ) -> tuple[Prediction, Carry]:
        """Return y₀ + ẏ, with y₀ = f(x; λ₀ + ε, w₀) and ẏ = J_w f(x; λ₀ + ε, w₀) · Θε.

        Only the prediction is linearized. A linearized objective would have no lower bound in Θ.
        """
        predict = partial(self.core.predict, hypers, carry, batch)
        weights = partial(self.response.weights, self.theta.tensors, w0)
        return self.linearize(predict, weights, offset)

    def linearize(self, predict: Predict, weights: Weights, offset: Tensor) -> Any:
        """Return y₀ + ẏ and the next carry in forward mode, or else by two backward passes.

        Forward mode is cheaper, but it gives no correct gradient of w₀ in some layers, which the
        joint step needs. And it is wrong where a network differentiates itself (forces): the rules
        of per-example weights have no tangent in that derivative, PyTorch's formula for the second
        derivative of a layer norm is wrong, and forward mode does not nest.
        """
        if self.settings.regularized_w0 and not self.core.calls.differentiates:
            return forward_mode(predict, weights, offset, self.core.functions)
        return double_backward(predict, weights, offset)

    # --- the outer step: u and s descend L_V(λ₀ + δ, ŵ(λ₀ + δ)) − τ H, with δ = u − u₀ + ε ---

    def bonus(self) -> dict[str, tuple[float, Tensor]]:
        """Return τ and H[N(u, diag σ²)]; nothing if σ is not tuned."""
        search, tau = self.core.search, self.settings.entropy_weight
        return {"entropy": (tau, search.entropy())} if self.settings.tune_scale else {}

    # --- what the runner asks for ---

    def effective_weights(self) -> Params:
        return detached(self.unperturbed_weights())

    def optimized(self) -> dict[str, Optimized]:
        return {"theta": self.theta}

    def scales(self) -> Hypers:
        return self.core.search.scales()

    def extra_tensors(self) -> Params:
        return {f"Θ of {name}": tensor for name, tensor in self.theta.detached().items()}

    def rebound(self) -> tuple[str, ...]:
        return ("response_carry",)

    def warnings(self, metrics: Mapping[str, float]) -> dict[str, str]:
        found = large_response(self.space, self.core.weights.leaves, self.theta.leaves)
        if self.settled is not None:
            found |= self.settled.warnings("SelfTuning")
        if self.constant_statistics is not None and "hypergradient_norm" in metrics:
            found |= self.constant_statistics.warnings("SelfTuning")
        return found

    def before_dry_run(self) -> None:
        check_part(self.core, self.response_pass)

    def after_dry_run(self) -> None:
        """Check per-example weights: in a round with fewer examples, and row by row.

        The round fails if another axis was taken for that of the examples.
        """
        if not self.varies_per_example:
            return
        core, linearize = self.core, self.linearize if self.settings.linearize else None
        batches = core.data.train.peek(), core.data.valid.peek()
        shorter = without_last(batches[0], self.response_pass.step), without_last(batches[1])
        if takes(core, shorter[0]):
            self.round_of(*shorter)
        if self.row_counts.revised:
            self.round_of(*batches)
        check_rows(core, self.response, linearize)
        self.row_counts.closed = True

    def round_of(self, training: Batch, validation: Batch) -> None:
        """Take an inner and an outer step on batches that may differ in size from the last."""
        core = self.core
        for owner, name in ((core, "carry"), (self, "response_carry")):
            setattr(owner, name, core.problem.fresh_carry(getattr(owner, name), training))
        core.last_outer_carry = None
        self.inner_step(training)
        self.outer_step(validation)

    def outer_ended(self) -> Metrics:
        """Count a round of a response that has a number for each weight and hyperparameter."""
        if self.settled is not None:
            self.settled.round_ended(self.theta.leaves)
        return {}

    def state_dict(self) -> dict[str, Any]:
        settled = {} if self.settled is None else {"settled": self.settled.state_dict()}
        return {"response_carry": self.response_carry, **settled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.response_carry = to_device(state["response_carry"], self.core.device)
        if self.settled is not None and "settled" in state:
            self.settled.load_state_dict(state["settled"], self.core.device)
