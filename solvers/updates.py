"""One step of PyTorch's optimizers as a pure function: differentiable in weights, gradients, state and settings alike.

Each function follows its twin in `torch.optim` to the rounding error, and names its state as that does. Where the twin divides
by √v, the derivative of the root is 0 at v = 0: a weight that never had a gradient has no effect on its own step, where the
infinite derivative would make NaN of everything.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from bilevel import BilevelError, Hypers, Params, Refused, Space
from bilevel.domains import OPTIMIZER_SETTINGS
from solvers.trained import MakeOptimizer, Trained

Settings: TypeAlias = Mapping[str, Any]
"""Of an optimizer, by PyTorch's names: numbers, or [] tensors that carry a derivative; of `betas`, `beta1` and `beta2`."""

Slots: TypeAlias = dict[str, Tensor]
"""What an optimizer remembers of one weight."""


class Moments(NamedTuple):
    """What an optimizer remembers: by weight, and how many steps it has taken."""

    slots: dict[str, Slots]
    steps: int


def sgd(w: Tensor, gradient: Tensor, slots: Slots, count: int, s: Settings) -> tuple[Tensor, Slots]:
    """b ← m b + (1 − dampening) g, w ← w − lr b, or w − lr (g + m b) with Nesterov's momentum."""
    gradient = _decayed(gradient, w, s)
    if not _is_zero(s["momentum"]):
        before = slots.get("momentum_buffer")
        buffer = gradient if before is None else s["momentum"] * before + (1 - s["dampening"]) * gradient
        slots = {"momentum_buffer": buffer}
        gradient = gradient + s["momentum"] * buffer if s["nesterov"] else buffer
    return w - s["lr"] * gradient, slots


def adam(w: Tensor, gradient: Tensor, slots: Slots, count: int, s: Settings) -> tuple[Tensor, Slots]:
    """m ← β₁m + (1 − β₁)g, v ← β₂v + (1 − β₂)g², w ← w − lr m̂ / (√v̂ + eps), with m̂ = m/(1 − β₁ᵗ) and v̂ = v/(1 − β₂ᵗ)."""
    return _adam(w, _decayed(gradient, w, s), slots, count, s)


def adamw(w: Tensor, gradient: Tensor, slots: Slots, count: int, s: Settings) -> tuple[Tensor, Slots]:
    """Adam with decoupled weight decay: w ← (1 − lr · decay) w before its step."""
    return _adam(w * (1 - s["lr"] * s["weight_decay"]), gradient, slots, count, s)


def rmsprop(w: Tensor, gradient: Tensor, slots: Slots, count: int, s: Settings) -> tuple[Tensor, Slots]:
    """v ← αv + (1 − α)g², w ← w − lr g / (√v + eps); centered, v less the squared mean of g; with momentum on the quotient."""
    gradient = _decayed(gradient, w, s)
    square = s["alpha"] * slots.get("square_avg", torch.zeros_like(w)) + (1 - s["alpha"]) * gradient * gradient
    after = {"square_avg": square}
    if s["centered"]:
        mean = slots.get("grad_avg", torch.zeros_like(w))
        after["grad_avg"] = mean = mean + (1 - s["alpha"]) * (gradient - mean)
        square = square - mean * mean
    step = gradient / (_root(square) + s["eps"])
    if not _is_zero(s["momentum"]):
        step = s["momentum"] * slots.get("momentum_buffer", torch.zeros_like(w)) + step
        after["momentum_buffer"] = step
    return w - s["lr"] * step, after


UPDATES: dict[type[torch.optim.Optimizer], Callable[[Tensor, Tensor, Slots, int, Settings], tuple[Tensor, Slots]]] = {
    torch.optim.SGD: sgd,
    torch.optim.Adam: adam,
    torch.optim.AdamW: adamw,
    torch.optim.RMSprop: rmsprop,
}


class Twin:
    """The optimizer of a `Trained` as a function: its clipping, its settings as its schedule has left them, and its memory.

    Args:
        trained: weights and their optimizer.
        space: of the problem; its settings of the optimizer take the place of the optimizer's own.

    Raises:
        Refused: an optimizer (or an option of one) without a differentiable twin, or without a setting that the space tunes.
    """

    def __init__(self, trained: Trained, space: Space) -> None:
        kind, group = type(trained.optimizer), trained.optimizer.param_groups[0]
        if kind not in UPDATES:
            known = ", ".join(f"torch.optim.{k.__name__}" for k in UPDATES)
            raise Refused(f"{kind.__name__} has no differentiable twin here; choose one of {known} as inner_optimizer")
        if odd := [name for name in ("amsgrad", "maximize", "capturable") if group.get(name)]:
            raise Refused(f"the differentiable twin of {kind.__name__} has no {odd[0]}=true; leave it out of inner_optimizer")
        self.trained, self.space, self.update = trained, space, UPDATES[kind]
        self.tuned = {name: domain.optimizer for name, domain in space.items() if domain.optimizer is not None}
        for name, setting in self.tuned.items():
            if setting not in _settings(group):
                raise Refused(f"`{name}` sets `{setting}`, which {kind.__name__} has not; choose another inner_optimizer")

    def read(self) -> tuple[Params, Moments]:
        """The weights and the memory as they are, as constants."""
        slots: dict[str, Slots] = {}
        count = 0
        for name, leaf in self.trained.tensors.items():
            state = self.trained.optimizer.state.get(leaf, {})
            count = int(state.get("step", 0))  # it lies on the host
            slots[name] = {key: value for key, value in state.items() if key != "step" and value is not None}
        return self.trained.detached(), Moments(slots, count)

    @torch.no_grad()
    def write(self, params: Params, moments: Moments) -> None:
        """Leave weights and memory as if the optimizer itself had come here."""
        for name, leaf in self.trained.tensors.items():
            leaf.copy_(params[name])
            state = self.trained.optimizer.state[leaf]
            state.update({key: value.detach() for key, value in moments.slots[name].items()})
            if self.update is not sgd:
                state["step"] = torch.tensor(float(moments.steps))

    def settings(self, hypers: Hypers) -> Settings:
        """The optimizer's, with λ's in their place."""
        own = _settings(self.trained.optimizer.param_groups[0])
        return own | {setting: hypers[name] for name, setting in self.tuned.items()}

    def step(self, params: Params, moments: Moments, gradients: Iterable[Tensor], settings: Settings) -> tuple[Params, Moments]:
        """The weights and the memory after one step along `gradients`, in the order of `params`."""
        gradients = self._clipped(list(gradients))
        count = moments.steps + 1
        after: Params = {}
        slots: dict[str, Slots] = {}
        for (name, w), gradient in zip(params.items(), gradients, strict=True):
            after[name], slots[name] = self.update(w, gradient, moments.slots[name], count, settings)
        return after, Moments(slots, count)

    def _clipped(self, gradients: list[Tensor]) -> list[Tensor]:
        if self.trained.clip_norm is None:
            return gradients
        squares = torch.stack([(g * g).sum() for g in gradients])
        factor = (self.trained.clip_norm / (_root(squares.sum()) + 1e-6)).clamp(max=1.0)
        return [g * factor for g in gradients]


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
        optimizer.defaults.update({key: value for key, value in settings.items() if key in optimizer.defaults})
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
            raise BilevelError(f"the inner optimizer has no setting `{setting}`; choose one that has, or leave it untuned")


def optimizer_settings(space: Space, hypers: Hypers) -> dict[str, float]:
    """The settings of the inner optimizer that λ holds, as numbers (reads them from the device)."""
    return {setting: float(hypers[name]) for name, domain in space.items() if (setting := domain.optimizer) is not None}


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    known = {key: value for key, value in group.items() if key in (*OPTIMIZER_SETTINGS, "dampening", "nesterov", "centered")}
    return known | ({"beta1": group["betas"][0], "beta2": group["betas"][1]} if "betas" in group else {})


def _adam(w: Tensor, gradient: Tensor, slots: Slots, count: int, s: Settings) -> tuple[Tensor, Slots]:
    zeros = torch.zeros_like(w)
    mean = s["beta1"] * slots.get("exp_avg", zeros) + (1 - s["beta1"]) * gradient
    square = s["beta2"] * slots.get("exp_avg_sq", zeros) + (1 - s["beta2"]) * gradient * gradient
    scale = s["lr"] / (1 - s["beta1"] ** count)
    root = _root(square) / (1 - s["beta2"] ** count) ** 0.5 + s["eps"]
    return w - scale * mean / root, {"exp_avg": mean, "exp_avg_sq": square}


def _decayed(gradient: Tensor, w: Tensor, s: Settings) -> Tensor:
    return gradient if _is_zero(s["weight_decay"]) else gradient + s["weight_decay"] * w


def _root(v: Tensor) -> Tensor:
    """√v with derivative 0 where v is 0."""
    positive = v > 0
    return torch.where(positive, torch.where(positive, v, 1.0).sqrt(), 0.0)


def _is_zero(setting: Any) -> bool:
    return not isinstance(setting, Tensor) and setting == 0
