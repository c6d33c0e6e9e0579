"""The command `bilevel`: a Hydra application over the configuration in `bilevel.conf`."""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra import main as hydra_main
from hydra.core.override_parser.types import OverrideType
from omegaconf import DictConfig

from bilevel.cli import input_errors, standard_streams, sweep, user_modules
from bilevel.cli.job import OPEN_GROUPS, Job, add_resolvers
from bilevel.cli.resume import AUTO, stored_config
from bilevel.errors import BilevelError
from bilevel.links import broken_link
from bilevel.parallel.torchrun import torchrun_launch, world_size
from bilevel.run.signals import EX_TEMPFAIL, OutOfTime, time_limit_raises


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status.

    It is 0 where all ended well, 1 where a run failed, 130 after Ctrl-C and its like, and 75 (EX_TEMPFAIL) after the signal of
    a time limit. Bad input is one sentence on the standard error; HYDRA_FULL_ERROR=1 asks for the traceback.
    """
    standard_streams.occupy_standard_streams()
    told, logging.raiseExceptions = (
        logging.raiseExceptions,
        False,
    )  # W&B's own log on a full disk would print tracebacks
    try:
        return _main(arguments)
    finally:
        logging.raiseExceptions = told
        standard_streams.flush_standard_streams(sys.stdout, sys.stderr)


def _main(arguments: Sequence[str] | None) -> int:
    job = Job(traceback_wanted=os.environ.get("HYDRA_FULL_ERROR") == "1")
    try:
        with torchrun_launch() as job.launch, time_limit_raises(), sweep.counted() as failed:
            if (sentence := broken_link()) is not None:
                raise BilevelError(sentence)
            user_modules.add_working_directory()
            _run_hydra(job, prepared(sys.argv[1:] if arguments is None else arguments))
    except Exception as error:
        if not job.told(error):
            raise
    except OutOfTime:
        return EX_TEMPFAIL
    except KeyboardInterrupt:
        return 130  # what shells expect of a process that Ctrl-C ended
    return min(job.failures + len(failed), 1)


GROUPS = ("problem", "solver", "logger", "experiment")


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
    if sweeping and world_size() > 1:
        raise BilevelError(
            "torchrun spreads one run over its processes, and -m is a sweep; start torchrun for each run of it"
        )
    flags: list[str] = []
    overrides: list[str] = []
    for argument in arguments:
        if argument.startswith("-") or "=" not in argument:
            flags.append(argument)
            continue
        if argument.startswith("resume=") and argument not in ("resume=", "resume=null"):
            argument = "resume=" + _quoted(
                argument.removeprefix("resume=")
            )  # a path, whatever its letters mean to Hydra
        override = input_errors.parse(argument)
        key = override.key_or_group
        if override.is_sweep_override() and not sweeping:
            raise BilevelError(
                f"`{argument}` gives several values; add -m to run each, or write [a,b] for a list"
            )
        if (
            key in GROUPS
            and override.type is OverrideType.DEL
            and not isinstance(override.value(), (str, type(None)))
        ):
            raise BilevelError(
                f"`{argument}` names no choice of {key}; write ~{key}, or ~{key}=NAME of what was chosen"
            )
        if (
            key in GROUPS
            and override.type in (OverrideType.CHANGE, OverrideType.ADD)
            and not override.is_sweep_override()
        ):
            chosen = override.value()
            named = (
                (str,) if override.type is OverrideType.CHANGE else (str, dict)
            )  # a node of one's own may be added
            if not all(
                isinstance(name, named)
                for name in (chosen if isinstance(chosen, list) else [chosen])
            ):
                raise BilevelError(f"`{argument}` chooses no {key} by its name; write {key}=NAME")
        if key == "resume" and override.value() is not None:
            resumed = str(override.value())
            if sweeping and resumed == AUTO:
                raise BilevelError(
                    f"resume={AUTO} is of one run; a sweep with its hydra.sweep.dir=… goes on when it is repeated"
                )
            if sweeping:
                raise BilevelError("`resume` continues one run; leave -m out")
            if resumed != AUTO:
                stored_config(Path(resumed))
        opened = (
            override.type is OverrideType.CHANGE
            and key.partition(".")[0] in OPEN_GROUPS
            and "." in key
        )
        overrides.append(f"++{argument}" if opened else argument)
    return flags + overrides


def _quoted(text: str) -> str:
    return "'" + text.replace("'", r"\'") + "'" if text[:1] not in ("'", '"') else text


def _run_hydra(job: Callable[[DictConfig], float], arguments: Sequence[str]) -> None:
    add_resolvers()
    with _process(
        ["bilevel", *arguments], HYDRA_FULL_ERROR="1"
    ):  # errors reach us instead of being printed in Hydra's way
        hydra_main(version_base="1.3", config_path="pkg://bilevel.conf", config_name="config")(
            job
        )()


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
