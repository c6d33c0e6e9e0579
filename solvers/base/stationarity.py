"""A check, at evaluations, that training brings w towards a minimum of L_T."""

from typing import NamedTuple

import torch

from bilevel import Carry, Params
from bilevel.solver import initial_state
from bilevel.solvers.base.core import Core

FIRST = 50
"""Inner steps before the first check; `Core.next_check` doubles, as `Problem.init` may be slow."""

LEAST_GAIN = 0.05
"""Fall of L_T since the initial weights, relative to its value there, that counts as training."""

SAME = 0.9
"""Part of ‖∇_w L_T‖ at the initial weights, from which on it has not shrunk."""

FLAT = 1e-4
"""‖∇_w L_T‖ relative to |L_T| at the initial weights, below which w counts as a minimum."""


class Place(NamedTuple):
    """L_T and ‖∇_w L_T‖ at some weights."""

    loss: float
    norm: float


def far_from_minimum(name: str, core: Core, params: Params) -> dict[str, str]:
    """Return a warning if w is no nearer to a minimum of L_T than the initial weights are.

    A hypergradient is that of a minimum. L_T and its gradient are taken at both weights on the next
    training batch, at the present λ and with the same draws. Nothing moves, and no training step
    pays for it. Two cases give a warning: w has hardly trained, or L_T falls below 0 and keeps its
    slope, as without a lower bound.

    Args:
        name: the solver.
        core: its problem and data.
        params: the weights that belong to λ.
    """
    if core.inner_count < max(FIRST, core.next_check):
        return {}
    core.next_check = 2 * core.inner_count
    now = _place(core, params, core.carry)
    start = _place(core, *initial_state(core.problem, core.device, core.generator))
    if not now.norm > max(SAME * start.norm, FLAT * abs(start.loss)):
        return {}
    numbers = (
        f"after {core.inner_count} inner steps, L_T = {now.loss:.3g} and ‖∇_w L_T‖ = "
        f"{now.norm:.2g} on one batch, where the initial weights have {start.loss:.3g} and "
        f"{start.norm:.2g}"
    )
    gain = start.loss - now.loss
    if now.loss < 0 and gain > abs(start.loss):
        return {
            "unbounded": f"{name}: {numbers}; L_T seems to have no minimum in w, and then there is "
            "no hypergradient; bound it, for example by a penalty on w"
        }
    if gain < LEAST_GAIN * abs(start.loss):
        return {
            "stationarity": f"{name}: {numbers}; the hypergradient is that of a minimum, and w is "
            "far from one; change the inner learning rate, or train longer before λ moves "
            "(runner.warmup_epochs)"
        }
    return {}


def _place(core: Core, params: Params, carry: Carry) -> Place:
    batch, draws = core.data.train.peek(), torch.Generator(core.device).manual_seed(0)
    w = {name: p.detach().requires_grad_() for name, p in params.items()}
    hypers = core.problem.space.constrain(core.search.u0, draws)
    carry = core.problem.fresh_carry(carry, batch)
    loss, _ = core.problem.inner_loss(hypers, w, carry, batch, draws)
    gradients = torch.autograd.grad(loss, list(w.values()), materialize_grads=True)
    norm = torch.stack([g.norm() for g in gradients]).norm()
    return Place(float(loss.detach()), float(norm))
