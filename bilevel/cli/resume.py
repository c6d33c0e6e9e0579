"""Continuing a run: its stored configuration, and which overrides may differ from it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from bilevel.checkpoint import CHECKPOINT
from bilevel.errors import BilevelError

CONFIG = "config.yaml"

MAY_CHANGE = (
    "runner.epochs",
    "runner.seconds",
    "runner.examples",
    "runner.patience",
    "runner.checkpoint_every",
    "runner.device",
    "runner.progress",
    "runner.picture",
    "wandb.mode",
    "tensorboard.flush_seconds",
)
"""What a resumed run may do otherwise: none of it enters the steps that are already taken."""

ABSENT = object()


def stored_config(directory: Path) -> DictConfig:
    """The configuration that the run in `directory` was started with.

    Raises:
        BilevelError: the directory is not a run's.
    """
    file = directory / CONFIG
    if not directory.is_dir():
        raise BilevelError(f"resume={directory} is not a directory; give the directory of an earlier run")
    if missing := [name for name in (CONFIG, CHECKPOINT) if not (directory / name).is_file()]:
        raise BilevelError(f"resume={directory} is not a run: it has no {missing[0]}; give the directory of an earlier run")
    try:
        config = OmegaConf.load(file)
    except (OSError, YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise BilevelError(f"{file} cannot be read ({type(error).__name__}); restore it, or start a new run") from error
    if not isinstance(config, DictConfig) or any(key not in config for key in ("names", "seed", "problem", "solver", "runner")):
        raise BilevelError(f"{file} is not the configuration of a run of bilevel; give the directory of an earlier run")
    return config


def continued(stored: DictConfig, composed: Mapping[str, Any], overridden: Sequence[str], directory: Path) -> dict[str, Any]:
    """The stored configuration with the overrides that a resumed run may have.

    Args:
        stored: from `stored_config`.
        composed: the resolved configuration of this command line.
        overridden: the keys that this command line sets; all others are the stored ones.
        directory: named in errors.

    Raises:
        BilevelError: an override differs from the stored value, and may not.
    """
    now = OmegaConf.create(dict(composed))
    config = stored.copy()
    for key in overridden:
        if key == "resume":
            continue
        if key == "logger":  # a choice too, of which the nodes alone are stored
            for name in stored.get("loggers", ("wandb",)):
                config.pop(name, None)
            for name in ("loggers", *now.loggers):
                config[name] = now[name]
            continue
        if key in ("problem", "solver"):  # a choice from a group: its name stands for it, its settings may have been overridden
            key = f"names.{key}"
        value = OmegaConf.select(now, key, default=ABSENT)
        before = OmegaConf.select(stored, key, default=ABSENT)
        if key in MAY_CHANGE:
            OmegaConf.update(config, key, value, force_add=True)
        elif value != before:
            raise BilevelError(
                f"`{key.removeprefix('names.')}` is {_said(value)} on the command line and was {_said(before)} in {directory}; "
                "leave it out to continue that run, or start a new one"
            )
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _said(value: Any) -> str:
    return "left at its default" if value is ABSENT else str(value)
