"""What a run does otherwise where it has several ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bilevel.data.tensor_stream import Data
from bilevel.parallel.check_shards import dry_run_shards
from bilevel.parallel.process_group import ProcessGroup, Ranks
from bilevel.parallel.sharded_problem import ShardedProblem
from bilevel.problem import Problem
from bilevel.run.faults import Saving


def spread(problem: Problem, data: Data, device: torch.device, ranks: Ranks) -> Problem:
    """The problem as solvers meet it: where there are several ranks, shared among them.

    Raises:
        Refused: it cannot be shared.
    """
    if not isinstance(ranks, ProcessGroup):
        return problem
    ranks.share_rng_state(device)
    parallel = ShardedProblem(problem, ranks)
    dry_run_shards(parallel, data, device)
    return parallel


class SavingTogether(Saving):
    """The first rank saves; all others learn how that went, and do as it does."""

    def __init__(
        self, save: Callable[[dict[str, Any]], None], directory: Path, ranks: Ranks
    ) -> None:
        super().__init__(save, directory)
        self.ranks = ranks

    def __call__(self, state: dict[str, Any], *, last: bool = False) -> None:
        def saved() -> tuple[bool, int | None]:
            super(SavingTogether, self).__call__(state, last=last)
            return self.owed, self.step

        self.owed, self.step = self.ranks.on_first(saved)
