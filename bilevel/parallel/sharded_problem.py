"""A problem of which every rank computes its shard of each batch."""

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.errors import BilevelError
from bilevel.metrics import Reported, Weighted, read_metrics
from bilevel.parallel.batch_norm import BatchStatistics
from bilevel.parallel.collectives import enter, leave
from bilevel.parallel.per_example_draws import WholeBatchDraws
from bilevel.parallel.process_group import ProcessGroup
from bilevel.parallel.shards import Shard, even_shards
from bilevel.params import (
    Batch,
    Carry,
    Hypers,
    Params,
    PerExampleWeight,
    Prediction,
    count_examples,
    detached,
    widen,
)
from bilevel.problem import Problem
from bilevel.problem_wrapper import ProblemWrapper, class_name


class ShardedProblem(ProblemWrapper):
    """`problem`, computed by several ranks that each take a shard of every batch.

        L(λ, w) = Σ_ranks (b_r/B) L_r(λ, w),    ∇L = Σ_ranks (b_r/B) ∇L_r

    L_r is the mean over the rank's own b_r of the B examples, so the sums are exact for shards of
    different sizes too. Solvers see the whole batch and its losses; all ranks hold the same λ, w
    and gradients. w and λ enter the shard, and the loss leaves it (`bilevel.parallel.collectives`).
    Everything between is local, including the prediction. Every rank computes a batch of fewer
    examples than ranks as a whole, for example that of a closed form.

    Args:
        problem: a problem whose objectives are means over examples.
        ranks: the process group.
    """

    sharded = True

    def __init__(self, problem: Problem, ranks: ProcessGroup) -> None:
        super().__init__(problem)
        self.ranks = ranks
        self.state_axes: dict[str, int] = {}
        """The example axis of recurrent state in the carry, by name."""
        self.fixed_lengths: frozenset[int] = frozenset()
        """First axes of draws in `predict` that are not the example axis."""
        self._statistics = BatchStatistics(ranks)
        self._entered: dict[int, tuple[Tensor, Tensor]] = {}

    def init(self, generator: torch.Generator) -> tuple[Params, Carry]:
        params, carry = self.ranks.copy(self.problem.init(generator))
        return params, carry

    def shard(self, batch: Batch) -> Shard | None:
        """Return the shard of this rank; None where every rank computes the whole batch."""
        examples = count_examples(batch)
        return (
            None
            if examples < self.ranks.world
            else even_shards(examples, self.ranks.world)[self.ranks.rank]
        )

    def check_lengths(self, examples: int) -> None:
        """Raise where a shard of a training batch has the length of another draw."""
        if ambiguous := self.fixed_lengths.intersection(
            part.size for part in even_shards(examples, self.ranks.world)
        ):
            raise BilevelError(
                f"batch_size={examples} gives a rank {min(ambiguous)} examples, and the network "
                "draws another tensor of that length (a mask of weights, for example), which "
                "cannot be distinguished; choose another batch size"
            )

    def predict(
        self,
        hypers: Hypers,
        params: Params,
        carry: Carry,
        batch: Batch,
        *,
        train: bool,
        generator: torch.Generator | None,
    ) -> tuple[Prediction, Carry]:
        if (shard := self.shard(batch)) is None:
            return self.problem.predict(
                hypers, params, carry, batch, train=train, generator=generator
            )
        if train and self.fixed_lengths:
            self.check_lengths(shard.whole)
        self._entered = {}
        hypers, params = self._localize(hypers, params, shard, self._entered)
        own = self._carry_of_shard(carry, shard)
        with WholeBatchDraws(shard, self._statistics):
            prediction, after = self.problem.predict(
                hypers, params, own, shard.of(batch), train=train, generator=generator
            )
        return prediction, self._gather(after, shard)

    def statistics(
        self,
        hypers: Hypers,
        params: Params,
        carry: Carry,
        batch: Batch,
        generator: torch.Generator | None,
    ) -> Carry:
        """Return the statistics of the whole batch: the means of those of the shards."""
        if (shard := self.shard(batch)) is None:
            return self.problem.statistics(hypers, params, carry, batch, generator)
        hypers, params = self._localize(hypers, params, shard, {})
        own = self._carry_of_shard(carry, shard)
        with WholeBatchDraws(shard, self._statistics):
            found = self.problem.statistics(hypers, params, own, shard.of(batch), generator)
        parts = [shard.weight * value for value in found.values()]
        return dict(zip(found, leave(self.ranks, parts) if parts else (), strict=True))

    def inner_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        return self._mean(self.problem.inner_objective, hypers, params, prediction, batch)

    def outer_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        return self._mean(self.problem.outer_objective, hypers, params, prediction, batch)

    def _mean(
        self,
        objective: Callable[..., Tensor],
        hypers: Hypers,
        params: Params,
        prediction: Prediction,
        batch: Batch,
    ) -> Tensor:
        """Return an objective over the whole batch."""
        if (shard := self.shard(batch)) is None:
            return objective(hypers, params, prediction, batch)
        # no other pass can use the entered tensors, and they hold this pass's graph
        known, self._entered = self._entered, {}
        hypers, params = self._localize(hypers, params, shard, known)
        loss = objective(hypers, params, prediction, shard.of(batch))
        return leave(self.ranks, [shard.weight * loss])[0]

    def metrics(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Reported:
        """Return the metrics of the whole batch on all ranks.

        Values per item are joined in the order of ranks.
        """
        if (shard := self.shard(batch)) is None:
            return self.problem.metrics(hypers, params, prediction, batch)
        hypers, params = self._localize(hypers, params, shard, {})
        reported = self.problem.metrics(hypers, params, prediction, shard.of(batch))
        own: dict[tuple[str, str], Tensor] = {}
        for name, value in read_metrics(
            reported, class_name(self.problem), self.ranks.device
        ).items():
            if isinstance(value, Weighted):  # of each rank one item at least
                own[name, "value"] = torch.atleast_1d(widen(value.value))
                own[name, "weight"] = torch.atleast_1d(widen(value.weight))
            else:
                own[name, ""] = widen(shard.weight * value if value.ndim == 0 else value)
        whole = self._join(own)
        return {
            name: Weighted(t, whole[name, "weight"]) if part else t
            for (name, part), t in whole.items()
            if part != "weight"
        }

    def _join(self, own: dict[tuple[str, str], Tensor]) -> dict[tuple[str, str], Tensor]:
        """Return the sums of numbers over ranks, and the items of all ranks."""
        found = self.ranks.gather({name: list(value.shape) for name, value in own.items()})
        gathered: dict[tuple[str, str], Tensor] = {}
        # a rank may lack a metric, for example that of a rare class
        for name in dict.fromkeys(name for shapes in found for name in shapes):
            present = [shapes[name] for shapes in found if name in shapes]
            if not present[0]:
                gathered[name] = own.get(name, self._zeros([]))
                continue
            before = [shapes[name][0] if name in shapes else 0 for shapes in found]
            start = sum(before[: self.ranks.rank])
            gathered[name] = self._zeros([sum(before), *present[0][1:]])
            if name in own:
                gathered[name][start : start + len(own[name])] = own[name]
        return dict(zip(gathered, leave(self.ranks, list(gathered.values())), strict=True))

    def _zeros(self, shape: list[int]) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.ranks.device)

    def _localize(
        self, hypers: Hypers, params: Params, shard: Shard, known: dict[int, tuple[Tensor, Tensor]]
    ) -> tuple[Hypers, Params]:
        """Return λ and w for the shard.

        `known` holds tensors that have entered already, and new ones are added to it. λ and w enter
        separately, so that a derivative in one of them neither computes nor sends the other.
        """
        leaves = self._enter(list(hypers.values()), known)
        own = shard.of_hypers(self.space, dict(zip(hypers, leaves, strict=True)))
        parts = {
            name: p.parts() if isinstance(p, PerExampleWeight) else (p,)
            for name, p in params.items()
        }
        moved = iter(self._enter([part for held in parts.values() for part in held], known))
        weights: Params = {}
        for name, p in params.items():
            held = [next(moved) for _ in parts[name]]
            if isinstance(p, PerExampleWeight):
                *shared, varying = held
                weights[name] = p.with_parts(*shared, varying[shard.rows])
            else:
                weights[name] = held[0]
        return own, weights

    def _enter(
        self, tensors: list[Tensor], known: dict[int, tuple[Tensor, Tensor]]
    ) -> list[Tensor]:
        """Return the tensors in the shard; `known` keeps those alive whose `id` it holds."""
        fresh = [t for t in tensors if not self._holds(known, t)]
        known |= {
            id(t): (t, entered) for t, entered in zip(fresh, enter(self.ranks, fresh), strict=True)
        }
        return [known[id(t)][1] for t in tensors]

    @staticmethod
    def _holds(known: dict[int, tuple[Tensor, Tensor]], t: Tensor) -> bool:
        return id(t) in known and known[id(t)][1].requires_grad == (
            t.requires_grad and torch.is_grad_enabled()
        )

    def _carry_of_shard(self, carry: Carry, shard: Shard) -> Carry:
        """Return the carry for the shard; statistics that follow w enter it."""
        own = dict(zip(carry, enter(self.ranks, list(carry.values())), strict=True))
        return {name: self._state_of_shard(name, state, shard) for name, state in own.items()}

    def _state_of_shard(self, name: str, state: Tensor, shard: Shard) -> Tensor:
        axis = self.state_axes.get(name)
        return state if axis is None else state.narrow(axis, shard.start, shard.size)

    def _gather(self, carry: Carry, shard: Shard) -> Carry:
        """Return the carry with the state of all examples.

        The state is detached, since it is a constant of the next step.
        """
        names = [name for name in carry if name in self.state_axes]
        if not names:
            return carry
        whole = []
        for name in names:
            state, axis = detached({name: carry[name]})[name], self.state_axes[name]
            padded = state.new_zeros(*state.shape[:axis], shard.whole, *state.shape[axis + 1 :])
            padded.narrow(axis, shard.start, shard.size).copy_(state)
            whole.append(padded)
        with torch.no_grad():
            return carry | dict(zip(names, leave(self.ranks, whole), strict=True))
