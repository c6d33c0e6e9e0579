"""Laws about the objectives and the metrics: scalars, finite, averaged over examples."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel.checks.equality import nearly_equal
from bilevel.checks.finding import Finding
from bilevel.checks.first_batch import FirstBatch, brief, has_examples
from bilevel.params import count_examples


def scalar_objectives(case: FirstBatch) -> Iterator[Finding]:
    """Both objectives have shape []."""
    for name, loss in _losses(case):
        if not isinstance(loss, Tensor) or loss.ndim:
            shape = (
                f"of shape {list(loss.shape)}"
                if isinstance(loss, Tensor)
                else f"a {type(loss).__name__}"
            )
            yield Finding(
                "error",
                f"`{name}` is {shape}; return a tensor of shape [], averaged over examples",
            )


def finite_objectives(case: FirstBatch) -> Iterator[Finding]:
    """Both objectives are finite at the start."""
    for name, loss in _losses(case):
        if not bool(torch.isfinite(torch.as_tensor(loss)).all()):
            at = ", ".join(f"{key}={brief(leaf)}" for key, leaf in case.hypers.items())
            yield Finding(
                "error",
                (
                    f"`{name}` is not finite at the initial weights and {at}; look for log(0), 0/0 "
                    "or an overflow"
                ),
            )


def averages(case: FirstBatch) -> Iterator[Finding]:
    """Both objectives of a batch are the weighted averages over its parts, in evaluation mode.

    A sum grows with the batch, and the suitable learning rate changes with it. An added penalty is
    the same for all parts.
    """
    examples = count_examples(case.batch)
    if examples < 5:
        return
    cut = examples // 2 + 1  # unequal parts, since the average of equal ones needs no weights

    def of(name: str, start: int, stop: int) -> Tensor:
        part = pytree.tree_map(
            lambda x: x[start:stop] if has_examples(x, examples) else x, case.batch
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
        except Exception:  # the law does not apply where a smaller batch raises
            return
        if whole.ndim or nearly_equal(whole, (cut * first + (examples - cut) * rest) / examples):
            continue
        # in a sum, an added penalty is counted once too often, whatever the parts
        if nearly_equal(first + rest - whole, again - first):
            yield Finding(
                "error",
                (
                    f"`{name}` adds up over examples and grows with the batch; average it "
                    "(reduction='mean')"
                ),
            )
        else:
            yield Finding(
                "note",
                (
                    f"`{name}` of a batch is not the average of its parts; average over examples, "
                    "unless they are meant to interact"
                ),
            )


def _losses(case: FirstBatch) -> Iterator[tuple[str, Tensor]]:
    yield "inner_objective", case.inner_loss(params=case.start[0])
    yield "outer_objective", case.outer_loss(params=case.start[0])
