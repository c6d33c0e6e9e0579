"""Configurations that a run directory holds: read with limits, and built within limits.

A run directory may come from somebody else. Its `config.yaml` names classes and functions
(`_target_`), and a resumed run would call them. So a stored configuration may name only what a run
of bilevel consists of; see `docs/security.md`.
"""

import inspect
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from bilevel.checkpoint.checkpoints import CheckpointWarning, load_config
from bilevel.cli.locate import resolved
from bilevel.errors import BilevelError
from bilevel.untrusted_files import MOST_YAML_BYTES, read_bytes, yaml_fault

CONFIG = "config.yaml"

KEYS = ("names", "seed", "problem", "solver", "runner", "loggers")
"""Entries that every configuration of a run has."""

OURS = (
    "bilevel.solvers",
    "bilevel.problems",
    "bilevel.loggers",
    "bilevel.run.runner",
    "bilevel.run.pooled_data",
)
"""Modules of bilevel whose classes and functions a stored configuration may name."""

OF_TORCH = ("torch.optim", "torch.nn")
"""Modules of PyTorch whose classes a stored configuration may name."""


def read_stored(directory: Path, *, quiet: bool = False) -> DictConfig:
    """Return the configuration of a run, from its `config.yaml` or else from its checkpoint.

    Nothing in it is resolved.

    Args:
        directory: the run directory.
        quiet: whether to give no warning.

    Raises:
        BilevelError: neither holds a configuration, or it has aliases or interpolations.

    Warns:
        CheckpointWarning: the checkpoint replaces a damaged `config.yaml`.
    """
    file, config = directory / CONFIG, None
    try:
        text = read_bytes(file, MOST_YAML_BYTES).decode()
        if fault := yaml_fault(text):
            raise BilevelError(f"{file} {fault}; restore it, or start a new run")
        config = OmegaConf.create(text)
        reason = "is not the configuration of a run of bilevel"
    except FileNotFoundError:
        reason = "is missing"
    except (OSError, YAMLError, ValueError, RecursionError, OmegaConfBaseException) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
        reason = f"cannot be read ({why})"
    if not isinstance(config, DictConfig) or any(key not in config for key in KEYS):
        config = OmegaConf.create(load_config(directory))
        if not config and reason == "is missing":
            raise BilevelError(
                f"{file} is missing, as in every run that Python started; continue or refit it "
                "from Python (resume=True of Runner.run), or restore the file"
            )
        if any(key not in config for key in KEYS):
            raise BilevelError(f"{file} {reason}; restore it, or start a new run")
        if not quiet:
            warnings.warn(
                f"{file} {reason}; the configuration in the checkpoint replaces it",
                CheckpointWarning,
                stacklevel=2,
            )
    for key, value in _leaves(OmegaConf.to_container(config, resolve=False)):
        if isinstance(value, str) and "${" in value:
            raise BilevelError(
                f"{file} has the interpolation {value} at {key}, and a stored configuration holds "
                "values alone; replace it by its value"
            )
    return config


def check_trusted(stored: Any, named: Any, directory: Path, *, command: str = "resume={}") -> None:
    """Check that a stored configuration names nothing but parts of bilevel and PyTorch.

    Args:
        stored: the stored configuration, as plain containers.
        named: the configuration of this command line; what it names itself is trusted.
        directory: the run directory, for the error.
        command: the part of the command line that reads the directory, for the error.

    Raises:
        BilevelError: a target is neither a class or function of `OURS`, nor a class of `OF_TORCH`,
            nor named by the command line.
    """
    own = {value for key, value in _leaves(named) if _is_target(key)}
    for key, value in _leaves(stored):
        if _is_target(key) and value not in own and not _is_ours(value):
            raise BilevelError(
                f"{command.format(directory)} would run {key}={value}, which is not a part of "
                "bilevel, torch.optim or torch.nn; add trust=true if you trust whoever made that "
                "directory"
            )


def _is_target(key: str) -> bool:
    return key.rpartition(".")[2] == "_target_"


def _is_ours(path: Any) -> bool:
    """Return whether a dotted path names a part of a run; only installed packages are imported."""
    if not isinstance(path, str) or path.partition(".")[0] not in ("bilevel", "torch"):
        return False
    try:
        target = resolved(path)
    except Exception:  # it cannot be imported, which the builder explains
        return path.startswith(tuple(f"{place}." for place in (*OURS, *OF_TORCH)))
    # where it was defined: `torch.nn.functional.torch.load` is no part of torch.nn
    home = getattr(target, "__module__", None)
    if not isinstance(home, str) or not callable(target):
        return False
    places = OURS if home.startswith("bilevel.") else OF_TORCH if inspect.isclass(target) else ()
    return f"{home}.".startswith(tuple(f"{place}." for place in places))


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested containers, and the keys, by dotted path."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            if isinstance(key, str) and "${" in key:
                yield prefix or "the top", key
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{prefix}.{index}")
    else:
        yield prefix, node
