"""Laws about hyperparameters with one value per example: each acts on its own example alone."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from bilevel.checks.equality import nearly_equal
from bilevel.checks.finding import Finding
from bilevel.checks.first_batch import FirstBatch, brief, has_examples
from bilevel.checks.hints import hint
from bilevel.params import Batch, Hypers, Prediction, count_examples
from bilevel.problem_wrapper import of_one_process
from bilevel.text import describe


def per_example_leaves(case: FirstBatch) -> Iterator[Finding]:
    """A leaf [B] of equal values gives the losses of the leaf [], also for another B.

    And the value of an example changes the prediction and the loss of that example alone.
    """
    space = case.problem.space
    names = [name for name in space.tuned if space[name].per_example]
    case = replace(case, problem=of_one_process(case.problem))
    if not names or (flaw := _flaw(case, names)) is None:
        return
    alone = {name: _flaw(case, [name]) for name in names} if len(names) > 1 else {}
    found = {name: text for name, text in alone.items() if text} or {"`, `".join(names): flaw}
    for shown, text in found.items():
        yield Finding("error", f"`{shown}` with one value per example {text}")


def _flaw(case: FirstBatch, names: Sequence[str]) -> str | None:
    """Return what is wrong where the given hyperparameters vary per example, and the remedy."""
    shown = names[0]
    advice = (
        f"broadcast `{shown}` with bilevel.along_examples, average the loss over examples, or "
        "declare per_example=False"
    )
    examples = count_examples(case.batch)
    try:
        with torch.no_grad():
            plain = case.inner_loss(train=False)
            repeated = case.inner_loss(train=False, hypers=_repeated(case, names, examples))
            case.inner_loss(hypers=_repeated(case, names, examples))
    except Exception as error:  # the problem is a user's own code
        return f"raises {describe(error)}{hint(error) or f'; {advice}'}"
    if not nearly_equal(plain, repeated):
        return f"makes L_T {brief(repeated)} instead of {brief(plain)}; {advice}"
    with torch.no_grad():
        if (found := _raises_for_fewer(case, names, examples)) is not None:
            return (
                f"raises {found} for a batch of {examples - 1} examples, so it acts along another "
                f"axis, whose length is the batch size by chance; {advice}"
            )
        if examples > 1 and (found := _acts_on_others(case, names, examples)) is not None:
            return f"changes {found} of other examples; {advice}"
    return None


def _repeated(case: FirstBatch, names: Sequence[str], examples: int) -> Hypers:
    """Return λ with one value for each example, equal for all of them."""
    leaves = {name: case.hypers[name] for name in names}
    return case.hypers | {
        name: leaf.expand(examples, *leaf.shape).clone() for name, leaf in leaves.items()
    }


def _raises_for_fewer(case: FirstBatch, names: Sequence[str], examples: int) -> str | None:
    """Return the error for a batch without its last example, if there is none at a common λ."""
    if examples < 3:
        return None
    few = select(case.batch, torch.arange(examples - 1), examples)
    carry = case.problem.fresh_carry(case.start[1], few)

    def compute(hypers: Hypers) -> None:
        draws = torch.Generator(case.device).manual_seed(0)
        problem, w = case.problem, case.params
        prediction, _ = problem.predict(hypers, w, carry, few, train=True, generator=draws)
        problem.inner_objective(hypers, w, prediction, few)
        prediction, _ = problem.predict(hypers, w, carry, few, train=False, generator=None)
        problem.outer_objective(hypers, w, prediction, few)

    try:
        compute(_repeated(case, names, examples - 1))
        return None
    except Exception as error:
        found = describe(error)
    try:
        compute(case.hypers)
    except Exception:  # the problem takes no other batch size
        return None
    return found


def _acts_on_others(case: FirstBatch, names: Sequence[str], examples: int) -> str | None:
    """Return "the predictions" or the objective that the values of other examples change."""
    even = torch.arange(examples, device=case.device) % 2 == 0
    base = _repeated(case, names, examples)
    moved = _moved(case, names, even)
    swapped = select(case.batch, _even_from_odd(examples), examples)
    for train, name in ((True, "inner_objective"), (False, "outer_objective")):
        statistics = FrozenStatistics()
        before, drawn = _predict(case, statistics, base, case.batch, train=train)
        after, again = _predict(case, statistics, moved, case.batch, train=train)
        if not torch.equal(drawn, again):
            continue  # a sampler whose draws depend on λ moves the draws of later examples
        if not _odd_rows_agree(before, after, examples):
            # a network that mixes the examples of a batch may do so
            other, _ = _predict(case, statistics, base, swapped, train=train)
            if _odd_rows_agree(before, other, examples):
                return "the predictions"
            continue
        if _mixes(case, name, (base, moved), (before, case.batch), examples):
            return f"the terms of `{name}`"
    return None


def _moved(case: FirstBatch, names: Sequence[str], even: Tensor) -> Hypers:
    """Return λ with one value per example, moved by two σ for the even ones."""
    space = case.problem.space
    scale = 2 * space.initial_scales().to(case.u)
    far = space.constrain(
        case.u + even[:, None] * scale * torch.linspace(0.5, 1, len(scale)).to(scale)
    )
    return case.hypers | {name: far[name] for name in names}


def _predict(
    case: FirstBatch, statistics: "FrozenStatistics", hypers: Hypers, batch: Batch, *, train: bool
) -> tuple[Prediction, Tensor]:
    """Return the prediction at fixed statistics of batch norm, and the generator's end state."""
    generator = torch.Generator(case.device).manual_seed(0)
    with statistics:
        prediction, _ = case.problem.predict(
            hypers,
            case.params,
            case.start[1],
            batch,
            train=train,
            generator=generator if train else None,
        )
    return prediction, generator.get_state()


def _odd_rows_agree(one: Prediction, other: Prediction, examples: int) -> bool:
    """Return whether the predictions of the odd examples are equal up to rounding.

    An example may have several rows, which stand together or are interleaved.
    """
    for ours, theirs in zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True):
        if not isinstance(ours, Tensor) or not ours.ndim or len(ours) % examples:
            continue
        if nearly_equal(ours, theirs):
            continue
        rows = len(ours) // examples
        together = [t.unflatten(0, (examples, rows))[1::2] for t in (ours, theirs)]
        apart = [t.unflatten(0, (rows, examples))[:, 1::2] for t in (ours, theirs)]
        if not (nearly_equal(*together) or nearly_equal(*apart)):
            return False
    return True


def _mixes(
    case: FirstBatch,
    name: str,
    hypers: tuple[Hypers, Hypers],
    at: tuple[Prediction, Batch],
    examples: int,
) -> bool:
    """Return whether an objective multiplies the values of some examples with other examples.

    An objective without such a product changes with λ of the even examples by an amount in which
    the odd ones have no part. The terms must be separate at a common λ.
    """
    base, moved = hypers
    odd, even = _odd_from_even(examples), _even_from_odd(examples)

    def loss(hypers: Hypers, rows: Tensor | None) -> Tensor:
        prediction, batch = at if rows is None else (select(part, rows, examples) for part in at)
        return getattr(case.problem, name)(hypers, case.params, prediction, batch)

    try:
        plain, other = loss(base, None), loss(base, odd)
        effect, with_others = loss(moved, None) - plain, loss(moved, odd) - other
        size = torch.stack([plain, other, plain + effect, other + with_others]).abs().max()
        rounding = max(1e-4, 16 * torch.finfo(size.dtype).eps) * size
        if bool((effect - with_others).abs() <= rounding):
            return False
        both = torch.where(torch.arange(examples) % 2 == 0, even, odd)
        separate = plain + loss(base, both) - other - loss(base, even)
    except Exception:  # this objective takes no other prediction
        return False
    return bool(separate.abs() <= rounding)


def _even_from_odd(examples: int) -> Tensor:
    """Return indices at which every even example is replaced by an odd one."""
    i = torch.arange(examples)
    return torch.where(i % 2 == 0, (i + 1) % (examples - examples % 2), i)


def _odd_from_even(examples: int) -> Tensor:
    """Return indices at which every odd example is replaced by an even one."""
    i = torch.arange(examples)
    return torch.where(i % 2 == 1, i - 1, i)


def select(tree: Any, rows: Tensor, examples: int) -> Any:
    """Return the given examples of a batch or a prediction."""
    return pytree.tree_map(lambda x: x[rows.to(x.device)] if has_examples(x, examples) else x, tree)


class FrozenStatistics(TorchFunctionMode):
    """A mode in which batch norm keeps the statistics of the batch that it saw first.

    So the examples of a batch do not act on each other through them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._call = 0

    def __enter__(self) -> "FrozenStatistics":
        self._call = 0
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        return self._normalize(*args, **kwargs)

    def _normalize(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(
                input, running_mean, running_var, weight, bias, False, momentum, eps
            )
        if self._call == len(self._seen):
            axes = [0, *range(2, input.ndim)]
            self._seen.append((input.mean(axes), input.var(axes, correction=0)))
        mean, var = self._seen[self._call]
        self._call += 1
        return F.batch_norm(input, mean, var, weight, bias, False, momentum, eps)
