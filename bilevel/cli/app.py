"""The command `bilevel`: a Hydra application over the configuration in `bilevel.conf`."""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra import main as hydra_main
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig

from bilevel.cli import (
    export,
    hints,
    input_errors,
    log,
    ray_launcher,
    refit,
    standard_streams,
    sweep,
    user_modules,
)
from bilevel.cli.job import Job, add_resolvers
from bilevel.cli.named_optimizers import optimizer_overrides
from bilevel.cli.resume import AUTO, stored_config
from bilevel.cli.run_config import OPEN_GROUPS
from bilevel.errors import BilevelError
from bilevel.parallel.slurm import slurm_environment
from bilevel.parallel.torchrun import torchrun_launch, world_size
from bilevel.run.signals import EX_TEMPFAIL, OutOfTime, time_limit_raises
from bilevel.symlinks import broken_link

COMMANDS = {"export": export.main, "log": log.main, "refit": refit.main}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    The status is 0 if all runs ended well, 1 if a run failed, 130 after Ctrl-C or another signal
    that ends a run, and 75 (EX_TEMPFAIL) after the signal of a time limit. Bad input causes one
    sentence on the standard error. HYDRA_FULL_ERROR=1 shows the traceback. `export`,
    `log` and `refit` as the first word are commands of their own.
    """
    words = sys.argv[1:] if arguments is None else arguments
    standard_streams.occupy_standard_streams()
    before = logging.raiseExceptions
    logging.raiseExceptions = False  # on a full disk the log of W&B would print tracebacks
    try:
        if words and words[0] in COMMANDS:
            return COMMANDS[words[0]](words[1:])
        return _main(words)
    finally:
        logging.raiseExceptions = before
        standard_streams.flush_standard_streams(sys.stdout, sys.stderr)


def _main(arguments: Sequence[str]) -> int:
    job = Job(traceback_wanted=os.environ.get("HYDRA_FULL_ERROR") == "1")
    try:
        with (
            slurm_environment(),
            torchrun_launch() as job.launch,
            time_limit_raises(),
            sweep.counted() as failed,
        ):
            if (sentence := broken_link()) is not None:
                raise BilevelError(sentence)
            user_modules.add_working_directory()
            _run_hydra(job, prepared(arguments))
    except Exception as error:
        if not job.report(error):
            raise
    except OutOfTime:
        return EX_TEMPFAIL
    except KeyboardInterrupt:
        return 130  # the status that shells expect after Ctrl-C
    return min(job.failures + len(failed), 1)


GROUPS = ("problem", "solver", "logger", "experiment")


def prepared(arguments: Sequence[str]) -> list[str]:
    """Return the arguments for Hydra, checked as far as possible before it makes a directory.

    A constructor setting that the YAML leaves out can be set like any other, where Hydra alone
    needs a `++`. Flags may stand between overrides.

    Example:
        >>> prepared(["solver.clip_norm=1", "-m", "seed=3,4"])
        ['-m', '++solver.clip_norm=1', 'seed=3,4']

    Raises:
        BilevelError: an override has several values without `-m`, a choice is not a name, or
            `resume` gives a directory without a run.
    """
    sweeping = "-m" in arguments or "--multirun" in arguments
    if sweeping and world_size() > 1:
        raise BilevelError(
            "-m is a sweep, but torchrun and srun spread one run over their processes; start them "
            "for each run of the sweep, or set WORLD_SIZE=1"
        )
    flags: list[str] = []
    overrides: list[str] = []
    for argument in arguments:
        if argument.startswith("-") or "=" not in argument:
            flags.append(argument)
            continue
        if argument.startswith("resume=") and argument not in ("resume=", "resume=null"):
            # a path may have letters that mean something to Hydra
            argument = "resume=" + _quoted(argument.removeprefix("resume="))
        override = input_errors.parse(argument)
        _check_choice(argument, override, sweeping)
        hints.check_group(argument, override)
        key = override.key_or_group
        if key == "resume" and override.value() is not None:
            _check_resume(str(override.value()), sweeping)
        changed = override.type is OverrideType.CHANGE and "." in key
        opened = changed and key.partition(".")[0] in OPEN_GROUPS
        node = optimizer_overrides(override) if opened else []
        overrides += node or [f"++{argument}" if opened else argument]
    hints.check_flags(flags)
    return flags + overrides


def _check_choice(argument: str, override: Override, sweeping: bool) -> None:
    """Check that an override has one value, and that a choice from a group is a name."""
    kind, key, value = override.type, override.key_or_group, override.value()
    several = override.is_sweep_override()
    if several and not sweeping:
        raise BilevelError(
            f"`{argument}` gives several values; add -m to run each, or write [a,b] for a list"
        )
    if key not in GROUPS:
        return
    if kind is OverrideType.DEL and not isinstance(value, (str, type(None))):
        raise BilevelError(
            f"`{argument}` is not the name of a choice; write ~{key}, or ~{key}=NAME of the choice"
        )
    if kind in (OverrideType.CHANGE, OverrideType.ADD) and not several:
        # a user may add a node in place of a name
        named = (str,) if kind is OverrideType.CHANGE else (str, dict)
        names = value if isinstance(value, list) else [value]
        if not all(isinstance(name, named) for name in names):
            raise BilevelError(f"`{argument}` is not the name of a choice; write {key}=NAME")


def _check_resume(resumed: str, sweeping: bool) -> None:
    if sweeping:
        raise BilevelError(
            f"resume={resumed} is for one run; repeat a sweep with its hydra.sweep.dir=… to "
            "continue it, or leave -m out"
        )
    if resumed != AUTO:
        stored_config(Path(resumed), quiet=True)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", r"\'") + "'" if text[:1] not in ("'", '"') else text


def _run_hydra(job: Callable[[DictConfig], float], arguments: Sequence[str]) -> None:
    add_resolvers()
    ray_launcher.register()
    run = hydra_main(version_base="1.3", config_path="pkg://bilevel.conf", config_name="config")
    # with HYDRA_FULL_ERROR, Hydra raises errors instead of printing them
    with _process(["bilevel", *arguments], HYDRA_FULL_ERROR="1"):
        run(job)()


@contextmanager
def _process(argv: list[str], **environment: str) -> Iterator[None]:
    """Give the process the arguments and the environment that Hydra reads, and restore both."""
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
