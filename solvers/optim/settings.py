"""The settings of optimizers, and those among them that λ holds."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel import BilevelError, Hypers, Space
from bilevel.domains import OPTIMIZER_SETTINGS
from bilevel.solvers.optim.optimized import MakeOptimizer

SCALED = ("lr", "weight_decay")
"""Settings of which groups of parameters may have different values while λ holds one."""


def configured(make: MakeOptimizer, settings: Mapping[str, float]) -> MakeOptimizer:
    """Return `make` with some settings of the optimizer changed.

    Args:
        make: makes the optimizer.
        settings: the new values; `beta1` and `beta2` in place of `betas`.

    Raises:
        BilevelError: the optimizer lacks a setting, or its groups of parameters have different
            values of a setting that cannot be scaled; it is raised when the optimizer is made.
    """
    if not settings:
        return make

    def made(params: Iterable[Tensor]) -> torch.optim.Optimizer:
        optimizer = make(params)
        apply_to_groups(optimizer.param_groups, settings)
        known = {key: value for key, value in settings.items() if key in optimizer.defaults}
        optimizer.defaults.update(known)
        return optimizer

    return made


def apply_to_groups(groups: Sequence[dict[str, Any]], settings: Mapping[str, float]) -> None:
    """Change the settings of several parameter groups in place, in proportion to their values.

    The group with the largest value takes the new one.

    Raises:
        BilevelError: a group lacks a setting, or the values of a setting in (0, 1) differ.
    """
    for setting, value in settings.items():
        ratios = _proportions([settings_of(group).get(setting) for group in groups], setting)
        for group, ratio in zip(groups, ratios, strict=True):
            apply_settings(group, {setting: value * ratio})


def _proportions(values: Sequence[Any], setting: str) -> list[float]:
    """Return each value as a part of the largest."""
    if any(value is None for value in values) or len({float(value) for value in values}) == 1:
        return [1.0] * len(values)
    if setting not in SCALED:
        both = " and ".join(f"{float(value):g}" for value in dict.fromkeys(values))
        raise BilevelError(
            f"inner_optimizer.{setting}={both} differs between groups of parameters, and λ holds "
            f"one {setting} for all; give all groups the same {setting}, or do not tune it"
        )
    largest = max(float(value) for value in values)
    return [float(value) / largest for value in values]


def apply_settings(group: dict[str, Any], settings: Mapping[str, float]) -> None:
    """Change the settings of a parameter group in place.

    Raises:
        BilevelError: the group lacks a setting.
    """
    for setting, value in settings.items():
        if setting in ("beta1", "beta2") and "betas" in group:
            betas = list(group["betas"])
            betas[int(setting[-1]) - 1] = value
            group["betas"] = tuple(betas)
        elif setting in group:
            group[setting] = value
        else:
            raise BilevelError(
                f"inner_optimizer has no setting `{setting}`; choose an optimizer that has it, or "
                "do not tune it"
            )


def optimizer_settings(space: Space, hypers: Hypers) -> dict[str, float]:
    """Return the optimizer settings that λ holds, as numbers; this waits for the device."""
    return {
        setting: float(hypers[name])
        for name, domain in space.items()
        if (setting := domain.optimizer) is not None
    }


def settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a parameter group that an update may use."""
    used = (*OPTIMIZER_SETTINGS, "dampening", "nesterov", "centered")
    settings = {key: value for key, value in group.items() if key in used}
    if "betas" in group:
        settings["beta1"], settings["beta2"] = group["betas"]
    return settings
