"""The core of a training run: problem, data, weights and search distribution, with shared steps."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel import Batch, Carry, Data, Hypers, Metrics, Params, Prediction, Problem
from bilevel.half_weights import for_weights
from bilevel.params import detached, to_device
from bilevel.services import Services
from bilevel.solver import Split, initial_state
from bilevel.solvers.autodiff.decompositions import RECURRENT
from bilevel.solvers.autodiff.pullback import flat
from bilevel.solvers.base.hypergradient_signal import HypergradientSignal
from bilevel.solvers.base.search_distribution import SearchDistribution
from bilevel.solvers.base.settings import InnerSettings, OuterSettings
from bilevel.solvers.optim.followed_schedule import FollowedSchedule
from bilevel.solvers.optim.optimized import (
    MakeOptimizer,
    Optimized,
    check_all_trained,
    descend,
)
from bilevel.solvers.optim.settings import configured, optimizer_settings
from bilevel.solvers.optim.weight_decay import WeightDecay
from bilevel.solvers.response.call_recorder import CallRecorder


class Core:
    """The state that every method works on.

    Attributes:
        problem: the bilevel problem; it takes λ in float32 whatever the type of the weights.
        data: its streams.
        device: where everything lies.
        generator: serves all draws of training.
        services: timers, watch and captured steps.
        inner_count: the number of the present inner step.
        inner_optimizer: makes the optimizer of w, with the settings that λ holds at the start.
        weights: w and its optimizer.
        carry: batch-norm statistics, recurrent state.
        search: the search distribution of λ, after `prepare_search`.
        signal: the signal-to-noise ratio of the hypergradient, after `prepare_search`.
        outer_rates: the learning rates of λ and σ, where they follow the schedule of w.
        calls: the calls of the network, as one pass at set-up showed them; after `prepare_search`.
        functions: the torch functions among them.
        recurrent: whether there are fused recurrent layers, which cuDNN does not differentiate in
            evaluation mode.
        follows: whether the statistics of L_V follow w in the hypergradient.
        latest: the last training batch, where they do.
        last_outer_carry: the carry after the last outer batch; a problem may continue from it
            (`Problem.outer_carry`).
        next_check: the inner step from which an evaluation looks whether w nears a minimum.
    """

    search: SearchDistribution
    signal: HypergradientSignal | None = None
    outer_rates: FollowedSchedule | None = None
    calls: CallRecorder
    functions: set[Any]
    recurrent: bool = False
    follows: bool = False
    latest: Batch | None = None
    last_outer_carry: Carry | None = None
    next_check: int = 0

    def __init__(
        self,
        settings: InnerSettings,
        problem: Problem,
        data: Data,
        device: torch.device,
        generator: torch.Generator,
        services: Services,
        constants: Hypers | None = None,
    ) -> None:
        self.settings = settings
        self.data = data
        self.device = device
        self.generator = generator
        self.services = services
        self.inner_count = 0
        params, self.carry = initial_state(problem, device, generator)
        self.problem = for_weights(problem, params)
        initial = {name: problem.space[name].initial() for name in problem.space}
        initial |= constants or {}
        self.inner_optimizer = configured(
            settings.inner_optimizer, optimizer_settings(problem.space, initial), list(params)
        )
        own = services.leaves
        self.weights = Optimized(
            params if own is None else own,
            self.inner_optimizer,
            settings.inner_scheduler,
            settings.clip_norm,
            in_place=own is not None,
        )
        check_all_trained(self.weights)

    def optimized(self, tensors: Params, optimizer: MakeOptimizer) -> Optimized:
        """Return `tensors` under `optimizer`, with the schedule and clipping of the inner steps."""
        return Optimized(tensors, optimizer, self.settings.inner_scheduler, self.settings.clip_norm)

    def prepare_search(self, outer: OuterSettings) -> None:
        """Make the search distribution, with the optimizer of u, and record the network's calls."""
        space, like = self.problem.space, self.weights.leaves[0]
        scheduler = None if outer.outer_scheduler == "inner" else outer.outer_scheduler
        self.search = SearchDistribution(space, outer.outer_optimizer, scheduler, like=like)
        self.signal = HypergradientSignal(self.search.u0)
        hypers = space.constrain(self.search.u0)
        draws = torch.Generator(self.generator.device).manual_seed(0)
        batch = self.data.train.peek()
        params = self.weights.detached()
        self.calls = CallRecorder(self.problem, hypers, params, self.carry, batch, draws)
        self.functions = self.calls.functions
        self.recurrent = not self.functions.isdisjoint(RECURRENT)
        if outer.follow_statistics and self.carry:
            with torch.no_grad():
                found = self.problem.statistics(hypers, params, self.carry, batch, draws)
            self.follows = bool(found)

    def follow_inner_schedule(self) -> None:
        """Let the learning rates of λ and σ follow the schedule of w, from their present values."""
        followers = [group.optimizer for group in self.search.trained()]
        self.outer_rates = FollowedSchedule(self.weights.optimizer, followers)

    @cached_property
    def weight_decay(self) -> WeightDecay | None:
        """The penalty that the optimizer of w adds to L_T; None without weight decay.

        Raises:
            Refused: the optimizer decays weights in a way that is no penalty.
        """
        return WeightDecay.of(self.weights, self.problem.space, lambda: self.search.u0)

    def tune_weight_decay(self) -> None:
        """Let each step decay w at λ₀, where λ holds the weight decay of the optimizer."""
        if self.weight_decay is not None:
            self.weight_decay.take_over()

    # --- steps ---

    def next_batches(self, splits: Iterable[Split]) -> list[Batch]:
        """Return the next batch of each split."""
        return [self.services.next_batch(getattr(self.data, split)) for split in splits]

    def note_hypergradient(self, gradient: Tensor) -> Metrics:
        """Return the metrics of the hypergradient of an outer step, [h]."""
        metrics = {"hypergradient_norm": gradient.norm()}
        if self.signal is not None:
            metrics["hypergradient_snr"] = self.signal.note(gradient)
        return metrics

    def watch(self, loss: Tensor) -> None:
        """Note the present inner step if `loss` is not finite."""
        self.services.watch(loss, self.inner_count)

    def hypers(self) -> Hypers:
        """Return λ₀ in its own units, whole numbers rounded at random as in every inner step."""
        return self.problem.space.constrain(self.search.u0, self.generator)

    def predict(
        self, hypers: Hypers, carry: Carry, batch: Batch, params: Params
    ) -> tuple[Prediction, Carry]:
        """Return f(x; λ, w) and the next carry, as in training."""
        draws = self.generator
        return self.problem.predict(hypers, params, carry, batch, train=True, generator=draws)

    def descend_inner(self, hypers: Hypers, batch: Batch) -> Metrics:
        """Take one optimizer step of w on L_T(λ, ·), at constant λ."""
        loss, carry = self.problem.inner_loss(
            hypers, self.weights.tensors, self.carry, batch, self.generator
        )
        self.watch(loss)
        descend(loss, self.weights)
        self.carry = detached(carry)
        return {"inner_loss": loss.detach()}

    def frozen_step(self, batch: Batch) -> Metrics:
        """Take one optimizer step of w on L_T(λ₀, ·), as plain training does."""
        return self.descend_inner(self.hypers(), batch)

    def decayed(self, gradient: Tensor) -> Tensor:
        """Return ∇_w L_T, [m], with the gradient of weight decay."""
        if self.weight_decay is None:
            return gradient
        return gradient + self.weight_decay.times(flat(list(self.weights.detached().values())))

    def outer_gradients(
        self, batch: Batch, params: Params, carry: Carry, training: Batch | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return L_V(λ(u), w), ∇_w L_V [m] and ∂_u L_V [h] at `params`; ŵ has no part in them.

        Statistics follow w as on `training`, by default the last training batch.
        """
        w = {name: p.detach().requires_grad_() for name, p in params.items()}
        hypers = self.problem.space.constrain(self.search.u)
        fresh = self.problem.fresh_carry(carry, batch)
        fresh = self.following(hypers, w, fresh, training)
        with self.without_cudnn():
            loss, _ = self.problem.outer_loss(hypers, w, fresh, batch)
        leaves = [*w.values(), self.search.u]
        *gradients, direct = torch.autograd.grad(loss, leaves, materialize_grads=True)
        return loss.detach(), flat(gradients), direct

    def following(
        self, hypers: Hypers, params: Params, carry: Carry, training: Batch | None
    ) -> Carry:
        """Return the carry with `moving_statistics`, where statistics follow w."""
        if not self.follows:
            return carry
        training = self.training_batch() if training is None else training
        return self.moving_statistics(hypers, params, carry, training)

    def moving_statistics(
        self, hypers: Hypers, params: Params, carry: Carry, training: Batch
    ) -> Carry:
        """Return the carry with the derivative of the statistics of `training` in λ and w.

        Its values stay. At a minimum the running statistics are those of training batches at w.
        """
        with self.services.phase("response"):
            start = self.problem.fresh_carry(carry, training)
            found = self.problem.statistics(hypers, params, start, training, self.generator)
        moving = {name: (s - s.detach()).to(carry[name].dtype) for name, s in found.items()}
        return carry | {name: carry[name] + change for name, change in moving.items()}

    def training_batch(self) -> Batch:
        """Return the last training batch; before training, the first one."""
        return self.data.train.peek() if self.latest is None else self.latest

    def without_cudnn(self) -> AbstractContextManager[Any]:
        """Turn cuDNN off within a block, for a network with fused recurrent layers."""
        return torch.backends.cudnn.flags(enabled=False) if self.recurrent else nullcontext()

    def warnings(self) -> dict[str, str]:
        """Return warnings of weight decay, by kind."""
        found: dict[str, str] = {}
        if "weight_decay" in vars(self) and self.weight_decay is not None:  # the method uses it
            found = self.weight_decay.warnings()
        groups = self.search.mean.optimizer.param_groups
        if decay := max(float(group.get("weight_decay") or 0.0) for group in groups):
            found["outer_weight_decay"] = (
                f"outer_optimizer.weight_decay={decay:g} of "
                f"{type(self.search.mean.optimizer).__name__} draws u to 0, so that λ does not "
                "minimize L_V; set weight_decay to 0"
            )
        return found

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Return w with its optimizer, the carry, the draws, and moments of the hypergradient."""
        return {
            "weights": self.weights.state_dict(),
            "carry": self.carry,
            "generator": self.generator.get_state(),
            "signal": None if self.signal is None else self.signal.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.weights.load_state_dict(state["weights"])
        self.carry = to_device(state["carry"], self.device)
        self.generator.set_state(state["generator"].cpu())
        if self.signal is not None and state.get("signal"):
            self.signal.load_state_dict(state["signal"])
        self.latest = None


def averaged(steps: Iterable[Metrics]) -> Metrics:
    """Return the mean of each metric over the steps that have it, by a running sum."""
    totals: Metrics = {}
    counts: dict[str, int] = {}
    for metrics in steps:
        for name, value in metrics.items():
            totals[name] = totals[name] + value if name in totals else value
            counts[name] = counts.get(name, 0) + 1
    return {name: total / counts[name] for name, total in totals.items()}
