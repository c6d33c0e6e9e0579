"""Common slips on the command line: each becomes a sentence with what to write instead."""

from collections.abc import Sequence
from dataclasses import fields

from hydra.core.override_parser.types import Override, OverrideType

from bilevel.errors import BilevelError
from bilevel.run.settings import RunSettings
from bilevel.text import near

RUNNER = frozenset(field.name for field in fields(RunSettings))

RATES = ("lr", "learning_rate")
RATE_HINT = "set lr.inner for w, or lr.outer for λ"

GROUPS = {
    "lr": RATE_HINT,
    "wandb": "write wandb.mode=offline, online or disabled, or another wandb.NAME=…",
    "tensorboard": "write tensorboard.NAME=…",
    "mlflow": "write mlflow.NAME=…",
    "data": "write data.root=DIR",
    "runner": "write runner.NAME=…, for example runner.epochs=20",
    "trial": "write trial.epochs=…",
    "names": "write names.problem=… or names.solver=…",
}
"""Groups of settings, each with what to write in place of `group=value`."""

FLAGS = (
    *("help", "hydra-help", "version", "cfg", "resolve", "package", "run", "multirun"),
    *("shell-completion", "config-path", "config-name", "config-dir", "experimental-rerun", "info"),
)
"""Hydra's flags; a start of one is accepted too."""


def check_flags(arguments: Sequence[str]) -> None:
    """Require flags of Hydra.

    Example:
        >>> check_flags(["--epochs", "10"])
        Traceback (most recent call last):
        bilevel.errors.BilevelError: --epochs is not a flag; settings have the form key=value,
        write runner.epochs=…

    Raises:
        BilevelError: a flag is unknown.
    """
    for argument in arguments:
        name = argument[2:].partition("=")[0]
        if not argument.startswith("--") or not name:
            continue
        if any(flag.startswith(name) for flag in FLAGS):
            continue
        key = _where(name.replace("-", "_"))
        wanted = f"write {key}" if key else "and --help lists them"
        raise BilevelError(
            f"--{name} is not a flag{near(name, FLAGS)}; settings have the form key=value, {wanted}"
        )


def check_group(argument: str, override: Override) -> None:
    """Require a mapping where an override gives a whole group of settings.

    Raises:
        BilevelError: a group of settings gets a single value.
    """
    key = override.key_or_group
    single = override.type is OverrideType.CHANGE and not isinstance(override.value(), dict)
    if key in GROUPS and single:
        raise BilevelError(f"`{argument}` would replace a group of settings; {GROUPS[key]}")


def key_hint(name: str) -> str:
    """Return what to write for a key that the top level does not have; "" if nothing is known."""
    if name in RATES:
        return RATE_HINT
    return f"write runner.{name}=…" if name in RUNNER else ""


def rate_hint(name: str) -> str:
    """Return what to write for a learning rate that a node does not have; "" for other names."""
    return RATE_HINT if name in RATES else ""


def _where(name: str) -> str | None:
    """Return the override that sets `name`; None for a name that is not known here."""
    if name in RATES:
        return "lr.inner=… or lr.outer=…"
    if name in RUNNER:
        return f"runner.{name}=…"
    return f"{name}=…" if name in ("seed", "problem", "solver", "resume", "logger") else None
