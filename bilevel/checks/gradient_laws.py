"""Laws about gradients: every weight and every tuned hyperparameter acts on a loss."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from bilevel.checks.dropout_laws import remedy_of_unused
from bilevel.checks.finding import Finding
from bilevel.checks.first_batch import FirstBatch
from bilevel.checks.hints import remedy_of, without_hint
from bilevel.text import first_line


def trains_weights(case: FirstBatch) -> Iterator[Finding]:
    """L_T depends on w."""
    try:
        gradients = _inner_gradients(case)
    except RuntimeError as error:
        yield Finding(
            "error",
            (
                f"`inner_objective` cannot be differentiated in w ({without_hint(error)}); use "
                f"operations with a derivative{remedy_of(error)}"
            ),
            first_line(error),
        )
        return
    if all(gradient is None for gradient in gradients):
        yield Finding(
            "error",
            (
                "`inner_objective` does not depend on w, so nothing can be trained; compute it "
                "from the prediction or the params, without item(), detach(), numpy() or no_grad()"
            ),
        )


def outer_gradient(case: FirstBatch) -> Iterator[Finding]:
    """L_V has a gradient, in w or directly in λ."""
    if (found := _outer_gradient(case)) is None:
        return
    yield Finding(
        "note",
        (
            f"the gradient of `outer_objective` is {found} (as for an error rate, argmax, rounding "
            "or a score from outside PyTorch), so no solver can follow a hypergradient; tune λ "
            "with a black-box solver (random_search, tpe, gp, pbt) or with es, or return a "
            "differentiable loss and report the score in `metrics`"
        ),
    )


def _outer_gradient(case: FirstBatch) -> str | None:
    """Return "absent" or "zero" for the gradient of L_V on the first batch, or None."""
    space = case.problem.space
    tuned = {name: case.hypers[name].detach().clone().requires_grad_() for name in space.tuned}
    leaves = [*case.params.values(), *tuned.values()]
    without_cudnn = torch.backends.cudnn.flags(enabled=False)  # it wants a training pass for RNNs
    with without_cudnn if case.device.type == "cuda" else nullcontext():
        try:
            loss = case.outer_loss(hypers={**case.hypers, **tuned})
        except Exception:  # it could be computed without a graph: `scalar_objectives` did so
            return "absent"
        if not loss.requires_grad:
            return "absent"
        try:
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        except RuntimeError:  # a layer without a derivative, which the dry run of a solver explains
            return None
    known = [g for g in gradients if g is not None]
    if not known:
        return "absent"
    return None if any(bool(g.any()) for g in known) else "zero"


def gradients_of_weights(case: FirstBatch) -> Iterator[Finding]:
    """Every weight receives a gradient from L_T."""
    try:
        gradients = _inner_gradients(case)
    except RuntimeError:  # `trains_weights` says so
        return
    known = [g for g in gradients if g is not None]
    if known and not any(bool(g.any()) for g in known):
        yield Finding(
            "error",
            (
                "the gradient of `inner_objective` is zero in every weight on the first batch, so "
                "nothing can be trained; use a loss with a slope (no rounding, no argmax)"
            ),
        )
        return
    for name, gradient in zip(case.params, gradients if known else (), strict=False):
        if gradient is None:
            yield Finding(
                "error",
                (
                    f"the weight `{name}` receives no gradient from the inner objective; use it, "
                    "or move it to the carry"
                ),
            )
        elif not bool(torch.isfinite(gradient).all()):
            yield Finding(
                "error",
                (
                    f"the gradient of the weight `{name}` is not finite near its initial value; "
                    "look for sqrt(0), log(0) or an overflow"
                ),
            )
        elif not bool(gradient.any()):
            yield Finding("note", f"the gradient of the weight `{name}` is zero on the first batch")


def _inner_gradients(case: FirstBatch) -> Sequence[Tensor | None]:
    """Return ∇_w L_T on the first batch; None for a weight on which L_T does not depend."""
    loss = case.training_loss
    if not loss.requires_grad:
        return [None] * len(case.params)
    weights = list(case.params.values())
    return torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)


def hyperparameters(case: FirstBatch) -> Iterator[Finding]:
    """Every tuned hyperparameter changes a loss, and ∂L_T/∂λ exists where it is declared."""
    with torch.no_grad():
        inner, outer = case.inner_loss(), case.outer_loss()
    for name in case.problem.space.tuned:
        if case.problem.space[name].optimizer is not None:
            continue  # it acts on the path to w*, not on the losses
        moved = list(case.moved(name))
        with torch.no_grad():
            acts_inside = any(
                not torch.equal(inner, case.inner_loss(hypers=hypers)) for hypers in moved
            )
            acts_outside = any(
                not torch.equal(outer, case.outer_loss(hypers=hypers)) for hypers in moved
            )
        if not (acts_inside or acts_outside):
            yield Finding(
                "error",
                (
                    f"the hyperparameter `{name}` changes neither objective; "
                    f"{remedy_of_unused(case.problem, name)}"
                ),
            )
        elif acts_inside and case.problem.space[name].differentiable:
            leaf = case.hypers[name].detach().clone().requires_grad_()
            loss = case.inner_loss(hypers={**case.hypers, name: leaf})
            (gradient,) = (
                torch.autograd.grad(loss, [leaf], allow_unused=True)
                if loss.requires_grad
                else (None,)
            )
            if gradient is None or not bool(gradient.any()):
                found = "absent" if gradient is None else "zero"
                yield Finding(
                    "error",
                    (
                        f"the hyperparameter `{name}` changes L_T, but ∂L_T/∂{name} is {found}; "
                        "declare differentiable=False if it is sampled or rounded, or keep it in "
                        "the graph (no item() and no detach())"
                    ),
                )
