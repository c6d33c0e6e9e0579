"""Few-shot regression tasks, and the streams of their support and their queries."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel import Batch, Stream


class Tasks(NamedTuple):
    """T tasks, each with support points for training and query points for validation."""

    support_x: Float[Tensor, "tasks shots inputs"]
    support_y: Float[Tensor, "tasks shots outputs"]
    query_x: Float[Tensor, "tasks queries inputs"]
    query_y: Float[Tensor, "tasks queries outputs"]

    def support(self) -> Batch:
        """Return the batch that trains the weights of each task."""
        return {"x": self.support_x, "y": self.support_y}

    def queries(self) -> Batch:
        """Return the batch that evaluates those weights."""
        return {"x": self.query_x, "y": self.query_y}

    def unseen(self, start: int, stop: int) -> Batch:
        """Return a batch of tasks without weights: queries, and the support that adapts them."""
        return {
            "x": self.query_x[start:stop],
            "y": self.query_y[start:stop],
            "support_x": self.support_x[start:stop],
            "support_y": self.support_y[start:stop],
        }

    def to(self, device: torch.device) -> "Tasks":
        """Return the tasks on `device`; a copy to a GPU uses pinned memory and does not wait."""
        if device.type != "cuda":
            return Tasks(*(t.to(device) for t in self))
        return Tasks(*(t.pin_memory().to(device, non_blocking=True) for t in self))


Draw: TypeAlias = Callable[[int, torch.Generator], Tasks]
"""Draws a number of tasks of a distribution on the CPU."""


def sinusoids(shots: int = 10, queries: int = 10) -> Draw:
    """Return tasks y = A sin(x − b): A uniform on [0.1, 5], b on [0, π], and x on [−5, 5].

    Source: Finn, Abbeel & Levine, ICML 2017, section 5.1.
    """

    def draw(count: int, generator: torch.Generator) -> Tasks:
        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(shape, generator=generator)

        amplitude, phase = uniform(0.1, 5.0, count, 1, 1), uniform(0.0, torch.pi, count, 1, 1)
        x = uniform(-5.0, 5.0, count, shots + queries, 1)
        y = amplitude * torch.sin(x - phase)
        return Tasks(x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:])

    return draw


class Episodes:
    """The current tasks, which a `SupportStream` and a `QueryStream` share.

    A round of a solver takes some support batches, and then queries. If tasks are `fresh`, the next
    support batch after queries has new tasks. The seed and the number of a round determine its
    tasks.
    """

    def __init__(
        self, draw: Draw, tasks: int, seed: int, device: torch.device, *, fresh: bool
    ) -> None:
        self.draw = draw
        self.tasks = tasks
        self.seed = seed
        self.device = device
        self.fresh = fresh
        self.round = 0
        self.judged = False
        self._held: tuple[int, int, Tasks] | None = None

    def now(self) -> Tasks:
        """Return the tasks of this round."""
        if self._held is None or self._held[:2] != (self.seed, self.round):
            generator = torch.Generator().manual_seed((self.seed + self.round) % 2**63)
            self._held = self.seed, self.round, self.draw(self.tasks, generator).to(self.device)
        return self._held[2]

    def support(self) -> Batch:
        """Return the support, of new tasks if queries of the current ones have been returned."""
        if self.fresh and self.judged:
            self.round, self.judged = self.round + 1, False
        return self.now().support()

    def queries(self) -> Batch:
        """Return the queries, and end the round."""
        self.judged = True
        return self.now().queries()


class SupportStream(Stream):
    """Training batches: the support of all current tasks. An example is a task."""

    def __init__(self, episodes: Episodes) -> None:
        self.episodes = episodes
        self.size = episodes.tasks
        self.steps_per_epoch = 1
        self.examples = 0

    def next(self) -> Batch:
        self.examples += self.size
        return self.episodes.support()

    def peek(self) -> Batch:
        return self.episodes.now().support()

    def once(self, limit: int | None = None) -> Iterator[Batch]:
        yield self.peek()  # all tasks: each one belongs to its own weights

    def state_dict(self) -> dict[str, Any]:
        own = self.episodes
        return {
            "examples": self.examples,
            "seed": own.seed,
            "round": own.round,
            "judged": own.judged,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = self.episodes
        self.examples, own.seed, own.round, own.judged = (
            state[name] for name in ("examples", "seed", "round", "judged")
        )


class UnseenStream(Stream):
    """Unseen tasks for evaluation."""

    def __init__(self, unseen: Tasks) -> None:
        self.unseen = unseen
        self.size = len(unseen.query_x)
        self.steps_per_epoch = 1
        self.examples = 0

    def next(self) -> Batch:
        self.examples += self.size
        return self.peek()

    def peek(self) -> Batch:
        return self.unseen.unseen(0, self.size)

    def once(self, limit: int | None = None) -> Iterator[Batch]:
        yield self.unseen.unseen(0, self.size if limit is None else min(limit, self.size))

    def state_dict(self) -> dict[str, Any]:
        return {"examples": self.examples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.examples = state["examples"]


class QueryStream(UnseenStream):
    """Validation batches: the queries of the current tasks; evaluation uses unseen tasks."""

    def __init__(self, episodes: Episodes, unseen: Tasks) -> None:
        super().__init__(unseen)
        self.episodes = episodes

    def next(self) -> Batch:
        self.examples += self.episodes.tasks
        return self.episodes.queries()

    def peek(self) -> Batch:
        return self.episodes.now().queries()
