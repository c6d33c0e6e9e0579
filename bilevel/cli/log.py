"""The command `bilevel log`: log runs again, from their metrics.jsonl and summary.json."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from bilevel.checkpoint.checkpoints import CheckpointWarning, kept, load, load_config
from bilevel.cli import input_errors, user_modules
from bilevel.cli.run_config import build_loggers
from bilevel.cli.standard_streams import print_line
from bilevel.cli.stored import CONFIG, check_trusted, read_stored
from bilevel.comparison.run_files import parse_records, read_object
from bilevel.errors import BilevelError, FaultWarning
from bilevel.loggers.logger import RunInfo
from bilevel.loggers.records import DESCRIPTION, METRICS, SUMMARY, Record
from bilevel.loggers.space_json import space_from_json
from bilevel.run.directory_lock import DirectoryLock
from bilevel.run.faults import Loggers
from bilevel.text import printable


def main(arguments: Sequence[str]) -> int:
    """Log every named run again, and return the exit status: 0 if all were logged whole."""
    given = parser().parse_args(arguments)
    user_modules.add_working_directory()
    runs = [Path(word) for word in given.runs if _is_run(word)]
    words = [word for word in given.runs if not _is_run(word)]
    failed = not runs
    if not runs:
        print_line("bilevel: log has no run; give the directory of a run", sys.stderr)
    for run in runs:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", FaultWarning)
                done = log_again(run, words)
        except Exception as error:
            failed = True
            sentence = input_errors.sentence(error) or input_errors.unexpected(error)
            print_line(f"bilevel: {sentence}", sys.stderr)
            continue
        for warning in caught:
            failed = failed or issubclass(warning.category, FaultWarning)
            if issubclass(warning.category, (FaultWarning, CheckpointWarning)):
                print_line(f"bilevel: warning: {warning.message}", sys.stderr)
        print_line(done, sys.stdout)
    return int(failed)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="bilevel log",
        description="Log runs again, from their metrics.jsonl: to W&B, TensorBoard or both.",
        epilog="Earlier folders of W&B are renamed to replaced-…, and hold the pictures.",
    )
    made.add_argument(
        "runs",
        nargs="+",
        metavar="RUN|key=value",
        help="the directory of a run, or a setting: logger=[wandb,tensorboard], wandb.mode=online, "
        "wandb.project=…, trust=true; the default is the settings of the run",
    )
    return made


def log_again(directory: Path, words: Sequence[str] = ()) -> str:
    """Log a run again, and return a sentence about what was logged.

    Raises:
        BilevelError: the directory holds no run, or one in progress; or a setting is wrong.

    Warns:
        FaultWarning: a logger failed, or did not take everything.
    """
    with DirectoryLock() as lock:
        lock.take(directory)
        records, summary = _records(directory), read_object(directory / SUMMARY, _warn)
        config = _config(directory, [input_errors.parse(word) for word in words])
        loggers = Loggers(build_loggers(config))
        states = _states(directory)
        for logger in loggers:
            name = type(logger).__name__
            states[name] = logger.again(directory, states.get(name, {}))
        with loggers.started(_info(directory, config, records), states):
            for record in records:
                loggers.call("log", record)
            if summary:
                loggers.call("finish", summary)
    names = " and ".join(type(logger).__name__ for logger in loggers)
    end = "and its summary" if summary else "and no summary, since it has not ended"
    return f"{directory}: {len(records)} records {end} were logged to {names}"


def _is_run(word: str) -> bool:
    return "=" not in word or Path(word).is_dir()


def _warn(sentence: str) -> None:
    warnings.warn(sentence, FaultWarning, stacklevel=2)


def _records(directory: Path) -> list[Record]:
    path = directory / METRICS
    try:
        found, damaged = parse_records(path)
    except OSError as error:
        raise BilevelError(
            f"cannot read {path} ({error.strerror or error}); give the directory of a run"
        ) from None
    usable = [
        record
        for record in found
        if type(record.get("step")) is int and {"epoch", "seconds", "examples"} <= record.keys()
    ]
    if left_out := damaged + len(found) - len(usable):
        _warn(f"{left_out} lines of {path} are damaged, and are not logged")
    return usable


def _config(directory: Path, overrides: Sequence[Override]) -> dict[str, Any]:
    """Return the stored configuration with the loggers of this command line."""
    # a run that Python started has none
    known = (directory / CONFIG).exists() or (kept(directory) and load_config(directory))
    config: Any = read_stored(directory) if known else OmegaConf.create({"loggers": {}})
    named: dict[str, Any] = {}
    trusted = False
    for override in overrides:
        if override.key_or_group == "logger":
            with initialize_config_module("bilevel.conf", version_base="1.3"):
                composed = compose("config", [str(override.input_line)])
            chosen = OmegaConf.masked_copy(composed, ["loggers", *composed.loggers])
            config = OmegaConf.merge(
                {key: config[key] for key in config if key not in ("loggers", *config.loggers)},
                chosen,
            )
            named |= _plain(chosen)
    for override in overrides:
        key, value = override.key_or_group, override.value()
        if key == "trust":
            trusted = value is True
        elif key.partition(".")[0] in config.loggers and "." in key:
            OmegaConf.update(config, key, value, force_add=True)
            named[key] = value
        elif key != "logger":
            raise BilevelError(
                f"`{override.input_line}` is not a setting of a logger that is on "
                f"({', '.join(config.loggers) or 'none'}); add logger=NAME, or leave it out"
            )
    on = [name for name, chosen in config.loggers.items() if chosen]
    if not on:
        raise BilevelError(f"{directory} has no dashboard; add logger=wandb, or logger=tensorboard")
    plain = _plain(config)
    if not trusted:
        check_trusted({name: plain.get(name) for name in on}, named, directory, command="log {}")
    if isinstance(of_wandb := plain.get("wandb"), dict) and of_wandb.get("mode") == "disabled":
        raise BilevelError("wandb.mode=disabled logs nothing; add wandb.mode=offline, or online")
    return plain


def _plain(config: Any) -> dict[str, Any]:
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _states(directory: Path) -> dict[str, dict[str, Any]]:
    """Return the states of the loggers in the newest checkpoint; {} without a usable one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointWarning)
            return dict(load(directory)["loggers"])
    except (BilevelError, LookupError, TypeError, ValueError):
        return {}


def _info(directory: Path, config: dict[str, Any], records: list[Record]) -> RunInfo:
    described = read_object(directory / DESCRIPTION, _warn)
    names = {"problem": "unknown problem", "solver": "unknown solver", **described}
    seed = described.get("seed")
    first = records[0] if records else {}
    return RunInfo(
        directory=directory.absolute(),
        problem=printable(str(names["problem"])),
        solver=printable(str(names["solver"])),
        seed=seed if isinstance(seed, int) else 0,
        space=space_from_json(described.get("space")),
        config=config,
        initial={
            name.removeprefix("hypers."): value
            for name, value in first.items()
            if name.startswith("hypers.")
        },
    )
