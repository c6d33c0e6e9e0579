"""The settings of optimizers, and those among them that λ holds."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from bilevel import BilevelError, Hypers, Space
from bilevel.domains import OPTIMIZER_SETTINGS
from bilevel.name_patterns import Patterns, grouped
from bilevel.solvers.optim.optimized import MakeOptimizer

SCALED = ("lr", "weight_decay")
"""Settings of which groups of parameters may have different values while λ holds one."""


CONSTANTS = (
    "dampening",
    "nesterov",
    "centered",
    "decoupled_weight_decay",
    "momentum_decay",
    "lr_decay",
    "initial_accumulator_value",
)
"""Settings that an update uses and λ cannot hold."""

SELECTED = "weight_decay_params"
"""The key of a group of parameters with the patterns that selected them for their weight decay."""


class Part(NamedTuple):
    """The weight decay of the weights that patterns select; the key of its value in settings."""

    patterns: Patterns

    @property
    def key(self) -> str:
        """Return the patterns as one text, which a checkpoint keeps as it is."""
        return self.patterns if isinstance(self.patterns, str) else " ".join(self.patterns)


Values: TypeAlias = Mapping[str | Part, float]
"""Settings of an optimizer; `beta1` and `beta2` in place of `betas`."""


def configured(make: MakeOptimizer, settings: Values, names: Sequence[str] = ()) -> MakeOptimizer:
    """Return `make` with some settings of the optimizer changed.

    A weight decay of selected weights gives them a group of their own.

    Args:
        make: makes the optimizer.
        settings: the new values.
        names: the names of the parameters, in order; for patterns alone.

    Raises:
        BilevelError: the optimizer lacks a setting, or its groups of parameters have different
            values of a setting that cannot be scaled; it is raised when the optimizer is made.
    """
    if not settings:
        return make

    def made(params: Iterable[Tensor]) -> torch.optim.Optimizer:
        leaves = list(params)
        optimizer = make(leaves)
        if parts := [key.patterns for key in settings if isinstance(key, Part)]:
            _select(optimizer, parts, {id(p): n for p, n in zip(leaves, names, strict=True)})
        apply_to_groups(optimizer.param_groups, settings)
        known = {
            key: value
            for key, value in settings.items()
            if not isinstance(key, Part) and key in optimizer.defaults
        }
        optimizer.defaults.update(known)
        return optimizer

    return made


def _select(
    optimizer: torch.optim.Optimizer, parts: Sequence[Patterns], names: Mapping[int, str]
) -> None:
    """Give the weights that patterns select groups of their own, within the present groups."""
    chosen = grouped(
        {str(i): part for i, part in enumerate(parts)}, names.values(), "params", "weight"
    )
    for group in list(optimizer.param_groups):
        if "weight_decay" not in group:
            raise BilevelError(
                "inner_optimizer has no setting `weight_decay`; choose an optimizer that has it, "
                "or do not tune it"
            )
        for i, part in enumerate(parts):
            own = [p for p in group["params"] if chosen.get(names[id(p)]) == str(i)]
            if not own:
                continue
            group["params"] = [p for p in group["params"] if all(p is not other for other in own)]
            optimizer.add_param_group({**group, "params": own, SELECTED: Part(part).key})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def apply_to_groups(groups: Sequence[dict[str, Any]], settings: Values) -> None:
    """Change the settings of several parameter groups in place, in proportion to their values.

    The group with the largest value takes the new one.

    Raises:
        BilevelError: a group lacks a setting, or the values of a setting in (0, 1) differ.
    """
    for setting, value in settings.items():
        if isinstance(setting, Part):
            for group in groups:
                if group.get(SELECTED) == setting.key:
                    group["weight_decay"] = value
            continue
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


def optimizer_settings(space: Space, hypers: Hypers) -> dict[str | Part, float]:
    """Return the optimizer settings that λ holds, as numbers; this waits for the device."""
    return {
        setting if domain.params is None else Part(domain.params): float(hypers[name])
        for name, domain in space.items()
        if (setting := domain.optimizer) is not None
    }


class Decay(NamedTuple):
    """The weight decay of a group of parameters: factor · λ, or the factor if λ holds none."""

    hyper: str | None
    factor: float

    def value(self, hypers: Hypers) -> float | Tensor:
        """Return the weight decay at λ."""
        return self.factor if self.hyper is None else self.factor * hypers[self.hyper]


def decay_of(group: Mapping[str, Any], space: Space) -> Decay:
    """Return the weight decay of a group, as it was made at the initial λ."""
    own = float(group.get("weight_decay") or 0.0)
    for name, domain in space.items():
        selected = None if domain.params is None else Part(domain.params).key
        tuned = domain.optimizer == "weight_decay" and not domain.frozen
        if tuned and selected == group.get(SELECTED):
            return Decay(name, own / float(domain.initial()))
    return Decay(None, own)


def settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a parameter group that an update may use."""
    used = (*OPTIMIZER_SETTINGS, *CONSTANTS)
    settings = {key: value for key, value in group.items() if key in used}
    if "betas" in group:
        settings["beta1"], settings["beta2"] = group["betas"]
    return settings
