"""Resuming a run: its stored configuration, and the overrides that may differ from it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bilevel.checkpoint.checkpoints import CHECKPOINT, kept
from bilevel.checkpoint.file_format import check_version
from bilevel.checkpoint.refit_directory import is_refit
from bilevel.cli.stored import CONFIG, check_trusted, read_stored
from bilevel.errors import BilevelError
from bilevel.loggers.records import SUMMARY, Record
from bilevel.untrusted_files import read_bytes

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
    "runner.refit",
    "runner.sensitivities",
    "wandb.mode",
    "tensorboard.flush_seconds",
)
"""Settings that a resumed run may change: no step that was taken depends on them."""

BUDGETS = (
    *("runner.epochs", "runner.seconds", "runner.examples", "runner.patience"),
    "runner.refit",
)
"""Settings that decide the end of a run: a finished run continues if one of them differs."""

AUTO = "auto"
"""`resume=auto` starts a run, continues it, or leaves it as it ended."""

ABSENT = object()


def stored_config(directory: Path, *, quiet: bool = False) -> DictConfig:
    """Return the configuration that the run in `directory` was started with.

    Args:
        directory: the run directory.
        quiet: whether to give no warning.

    Raises:
        BilevelError: the directory holds no run, or a run from before the packages moved.
    """
    setting = f"resume={directory}"
    if not directory.is_dir():
        raise BilevelError(f"{setting} is not a directory; give the directory of an earlier run")
    if not (checkpoints := kept(directory)):
        raise BilevelError(
            f"{setting} is not a run, since it has no {CHECKPOINT}; give the directory of an "
            "earlier run"
        )
    # before the configuration is used: the targets of an older run can no longer be imported
    check_version(checkpoints[0])
    if not (directory / CONFIG).exists() and is_refit(directory):
        raise BilevelError(
            f"{setting} is a refit, which belongs to the run around it; write "
            f"resume={directory.parent} to continue both"
        )
    return read_stored(directory, quiet=quiet)


def continued(
    stored: DictConfig,
    composed: Mapping[str, Any],
    overridden: Sequence[str],
    directory: Path,
    *,
    trust: bool = False,
) -> dict[str, Any]:
    """Return the stored configuration with the overrides that a resumed run may have.

    Args:
        stored: the result of `stored_config`.
        composed: the resolved configuration of this command line.
        overridden: the keys that this command line sets; all others keep their stored values.
        directory: the run directory, for errors.
        trust: whether the stored configuration may name any class or function.

    Raises:
        BilevelError: an override must not differ from the stored value, and does; or the stored
            configuration names something outside bilevel and PyTorch, and `trust` is False.
    """
    now = OmegaConf.create(dict(composed))
    config = stored.copy()
    for key in overridden:
        if key in ("resume", "trust"):
            continue
        if key == "logger":  # a choice from a group, of which only the nodes are stored
            for name in stored.loggers:
                config.pop(name, None)
            for name in ("loggers", *now.loggers):
                config[name] = now[name]
            continue
        if key in ("problem", "solver"):
            # a choice from a group: compare its name, since its settings may have been overridden
            key = f"names.{key}"
        value = OmegaConf.select(now, key, default=ABSENT)
        before = OmegaConf.select(stored, key, default=ABSENT)
        if key in MAY_CHANGE:
            OmegaConf.update(config, key, value, force_add=True)
        elif value != before:
            raise BilevelError(
                f"{key.removeprefix('names.')}={_text(value)} differs from {_text(before)} in "
                f"{directory}; leave it out to continue that run, or start a new one"
            )
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    if not trust:
        check_trusted(plain, composed, directory)
    return {str(key): value for key, value in plain.items()}


def repeated(composed: Mapping[str, Any], directory: Path) -> tuple[bool, Record | None]:
    """Look for an earlier run of the same command in its directory.

    Returns:
        Whether there is a run to continue, and its summary if it has ended with the same budgets.

    Raises:
        BilevelError: the directory holds a run with other settings, or one that cannot be read.
    """
    if not kept(directory):
        return False, None
    stored, now = stored_config(directory), OmegaConf.create(dict(composed))
    before = OmegaConf.to_container(stored, resolve=False)
    assert isinstance(before, dict)
    never = {"resume": None, "trust": None}  # they belong to a command, not to a run
    apart = dict(_differences({**before, **never}, {**composed, **never}))
    free = {*MAY_CHANGE, "loggers", *stored.loggers, *now.get("loggers", {})}
    for key, (then, this) in apart.items():
        if key not in free and key.split(".")[0] not in free:
            raise BilevelError(
                f"{key}={_text(this)} differs from {_text(then)} in {directory}; choose another "
                "directory, or remove that run"
            )
    try:
        summary = json.loads(read_bytes(directory / SUMMARY))
        ended = not summary["interrupted"] and {"best", "diverged", "message"} <= summary.keys()
        ended = ended and (summary["diverged"] or "valid_loss" in summary["best"])
    except (OSError, ValueError, LookupError, TypeError):
        return True, None  # the run was killed; its checkpoint has its last step
    return True, summary if ended and not any(budget in apart for budget in BUDGETS) else None


def _differences(then: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield the keys in which two configurations differ, with both values."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in {**then, **now}:
            name = f"{prefix}.{key}" if prefix else str(key)
            yield from _differences(then.get(key, ABSENT), now.get(key, ABSENT), name)
    elif then != now:
        yield prefix, (then, now)


def _text(value: Any) -> str:
    return "its default" if value is ABSENT else str(value)
