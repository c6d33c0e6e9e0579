"""The certain check of per-example weights: each row against a run with that example's weights.

Row b of a per-example run must equal row b of a run in which all examples have the plain dense
weight W₀ + diag(s_b) W₁. The check runs in float64 where the network can. Both runs draw the same
masks, and batch norm uses constant statistics. A row that depends on the other examples of its
batch (through a statistic that the network writes out) has no such twin.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from bilevel import Batch, BilevelError, Params, Prediction, Refused
from bilevel.params import count_examples
from bilevel.solvers.autodiff.decompositions import FORWARD_MODE, Decomposed
from bilevel.solvers.base.core import Core
from bilevel.solvers.response.jacobian import Response
from bilevel.solvers.response.row_counts import PER_BATCH, RowCounts
from bilevel.text import describe

TOLERANCES = {torch.float64: 1e-5}
"""Relative error of a row, by type; 0.1 in other types. A wrong rule is off by about 1."""

OFFSETS = 4
"""Offsets that the examples of a batch share in the check."""

MOST_COPIES = 3
"""Rows of a leaf that are looked at for a dependence on other examples."""

Run = Callable[[Tensor, Batch], Prediction]
"""The prediction at an offset, [h] or [B, h], on a batch, with the same draws at every call."""


def check_rows(core: Core, response: Response, linearize: Callable[..., Any] | None) -> None:
    """Compare rows of a training batch, as an inner step predicts, and of a validation batch.

    Args:
        core: the problem, with weights that are kept.
        response: maps ε to w₀ + Θε.
        linearize: the linearization of an inner step; None for none.

    Raises:
        Refused: a row is that of other weights.
    """
    for train in (True, False):
        batch = (core.data.train if train else core.data.valid).peek()
        counts = response.row_counts or RowCounts()
        counts.split = "train" if train else "valid"
        failed = ""
        for dtype in (torch.float64, None):  # None keeps the types, where float64 does not run
            try:
                run = predictor(core, response, linearize if train else None, batch, train, dtype)
                strict = core.calls.differentiates or counts.folds()
                error = wrong_row(*run, strict=strict)
            except BilevelError:
                raise
            except Exception as caught:
                failed = describe(caught)
                continue
            if error is not None:
                raise Refused(_sentence(error, train=train))
            break
        else:
            if counts.folds():
                raise Refused(
                    "rows of other axes are folded into the example axis, and the check of their "
                    f"order raises {failed}; {PER_BATCH}"
                )


def wrong_row(run: Run, offset: Tensor, batch: Batch, *, strict: bool) -> float | None:
    """Return the relative error of a row of `run` that is wrong; None if all rows are right.

    A few offsets are dealt out to the examples by the digits of their numbers. So any two examples
    differ in some run, and few runs with plain weights check all rows.

    Args:
        run: the prediction at an offset.
        offset: [B, h].
        batch: a batch of B examples.
        strict: count a row that depends on other examples as wrong, and a leaf without an example
            axis that changes. It is for a network that takes derivatives, or that folds other axes
            into that of the examples. Otherwise such rows are left out.
    """
    examples = len(offset)
    values = offset[:OFFSETS]
    still = run(torch.zeros_like(offset[0]), batch)
    alone = [run(value, batch) for value in values]
    number = torch.arange(examples)
    while True:
        dealt = number % len(values)
        together = run(values[dealt.to(values.device)], batch)
        trees = [_rows(tree, examples) for tree in (together, still, *alone)]
        for leaf, (ours, start, *each) in enumerate(zip(*trees, strict=True)):
            if ours is None or start is None or any(rows is None for rows in each):
                if strict and _changes(together, still, leaf):
                    return float("inf")
                continue
            truth = torch.stack([each[k][b] for b, k in enumerate(dealt.tolist())])
            tolerance, errors = TOLERANCES.get(truth.dtype, 0.1), _errors(ours, truth, start)
            for b in (errors > tolerance).nonzero()[:MOST_COPIES, 0].tolist():
                rows: Tensor | None = truth
                if not strict:
                    rows = _rows(run(values[dealt[b]], _copies(batch, b)), examples)[leaf]
                if rows is not None and _errors(rows, truth, start)[b] <= tolerance:
                    return float(errors[b])
        number //= max(2, len(values))
        if not bool(number.any()):
            return None


def predictor(
    core: Core,
    response: Response,
    linearize: Callable[..., Any] | None,
    batch: Batch,
    train: bool,
    dtype: torch.dtype | None,
) -> tuple[Run, Tensor, Batch]:
    """Return the prediction at random Θ as a function of the offset, offsets, and the batch."""

    def cast(x: Any) -> Any:
        floating = isinstance(x, Tensor) and x.is_floating_point() and dtype is not None
        return x.to(dtype) if floating else x

    problem, device = core.problem, core.device
    batch, carry, w0 = pytree.tree_map(cast, (batch, core.carry, core.weights.detached()))
    carry = problem.fresh_carry(carry, batch)
    if not train:
        carry = problem.outer_carry(carry, None, batch)
    draws, h = torch.Generator().manual_seed(0), problem.space.numel
    like = next(iter(w0.values()))
    theta = response.init(w0, h, core.calls.axes, draws)
    theta = {  # the parts of Θ that start at zero would hide the others
        name: t if bool(t.any()) else torch.randn(t.shape, generator=draws).to(like)
        for name, t in theta.items()
    }
    offset = torch.randn(count_examples(batch), h, generator=draws).to(like) / h**0.5
    # away from w₀, where a branch that starts at zero would hide its weights
    w0 = response.weights(theta, w0, 0.1 * offset[0], tangent=False)
    hypers = problem.space.constrain(cast(core.search.u0), torch.Generator(device).manual_seed(0))
    weights = partial(response.weights, theta, w0)

    def run(offset: Tensor, batch: Batch) -> Prediction:
        def predict(params: Params) -> Any:
            generator = torch.Generator(device).manual_seed(0) if train else None
            with _ConstantStatistics():
                return problem.predict(
                    hypers, params, carry, batch, train=train, generator=generator
                )

        if linearize is not None:
            return linearize(predict, weights, offset)[0]
        with torch.no_grad(), Decomposed(FORWARD_MODE):  # the same draws of dropout in an LSTM
            return predict(weights(offset, tangent=False))[0]

    return run, offset, batch


class _ConstantStatistics(TorchFunctionMode):
    """A context in which batch norm takes running statistics, so that examples do not interact."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return (_batch_norm if func is F.batch_norm else func)(*args, **kwargs)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if running_mean is None or running_var is None:
        running_mean = torch.zeros(input.shape[1], dtype=input.dtype, device=input.device)
        running_var = torch.ones_like(running_mean)
    return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)


def _rows(prediction: Prediction, examples: int) -> list[Tensor | None]:
    """Return [B, …] rows of the examples in every leaf; None for a leaf without an example axis."""
    return [
        leaf.detach().reshape(examples, -1)
        if isinstance(leaf, Tensor)
        and leaf.is_floating_point()
        and leaf.numel()
        and leaf.ndim
        and leaf.shape[0] % examples == 0
        else None
        for leaf in pytree.tree_leaves(prediction)
    ]


def _changes(together: Prediction, still: Prediction, leaf: int) -> bool:
    """Return whether a leaf of numbers differs between two predictions."""
    one, other = (pytree.tree_leaves(tree)[leaf] for tree in (together, still))
    floating = isinstance(one, Tensor) and isinstance(other, Tensor) and one.is_floating_point()
    return floating and (one.shape != other.shape or not torch.equal(one, other))


def _copies(batch: Batch, b: int) -> Batch:
    """Return the batch in which every example is a copy of example b."""
    examples = count_examples(batch)
    return pytree.tree_map(
        lambda x: (
            x[[b] * examples] if isinstance(x, Tensor) and x.ndim and len(x) == examples else x
        ),
        batch,
    )


def _errors(ours: Tensor, truth: Tensor, start: Tensor) -> Tensor:
    """Return the error of each row relative to its change from `start`, [B], less rounding."""
    if ours.shape != truth.shape:
        return truth.new_full((len(truth),), float("inf"))
    rounding = 1e3 * torch.finfo(truth.dtype).eps * truth.abs().amax(1)
    change, distance = (truth - start).abs().amax(1), (ours - truth).abs().amax(1)
    errors = distance / torch.maximum(change, rounding)
    errors = errors.nan_to_num(float("inf")).masked_fill(distance <= rounding, 0.0)
    return errors.masked_fill(~torch.isfinite(truth).all(1), 0.0)


def _sentence(error: float, *, train: bool) -> str:
    mode = "training" if train else "evaluation"
    return (
        f"per-example perturbations of λ give wrong predictions in this network: in {mode} mode a "
        f"row differs from that of the network with its own weights by {error:.0%} of the change "
        "(an operation mixes examples, or takes another axis for theirs, or folds another axis "
        f"into it with the rows of an example apart); {PER_BATCH}"
    )
