"""RMSprop for hyperparameters: one scale, a correction for the start, and a test of the signal."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bilevel.solvers.optim.signal import squared_signal
from bilevel.validate import at_least, between, wrong


class OuterRMSprop(torch.optim.Optimizer):
    """RMSprop with three options for λ, whose gradient is noisy and of very different sizes.

        v ← α v + (1 − α) g²,    u ← u − lr · φ ∘ g / (r + eps),    r = √v,    φ = 1

    `shared_scale`: r = √max v, over all entries. A coordinate with a small gradient then takes
    small steps, where RMSprop alone steps as far in every coordinate.

    `bias_correction`: v is divided by 1 − αᵗ at step t. Without it the first steps are up to
    1/√(1 − α) times as long, 10 times at α = 0.99. They follow the first gradients, which are
    mostly noise, and a short run does not come back from them.

    `signal_test`: φ is the positive-part James–Stein factor of a running mean of the gradient,

        φ = max(0, 1 − c²/z²),    z² = m̂² / var m̂,    m ← β m + (1 − β) g,    c = `threshold`

    with z² as in `solvers/optim/signal.py`. The first step is 0, because one gradient has no
    variance. At c = 1 a step of pure noise is 0.15 of a full one on average. But the steps that
    remain point the same way for a while, so that the way of many steps is 0.85 of the full one. It
    is 0.23 at c = 2 and β = 0.97, where a mean as large as its noise keeps 0.94 of its way.

    Without the options it is `torch.optim.RMSprop`, bit for bit. All state lies in tensors beside
    the parameters, and no step waits for the device.

    Args:
        params: the parameters, or groups of them; `shared_scale` is over one group.
        lr: the learning rate.
        alpha: α, the rate of the mean square.
        eps: is added to r.
        shared_scale: divide all entries by the largest running size.
        bias_correction: correct v for its start at 0.
        signal_test: scale the step of each entry by its signal.
        beta: β, the rate of the running mean; for `signal_test`.
        threshold: c, the size of z below which no step is taken; for `signal_test`.
        capturable: accepted as in PyTorch; every step can be captured as a CUDA graph.

    Example:
        >>> u = torch.zeros(2, requires_grad=True)
        >>> optimizer = OuterRMSprop([u], lr=0.1, shared_scale=True)
        >>> u.grad = torch.tensor([1.0, 0.01])
        >>> optimizer.step()
        >>> (u[0] / u[1]).round().item()
        100.0

    Raises:
        BilevelError: a setting is out of its range.

    Source: James & Stein, 1961; Baranchik, 1964 (the positive part). Tieleman & Hinton, 2012
        (RMSprop).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.03,
        alpha: float = 0.99,
        eps: float = 1e-8,
        shared_scale: bool = False,
        bias_correction: bool = False,
        signal_test: bool = False,
        beta: float = 0.9,
        threshold: float = 1.0,
        capturable: bool = False,
    ) -> None:
        at_least(0, lr=float(lr) if isinstance(lr, Tensor) else lr, eps=eps, threshold=threshold)
        between(0, 1, alpha=alpha)
        if signal_test and not 0 < beta < 1:
            raise wrong("beta", beta, "must be between 0 and 1", "0.9 averages about 19 gradients")
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "shared_scale": shared_scale,
            "bias_correction": bias_correction,
            "signal_test": signal_test,
            "beta": beta,
            "threshold": threshold,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step along the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            squares = [self._mean_square(p, group) for p in moved]
            if group["shared_scale"] and squares:
                largest = torch.stack([v.max() for v in squares]).max()
                squares = [largest] * len(squares)
            for p, square in zip(moved, squares, strict=True):
                self._move(p, square.sqrt().add_(group["eps"]), group)
        return loss

    def _mean_square(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Update v of a parameter and, for the signal test, m; return v, or v / (1 − αᵗ)."""
        state, α, β = self.state[p], group["alpha"], group["beta"]
        if not state:
            state["square_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            if group["signal_test"]:
                state["grad_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            if group["signal_test"] or group["bias_correction"]:
                state["count"] = torch.zeros((), dtype=p.dtype, device=p.device)
        state["square_avg"].mul_(α).addcmul_(p.grad, p.grad, value=1 - α)
        if group["signal_test"]:
            state["grad_avg"].mul_(β).add_(p.grad, alpha=1 - β)
        if "count" in state:
            state["count"].add_(1)
        square: Tensor = state["square_avg"]
        return square / (1 - α ** state["count"]) if group["bias_correction"] else square

    def _move(self, p: Tensor, size: Tensor, group: dict[str, Any]) -> None:
        step, lr = p.grad, group["lr"]
        assert step is not None
        if group["signal_test"]:
            step = step * self._signal(p, group)
        if isinstance(lr, Tensor):
            p.sub_(lr * step / size)
        else:
            p.addcdiv_(step, size.expand_as(p), value=-lr)

    def _signal(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Return φ of every entry."""
        state, α, β = self.state[p], group["alpha"], group["beta"]
        z_squared = squared_signal(state["grad_avg"], state["square_avg"], state["count"], α, β)
        return (1 - group["threshold"] ** 2 / z_squared).clamp(min=0)
