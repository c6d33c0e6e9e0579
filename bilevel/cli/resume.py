"""Continuing a run: its stored configuration, and which overrides may differ from it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from bilevel.checkpoint.checkpoints import CHECKPOINT, kept
from bilevel.errors import BilevelError
from bilevel.loggers.records import SUMMARY, Record

CONFIG = "config.yaml"

MAY_CHANGE = (
    "runner.epochs",
    "runner.seconds",
    "runner.examples",
    "runner.patience",
    "runner.checkpoint_every",
    "runner.keep_checkpoints",
    "runner.device",
    "runner.requeue",
    "runner.progress",
    "runner.picture",
    "wandb.mode",
    "tensorboard.flush_seconds",
)
"""What a resumed run may do otherwise: none of it enters the steps that are already taken."""

BUDGETS = ("runner.epochs", "runner.seconds", "runner.examples", "runner.patience")
"""What ends a run: one that has ended goes on where they differ."""

AUTO = "auto"
"""`resume=auto`: start, go on or leave alone, as the directory of the run has it."""

ABSENT = object()


def stored_config(directory: Path) -> DictConfig:
    """The configuration that the run in `directory` was started with.

    Raises:
        BilevelError: the directory is not a run's.
    """
    file = directory / CONFIG
    if not directory.is_dir():
        raise BilevelError(
            f"resume={directory} is not a directory; give the directory of an earlier run"
        )
    if missing := [
        name
        for name, there in ((CONFIG, file.is_file()), (CHECKPOINT, kept(directory)))
        if not there
    ]:
        raise BilevelError(
            f"resume={directory} is not a run: it has no {missing[0]}; give the directory of an earlier run"
        )
    try:
        config = OmegaConf.load(file)
    except (OSError, YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise BilevelError(
            f"{file} cannot be read ({type(error).__name__}); restore it, or start a new run"
        ) from error
    if not isinstance(config, DictConfig) or any(
        key not in config for key in ("names", "seed", "problem", "solver", "runner")
    ):
        raise BilevelError(
            f"{file} is not the configuration of a run of bilevel; give the directory of an earlier run"
        )
    return config


def continued(
    stored: DictConfig, composed: Mapping[str, Any], overridden: Sequence[str], directory: Path
) -> dict[str, Any]:
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
        if key in (
            "problem",
            "solver",
        ):  # a choice from a group: its name stands for it, its settings may have been overridden
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


def repeated(composed: Mapping[str, Any], directory: Path) -> tuple[bool, Record | None]:
    """What a command that may have run before finds in the directory of its run.

    Returns:
        Whether there is a run to go on with, and the summary of one that has ended with the same budgets.

    Raises:
        BilevelError: a run with other settings is there, or one that cannot be read.
    """
    if not kept(directory):
        return False, None
    stored, now = stored_config(directory), OmegaConf.create(dict(composed))
    before = OmegaConf.to_container(stored, resolve=True)
    assert isinstance(before, dict)
    apart = dict(_differences({**before, "resume": None}, {**composed, "resume": None}))
    free = {*MAY_CHANGE, "loggers", *stored.get("loggers", {}), *now.get("loggers", {})}
    for key, (then, this) in apart.items():
        if key not in free and key.split(".")[0] not in free:
            raise BilevelError(
                f"{directory} holds a run with `{key}` {_said(then)}, and it is {_said(this)} now; choose another directory, "
                "or remove that run"
            )
    try:
        summary = json.loads((directory / SUMMARY).read_text(encoding="utf-8"))
        ended = not summary["interrupted"] and {"best", "diverged", "message"} <= summary.keys()
        ended = ended and (summary["diverged"] or "valid_loss" in summary["best"])
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
    ):  # killed, or not a summary: the checkpoint knows how far it came
        return True, None
    return True, summary if ended and not any(budget in apart for budget in BUDGETS) else None


def _differences(then: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The keys by which two configurations differ, with both values."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in {**then, **now}:
            yield from _differences(
                then.get(key, ABSENT),
                now.get(key, ABSENT),
                f"{prefix}.{key}" if prefix else str(key),
            )
    elif then != now:
        yield prefix, (then, now)


def _said(value: Any) -> str:
    return "left at its default" if value is ABSENT else str(value)
