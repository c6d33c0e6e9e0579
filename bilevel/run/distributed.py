"""A run with several ranks: it shards the problem, and saves on the first rank."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bilevel.data.tensor_stream import Data
from bilevel.parallel.check_shards import dry_run_shards
from bilevel.parallel.process_group import ProcessGroup, Ranks
from bilevel.parallel.sharded_problem import ShardedProblem
from bilevel.problem import Problem
from bilevel.run.faults import CheckpointSaver


def shard(problem: Problem, data: Data, device: torch.device, ranks: Ranks) -> Problem:
    """Return the problem sharded over the ranks; with one rank, return it unchanged.

    Raises:
        Refused: the problem cannot be sharded.
    """
    if not isinstance(ranks, ProcessGroup):
        return problem
    ranks.share_rng_state(device)
    parallel = ShardedProblem(problem, ranks)
    dry_run_shards(parallel, data, device)
    return parallel


class FirstRankSaver(CheckpointSaver):
    """Save on the first rank; all other ranks take over the outcome."""

    def __init__(
        self, save: Callable[[dict[str, Any]], None], directory: Path, ranks: Ranks
    ) -> None:
        super().__init__(save, directory)
        self.ranks = ranks

    def __call__(
        self,
        state: dict[str, Any],
        *,
        last: bool = False,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        def saved() -> tuple[bool, int | None]:
            super(FirstRankSaver, self).__call__(state, last=last, interrupted=interrupted)
            return self.owed, self.step

        self.owed, self.step = self.ranks.on_first(saved)
