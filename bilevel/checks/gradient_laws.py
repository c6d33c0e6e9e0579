"""Laws about gradients: every weight and every tuned hyperparameter acts on a loss."""

from collections.abc import Iterator

import torch

from bilevel.checks.equality import nearly_equal
from bilevel.checks.finding import Finding
from bilevel.checks.first_batch import FirstBatch, brief
from bilevel.params import count_examples
from bilevel.text import describe


def gradients_of_weights(case: FirstBatch) -> Iterator[Finding]:
    """Every weight receives a gradient from L_T."""
    loss = case.inner_loss()
    gradients = (
        torch.autograd.grad(loss, list(case.params.values()), allow_unused=True)
        if loss.requires_grad
        else ()
    )
    for name, gradient in zip(case.params, gradients or [None] * len(case.params), strict=True):
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
                (f"the hyperparameter `{name}` changes neither objective; use it, or remove it"),
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


def per_example_leaves(case: FirstBatch) -> Iterator[Finding]:
    """A leaf [B] of equal values gives the same losses as the leaf []."""
    examples = count_examples(case.batch)
    for name in case.problem.space.tuned:
        if not case.problem.space[name].per_example:
            continue
        leaf = case.hypers[name]
        repeated = {**case.hypers, name: leaf.expand(examples, *leaf.shape).clone()}
        advice = (
            f"broadcast `{name}` with bilevel.along_examples, average the loss over "
            "examples, or declare per_example=False"
        )
        try:
            with torch.no_grad():
                plain, repeated_loss = (
                    case.inner_loss(train=False),
                    case.inner_loss(train=False, hypers=repeated),
                )
                case.inner_loss(hypers=repeated)
        except Exception as error:  # the problem is a user's own code
            yield Finding(
                "error", f"`{name}` with one value per example raises {describe(error)}; {advice}"
            )
            continue
        if not nearly_equal(plain, repeated_loss):
            yield Finding(
                "error",
                (
                    f"`{name}` with one value per example makes L_T {brief(repeated_loss)} instead "
                    f"of {brief(plain)}; {advice}"
                ),
            )
