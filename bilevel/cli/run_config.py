"""A run from its resolved configuration: build problem, solver, runner and loggers, and run."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from bilevel.cli import targets
from bilevel.cli.setting_types import check_type
from bilevel.cli.stored import CONFIG
from bilevel.errors import BilevelError
from bilevel.files import write_atomically
from bilevel.loggers.logger import Logger, Place, RunInfo
from bilevel.loggers.records import Record
from bilevel.problem import Problem
from bilevel.run.result import Result
from bilevel.run.runner import Runner
from bilevel.solver import Solver
from bilevel.text import printable

BUILT = ("problem", "solver", "runner")
OPEN_GROUPS = (*BUILT, "wandb", "tensorboard", "mlflow")
"""Nodes whose keys are constructor arguments, so that settings beyond the YAML can be set too."""


class ConfigFile(Logger):
    """Write `config.yaml` once set-up has succeeded, so that a refused run leaves nothing."""

    vital = True

    def start(self, run: RunInfo, state: dict[str, Any]) -> None:
        text = OmegaConf.to_yaml(OmegaConf.create(dict(run.config)))
        write_atomically(run.directory / CONFIG, lambda file: file.write(text))

    def log(self, record: Record) -> None:
        """Do nothing: the configuration stays as it is."""


def run_config(
    config: dict[str, Any],
    directory: Path | None,
    *,
    resumed: bool,
    place: Place | None = None,
    quiet: bool = False,
) -> Result:
    """Run a resolved configuration in its directory, and return the summary.

    Args:
        config: the configuration, as `config.yaml` keeps it.
        directory: the run directory; None for a new name in `runs`.
        resumed: whether the run continues there.
        place: the place of the run in its sweep.
        quiet: whether `progress=auto` shows nothing, since several runs would overwrite each other.

    Raises:
        BilevelError: a setting is wrong, or the run is refused.
    """
    check_type(config.get("seed"), int, "seed")
    if not -(2**63) <= config["seed"] < 2**64:
        raise BilevelError(
            f"seed={config['seed']} has more than 64 bits; choose a seed from 0 to 2⁶⁴ − 1"
        )
    # the process belongs to this run, and a user's modules and loaders may draw from the global
    # generator of torch
    torch.manual_seed(config["seed"])
    loggers = build_loggers(config)  # first, since their errors cost no reading of data
    nodes = {node: config.get(node) for node in BUILT}
    of_runner = nodes["runner"]
    if quiet and isinstance(of_runner, dict) and of_runner.get("progress", "auto") == "auto":
        nodes["runner"] = of_runner | {"progress": "none"}
    problem, solver, runner = (targets.build(nodes[node], node) for node in BUILT)
    kinds = (Problem, Solver, Runner)
    for built, kind, node in zip((problem, solver, runner), kinds, BUILT, strict=True):
        if not isinstance(built, kind):
            raise BilevelError(
                f"{node}._target_={config[node]['_target_']} makes a {type(built).__name__}; give "
                f"the dotted path of a {kind.__name__}"
            )
    names = config.get("names")
    if not isinstance(names, dict) or not names.keys() >= {"problem", "solver"}:
        raise BilevelError(
            f"names={names!r} must have a problem and a solver; give names.problem and names.solver"
        )
    return runner.run(
        problem,
        solver,
        directory=directory,
        seed=config["seed"],
        names=(printable(str(names["problem"])), printable(str(names["solver"]))),
        config=config,
        loggers=[ConfigFile(), *loggers],
        resume=resumed,
        place=place,
    )


def build_loggers(config: dict[str, Any]) -> list[Logger]:
    """Build the loggers that are on, each from the node of its name.

    Raises:
        BilevelError: a logger is off but has settings, or is on but has none.
    """
    wanted = config.get("loggers")
    if not isinstance(wanted, dict):
        raise BilevelError(
            f"loggers={wanted!r} does not name loggers; write loggers.NAME=true or false"
        )
    for name, chosen in wanted.items():
        check_type(chosen, bool, f"loggers.{name}")
    on = [name for name, chosen in wanted.items() if chosen]
    for name in OPEN_GROUPS:
        if name not in (*BUILT, *wanted) and config.get(name):
            raise BilevelError(
                f"{name}.… is set, but the loggers are {', '.join(on) or 'none'}; add it, "
                f"logger=[{','.join([*on, name])}], or leave {name}.… out"
            )
    loggers = [targets.build(config.get(name), name) for name in on]
    for name, logger in zip(on, loggers, strict=True):
        if not isinstance(logger, Logger):
            raise BilevelError(
                f"{name}._target_={config[name]['_target_']} makes a {type(logger).__name__}; give "
                "the dotted path of a subclass of bilevel.loggers.logger.Logger"
            )
    return loggers
