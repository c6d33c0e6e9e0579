"""Laws about the objectives and the metrics: scalars, finite, averaged over examples."""

from collections.abc import Iterator
from numbers import Number

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel.checks.equality import nearly_equal
from bilevel.checks.finding import Finding
from bilevel.checks.first_batch import FirstBatch, brief, has_examples
from bilevel.checks.trial import Trial
from bilevel.params import count_examples


def scalar_objectives(case: FirstBatch) -> Iterator[Finding]:
    """Both objectives return a real tensor of shape []."""
    for name, loss in case.initial_losses.items():
        if (flaw := _flaw(loss)) is not None:
            yield Finding("error", f"`{name}` {flaw}")


def _flaw(loss: object) -> str | None:
    """Return what is wrong with the value of an objective and the remedy, or None."""
    if not isinstance(loss, Tensor):
        if isinstance(loss, Number):
            return (
                f"returns a {type(loss).__name__}; return a tensor of shape [], without item() or "
                "float() (torch.tensor(score) for a score from outside PyTorch)"
            )
        kind = "None" if loss is None else f"a {type(loss).__name__}"
        return f"returns {kind}; return the loss alone, a tensor of shape []"
    if loss.ndim:
        mean = ".mean()" if loss.is_floating_point() or loss.is_complex() else ".float().mean()"
        return (
            f"is of shape {list(loss.shape)}; return a tensor of shape [], averaged over examples "
            f"({mean})"
        )
    if loss.is_complex():
        return f"is {loss.dtype}, which has no order; return a real tensor (.real or .abs())"
    if not loss.is_floating_point():
        return (
            f"is {loss.dtype}, which has no gradient; return a floating-point tensor "
            "(.float() before the mean)"
        )
    if loss.dtype == torch.float16 and not bool(torch.isfinite(loss)):
        return "overflows float16, which ends at 65504; compute it in float32 (prediction.float())"
    return None


def finite_objectives(case: FirstBatch) -> Iterator[Finding]:
    """Both objectives are finite at the start."""
    for name, loss in case.initial_losses.items():
        if _flaw(loss) is None and not bool(torch.isfinite(loss)):
            at = ", ".join(f"{key}={brief(leaf)}" for key, leaf in case.hypers.items())
            split, stream = (
                ("train", case.data.train)
                if name == "inner_objective"
                else ("valid", case.data.valid)
            )
            trial = Trial(case, split, stream.peek()).run({}, watch=True)
            begins = "" if trial.begins is None else f" ({trial.begins})"
            yield Finding(
                "error",
                trial.flaw
                or (
                    f"`{name}` is not finite at the initial weights and {at}{begins}; look for "
                    "log(0), 0/0 or an overflow (float16 ends at 65504)"
                ),
            )


def averages(case: FirstBatch) -> Iterator[Finding]:
    """Both objectives of a batch are the weighted averages over its parts, in evaluation mode.

    A sum grows with the batch, and the suitable learning rate changes with it. An added penalty is
    the same for all parts.
    """
    examples = count_examples(case.batch)
    if examples < 3:
        return
    cut = examples // 2 + 1  # unequal parts, since the average of equal ones needs no weights
    few = 2 if cut > 2 else 1

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
                again = of(name, 0, few) + of(name, few, cut)
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
