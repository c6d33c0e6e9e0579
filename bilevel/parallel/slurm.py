"""The processes of one run as tasks of a SLURM step: `srun --ntasks 4 bilevel …`, no torchrun."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

SUBMITIT = "SUBMITIT_EXECUTOR"
"""The environment variable that marks a job of submitit."""


def slurm_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that `torchrun` would set for this task of a step with several tasks.

    They are {} outside such a step, in a job of submitit, and where WORLD_SIZE is set: it belongs
    to `torchrun`, or to a user who wants one run for each task (WORLD_SIZE=1).

    Example:
        >>> step = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
        ...         "SLURM_STEP_NODELIST": "gpu[07-08,11]", "SLURM_JOB_ID": "123"}
        >>> ranks = slurm_ranks(step)
        >>> ranks["RANK"], ranks["WORLD_SIZE"], ranks["LOCAL_RANK"], ranks["MASTER_ADDR"]
        ('5', '8', '1', 'gpu07')
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")  # srun alone sets it, sbatch does not
    if tasks == "1" or "WORLD_SIZE" in environment or SUBMITIT in environment:
        return {}
    job = int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))
    defaults = {
        "MASTER_ADDR": first_host(environment.get("SLURM_STEP_NODELIST", "localhost")),
        "MASTER_PORT": str(20000 + job % 10000),  # two steps on one node need two ports
    }
    return {
        "WORLD_SIZE": tasks,
        "RANK": environment["SLURM_PROCID"],
        # with --gpus-per-task, each task sees its own GPUs alone
        "LOCAL_RANK": "0" if "SLURM_GPUS_PER_TASK" in environment else environment["SLURM_LOCALID"],
        **{name: environment.get(name, value) for name, value in defaults.items()},
    }


def first_host(nodes: str) -> str:
    """Return the first host of a list in SLURM's short form.

    Example:
        >>> first_host("a1,a2"), first_host("gpu[007-012].x"), first_host("r[1-2]n[05,09]")
        ('a1', 'gpu007.x', 'r1n05')
    """
    host = re.match(r"(?:[^,\[]|\[[^]]*\])*", nodes)
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", host[0] if host else nodes)


@contextmanager
def slurm_environment() -> Iterator[None]:
    """Set the variables of `slurm_ranks` within the context."""
    added = slurm_ranks(os.environ)
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
