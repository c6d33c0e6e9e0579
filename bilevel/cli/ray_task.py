"""One run of a sweep as a task of Ray, in a process that Ray has started on some machine."""

import os
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any, NamedTuple

import torch
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class Surroundings(NamedTuple):
    """The state of the command that each of its runs needs in another process.

    Attributes:
        context: Hydra's context, with its callbacks.
        function: the function to call for a run.
        singletons: Hydra's singletons and resolvers.
        directory: the working directory.
        environment: variables to set.
        threads: the number of CPU threads.
    """

    context: HydraContext
    function: TaskFunction
    singletons: Any
    directory: str
    environment: Mapping[str, str]
    threads: int


class Outcome(NamedTuple):
    """The result of a run, and the text that it printed."""

    returned: JobReturn
    out: str
    err: str


def execute(config: DictConfig, surroundings: Surroundings) -> Outcome:
    """Execute one run of a sweep, and return its result with the text that it printed."""
    os.chdir(surroundings.directory)
    os.environ.update(surroundings.environment)
    torch.set_num_threads(surroundings.threads)
    setup_globals()
    Singleton.set_state(surroundings.singletons)
    # Ray would print these lines with a prefix each, and lose the last ones
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        returned = run_job(
            hydra_context=surroundings.context,
            task_function=surroundings.function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
    return Outcome(returned, out.getvalue(), err.getvalue())
