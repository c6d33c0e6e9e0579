"""Few-shot regression tasks, and the streams that hand out their two halves: support to adapt to, queries to be judged by."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from bilevel import Batch, Stream


class Tasks(NamedTuple):
    """T tasks, each with points to adapt to and points to be judged by."""

    support_x: Float[Tensor, "tasks shots inputs"]
    support_y: Float[Tensor, "tasks shots outputs"]
    query_x: Float[Tensor, "tasks queries inputs"]
    query_y: Float[Tensor, "tasks queries outputs"]

    def support(self) -> Batch:
        """The batch from which each task's own weights are trained."""
        return {"x": self.support_x, "y": self.support_y}

    def queries(self) -> Batch:
        """The batch by which those weights are judged."""
        return {"x": self.query_x, "y": self.query_y}

    def unseen(self, start: int, stop: int) -> Batch:
        """Tasks that have no weights yet: queries, with the support from which they are to be adapted."""
        return {
            "x": self.query_x[start:stop],
            "y": self.query_y[start:stop],
            "support_x": self.support_x[start:stop],
            "support_y": self.support_y[start:stop],
        }

    def to(self, device: torch.device) -> "Tasks":
        """The same on `device`; from pinned memory, which is not waited for."""
        if device.type != "cuda":
            return Tasks(*(t.to(device) for t in self))
        return Tasks(*(t.pin_memory().to(device, non_blocking=True) for t in self))


Draw: TypeAlias = Callable[[int, torch.Generator], Tasks]
"""So many tasks of a distribution, drawn on the CPU."""


def sinusoids(shots: int = 10, queries: int = 10) -> Draw:
    """Tasks y = A sin(x − b): A uniform on [0.1, 5], b on [0, π], and all x on [−5, 5].

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
    """The tasks of the moment, which a `SupportStream` and a `QueryStream` share.

    A round of a solver takes some support batches and then queries; where tasks are `fresh`, the next support batch after
    queries is of new ones. The tasks of a round follow from the seed and its number alone.
    """

    def __init__(
        self, draw: Draw, tasks: int, seed: int, device: torch.device, *, fresh: bool
    ) -> None:
        self.draw, self.tasks, self.seed, self.device, self.fresh = draw, tasks, seed, device, fresh
        self.round, self.judged = 0, False
        self._held: tuple[int, int, Tasks] | None = None

    def now(self) -> Tasks:
        """The tasks of this round."""
        if self._held is None or self._held[:2] != (self.seed, self.round):
            generator = torch.Generator().manual_seed((self.seed + self.round) % 2**63)
            self._held = self.seed, self.round, self.draw(self.tasks, generator).to(self.device)
        return self._held[2]

    def support(self) -> Batch:
        """Support, of new tasks where those at hand have been judged."""
        if self.fresh and self.judged:
            self.round, self.judged = self.round + 1, False
        return self.now().support()

    def queries(self) -> Batch:
        """Queries, after which the round is over."""
        self.judged = True
        return self.now().queries()


class SupportStream(Stream):
    """Training batches: the support of all tasks of the moment. An example is a task."""

    def __init__(self, episodes: Episodes) -> None:
        self.episodes, self.size = episodes, episodes.tasks
        self.steps_per_epoch, self.examples = 1, 0

    def next(self) -> Batch:
        self.examples += self.size
        return self.episodes.support()

    def peek(self) -> Batch:
        return self.episodes.now().support()

    def once(self, limit: int | None = None) -> Iterator[Batch]:
        yield self.peek()  # whole: each task goes with its own weights

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
    """Tasks that nothing was trained on, for evaluation."""

    def __init__(self, unseen: Tasks) -> None:
        self.unseen, self.size = unseen, len(unseen.query_x)
        self.steps_per_epoch, self.examples = 1, 0

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
    """Validation batches: the queries of the tasks of the moment; evaluated is on unseen tasks."""

    def __init__(self, episodes: Episodes, unseen: Tasks) -> None:
        super().__init__(unseen)
        self.episodes = episodes

    def next(self) -> Batch:
        self.examples += self.episodes.tasks
        return self.episodes.queries()

    def peek(self) -> Batch:
        return self.episodes.now().queries()
