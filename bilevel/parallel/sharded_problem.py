"""A problem of which every rank computes its share of each batch."""

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.errors import BilevelError
from bilevel.parallel.batch_norm import BatchStatistics
from bilevel.parallel.collectives import enter, leave
from bilevel.parallel.per_example_draws import WholeBatchDraws
from bilevel.parallel.process_group import ProcessGroup
from bilevel.parallel.shards import Shard, even_shards
from bilevel.params import (
    Batch,
    Carry,
    Hypers,
    Metrics,
    Params,
    PerExampleWeight,
    Prediction,
    count_examples,
    detached,
    widen,
)
from bilevel.problem import Problem
from bilevel.problem_wrapper import ProblemWrapper


class ShardedProblem(ProblemWrapper):
    """`problem`, spread over ranks: solvers see the whole batch, losses over all of it, and λ, w and gradients that all hold.

        L(λ, w) = Σ_ranks (b_r/B) L_r(λ, w),    ∇L = Σ_ranks (b_r/B) ∇L_r

    with L_r the mean over the b_r of B examples that are the rank's own: exact, also where they differ in number. w and λ enter
    the shard (`bilevel.parallel.collectives`), and the loss leaves it; between them all is local, the prediction too. A batch
    of fewer examples than ranks, that of a closed form say, is computed whole by every rank.

    Args:
        problem: any whose objectives are means over examples.
        ranks: that shard it.
    """

    def __init__(self, problem: Problem, ranks: ProcessGroup) -> None:
        super().__init__(problem)
        self.ranks = ranks
        self.state_axes: dict[str, int] = {}
        """The example axis of what is carried from batch to batch, by name: recurrent state."""
        self.fixed_lengths: frozenset[int] = frozenset()
        """First axes of what `predict` draws that are no example axis."""
        self._statistics = BatchStatistics(ranks)
        self._entered: dict[int, tuple[Tensor, Tensor]] = {}

    def init(self, generator: torch.Generator) -> tuple[Params, Carry]:
        params, carry = self.ranks.copy(self.problem.init(generator))
        return params, carry

    def shard(self, batch: Batch) -> Shard | None:
        """The rank's own part; None where the batch is not shared."""
        examples = count_examples(batch)
        return (
            None
            if examples < self.ranks.world
            else even_shards(examples, self.ranks.world)[self.ranks.rank]
        )

    def check_lengths(self, examples: int) -> None:
        """Raise where a share of a training batch is as long as something else that is drawn."""
        if ambiguous := self.fixed_lengths.intersection(
            part.size for part in even_shards(examples, self.ranks.world)
        ):
            raise BilevelError(
                f"a batch of {examples} examples gives a rank {min(ambiguous)} of them, and the network draws something else "
                "of that length, a mask of weights say, which cannot be told from one per example; choose another batch size"
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
        hypers, params = self._localized(hypers, params, shard, self._entered)
        own = {name: self._own_state(name, state, shard) for name, state in carry.items()}
        with WholeBatchDraws(shard, self._statistics):
            prediction, after = self.problem.predict(
                hypers, params, own, shard.of(batch), train=train, generator=generator
            )
        return prediction, self._gathered(after, shard)

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
        """An objective over the whole batch."""
        if (shard := self.shard(batch)) is None:
            return objective(hypers, params, prediction, batch)
        known, self._entered = (
            self._entered,
            {},
        )  # of no use to any other pass, and they hold its graph
        hypers, params = self._localized(hypers, params, shard, known)
        loss = objective(hypers, params, prediction, shard.of(batch))
        return leave(self.ranks, [shard.weight * loss])[0]

    def metrics(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Metrics:
        """Of the whole batch, on all ranks: values of one rank after those of another."""
        if (shard := self.shard(batch)) is None:
            return self.problem.metrics(hypers, params, prediction, batch)
        hypers, params = self._localized(hypers, params, shard, {})
        own = {
            name: widen(shard.weight * value if value.ndim == 0 else value)
            for name, value in self.problem.metrics(
                hypers, params, prediction, shard.of(batch)
            ).items()
        }
        found = self.ranks.gather({name: list(value.shape) for name, value in own.items()})
        gathered: Metrics = {}
        for name in dict.fromkeys(
            name for shapes in found for name in shapes
        ):  # a rank may lack one: that of a rare class
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

    def _localized(
        self, hypers: Hypers, params: Params, shard: Shard, known: dict[int, tuple[Tensor, Tensor]]
    ) -> tuple[Hypers, Params]:
        """λ and w as the shard sees them; `known` are tensors that have entered it, and gains those that do now.

        λ and w enter apart: where the derivative in one of them is asked for, the other's is not computed and not sent.
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
        """The tensors in the shard; an `id` is that of a tensor which `known` keeps alive."""
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

    def _own_state(self, name: str, state: Tensor, shard: Shard) -> Tensor:
        axis = self.state_axes.get(name)
        return state if axis is None else state.narrow(axis, shard.start, shard.size)

    def _gathered(self, carry: Carry, shard: Shard) -> Carry:
        """The carry with the state of all examples, as constants: what is carried is a constant of the next step."""
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
