"""Hydra's launcher `ray`: the runs of a sweep are tasks of Ray, on this machine or on a cluster."""

import math
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from bilevel.cli import input_errors, sweep
from bilevel.cli.job import Job
from bilevel.cli.ray_connection import connected, imported
from bilevel.cli.ray_task import Surroundings, execute
from bilevel.cli.setting_types import check_type
from bilevel.cli.standard_streams import print_line
from bilevel.errors import BilevelError

POLL = 0.5
"""Seconds between two looks for a signal."""


PLUGINS = "hydra_plugins"
"""The namespace whose launchers Hydra accepts; our folder there would be a top-level package."""


def register() -> None:
    """Add the launcher to Hydra's plugins, under a name in their namespace."""
    try:
        import_module(PLUGINS)  # other plugins make it
    except ImportError:
        sys.modules[PLUGINS] = module_from_spec(ModuleSpec(PLUGINS, None, is_package=True))
    sys.modules[RayLauncher.__module__] = sys.modules[__name__]
    Plugins.instance().register(RayLauncher)


class RayLauncher(Launcher):
    """Launch each run of a sweep as a task of Ray.

    A run whose process dies counts as failed, and the others go on.

    Args:
        address: a running Ray (`auto`, `ray://HOST:10001`), or None to start one for this sweep.
        num_cpus: CPU cores for each run.
        num_gpus: GPUs for each run; a fraction shares one.
        init: further arguments of `ray.init`.
    """

    __module__ = f"{PLUGINS}.bilevel"

    def __init__(
        self,
        address: str | None = None,
        num_cpus: float = 1,
        num_gpus: float = 0,
        init: DictConfig | None = None,
    ) -> None:
        self.address, self.num_cpus, self.num_gpus, self.init = address, num_cpus, num_gpus, init

    def setup(self, *, hydra_context: HydraContext, task_function: Any, config: DictConfig) -> None:
        """Keep Hydra's state, and check the settings.

        Raises:
            BilevelError: Ray is not installed, or a setting is wrong.
        """
        self.ray = imported()
        self.context, self.config = hydra_context, config
        self.job: Job = task_function
        check_type(self.address, str | None, "hydra.launcher.address")
        for name, value in (("num_cpus", self.num_cpus), ("num_gpus", self.num_gpus)):
            check_type(value, float, f"hydra.launcher.{name}")
            least = 0 if name == "num_gpus" else math.ulp(0)
            if not least <= value < math.inf or (value > 1 and value % 1):
                kind = "at least 0" if name == "num_gpus" else "positive"
                raise BilevelError(
                    f"hydra.launcher.{name}={value} must be {kind}, and whole above 1"
                )
        if not isinstance(self.init, (DictConfig, type(None))):
            raise BilevelError(
                f"hydra.launcher.init={self.init!r} is not a mapping; write {{NAME: VALUE}} with "
                "arguments of ray.init"
            )

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> list[JobReturn]:
        """Run all jobs, and return their results in the same order.

        Raises:
            BilevelError: Ray cannot be reached, or no machine of it has room for a run.
            KeyboardInterrupt: a signal was received, and the runs have saved.
        """
        ray = self.ray
        configs = [
            self._composed(number, overrides)
            for number, overrides in enumerate(job_overrides, initial_job_idx)
        ]
        if not ray.is_initialized():
            given = OmegaConf.to_container(self.init, resolve=True) if self.init else {}
            sweep.until_end(connected(ray, self.address, cast(dict[str, Any], given)))
        self._check_room()
        task = ray.remote(execute).options(
            num_cpus=self.num_cpus, num_gpus=self.num_gpus, max_retries=0, name="bilevel"
        )
        surroundings = self._surroundings()
        runs = {task.remote(config, surroundings): config for config in configs}
        results: dict[Any, JobReturn] = {}
        with sweep.WorkersEndFirst() as signals:
            pending, announced = list(runs), False
            while pending:
                done, pending = ray.wait(pending, timeout=POLL)
                for run in done:
                    results[run] = self._result(run, runs[run])
                if signals.received and not announced:
                    announced = True
                    for run in pending:
                        ray.cancel(run)  # SIGINT for a run that has begun; others never begin
        return [results[run] for run in runs]

    def _composed(self, number: int, overrides: Sequence[str]) -> DictConfig:
        """Return the configuration of a run."""
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = f"{config.hydra.job.name}_{number}"
            config.hydra.job.num = number
        return config

    def _surroundings(self) -> Surroundings:
        counted = os.environ.get(sweep.RUNS)
        return Surroundings(
            context=self.context,
            function=self.job,
            singletons=Singleton.get_state(),
            directory=os.getcwd(),
            environment={sweep.RUNS: counted} if counted else {},
            threads=max(1, int(self.num_cpus)),
        )

    def _check_room(self) -> None:
        """Require a machine with room for a run; a cluster may still start one."""
        wanted = {"CPU": self.num_cpus, "GPU": self.num_gpus}
        machines = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        if any(all(has.get(k, 0) >= n for k, n in wanted.items()) for has in machines):
            return
        most = {k: max((has.get(k, 0) for has in machines), default=0) for k in wanted}
        sentence = (
            f"hydra.launcher.num_cpus={self.num_cpus} num_gpus={self.num_gpus} is more than any "
            f"machine of Ray has (at most {most['CPU']:g} and {most['GPU']:g})"
        )
        if self.address is None:
            raise BilevelError(f"{sentence}; lower it")
        print_line(
            f"bilevel: warning: {sentence}; the runs wait until a machine is added", sys.stderr
        )

    def _result(self, run: Any, config: DictConfig) -> JobReturn:
        """Return the result of a run; infinity if its process died, NaN if it was cancelled."""
        known = self.ray.exceptions
        try:
            outcome = self.ray.get(run)
        except known.TaskCancelledError:
            return _without_result(config, math.nan)
        except Exception as error:
            cause = getattr(error, "cause", None) or error  # Ray wraps what a task raises
            dead = (known.WorkerCrashedError, known.OutOfMemoryError)
            if isinstance(error, (*dead, known.NodeDiedError, known.LocalRayletDiedError)):
                sentence = input_errors.lost_worker(error)
            else:
                sentence = input_errors.sentence(cause) or input_errors.unexpected(cause)
            if not self.job.report(BilevelError(sentence)):
                raise
            _note_failure(sentence, config)
            return _without_result(config, math.inf)
        for text, stream in ((outcome.out, sys.stdout), (outcome.err, sys.stderr)):
            if text:
                print_line(text.rstrip("\n"), stream)
        return outcome.returned


def _note_failure(sentence: str, config: DictConfig) -> None:
    """Write the reason why a run failed, which its own process could not do."""
    hydra = HydraConfig.instance()
    before = hydra.cfg
    try:
        hydra.set_config(config)  # the names in it have `${hydra:…}`
        sweep.note_failure(sentence, Path(str(config.hydra.sweep.subdir)).name)
    finally:
        hydra.cfg = before


def _without_result(config: DictConfig, value: float) -> JobReturn:
    returned = JobReturn(overrides=list(config.hydra.overrides.task), status=JobStatus.COMPLETED)
    returned.return_value = value
    return returned
