"""Optimizers by name in a configuration: `solver.inner_optimizer=adam`."""

from collections.abc import Mapping
from typing import Any

import torch
from hydra.core.override_parser.types import Override

from bilevel.errors import BilevelError
from bilevel.text import near

OPTIMIZERS = {
    name.lower(): name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name != "Optimizer"
}
"""PyTorch's optimizers by their names in lower case."""


def optimizer_overrides(override: Override) -> list[str]:
    """Return the overrides that put a node in place of the name of an optimizer.

    Further overrides can then change its settings. The result is [] for any other override, and for
    a sweep over names, which `with_named_optimizers` replaces in each run.
    """
    group, _, key = override.key_or_group.rpartition(".")
    name = override.value()
    if group != "solver" or not key.endswith("_optimizer") or not isinstance(name, str):
        return []
    node = _node(key, name, {"inner": "'${lr.inner}'", "outer": "'${lr.outer}'"})
    settings = ", ".join(f"{setting}: {value}" for setting, value in node.items())
    place = f"++{override.key_or_group}"
    return [f"{place}=null", f"{place}={{{settings}}}"]  # a node would be merged into the other


def with_named_optimizers(config: dict[str, Any]) -> dict[str, Any]:
    """Return a resolved configuration in which names of optimizers are nodes.

    An optimizer that is given by name has PyTorch's defaults, and the learning rate `lr.inner`, or
    `lr.outer` for λ and its scale.

    Example:
        >>> solver = {"inner_optimizer": "adam"}
        >>> config = {"lr": {"inner": 0.1, "outer": 0.2}, "solver": solver}
        >>> with_named_optimizers(config)["solver"]["inner_optimizer"]
        {'_target_': 'torch.optim.Adam', '_partial_': True, 'lr': 0.1}

    Raises:
        BilevelError: PyTorch has no such optimizer.
    """
    solver = config.get("solver")
    if not isinstance(solver, dict):
        return config
    named = {
        key: _node(key, name, config["lr"])
        for key, name in solver.items()
        if str(key).endswith("_optimizer") and isinstance(name, str)
    }
    return config | {"solver": solver | named}


def _node(key: str, name: str, rates: Mapping[str, Any]) -> dict[str, Any]:
    kind = OPTIMIZERS.get(name.lower())
    if kind is None:
        raise BilevelError(
            f"solver.{key}={name} is no optimizer of PyTorch{near(name.lower(), OPTIMIZERS)}; "
            f"choose from {', '.join(sorted(OPTIMIZERS))}, or give a node with _target_ and "
            "_partial_"
        )
    level = "outer" if key in ("outer_optimizer", "scale_optimizer") else "inner"
    return {"_target_": f"torch.optim.{kind}", "_partial_": True, "lr": rates[level]}
