"""Features around a run and its problem; to remove one, delete its file and its entry here."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from bilevel.device.device import cpu_threads, deterministic
from bilevel.device.precision import at_precision, matmul_precision
from bilevel.parallel.process_group import open_ranks
from bilevel.problem import Problem
from bilevel.run.distributed import shard
from bilevel.run.frozen_hypers import FrozenHypers
from bilevel.run.initial_params import WithInitialParams
from bilevel.run.out_of_memory import ExplainedErrors
from bilevel.run.session import Session
from bilevel.run.signals import requeued

Surrounding = Callable[[Session], AbstractContextManager[Any]]
Wrapper = Callable[[Problem, Session], Problem]


@contextmanager
def _process_group(run: Session) -> Iterator[None]:
    with open_ranks(run.device) as run.ranks:
        yield


def _explained_errors(run: Session) -> AbstractContextManager[Any]:
    request, precision = run.request, run.settings.precision
    return ExplainedErrors(
        request.problem, request.solver, run.device, precision, data=lambda: run.data_after_setup
    )


AROUND_RUN: tuple[Surrounding, ...] = (
    lambda run: requeued(lambda: run.settings.requeue and run.out_of_time),
    lambda run: deterministic(run.settings.deterministic),
    _process_group,
    lambda run: run.lock,
    _explained_errors,
)
"""Context managers around the whole run, the outermost first."""

AROUND_REFIT: tuple[Surrounding, ...] = (lambda run: run.lock, _explained_errors)
"""Context managers around a refit, which takes place within those of its run."""

AROUND_TRAINING: tuple[Surrounding, ...] = (
    lambda run: run.interrupts,
    lambda run: matmul_precision(run.settings.precision),
    lambda run: cpu_threads(run.settings.threads, run.request.solver.solution().params),
    lambda run: run.loop.loggers.started(run.info, run.checkpoint.get("loggers", {})),
)
"""Context managers around training and the summary, the outermost first."""

WRAPPERS: tuple[Wrapper, ...] = (
    lambda problem, run: problem if run.params is None else WithInitialParams(problem, run.params),
    lambda problem, run: problem if run.frozen is None else FrozenHypers(problem, run.frozen),
    lambda problem, run: shard(problem, run.data, run.device, run.ranks),
    lambda problem, run: at_precision(
        problem, run.request.solver, run.settings.precision, run.device
    ),
)
"""Problems around the problem of the request, the innermost first."""
