"""`attach`: check what a user's training loop has, and return the tuner for it."""

import copy
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.errors import BilevelError
from bilevel.params import Batch
from bilevel.solver import Solver, Stepwise
from bilevel.space import Space
from bilevel.tuner.attached_problem import AttachedProblem
from bilevel.tuner.own_optimizer import OwnOptimizer, check_tuned_settings
from bilevel.tuner.tuner import Tuner
from bilevel.validate import seed_of, whole


def attach(
    model: nn.Module,
    space: Space,
    *,
    loss: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    solver: Solver,
    train_loss: Callable[..., Tensor] | None = None,
    penalty: Callable[..., Tensor] | None = None,
    inputs: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]] | None = None,
    example: tuple[Batch, Batch] | None = None,
    warmup_steps: int = 0,
    seed: int = 0,
) -> Tuner:
    """Return a tuner, which takes the steps of `solver` in a training loop of your own.

        L_T = train_loss(y, batch, λ) + penalty(λ, w),    L_V = loss(y, batch),    y = model(x)

    The parameters of `model` are w. The solver trains them in place with `optimizer`, so that
    schedules of the optimizer act, and `model.state_dict()` has the trained weights.

    Args:
        model: the network, on its device.
        space: the hyperparameters λ.
        loss: returns L_V, [], from a prediction and a batch.
        optimizer: the optimizer of `model.parameters()`.
        solver: a new solver that works batch by batch: all but search and population.
        train_loss: returns the data term of L_T, [], from prediction, batch and λ; by default
            `loss`.
        penalty: returns a penalty on w, [] or [B], from λ and w; by default none.
        inputs: returns the arguments of the model, as `ModuleProblem.inputs` does; by default the
            first entry of a batch. λ that acts on inputs or inside the model (dropout) enters here.
        example: a training and a validation batch with which the solver is set up at once. By
            default the first step does that.
        warmup_steps: inner steps before the first outer step.
        seed: of the draws of the solver.

    Example:
        >>> import torch.nn.functional as F
        >>> from bilevel import Positive, squared_norm
        >>> from bilevel.solvers import delta_stn
        >>> model, x, y = nn.Linear(3, 1), torch.randn(40, 3), torch.randn(40, 1)
        >>> tuner = attach(
        ...     model,
        ...     Space(decay=Positive(init=0.01)),
        ...     loss=lambda prediction, batch: F.mse_loss(prediction, batch[1]),
        ...     penalty=lambda hypers, params: hypers["decay"] * squared_norm(params),
        ...     optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        ...     solver=delta_stn(),
        ... )
        >>> for k in range(20):
        ...     loss = tuner.step((x[:20], y[:20]))
        ...     while tuner.due:
        ...         outer_loss = tuner.outer_step((x[20:], y[20:]))
        >>> sorted(tuner.hypers), tuner.solver.outer_count
        (['decay'], 4)

    Raises:
        BilevelError: an argument is wrong, or the solver refuses the problem.
    """
    make = partial(
        AttachedProblem,
        model,
        space,
        loss=loss,
        train_loss=train_loss,
        penalty=penalty,
        arguments=inputs,
    )
    problem = make()
    own = OwnOptimizer(optimizer, model)
    check_tuned_settings(optimizer, space)
    whole(0, warmup_steps=warmup_steps)
    seed = seed_of(seed)
    tuner = Tuner(make, problem, model, own, _own_solver(solver, own), warmup_steps, seed)
    if example is not None:
        if not isinstance(example, (tuple, list)) or len(example) != 2:
            raise BilevelError(
                f"example={type(example).__name__} must be a pair; pass a training and a "
                "validation batch"
            )
        tuner.set_up(*example)
    return tuner


def _own_solver(solver: Solver, own: OwnOptimizer) -> Stepwise:
    """Return a copy of the solver that trains w with the user's optimizer.

    Raises:
        BilevelError: it cannot be driven batch by batch, it was used before, or it has an optimizer
            or a schedule of w already.
    """
    kind = type(solver).__name__
    if not isinstance(solver, Solver):
        raise BilevelError(
            f"solver={getattr(solver, '__name__', kind)} must be a solver; pass for example "
            "bilevel.solvers.delta_stn()"
        )
    if not isinstance(solver, Stepwise):
        raise BilevelError(
            f"solver={kind} starts trainings of its own, so a loop cannot drive it; run it with a "
            "Runner, or attach a solver that tunes within one training (delta_stn())"
        )
    if solver.inner_count or hasattr(solver, "services"):
        raise BilevelError(f"solver={kind} is already in use; make a new solver for every loop")
    defaults: dict[str, Any] = {}
    if is_dataclass(solver):
        defaults = {field.name: field.default for field in fields(solver)}
    for setting in ("inner_optimizer", "inner_scheduler"):
        if setting in defaults and getattr(solver, setting) is not defaults[setting]:
            advice = "leave it out" if setting == "inner_optimizer" else "call its step() yourself"
            raise BilevelError(
                f"{setting} of {kind} has no effect beside optimizer=…, which trains w; {advice}"
            )
    if callable(getattr(solver, "outer_scheduler", None)):
        raise BilevelError(
            f"outer_scheduler of {kind} steps when an epoch ends, which a loop of your own does "
            'not report; set it to "inner" to follow the schedule of optimizer=…, or to None'
        )
    made = copy.copy(solver)
    made.inner_optimizer = own
    return made
