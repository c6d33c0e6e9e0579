"""A check before a run: the losses of two shards must agree with those of the whole batch."""

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel.checks.equality import nearly_equal
from bilevel.checks.first_batch import FirstBatch
from bilevel.data.tensor_stream import Data
from bilevel.errors import BilevelError, Refused
from bilevel.parallel.batch_norm import without_statistics
from bilevel.parallel.per_example_draws import DrawLengths, WholeBatchDraws
from bilevel.parallel.process_group import bits
from bilevel.parallel.sharded_problem import ShardedProblem
from bilevel.parallel.shards import Shard, even_shards
from bilevel.params import Batch, Carry, count_examples
from bilevel.text import describe

FEW = 5
"""Number of examples of the first check: shards of three and two."""


def dry_run_shards(problem: ShardedProblem, data: Data, device: torch.device) -> None:
    """Find the example axes that `problem` needs, and refuse a problem that cannot be sharded.

    Every rank computes everything on its own, on a few examples and on the first batches. A refusal
    on one rank is raised on all.

    Raises:
        Refused: an objective or the carry of two shards differs from that of the whole batch.
        BilevelError: a batch has fewer examples than there are ranks, or ranks read different
            batches.
    """
    batches = [stream.peek() for stream in (data.train, data.valid)]
    refusal: BilevelError | None = None
    try:
        _dry_run(problem, FirstBatch(problem.problem, data, device), *map(count_examples, batches))
    except BilevelError as error:
        refusal = error
    except Exception as error:  # the problem is a user's own code
        refusal = Refused(
            f"the problem cannot be computed on a part of a batch ({describe(error)}); {_REMEDY}"
        )
    seen = [int(bits(leaf)) for leaf in pytree.tree_leaves(batches) if isinstance(leaf, Tensor)]
    for others, refused in problem.ranks.gather((seen, refusal)):
        if refused is not None:
            raise refused
        if others != seen:
            raise BilevelError(
                "the ranks read different batches; give all of them the same data in the same "
                "order (split and shuffle by a seed, and transform in the problem instead of a "
                "loader's workers)"
            )


def _dry_run(problem: ShardedProblem, case: FirstBatch, size: int, valid_size: int) -> None:
    world = problem.ranks.world
    if any(1 < n < world for n in (size, valid_size)):
        raise BilevelError(
            f"batch_size={min(size, valid_size)} must be at least the number of processes, "
            f"{world}; take larger batches or fewer processes"
        )
    if size < 2:
        return
    few = first(case.batch, FEW)
    fewer = first(few, count_examples(few) - 1)
    problem.state_axes = state_axes(case, few, fewer)
    problem.fixed_lengths = fixed_lengths(case, few, fewer)
    problem.check_lengths(size)
    clear = [
        n
        for n in range(count_examples(few), size + 1)
        if problem.fixed_lengths.isdisjoint(s.size for s in even_shards(n, 2))
    ]
    # in a few examples, a coupling of examples has the largest effect; the whole batch also holds
    # rare cases such as padding
    parts = [(case.batch, True, n) for n in (clear[:1] + clear[1:][-1:] or [size])]
    valid = case.data.valid.peek()
    parts += [(valid, False, n) for n in sorted({min(FEW, valid_size), valid_size} - {0, 1})]
    for batch, train, n in parts:
        compare_shards_with_whole(problem, case, first(batch, n), train=train)


def compare_shards_with_whole(
    problem: ShardedProblem, case: FirstBatch, batch: Batch, *, train: bool
) -> None:
    """Raise where L_T, L_V or the carry of two shards differs from that of the whole batch.

    Batch norm is left out of both computations.
    """
    inner = problem.problem
    whole = Shard(0, count_examples(batch), count_examples(batch))
    carry = inner.fresh_carry(case.start[1], batch)
    name, objective = ("L_T", inner.inner_objective) if train else ("L_V", inner.outer_objective)

    def loss_and_carry(shard: Shard) -> tuple[Tensor, Carry]:
        own = shard.of(batch)
        part = {key: _narrow(t, problem.state_axes.get(key), shard) for key, t in carry.items()}
        generator = torch.Generator(case.device).manual_seed(0) if train else None
        with torch.no_grad(), WholeBatchDraws(shard, without_statistics):
            prediction, after = inner.predict(
                case.hypers, case.params, part, own, train=train, generator=generator
            )
            return objective(case.hypers, case.params, prediction, own), after

    with torch.random.fork_rng(devices=[case.device] if case.device.type == "cuda" else []):
        truth, carried = loss_and_carry(whole)
        parts = [(shard.weight, *loss_and_carry(shard)) for shard in even_shards(whole.size, 2)]
    total = torch.stack([weight * loss for weight, loss, _ in parts]).sum()
    if truth.ndim == 0 and not nearly_equal(truth, total):  # `check_setup` checks the shape
        raise Refused(
            f"{name} of a batch is {float(truth):.6g}, but the average over its two parts is "
            f"{float(total):.6g}, since it {_WHY}; {_REMEDY}"
        )
    for key, t in carried.items():
        axis = problem.state_axes.get(key)
        afters = [after[key] for _, _, after in parts]
        if (
            not nearly_equal(t, torch.cat(afters, axis))
            if axis is not None
            else not all(nearly_equal(t, after) for after in afters)
        ):
            raise Refused(
                f"`{key}` of the carry differs between parts of a batch, since it {_WHY}; {_REMEDY}"
            )


_WHY = (
    "is not a mean over examples, lets examples interact, or draws without a leading example axis"
)
_REMEDY = "run it in one process"


def first(batch: Batch, count: int) -> Batch:
    """Return the first examples of a batch."""
    return Shard(0, min(count, count_examples(batch)), count_examples(batch)).of(batch)


def state_axes(case: FirstBatch, few: Batch, fewer: Batch) -> dict[str, int]:
    """Return the example axis of every carried tensor that has one.

    It is the axis along which the fresh states of two batches differ in length.
    """
    ours, theirs = (case.problem.fresh_carry(case.start[1], batch) for batch in (few, fewer))
    axes = {}
    for name, state in ours.items():
        differ = [
            axis
            for axis, (m, n) in enumerate(zip(state.shape, theirs[name].shape, strict=True))
            if m != n
        ]
        if differ:
            axes[name] = differ[0]
    return axes


def fixed_lengths(case: FirstBatch, few: Batch, fewer: Batch) -> frozenset[int]:
    """Return the first axes of training draws that are equal for both numbers of examples."""
    with torch.random.fork_rng(devices=[case.device] if case.device.type == "cuda" else []):
        seen = [_lengths(case, batch) for batch in (few, fewer)]
    return frozenset(m for m, n in zip(*seen, strict=False) if m == n)


def _lengths(case: FirstBatch, batch: Batch) -> list[int]:
    carry = case.problem.fresh_carry(case.start[1], batch)
    hypers, params = case.hypers, case.params  # the first access draws them
    lengths, generator = DrawLengths(), torch.Generator(case.device).manual_seed(0)
    with torch.no_grad(), lengths:
        case.problem.predict(hypers, params, carry, batch, train=True, generator=generator)
    return lengths.seen


def _narrow(state: Tensor, axis: int | None, shard: Shard) -> Tensor:
    return state if axis is None else state.narrow(axis, shard.start, shard.size)
