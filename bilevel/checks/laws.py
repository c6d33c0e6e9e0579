"""What every solver relies on in a problem: one law a function, which yields what breaks it."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointError

from bilevel.checks.equality import bitwise_equal, nearly_equal
from bilevel.checks.first_batch import FirstBatch
from bilevel.params import Carry, count_examples
from bilevel.text import describe


class Finding(NamedTuple):
    """One sentence about a problem; an `error` will spoil runs, a `note` may be meant."""

    level: Literal["error", "note"]
    text: str


Law = Callable[[FirstBatch], Iterator[Finding]]


def initial_weights(case: FirstBatch) -> Iterator[Finding]:
    """`init` follows from its generator alone."""
    drawn = []
    with torch.random.fork_rng(devices=[]):
        for seed in (1, 2):  # of the global generator, which must not matter
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            drawn.append(case.problem.init(torch.Generator().manual_seed(0)))
            if not torch.equal(before, torch.get_rng_state()):
                yield Finding(
                    "error",
                    "`init` moves PyTorch's global random state; draw from the generator that it is given",
                )
                break
    if len(drawn) == 2 and not bitwise_equal(*drawn):
        yield Finding(
            "error",
            "`init` gives other weights for the same generator; draw all of them from the generator",
        )
    for name, p in drawn[0][0].items():
        if not p.is_floating_point():
            yield Finding(
                "error",
                f"the weight `{name}` is {p.dtype}, which has no gradient; pass it on in the carry",
            )


def purity(case: FirstBatch) -> Iterator[Finding]:
    """`predict` changes nothing, and the same generator state gives the same bits."""
    for train in (True, False):
        mode = f"`predict` with train={train}"
        given = (case.hypers, case.params, case.start[1], case.batch)
        before = pytree.tree_map(
            lambda x: x.detach().clone() if isinstance(x, Tensor) else x, given
        )
        state = torch.get_rng_state()
        first, second = case.predict(train=train), case.predict(train=train)
        if not torch.equal(state, torch.get_rng_state()):
            torch.set_rng_state(state)
            yield Finding(
                "error",
                f"{mode} draws from PyTorch's global random state; draw from the generator that it is given",
            )
        elif not bitwise_equal(first, second):
            yield Finding(
                "error",
                f"{mode} answers differently at the same generator state; keep no state outside the carry",
            )
        for part, now, then in zip(
            ("hypers", "params", "carry", "batch"), given, before, strict=True
        ):
            if not bitwise_equal(now, then):
                yield Finding(
                    "error",
                    f"{mode} modifies its {part} in place; work on a clone, and return what changes in the carry",
                )
        if not _alike(first[1], case.start[1]):
            yield Finding(
                "error",
                f"{mode} returns a carry of other names or shapes than `init` does; return them all, unchanged or new",
            )


def prediction_of_weights(case: FirstBatch) -> Iterator[Finding]:
    """The prediction depends on w."""
    leaves = [
        leaf
        for leaf in pytree.tree_leaves(case.predict(train=True)[0])
        if isinstance(leaf, Tensor) and leaf.requires_grad
    ]
    try:
        sums, weights = [leaf.sum() for leaf in leaves], list(case.params.values())
        gradients = torch.autograd.grad(sums, weights, allow_unused=True) if leaves else ()
    except RuntimeError as error:
        yield Finding(
            "error",
            f"the prediction cannot be differentiated in w, {describe(error)}{recomputation_hint(error)}",
        )
        return
    if all(g is None for g in gradients):
        yield Finding(
            "error",
            "the prediction does not depend on w, so that nothing can be learned; compute it from the `params` that `predict` "
            "is given (a module of your own through torch.func.functional_call), without detach() or no_grad()",
        )


def objectives(case: FirstBatch) -> Iterator[Finding]:
    """Both objectives are []."""
    for name, loss in _losses(case):
        if not isinstance(loss, Tensor) or loss.ndim:
            shape = (
                f"of shape {list(loss.shape)}"
                if isinstance(loss, Tensor)
                else f"a {type(loss).__name__}"
            )
            yield Finding(
                "error",
                f"`{name}` is {shape}; it must be a tensor of shape [], averaged over examples",
            )


def finite_objectives(case: FirstBatch) -> Iterator[Finding]:
    """Both objectives are finite at the start."""
    for name, loss in _losses(case):
        if not bool(torch.isfinite(torch.as_tensor(loss)).all()):
            at = ", ".join(f"{key}={_short(leaf)}" for key, leaf in case.hypers.items())
            yield Finding(
                "error",
                f"`{name}` is not finite at the initial weights and {at}; look for log(0), 0/0 or an overflow",
            )


def averages(case: FirstBatch) -> Iterator[Finding]:
    """Both objectives of a batch are the averages of those of its parts, weighted by their examples, in evaluation mode.

    A sum grows with the batch, and learning rates with it; what is added besides (a penalty) is the same for all parts.
    """
    examples = count_examples(case.batch)
    if examples < 5:
        return
    cut = examples // 2 + 1  # parts of unequal size: the average of equal ones needs no weights

    def of(name: str, start: int, stop: int) -> Tensor:
        part = pytree.tree_map(
            lambda x: x[start:stop] if _has_examples(x, examples) else x, case.batch
        )
        carry = case.problem.fresh_carry(case.start[1], part)
        prediction, _ = case.problem.predict(
            case.hypers, case.params, carry, part, train=False, generator=None
        )
        return getattr(case.problem, name)(case.hypers, case.params, prediction, part)

    for name in ("inner_objective", "outer_objective"):
        try:
            with torch.no_grad():
                whole, first, rest = (
                    of(name, 0, examples),
                    of(name, 0, cut),
                    of(name, cut, examples),
                )
                again = of(name, 0, 2) + of(name, 2, cut)
        except Exception:  # a problem that takes no smaller batch says nothing of averages
            return
        if whole.ndim or nearly_equal(whole, (cut * first + (examples - cut) * rest) / examples):
            continue
        if nearly_equal(
            first + rest - whole, again - first
        ):  # what a sum adds besides comes once too often, whatever the parts
            yield Finding(
                "error",
                f"`{name}` adds up over examples, so that it grows with the batch; average it (reduction='mean')",
            )
        else:
            yield Finding(
                "note",
                f"`{name}` of a batch is not the average of its parts: where examples are not meant to act on each other, "
                "average over them",
            )


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
                f"the weight `{name}` receives no gradient from the inner objective; use it, or pass it on in the carry",
            )
        elif not bool(torch.isfinite(gradient).all()):
            yield Finding(
                "error", f"the gradient of the weight `{name}` is not finite near its initial value"
            )
        elif not bool(gradient.any()):
            yield Finding("note", f"the gradient of the weight `{name}` is zero on the first batch")


def hyperparameters(case: FirstBatch) -> Iterator[Finding]:
    """Every tuned hyperparameter changes a loss, and ∂L_T/∂λ exists where that is declared."""
    with torch.no_grad():
        inner, outer = case.inner_loss(), case.outer_loss()
    for name in case.problem.space.tuned:
        if case.problem.space[name].optimizer is not None:
            continue  # it acts on the way to w*
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
                f"the hyperparameter `{name}` changes neither objective; use it, or leave it out of the space",
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
                    f"the hyperparameter `{name}` changes L_T, but ∂L_T/∂{name} is {found}; declare differentiable=False where "
                    "it is sampled or rounded, or let the gradient through (no item() and no detach())",
                )


def per_example_leaves(case: FirstBatch) -> Iterator[Finding]:
    """A leaf [B] of equal values gives the losses that the leaf [] gives."""
    examples = count_examples(case.batch)
    for name in case.problem.space.tuned:
        if not case.problem.space[name].per_example:
            continue
        leaf = case.hypers[name]
        repeated = {**case.hypers, name: leaf.expand(examples, *leaf.shape).clone()}
        advice = f"broadcast `{name}` with bilevel.along_examples, average the loss over examples, or declare per_example=False"
        try:
            with torch.no_grad():
                plain, spread = (
                    case.inner_loss(train=False),
                    case.inner_loss(train=False, hypers=repeated),
                )
                case.inner_loss(hypers=repeated)
        except Exception as error:  # whatever a user's own code raises is what we are here to tell
            yield Finding(
                "error", f"`{name}` with one value per example raises {describe(error)}; {advice}"
            )
            continue
        if not nearly_equal(plain, spread):
            yield Finding(
                "error",
                f"`{name}` given once for each example makes L_T {_short(spread)}, not {_short(plain)} as given once; {advice}",
            )


def example_axis(case: FirstBatch) -> Iterator[Finding]:
    """Examples in another order are predicted alike in that order, in evaluation mode.

    Batch statistics do not depend on the order either, so that a network may couple the examples of a batch.
    """
    examples = count_examples(case.batch)
    if examples < 2:
        return

    def reversed_examples(x: Any) -> Any:
        return x.flip(0) if _has_examples(x, examples) else x

    with torch.no_grad():
        straight, _ = case.predict(train=False)
        turned, _ = case.predict(train=False, batch=pytree.tree_map(reversed_examples, case.batch))
    for ours, theirs in zip(pytree.tree_leaves(straight), pytree.tree_leaves(turned), strict=False):
        # a leaf that stays as it is has no examples: w itself, say
        if (
            reversed_examples(ours) is ours
            or nearly_equal(ours, theirs)
            or nearly_equal(reversed_examples(ours), theirs)
        ):
            continue
        per_example = any(case.problem.space[name].per_example for name in case.problem.space.tuned)
        yield Finding(
            "error" if per_example else "note",
            "in evaluation mode, reversing the examples of a batch does not reverse the predictions: the first axis of every "
            "tensor is the example axis (give nn.LSTM batch_first=True, say); where their order is meant to matter, declare "
            "per_example=False",
        )
        return


def metrics(case: FirstBatch) -> Iterator[Finding]:
    """`loss` is among the metrics."""
    with torch.no_grad():
        prediction, _ = case.predict(train=False)
        reported = case.problem.metrics(case.hypers, case.params, prediction, case.batch)
    if "loss" not in reported:
        yield Finding(
            "error",
            f"`metrics` reports {', '.join(reported) or 'nothing'} but no `loss`, which λ minimizes; add it",
        )


ALL: tuple[Law, ...] = (
    initial_weights,
    purity,
    prediction_of_weights,
    objectives,
    finite_objectives,
    averages,
    gradients_of_weights,
    hyperparameters,
    per_example_leaves,
    example_axis,
    metrics,
)

AT_SETUP: tuple[Law, ...] = (prediction_of_weights, objectives)
"""Those that spoil every run; a loss that is not finite is the loop's to see, at any step."""

WARNED_OF: tuple[Law, ...] = (gradients_of_weights, hyperparameters)
"""Those whose errors a run survives, and may waste: a weight that is not used, a hyperparameter that does nothing."""


def recomputation_hint(error: RuntimeError) -> str:
    """A hint where a backward pass recomputes what it saved no activations of."""
    if isinstance(error, CheckpointError) or "meta" in str(error):
        return "; torch.utils.checkpoint recomputes when the weights of the call are gone: remove it from the network"
    return ""


def _losses(case: FirstBatch) -> Iterator[tuple[str, Tensor]]:
    yield "inner_objective", case.inner_loss(params=case.start[0])
    yield "outer_objective", case.outer_loss(params=case.start[0])


def _has_examples(x: Any, examples: int) -> bool:
    return isinstance(x, Tensor) and x.ndim > 0 and len(x) == examples


def _alike(one: Carry, other: Carry) -> bool:
    return {name: t.shape for name, t in one.items()} == {
        name: t.shape for name, t in other.items()
    }


def _short(leaf: Tensor) -> str:
    return f"{leaf.item():.4g}" if leaf.numel() == 1 else f"a tensor of shape {list(leaf.shape)}"
