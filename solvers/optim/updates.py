"""Steps of PyTorch's optimizers as pure functions, differentiable in all of their inputs.

Each function equals its counterpart in `torch.optim` up to rounding, and uses the same names for
the state. It is differentiable in weights, gradients, state and settings. Where the counterpart
divides by √v, the derivative of the root is defined as 0 at v = 0. A weight that never had a
gradient has m = 0 too, so the derivative of m √v is 0 there; the infinite derivative of the root
would make every result NaN.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

Settings: TypeAlias = Mapping[str, Any]
"""The settings of an optimizer by PyTorch's names; `beta1` and `beta2` in place of `betas`.

A value is a number, or a [] tensor that carries a derivative.
"""

Slots: TypeAlias = dict[str, Tensor]
"""The memory of an optimizer for one weight."""


def sgd(w: Tensor, gradient: Tensor, slots: Slots, count: int, s: Settings) -> tuple[Tensor, Slots]:
    """Return w and the memory after a step of SGD.

    b ← m b + (1 − dampening) g, with b = g at the first step; then w ← w − lr b, or
    w ← w − lr (g + m b) with Nesterov's momentum.
    """
    gradient = _decayed(gradient, w, s)
    if not _is_zero(s["momentum"]):
        buffer = gradient
        if (before := slots.get("momentum_buffer")) is not None:
            fresh = gradient if _is_zero(s["dampening"]) else (1 - s["dampening"]) * gradient
            buffer = _plus(fresh, s["momentum"], before)
        slots = {"momentum_buffer": buffer}
        gradient = _plus(gradient, s["momentum"], buffer) if s["nesterov"] else buffer
    return _plus(w, -s["lr"], gradient), slots


def is_plain(s: Settings) -> bool:
    """Return whether a step of SGD is w ← w − lr g, with a number for lr and without memory."""
    return (
        not isinstance(s["lr"], Tensor) and _is_zero(s["weight_decay"]) and _is_zero(s["momentum"])
    )


def adam(
    w: Tensor, gradient: Tensor, slots: Slots, count: int, s: Settings
) -> tuple[Tensor, Slots]:
    """Return w and the memory after a step of Adam.

    m ← β₁m + (1 − β₁)g and v ← β₂v + (1 − β₂)g²; then w ← w − lr m̂ / (√v̂ + eps), with
    m̂ = m/(1 − β₁ᵗ) and v̂ = v/(1 − β₂ᵗ).
    """
    return _adam(w, _decayed(gradient, w, s), slots, count, s)


def adamw(
    w: Tensor, gradient: Tensor, slots: Slots, count: int, s: Settings
) -> tuple[Tensor, Slots]:
    """Return w and the memory after a step of AdamW: w ← (1 − lr · decay) w, then Adam."""
    decayed = w if _is_zero(s["weight_decay"]) else w * (1 - s["lr"] * s["weight_decay"])
    return _adam(decayed, gradient, slots, count, s)


def rmsprop(
    w: Tensor, gradient: Tensor, slots: Slots, count: int, s: Settings
) -> tuple[Tensor, Slots]:
    """Return w and the memory after a step of RMSprop.

    v ← αv + (1 − α)g², then w ← w − lr g / (√v + eps). With `centered`, the squared mean of g is
    subtracted from v. Momentum applies to the quotient.
    """
    gradient = _decayed(gradient, w, s)
    square = _mean_square(slots.get("square_avg"), gradient, s["alpha"])
    after = {"square_avg": square}
    if s["centered"]:
        mean = _lerp(_or_zeros(slots.get("grad_avg"), w), gradient, 1 - s["alpha"])
        after["grad_avg"] = mean
        square = torch.addcmul(square, mean, mean, value=-1)
    step = gradient / (square_root(square) + s["eps"])
    if not _is_zero(s["momentum"]):
        if (before := slots.get("momentum_buffer")) is not None:
            step = _plus(step, s["momentum"], before)
        after["momentum_buffer"] = step
    return _plus(w, -s["lr"], step), after


def nadam(
    w: Tensor, gradient: Tensor, slots: Slots, count: int, s: Settings
) -> tuple[Tensor, Slots]:
    """Return w and the memory after a step of NAdam.

    With μ_t = β₁ (1 − ½ 0.96^(t ψ)), ψ = momentum_decay, and m, v as in Adam:
    w ← w − lr [(1 − μ_t) g/(1 − Π_{i≤t} μ_i) + μ_{t+1} m/(1 − Π_{i≤t+1} μ_i)]/(√v̂ + eps).
    """
    if s["decoupled_weight_decay"]:
        w = w * (1 - s["lr"] * s["weight_decay"])
    else:
        gradient = _decayed(gradient, w, s)
    now, following = (
        s["beta1"] * (1 - 0.5 * 0.96 ** (t * s["momentum_decay"])) for t in (count, count + 1)
    )
    before = slots.get("mu_product")
    product = (torch.ones((), dtype=torch.float32) if before is None else before) * now
    mean = _lerp(_or_zeros(slots.get("exp_avg"), w), gradient, 1 - s["beta1"])
    square = _mean_square(slots.get("exp_avg_sq"), gradient, s["beta2"])
    root = square_root(square) / (1 - s["beta2"] ** count) ** 0.5 + s["eps"]
    so_far = product.to(w.dtype)
    direct = (1 - now) / (1 - so_far) * gradient
    ahead = following / (1 - so_far * following) * mean
    after = w - s["lr"] * (direct + ahead) / root
    return after, {"exp_avg": mean, "exp_avg_sq": square, "mu_product": product}


def adamax(
    w: Tensor, gradient: Tensor, slots: Slots, count: int, s: Settings
) -> tuple[Tensor, Slots]:
    """Return w and the memory after a step of Adamax.

    m as in Adam, and n ← max(β₂ n, |g| + eps); then w ← w − lr m̂/n.
    """
    gradient = _decayed(gradient, w, s)
    mean = _lerp(_or_zeros(slots.get("exp_avg"), w), gradient, 1 - s["beta1"])
    largest = torch.maximum(
        s["beta2"] * _or_zeros(slots.get("exp_inf"), w), gradient.abs() + s["eps"]
    )
    after = w - s["lr"] / (1 - s["beta1"] ** count) * mean / largest
    return after, {"exp_avg": mean, "exp_inf": largest}


def adagrad(
    w: Tensor, gradient: Tensor, slots: Slots, count: int, s: Settings
) -> tuple[Tensor, Slots]:
    """Return w and the memory after a step of Adagrad.

    v ← v + g², then w ← w − lr/(1 + (t − 1) lr_decay) · g/(√v + eps).
    """
    gradient = _decayed(gradient, w, s)
    before = slots.get("sum")
    start = torch.full_like(w, s["initial_accumulator_value"]) if before is None else before
    total = torch.addcmul(start, gradient, gradient)
    rate = s["lr"] / (1 + (count - 1) * s["lr_decay"])
    return w - rate * gradient / (square_root(total) + s["eps"]), {"sum": total}


UPDATES: dict[
    type[torch.optim.Optimizer],
    Callable[[Tensor, Tensor, Slots, int, Settings], tuple[Tensor, Slots]],
] = {
    torch.optim.SGD: sgd,
    torch.optim.Adam: adam,
    torch.optim.AdamW: adamw,
    torch.optim.RMSprop: rmsprop,
    torch.optim.NAdam: nadam,
    torch.optim.Adamax: adamax,
    torch.optim.Adagrad: adagrad,
}


def _adam(
    w: Tensor, gradient: Tensor, slots: Slots, count: int, s: Settings
) -> tuple[Tensor, Slots]:
    mean = _lerp(_or_zeros(slots.get("exp_avg"), w), gradient, 1 - s["beta1"])
    square = _mean_square(slots.get("exp_avg_sq"), gradient, s["beta2"])
    scale = -s["lr"] / (1 - s["beta1"] ** count)
    root = square_root(square) / (1 - s["beta2"] ** count) ** 0.5 + s["eps"]
    after = (
        w + scale * mean / root
        if isinstance(scale, Tensor)
        else torch.addcdiv(w, mean, root, value=scale)
    )
    return after, {"exp_avg": mean, "exp_avg_sq": square}


def _lerp(start: Tensor, end: Tensor, weight: Any) -> Tensor:
    """Return start + weight · (end − start); `torch.lerp` needs a weight of the same type."""
    return torch.lerp(start, end, weight.to(end.dtype) if isinstance(weight, Tensor) else weight)


def _mean_square(before: Tensor | None, gradient: Tensor, decay: Any) -> Tensor:
    """Return decay · before + (1 − decay) g²."""
    if isinstance(decay, Tensor):
        return decay * _or_zeros(before, gradient) + (1 - decay) * (gradient * gradient)
    return torch.addcmul(decay * _or_zeros(before, gradient), gradient, gradient, value=1 - decay)


def _or_zeros(slot: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if slot is None else slot


def _decayed(gradient: Tensor, w: Tensor, s: Settings) -> Tensor:
    return gradient if _is_zero(s["weight_decay"]) else _plus(gradient, s["weight_decay"], w)


def _plus(x: Tensor, scale: Any, y: Tensor) -> Tensor:
    """Return x + scale · y, in one pass if scale is a number."""
    return x + scale * y if isinstance(scale, Tensor) else torch.add(x, y, alpha=scale)


def square_root(v: Tensor) -> Tensor:
    """Return √v, with derivative 0 where v is 0."""
    positive = v > 0
    return torch.where(positive, torch.where(positive, v, 1.0).sqrt(), 0.0)


def _is_zero(setting: Any) -> bool:
    return not isinstance(setting, Tensor) and setting == 0
