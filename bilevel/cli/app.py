"""The command `bilevel`: a Hydra application over the configuration in `bilevel.conf`."""

import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from hydra import main as hydra_main
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import OverrideType
from omegaconf import DictConfig, OmegaConf

from bilevel.check import ProblemWarning
from bilevel.cli import bad_input, own_code, sweep, targets
from bilevel.cli.resume import CONFIG, continued, stored_config
from bilevel.errors import BilevelError
from bilevel.loop import SolverWarning
from bilevel.records import Logger, Place, Record, RunInfo, write_atomically

BUILT = ("problem", "solver", "runner")
OPEN_GROUPS = (*BUILT, "wandb", "tensorboard")
"""Nodes whose keys are arguments of a constructor: those that the YAML leaves at their default can be set too."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status.

    Bad input is one sentence on the standard error; HYDRA_FULL_ERROR=1 asks for the traceback.
    """
    traceback_wanted = os.environ.get("HYDRA_FULL_ERROR") == "1"
    failures = 0

    def told(error: Exception) -> bool:
        nonlocal failures
        failures += 1
        if not traceback_wanted:
            print(f"bilevel: {bad_input.sentence(error) or bad_input.unexpected(error)}", file=sys.stderr, flush=True)
        return not traceback_wanted

    def job(composed: DictConfig) -> float:
        try:
            return _job(composed)
        except Exception as error:  # told here, so that the other runs of a sweep go on
            if not told(error):
                raise
            return math.inf

    try:
        own_code.check_not_hidden()
        own_code.add_working_directory()
        with warnings.catch_warnings():
            warnings.showwarning = _show(warnings.showwarning)
            _run_hydra(job, prepared(sys.argv[1:] if arguments is None else arguments))
    except Exception as error:
        if not told(error):
            raise
    except KeyboardInterrupt:
        return 130  # what shells expect of a process that Ctrl-C ended
    return min(failures, 1)


def prepared(arguments: Sequence[str]) -> list[str]:
    """The arguments as Hydra gets them: checked as far as they can be before it makes a directory.

    A setting of a constructor that the YAML leaves at its default is set like one that it lists, where Hydra alone would want a
    `++`; and flags may stand between overrides.

    Example:
        >>> prepared(["solver.clip_norm=1", "-m", "seed=3,4"])
        ['-m', '++solver.clip_norm=1', 'seed=3,4']

    Raises:
        BilevelError: several values without `-m`, or `resume` of what is no run.
    """
    sweeping = "-m" in arguments or "--multirun" in arguments
    flags: list[str] = []
    overrides: list[str] = []
    for argument in arguments:
        if argument.startswith("-") or "=" not in argument:
            flags.append(argument)
            continue
        if argument.startswith("resume=") and argument not in ("resume=", "resume=null"):
            argument = "resume=" + _quoted(argument.removeprefix("resume="))  # a path, whatever its letters mean to Hydra
        override = bad_input.parse(argument)
        key = override.key_or_group
        if override.is_sweep_override() and not sweeping:
            raise BilevelError(f"`{argument}` gives several values; add -m to run each, or write [a,b] for a list")
        if key == "resume" and override.value() is not None:
            if sweeping:
                raise BilevelError("`resume` continues one run; leave -m out")
            stored_config(Path(str(override.value())))
        opened = override.type is OverrideType.CHANGE and key.partition(".")[0] in OPEN_GROUPS and "." in key
        overrides.append(f"++{argument}" if opened else argument)
    return flags + overrides


def _quoted(text: str) -> str:
    return "'" + text.replace("'", r"\'") + "'" if text[:1] not in ("'", '"') else text


class ConfigFile(Logger):
    """`config.yaml`: written when set-up has succeeded, so that a refused run leaves nothing."""

    def start(self, run: RunInfo, state: dict[str, Any]) -> None:
        text = OmegaConf.to_yaml(OmegaConf.create(dict(run.config)))
        write_atomically(run.directory / CONFIG, lambda file: file.write(text))

    def log(self, record: Record) -> None:
        """Nothing: the configuration stays as it is."""


def run(config: dict[str, Any], directory: Path, *, resumed: bool, place: Place | None = None) -> Record:
    """One run from a resolved configuration, in its directory; its summary."""
    targets.check_type(config.get("seed"), int, "seed")
    # We own the process, so torch's own generator is ours to seed: modules and loaders of a user's own may draw from it.
    torch.manual_seed(config["seed"])
    loggers = _loggers(config)  # the first to be built: they are quick, and what they lack is told before data are read
    problem, solver, runner = (targets.build(config.get(node), node) for node in BUILT)
    return runner.run(
        problem,
        solver,
        directory=directory,
        seed=config["seed"],
        names=(str(config["names"]["problem"]), str(config["names"]["solver"])),
        config=config,
        loggers=[ConfigFile(), *loggers],
        resume=resumed,
        place=place,
    )


def _loggers(config: dict[str, Any]) -> list[Logger]:
    """Those that are on, each from the node of its name.

    Raises:
        BilevelError: a logger has settings and is not on, or is on and has none.
    """
    wanted = config.get("loggers", {"wandb": True})  # of runs from before there was a choice
    if not isinstance(wanted, dict):
        raise BilevelError(f"`loggers` = {wanted!r} says of no logger whether it is on; write loggers.NAME=true or false")
    for name, chosen in wanted.items():
        targets.check_type(chosen, bool, f"loggers.{name}")
    on = [name for name, chosen in wanted.items() if chosen]
    for name in OPEN_GROUPS:
        if name not in (*BUILT, *wanted) and config.get(name):
            raise BilevelError(
                f"`{name}` is set, and the loggers are {', '.join(on) or 'none'}; add it, logger=[{','.join([*on, name])}], or "
                f"leave {name}.… out"
            )
    loggers = [targets.build(config.get(name), name) for name in on]
    for name, logger in zip(on, loggers, strict=True):
        if not isinstance(logger, Logger):
            raise BilevelError(f"`{name}` is a {type(logger).__name__}; a logger is a subclass of bilevel.records.Logger")
    return loggers


def _job(composed: DictConfig) -> float:
    """One run of this command line, or of the sweep; its best validation loss, for Hydra's sweepers.

    Raises:
        BilevelError: the run diverged, or could not begin.
        KeyboardInterrupt: the run was interrupted, and so is the sweep that it may be part of.
    """
    config = _plain(composed)
    directory = Path(HydraConfig.get().runtime.output_dir)
    resumed = composed.resume is not None
    try:
        if resumed:
            overridden = [bad_input.parse(text).key_or_group for text in HydraConfig.get().overrides.task]
            config = continued(stored_config(directory), config, overridden, directory)
        summary = run(config, directory, resumed=resumed, place=sweep.place())
    except Exception:  # whatever it was is raised again
        with suppress(OSError):
            directory.rmdir()  # Hydra made it; a run that did not begin leaves nothing
        raise
    if summary["diverged"]:
        raise BilevelError(summary["message"])
    if summary["interrupted"]:
        raise KeyboardInterrupt
    return float(summary["best"]["valid_loss"])


def add_resolvers() -> None:
    """Teach OmegaConf what `${bilevel.…}` means in the configuration."""
    OmegaConf.register_new_resolver("bilevel.resumed", lambda resumed, fresh: resumed or fresh, replace=True)
    OmegaConf.register_new_resolver("bilevel.ablation", _ablation, replace=True)
    OmegaConf.register_new_resolver("bilevel.times", lambda factor, value: factor * value, replace=True)


def _run_hydra(job: Callable[[DictConfig], float], arguments: Sequence[str]) -> None:
    add_resolvers()
    with _process(["bilevel", *arguments], HYDRA_FULL_ERROR="1"):  # errors reach us instead of being printed in Hydra's way
        hydra_main(version_base="1.3", config_path="pkg://bilevel.conf", config_name="config")(job)()


@contextmanager
def _process(argv: list[str], **environment: str) -> Iterator[None]:
    """The process as Hydra reads it, and afterwards as it was."""
    before = sys.argv, {name: os.environ.get(name) for name in environment}
    sys.argv = argv
    os.environ.update(environment)
    try:
        yield
    finally:
        sys.argv = before[0]
        for name, value in before[1].items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _show(otherwise: Callable[..., None]) -> Callable[..., None]:
    """Print a warning about the problem or the solver in a line; hand others on."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, (ProblemWarning, SolverWarning)):
            print(f"bilevel: warning: {message}", file=sys.stderr, flush=True)
        else:
            otherwise(message, category, *place, **more)

    return show


def _ablation(overrides: Sequence[str]) -> str:
    """What tells the runs of a sweep apart beside names and seed: `-linearize-false`, of letters that `resume=` can read."""
    own = [text.lstrip("+~") for text in overrides if text.lstrip("+~").startswith(("problem.", "solver.", "lr."))]
    label = "".join("-" + text.split(".", 1)[1] for text in own)
    return re.sub(r"[^\w.-]+", "-", label)[:80]


def _plain(composed: DictConfig) -> dict[str, Any]:
    config = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}
