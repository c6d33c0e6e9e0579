"""Errors of Hydra, OmegaConf and the file system on bad input, as one sentence each."""

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

from bilevel.cli.hints import key_hint
from bilevel.errors import BilevelError
from bilevel.text import describe, first_line, near

UNUSABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
)
"""Errors of the file system that are about a place and not about the program."""

NO_EXPERIMENT = "Could not override 'experiment'"
"""Hydra's words where a group that is not in the defaults list is changed."""

LAUNCHERS = {"joblib": "joblib", "submitit_local": "submitit", "submitit_slurm": "submitit"}
"""Launchers that are plugins of Hydra, each with the extra that installs it."""

LOST_WORKERS = (
    "TerminatedWorkerError",
    "BrokenProcessPool",
    "UncompletedJobError",
    "FailedJobError",
)
"""Errors of joblib and submitit about a killed process, by name, since both are optional."""


def sentence(error: BaseException) -> str | None:
    """Return the sentence about an error, or None for an error that bad input does not explain."""
    if isinstance(error, BilevelError):
        return " ".join(str(error).split())
    if isinstance(error, MissingConfigException):
        return _missing(error)
    if type(error).__name__ in LOST_WORKERS:
        return lost_worker(error)
    if isinstance(error, OSError):
        return _unusable(error) if error.errno in UNUSABLE else None
    cause = error.__cause__
    unknown = isinstance(cause, (ConfigKeyError, ConfigAttributeError))
    if isinstance(error, ConfigCompositionException) and unknown:
        return _unknown_key(cause)
    if isinstance(error, ConfigCompositionException) and NO_EXPERIMENT in str(error):
        return (
            "no experiment is chosen by default, so that the override adds one; write +experiment=…"
        )
    if isinstance(error, OverrideParseException):
        return _malformed(error)
    if isinstance(error, SearchPathException):
        return f"{error}; give --config-dir a directory that exists"
    if isinstance(error, OmegaConfBaseException) and (ours := _ours(error)) is not None:
        return sentence(ours)
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        both = [
            e for e in (error, cause) if isinstance(e, (HydraException, OmegaConfBaseException))
        ]
        return ": ".join(first_line(e).rstrip(".:") for e in both if str(e).strip())
    return None


def lost_worker(error: BaseException) -> str:
    """Return a sentence about an error of a launcher, one of whose processes was killed."""
    return (
        f"a process of the launcher ended without a result ({first_line(error).rstrip('.')}), "
        "most often because the memory of the machine ran out; repeat the command with the "
        "same hydra.sweep.dir to run what is missing"
    )


def unexpected(error: BaseException) -> str:
    """Return a sentence about an error that nothing here explains, with the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{describe(error).rstrip('.')}{where}; HYDRA_FULL_ERROR=1 shows the whole traceback"


def parse(text: str) -> Override:
    """Return a command-line override as Hydra reads it."""
    return OverridesParser.create().parse_overrides([text])[0]


def _missing(error: MissingConfigException) -> str:
    path = str(error.missing_cfg_file)
    group, _, name = path.rpartition("/")
    if not group:
        return first_line(error)
    if group == "hydra/launcher" and name in LAUNCHERS:
        extra = LAUNCHERS[name]
        return f"{group}={name} is not installed; run `pip install 'bilevel[{extra}]'`"
    options = sorted(option for option in error.options or ())
    known = f"choose from {', '.join(options)}, or put" if options else "put"
    return (
        f"{group}={name} does not exist{near(name, options)}; {known} your own into "
        f"DIR/{group}/{name}.yaml and add --config-dir DIR"
    )


def _unknown_key(cause: Any) -> str:
    full = str(cause.full_key or cause.key)
    parent = cause.parent_node
    keys = [str(key) for key in parent if key != "hydra"] if OmegaConf.is_dict(parent) else []
    prefix, _, name = full.rpartition(".")
    where = f" of {prefix}" if prefix else ""
    listed = f"choose from {', '.join(keys)}" if keys else "leave it out"
    if not prefix and (hint := key_hint(name)):
        return f"`{name}` is not a key at the top level; {hint}"
    return f"`{name}` is not a key{where}{near(name, keys)}; {listed}"


def _malformed(error: OverrideParseException) -> str:
    return (
        f"`{error.override}` is not an override; write key=value, and quote a value that has "
        "spaces, commas or equals signs: 'key=\"a, b\"'"
    )


def _ours(error: BaseException | None) -> BilevelError | None:
    """Return our own error that OmegaConf has wrapped, or None."""
    while error is not None and not isinstance(error, BilevelError):
        error = error.__cause__ or error.__context__
    return error


def _unusable(error: OSError) -> str:
    place = os.fspath(error.filename) if error.filename is not None else "the run directory"
    return (
        f"{place} cannot be used ({error.strerror}); choose a place that exists and is writable "
        "(hydra.run.dir=… for a run, hydra.sweep.dir=… for a sweep, data.root=… for data)"
    )
