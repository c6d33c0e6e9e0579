"""What Hydra, OmegaConf and the file system raise on bad input, in one sentence each."""

import errno
import os
import traceback
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
    SearchPathException,
)
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from bilevel.errors import BilevelError
from bilevel.text import near

UNUSABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
)
"""Errors of the file system that say something about a place rather than about the program."""

LOST_WORKERS = (
    "TerminatedWorkerError",
    "BrokenProcessPool",
    "UncompletedJobError",
    "FailedJobError",
)
"""What joblib and submitit raise of a process that was killed; by name, since neither need be installed."""


def sentence(error: BaseException) -> str | None:
    """What is wrong and what to do; None for an error that is no user's input but somebody's bug, whose traceback is wanted."""
    if isinstance(error, BilevelError):
        return " ".join(str(error).split())
    if isinstance(error, MissingConfigException):
        return _missing(error)
    if type(error).__name__ in LOST_WORKERS:
        return (
            f"a process of the launcher has ended without a result ({_first_line(error).rstrip('.')}), most often since the "
            "machine's memory ran out; the same command with the same hydra.sweep.dir runs what is missing"
        )
    if isinstance(error, OSError):
        return _unusable(error) if error.errno in UNUSABLE else None
    if isinstance(error, ConfigCompositionException) and isinstance(
        error.__cause__, (ConfigKeyError, ConfigAttributeError)
    ):
        return _unknown_key(error.__cause__)
    if isinstance(error, OverrideParseException):
        return _malformed(error)
    if isinstance(error, SearchPathException):
        return f"{error}; give --config-dir a directory that exists"
    if isinstance(error, OmegaConfBaseException) and (ours := _ours(error)) is not None:
        return sentence(ours)
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        cause = error.__cause__
        lines = [
            _first_line(e)
            for e in (error, cause)
            if isinstance(e, (HydraException, OmegaConfBaseException))
        ]
        return ": ".join(line.rstrip(".:") for line in lines if line)
    return None


def unexpected(error: BaseException) -> str:
    """An error that nothing here explains, and where it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    said = _first_line(error).rstrip(".")
    return f"{type(error).__name__}{': ' if said else ''}{said}{where}; HYDRA_FULL_ERROR=1 shows the whole traceback"


def parse(text: str) -> Override:
    """A command-line override as Hydra reads it."""
    return OverridesParser.create().parse_overrides([text])[0]


def _missing(error: MissingConfigException) -> str:
    path = str(error.missing_cfg_file)
    group, _, name = path.rpartition("/")
    if not group:
        return _first_line(error)
    options = sorted(option for option in error.options or ())
    known = f"there are {', '.join(options)}" if options else "there is none"
    return (
        f"there is no {group} `{name}`{near(name, options)}; {known}; "
        f"one of your own goes into DIR/{group}/{name}.yaml, with --config-dir DIR"
    )


def _unknown_key(cause: Any) -> str:
    full = str(cause.full_key or cause.key)
    parent = cause.parent_node
    keys = [str(key) for key in parent if key != "hydra"] if OmegaConf.is_dict(parent) else []
    prefix, _, name = full.rpartition(".")
    where = f"`{prefix}` has" if prefix else "there is"
    return f"{where} no key `{name}`{near(name, keys)}; the keys are {', '.join(keys) or 'none'}"


def _malformed(error: OverrideParseException) -> str:
    return f"`{error.override}` is no override; write key=value, and quote what has spaces, commas or equals signs: 'key=\"a, b\"'"


def _ours(error: BaseException | None) -> BilevelError | None:
    """The error of ours that OmegaConf has wrapped."""
    while error is not None and not isinstance(error, BilevelError):
        error = error.__cause__ or error.__context__
    return error


def _unusable(error: OSError) -> str:
    place = os.fspath(error.filename) if error.filename is not None else "the run directory"
    return (
        f"cannot use {place!r}: {error.strerror}; choose a place that exists and where you may write "
        "(hydra.run.dir=… for a run, hydra.sweep.dir=… for a sweep, data.root=… for data)"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else ""
