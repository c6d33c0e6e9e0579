"""The sensitivity of L_V to each hyperparameter at the end of a run, in unconstrained coordinates.

    g_k = dL_V/du_k,    c_k = d²L_V/du_k²,    effect_k = |g_k| σ_k + |c_k| σ_k²/2

Both derivatives are those of L_V(λ(u), ŵ(u)) at the last u, and σ_k is the initial perturbation
scale of the coordinate. The effect is the change of L_V that a step of one σ_k can make. It is
large for a hyperparameter that matters, also at an optimum, where g_k = 0.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bilevel.data.stream import Stream
from bilevel.data.tensor_stream import Data, TensorStream
from bilevel.device.precision import has_half_products
from bilevel.loggers.records import Record
from bilevel.loggers.space_json import LARGE
from bilevel.params import Batch, Hypers, count_examples
from bilevel.problem import Problem
from bilevel.solver import Solver
from bilevel.space import Space

BATCHES = 8
"""Batches of the validation split over which g is averaged, as far as the split has them."""
CURVATURES = 8
"""Second derivatives of single batches, over all coordinates; every coordinate has at least one."""
COORDINATES = 50
"""Coordinates above which only the `LARGEST` by |g| σ have a second derivative."""
LARGEST = 10
STEP = 0.1
"""Step of the central difference of g, in units of σ."""


class Sensitivity(NamedTuple):
    """The derivatives at u, [h] each in float64 on the CPU; NaN where one is unknown."""

    hypergradient: Tensor
    standard_error: Tensor
    curvature: Tensor


def sensitivities(solver: Solver, problem: Problem, data: Data, initial: Hypers) -> Record:
    """Return by hyperparameter: how far it moved, the derivatives of L_V, and its effect.

    `moved` is the change of u in units of σ. `hypergradient`, `standard_error` (over validation
    batches), `curvature` and `effect` are described above. They are None for a solver without a
    hypergradient, and the last two also where ŵ is known at the present u alone or the products
    have 16 bits. For an array, `moved` is the root mean square, `hypergradient` and
    `standard_error` are norms, `curvature` is the mean, and `effect` the sum over its entries. If
    there are few entries, `entries` has each.

    Args:
        solver: the solver at the end of a run; it is left as it is.
        problem: its problem.
        data: its streams, which are left as they are.
        initial: λ before the run, on the CPU.
    """
    space = problem.space
    if space.numel == 0:
        return {}
    (hypers, params, _), scale = solver.solution(), space.initial_scales()
    precise = not has_half_products(problem, params)
    g, error, curvature = _measured(solver, data, _zero(space, hypers), scale, precise=precise)
    columns = {
        "moved": (_coordinates(space, hypers) - _coordinates(space, initial)) / scale,
        "hypergradient": g,
        "standard_error": error,
        "curvature": curvature,
        "effect": g.abs() * scale + curvature.abs() * scale**2 / 2,
    }
    by_name = {column: space.by_name(values) for column, values in columns.items()}
    return {
        name: _entry({column: leaves[name] for column, leaves in by_name.items()})
        for name in space.tuned
    }


def _measured(
    solver: Solver, data: Data, zero: Tensor, scale: Tensor, *, precise: bool
) -> Sensitivity:
    """Return the derivatives of L_V at the present u.

    Args:
        solver: the solver.
        data: its streams.
        zero: [h], the offset there.
        scale: [h], σ.
        precise: whether a difference of two slopes has correct digits.
    """
    unknown = torch.full_like(scale, torch.nan)
    if solver.outer_loss_at(zero, data.valid.peek()) is not None:
        g, error = _averaged(lambda batch: _slope(solver, zero, batch), data.valid, BATCHES)
        curvature = _curvature(solver, data.valid, zero, scale, g) if precise else unknown
        return Sensitivity(g, error, curvature)
    if type(solver).hypergradient is Solver.hypergradient:
        return Sensitivity(unknown, unknown, unknown)
    taken = solver.inner_count
    with _undisturbed(solver, data) as restart:

        def follow(batch: Batch) -> Tensor:
            if solver.inner_count != taken:  # a method that unrolls trains first
                restart()
            found = solver.hypergradient(batch)
            return unknown if found is None else found

        return Sensitivity(*_averaged(follow, data.valid, BATCHES), unknown)


def _slope(solver: Solver, offset: Tensor, batch: Batch) -> Tensor:
    """Return the derivative of L_V(λ(u + δ), ŵ(u + δ)) in δ at `offset`, [h]."""
    offset = offset.detach().requires_grad_()
    loss = solver.outer_loss_at(offset, batch)
    assert loss is not None
    return torch.autograd.grad(loss, offset, materialize_grads=True)[0]


def _curvature(
    solver: Solver, valid: Stream, zero: Tensor, scale: Tensor, g: Tensor
) -> Float[Tensor, " h"]:
    """Return d²L_V/du_k² by central differences of the derivative."""
    found = torch.full_like(scale, torch.nan)
    chosen = list(range(len(scale)))
    if len(scale) > COORDINATES:
        chosen = (g.abs() * scale).topk(LARGEST).indices.tolist()
    count = max(1, CURVATURES // len(chosen))
    for k in chosen:
        step = torch.zeros_like(zero)
        step[k] = STEP * scale[k]

        def second(batch: Batch, k: int = k, step: Tensor = step) -> Tensor:
            ends = (_slope(solver, end, batch)[k] for end in (zero + step, zero - step))
            above, below = ends
            return ((above - below) / (2 * step[k]))[None]

        found[k] = _averaged(second, valid, count, least=1)[0][0]
    return found


def _averaged(
    of: Callable[[Batch], Tensor], valid: Stream, most: int, least: int = BATCHES
) -> tuple[Tensor, Tensor]:
    """Return the mean of a vector over validation batches, and its standard error."""
    n, size, size2 = 0, 0.0, 0.0
    total = total2 = square2 = torch.zeros(())
    for batch in _batches(valid, most, least):
        value, weight = of(batch).detach().to("cpu", torch.float64), float(count_examples(batch))
        n, size, size2 = n + 1, size + weight, size2 + weight**2
        total = total + weight * value
        total2 = total2 + weight**2 * value
        square2 = square2 + weight**2 * value.square()
    mean = total / size
    if n < 2:
        return mean, torch.full_like(mean, torch.nan)
    spread = square2 - 2 * mean * total2 + mean.square() * size2
    return mean, (spread.clamp(min=0) * n / (n - 1)).sqrt() / size


def _batches(valid: Stream, most: int, least: int) -> Iterator[Batch]:
    """Return batches of the split that leave the stream where it is."""
    if isinstance(valid, TensorStream):
        return valid.spread(least, most)
    return islice(valid.once(), most)


@contextmanager
def _undisturbed(solver: Solver, data: Data) -> Iterator[Callable[[], None]]:
    """Yield a function that returns to the present state, as the end of the block does.

    Some hypergradients train first, and draw batches of their own. The block begins at the state of
    a checkpoint, so that a run that is resumed at its end measures the same.
    """
    held = _on_cpu(solver.state_dict())
    positions = [
        (stream, stream.examples, copy.deepcopy(stream.state_dict()))
        for stream in (data.train, data.valid)
    ]
    services = solver.services
    capture, services.capture = services.capture, None  # a recorded step works on its own memory

    def restart() -> None:
        solver.load_state_dict(copy.deepcopy(held))

    try:
        restart()
        yield restart
    finally:
        solver.load_state_dict(held)
        services.capture = capture
        for stream, examples, state in positions:
            if stream.examples != examples:  # a loader reads its data up to the position
                stream.load_state_dict(state)


def _on_cpu(tree: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.detach().to("cpu", copy=True), tree)


def _zero(space: Space, hypers: Hypers) -> Float[Tensor, " h"]:
    """Return zeros of the type and on the device of λ."""
    like = hypers[space.tuned[0]]
    return torch.zeros(space.numel, dtype=like.dtype, device=like.device)


def _coordinates(space: Space, hypers: Hypers) -> Float[Tensor, " h"]:
    """Return u in float64 on the CPU."""
    wide = {name: leaf.detach().to("cpu", torch.float64) for name, leaf in hypers.items()}
    return space.unconstrain(wide)


def _entry(columns: Hypers) -> Record:
    """Return the numbers of one hyperparameter, whose leaves these are."""
    first = next(iter(columns.values()))
    if first.ndim == 0:
        return {column: _number(leaf) for column, leaf in columns.items()}
    found: Record = {}
    for column, leaf in columns.items():
        total = {
            "moved": leaf.square().mean().sqrt(),
            "curvature": leaf.mean(),
            "effect": leaf.sum(),
        }.get(column, torch.linalg.vector_norm(leaf))
        found[column] = _number(total)
    if first.numel() <= LARGE:
        found["entries"] = {
            column: _numbers(leaf)
            for column, leaf in columns.items()
            if bool(torch.isfinite(leaf).any())
        }
    return found


def _numbers(leaf: Tensor) -> Any:
    """Return nested lists, with None for an unknown number."""
    return _number(leaf) if leaf.ndim == 0 else [_numbers(part) for part in leaf]


def _number(value: Tensor) -> float | None:
    return float(value) if math.isfinite(value) else None
