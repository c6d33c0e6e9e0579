"""One step of PyTorch's optimizers as a pure function: differentiable in weights, gradients, state and settings alike.

Each function follows its twin in `torch.optim` to the rounding error, and names its state as that does. Where the twin divides
by √v, the derivative of the root is 0 at v = 0: a weight that never had a gradient has m = 0 too, so that m √v has derivative 0
there, where the infinite derivative of the root would make NaN of everything.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from bilevel import BilevelError, Hypers, Params, Refused, Space
from bilevel.domains import OPTIMIZER_SETTINGS
from bilevel.solvers.optim.optimized import MakeOptimizer, Optimized

Settings: TypeAlias = Mapping[str, Any]
"""Of an optimizer, by PyTorch's names: numbers, or [] tensors that carry a derivative; of `betas`, `beta1` and `beta2`."""

Slots: TypeAlias = dict[str, Tensor]
"""What an optimizer remembers of one weight."""


class Moments(NamedTuple):
    """What an optimizer remembers of each weight, and how many steps that has taken (none where it had no gradient)."""

    slots: dict[str, Slots]
    steps: dict[str, int]


def sgd(w: Tensor, gradient: Tensor, slots: Slots, count: int, s: Settings) -> tuple[Tensor, Slots]:
    """b ← m b + (1 − dampening) g, w ← w − lr b, or w − lr (g + m b) with Nesterov's momentum; b is g at the first step."""
    gradient = _decayed(gradient, w, s)
    if not _is_zero(s["momentum"]):
        buffer = gradient
        if (before := slots.get("momentum_buffer")) is not None:
            fresh = gradient if _is_zero(s["dampening"]) else (1 - s["dampening"]) * gradient
            buffer = _plus(fresh, s["momentum"], before)
        slots = {"momentum_buffer": buffer}
        gradient = _plus(gradient, s["momentum"], buffer) if s["nesterov"] else buffer
    return _plus(w, -s["lr"], gradient), slots


def adam(
    w: Tensor, gradient: Tensor, slots: Slots, count: int, s: Settings
) -> tuple[Tensor, Slots]:
    """m ← β₁m + (1 − β₁)g, v ← β₂v + (1 − β₂)g², w ← w − lr m̂ / (√v̂ + eps), with m̂ = m/(1 − β₁ᵗ) and v̂ = v/(1 − β₂ᵗ)."""
    return _adam(w, _decayed(gradient, w, s), slots, count, s)


def adamw(
    w: Tensor, gradient: Tensor, slots: Slots, count: int, s: Settings
) -> tuple[Tensor, Slots]:
    """Adam with decoupled weight decay: w ← (1 − lr · decay) w before its step."""
    return _adam(
        w if _is_zero(s["weight_decay"]) else w * (1 - s["lr"] * s["weight_decay"]),
        gradient,
        slots,
        count,
        s,
    )


def rmsprop(
    w: Tensor, gradient: Tensor, slots: Slots, count: int, s: Settings
) -> tuple[Tensor, Slots]:
    """v ← αv + (1 − α)g², w ← w − lr g / (√v + eps); centered, v less the squared mean of g; with momentum on the quotient."""
    gradient = _decayed(gradient, w, s)
    square = _mean_square(slots.get("square_avg"), gradient, s["alpha"])
    after = {"square_avg": square}
    if s["centered"]:
        mean = torch.lerp(_or_zeros(slots.get("grad_avg"), w), gradient, 1 - s["alpha"])
        after["grad_avg"] = mean
        square = torch.addcmul(square, mean, mean, value=-1)
    step = gradient / (_root(square) + s["eps"])
    if not _is_zero(s["momentum"]):
        if (before := slots.get("momentum_buffer")) is not None:
            step = _plus(step, s["momentum"], before)
        after["momentum_buffer"] = step
    return _plus(w, -s["lr"], step), after


UPDATES: dict[
    type[torch.optim.Optimizer],
    Callable[[Tensor, Tensor, Slots, int, Settings], tuple[Tensor, Slots]],
] = {
    torch.optim.SGD: sgd,
    torch.optim.Adam: adam,
    torch.optim.AdamW: adamw,
    torch.optim.RMSprop: rmsprop,
}


DECOUPLED = "decoupled_weight_decay"

UNKNOWN = ("amsgrad", "maximize", "capturable", "fused", DECOUPLED)
"""Options of PyTorch's optimizers that change what is computed, or where the number of steps lies (on the device)."""


class FunctionalOptimizer:
    """The optimizer of an `Optimized` as a function: its clipping, its settings as its schedule has left them, and its memory.

    A learning rate that is tuned follows its schedule all the same: the schedule multiplies it by the factor by which it has
    changed the learning rate that it began with.

    Args:
        optimized: weights and their optimizer.
        space: of the problem; its settings of the optimizer take the place of the optimizer's own.

    Attributes:
        tuned: the settings that λ holds, by hyperparameter; a frozen one is a constant of the optimizer.

    Raises:
        Refused: an optimizer (or an option of one) without a differentiable twin, or without a setting that the space tunes.
    """

    def __init__(self, optimized: Optimized, space: Space) -> None:
        kind, group = type(optimized.optimizer), optimized.optimizer.param_groups[0]
        if kind not in UPDATES:
            known = ", ".join(f"torch.optim.{k.__name__}" for k in UPDATES)
            raise Refused(
                f"{kind.__name__} has no differentiable twin here; choose one of {known} as inner_optimizer"
            )
        if odd := [
            name
            for name in UNKNOWN
            if group.get(name) and not (kind is torch.optim.AdamW and name == DECOUPLED)
        ]:
            raise Refused(
                f"the differentiable twin of {kind.__name__} has no {odd[0]}=true; leave it out of inner_optimizer"
            )
        if len(optimized.optimizer.param_groups) > 1:
            raise Refused(
                "the differentiable twin has one group of parameters; give inner_optimizer the same settings for all"
            )
        self.optimized, self.space, self.update = optimized, space, UPDATES[kind]
        self.base_lr = group.get(
            "initial_lr", group["lr"]
        )  # a schedule writes the first, and has changed the second already
        self.tuned = {
            n: domain.optimizer
            for n, domain in space.items()
            if domain.optimizer is not None and not domain.frozen
        }
        for name, setting in self.tuned.items():
            if setting not in _settings(group):
                raise Refused(
                    f"`{name}` sets `{setting}`, which {kind.__name__} has not; choose another inner_optimizer"
                )

    def read(self) -> tuple[Params, Moments]:
        """The weights and the memory as they are, as constants; views, which an optimizer's own step changes in place."""
        states = {
            name: self.optimized.optimizer.state.get(leaf, {})
            for name, leaf in self.optimized.tensors.items()
        }
        steps = {
            name: int(state.get("step", 0)) for name, state in states.items()
        }  # they lie on the host
        return self.optimized.detached(), Moments(self.slots(), steps)

    def slots(self) -> dict[str, Slots]:
        """What the optimizer remembers of each weight, but for the number of its steps."""
        states = {
            name: self.optimized.optimizer.state.get(leaf, {})
            for name, leaf in self.optimized.tensors.items()
        }
        return {
            name: {
                key: value for key, value in state.items() if key != "step" and value is not None
            }
            for name, state in states.items()
        }

    @torch.no_grad()
    def write(self, params: Params, moments: Moments) -> None:
        """Leave weights and memory as if the optimizer itself had come here."""
        self.optimized.optimizer.step()  # leaves have no gradients to follow; a schedule warns of an optimizer that never stepped
        for name, leaf in self.optimized.tensors.items():
            leaf.copy_(params[name])
            # new tensors: a graph may still hold the old ones, and what autograd returns may share its memory
            state = {
                key: value.clone(memory_format=torch.contiguous_format)
                for key, value in moments.slots[name].items()
            }
            if self.update is not sgd and moments.steps[name]:
                state["step"] = torch.full(
                    (), moments.steps[name], dtype=torch.float32, device="cpu"
                )
            self.optimized.optimizer.state[leaf] = state

    def settings(self, hypers: Hypers) -> Settings:
        """The optimizer's, with λ's in their place."""
        own = _settings(group := self.optimized.optimizer.param_groups[0])
        own |= {setting: hypers[name] for name, setting in self.tuned.items()}
        if "lr" in self.tuned.values() and group["lr"] != self.base_lr:
            own["lr"] = own["lr"] * (group["lr"] / self.base_lr)
        return own

    def step(
        self,
        params: Params,
        moments: Moments,
        gradients: Iterable[Tensor | None],
        settings: Settings,
    ) -> tuple[Params, Moments]:
        """The weights and the memory after one step along `gradients`, in the order of `params`; None leaves a weight alone."""
        after, slots, steps = dict(params), dict(moments.slots), dict(moments.steps)
        for name, gradient in zip(params, self._clipped(list(gradients)), strict=True):
            if gradient is not None:
                steps[name] += 1
                after[name], slots[name] = self.update(
                    params[name], gradient, slots[name], steps[name], settings
                )
        return after, Moments(slots, steps)

    def _clipped(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        if self.optimized.clip_norm is None:
            return gradients
        squares = torch.stack(
            [g.reshape(-1).dot(g.reshape(-1)) for g in gradients if g is not None]
        )
        factor = (self.optimized.clip_norm / (_root(squares.sum()) + 1e-6)).clamp(max=1.0)
        return [None if g is None else g * factor for g in gradients]


def configured(make: MakeOptimizer, settings: Mapping[str, float]) -> MakeOptimizer:
    """The same optimizer with some of its settings changed, `beta1` and `beta2` among them.

    Raises:
        BilevelError: when it is made, for a setting that it does not have.
    """
    if not settings:
        return make

    def made(params: Iterable[Tensor]) -> torch.optim.Optimizer:
        optimizer = make(params)
        for group in optimizer.param_groups:
            apply_settings(group, settings)
        optimizer.defaults.update(
            {key: value for key, value in settings.items() if key in optimizer.defaults}
        )
        return optimizer

    return made


def apply_settings(group: dict[str, Any], settings: Mapping[str, float]) -> None:
    """Change the settings of an optimizer's group in place.

    Raises:
        BilevelError: a setting that it does not have.
    """
    for setting, value in settings.items():
        if setting in ("beta1", "beta2") and "betas" in group:
            betas = list(group["betas"])
            betas[int(setting[-1]) - 1] = value
            group["betas"] = tuple(betas)
        elif setting in group:
            group[setting] = value
        else:
            raise BilevelError(
                f"the inner optimizer has no setting `{setting}`; choose one that has, or leave it untuned"
            )


def optimizer_settings(space: Space, hypers: Hypers) -> dict[str, float]:
    """The settings of the inner optimizer that λ holds, as numbers (reads them from the device)."""
    return {
        setting: float(hypers[name])
        for name, domain in space.items()
        if (setting := domain.optimizer) is not None
    }


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    known = {
        key: value
        for key, value in group.items()
        if key in (*OPTIMIZER_SETTINGS, "dampening", "nesterov", "centered")
    }
    return known | (
        {"beta1": group["betas"][0], "beta2": group["betas"][1]} if "betas" in group else {}
    )


def _adam(
    w: Tensor, gradient: Tensor, slots: Slots, count: int, s: Settings
) -> tuple[Tensor, Slots]:
    mean = torch.lerp(_or_zeros(slots.get("exp_avg"), w), gradient, 1 - s["beta1"])
    square = _mean_square(slots.get("exp_avg_sq"), gradient, s["beta2"])
    scale = -s["lr"] / (1 - s["beta1"] ** count)
    root = _root(square) / (1 - s["beta2"] ** count) ** 0.5 + s["eps"]
    after = (
        w + scale * mean / root
        if isinstance(scale, Tensor)
        else torch.addcdiv(w, mean, root, value=scale)
    )
    return after, {"exp_avg": mean, "exp_avg_sq": square}


def _mean_square(before: Tensor | None, gradient: Tensor, decay: Any) -> Tensor:
    """Decay · before + (1 − decay) g²."""
    if isinstance(decay, Tensor):
        return decay * _or_zeros(before, gradient) + (1 - decay) * (gradient * gradient)
    return torch.addcmul(decay * _or_zeros(before, gradient), gradient, gradient, value=1 - decay)


def _or_zeros(slot: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if slot is None else slot


def _decayed(gradient: Tensor, w: Tensor, s: Settings) -> Tensor:
    return gradient if _is_zero(s["weight_decay"]) else _plus(gradient, s["weight_decay"], w)


def _plus(x: Tensor, scale: Any, y: Tensor) -> Tensor:
    """X + scale · y, in one pass where scale is a number."""
    return x + scale * y if isinstance(scale, Tensor) else torch.add(x, y, alpha=scale)


def _root(v: Tensor) -> Tensor:
    """√v with derivative 0 where v is 0."""
    positive = v > 0
    return torch.where(positive, torch.where(positive, v, 1.0).sqrt(), 0.0)


def _is_zero(setting: Any) -> bool:
    return not isinstance(setting, Tensor) and setting == 0
