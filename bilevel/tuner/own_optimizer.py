"""A user's optimizer as the one that trains w, and the optimizers that follow its schedule."""

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.errors import BilevelError
from bilevel.space import Space

CYCLED = ("lr", "momentum", "betas")
"""Settings that PyTorch's schedules change."""


class OwnOptimizer:
    """Makes the optimizer of w: the user's instance for the module's own parameters.

    Other leaves get a new optimizer with the same settings and no memory: the copies of w in the
    dry run of a set-up, a second network (the penalty method), or a response Θ.

    Args:
        optimizer: the user's optimizer.
        module: the module whose trainable parameters it trains.

    Raises:
        BilevelError: it is no optimizer, it wraps another one, or it trains other tensors than
            those of `module`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise BilevelError(
                f"optimizer={type(optimizer).__name__} must be an instance of an optimizer of "
                "PyTorch; pass for example torch.optim.SGD(model.parameters(), lr=0.1)"
            )
        if isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            raise BilevelError(
                f"optimizer={type(optimizer).__name__} wraps another optimizer, whose steps the "
                "solver takes itself; pass the one inside, optimizer.optimizer"
            )
        self.optimizer = optimizer
        self.leaves = [p for p in module.parameters() if p.requires_grad]
        groups = optimizer.param_groups
        held = [(id(p), index) for index, group in enumerate(groups) for p in group["params"]]
        known = {id(p) for p in module.parameters()}
        if any(key not in known for key, _ in held):
            raise BilevelError(
                "optimizer trains a tensor that is no parameter of model, so it is not a part of "
                "w; give the optimizer model.parameters(), or attach one module that holds both"
            )
        place = dict(held)
        if missing := [
            name for name, p in module.named_parameters() if p.requires_grad and id(p) not in place
        ]:
            raise BilevelError(
                f"optimizer does not train `{missing[0]}`, but w holds it; give the optimizer all "
                "parameters, or freeze it in the module (requires_grad=False)"
            )
        self.places = [place[id(p)] for p in self.leaves]

    def __call__(self, leaves: Iterable[Tensor]) -> torch.optim.Optimizer:
        """Return the optimizer of `leaves`."""
        leaves = list(leaves)
        if len(leaves) == len(self.leaves):
            if all(a is b for a, b in zip(leaves, self.leaves, strict=True)):
                return self.optimizer
            if all(a.shape == b.shape for a, b in zip(leaves, self.leaves, strict=True)):
                return self._copy(leaves, self.places)
        rates = {base_rate(group) for group in self.optimizer.param_groups}
        if len(rates) > 1:
            both = " and ".join(f"{rate:g}" for rate in sorted(rates))
            raise BilevelError(
                f"optimizer has groups with lr={both}, and the response has one; give it an "
                "optimizer of its own (response_optimizer of the solver)"
            )
        return self._copy(leaves, [0] * len(leaves))

    def _copy(self, leaves: list[Tensor], places: Sequence[int]) -> torch.optim.Optimizer:
        """Return an optimizer of the same class and settings, without memory, hooks and schedule.

        Its constructor is not called, since the arguments of a user's class are unknown.
        """
        own = vars(self.optimizer)
        kept = {k: v for k, v in own.items() if k != "step" and not k.endswith("_hooks")}
        made = object.__new__(type(self.optimizer))
        vars(made).update(kept | {k: OrderedDict() for k in own if k.endswith("_hooks")})
        made.defaults = dict(self.optimizer.defaults)
        made.state = defaultdict(dict)
        made.param_groups = [
            group | {"params": [leaf for leaf, at in zip(leaves, places, strict=True) if at == i]}
            for i, group in enumerate(self.optimizer.param_groups)
            if i in places
        ]
        return made


class Followers:
    """Optimizers that follow the schedule of another one.

    A setting that was equal when they met stays equal. A learning rate that was another one keeps
    its ratio. With one group each, or as many groups as the leader, a group follows its own one;
    otherwise all follow the first.
    """

    def __init__(
        self, leader: torch.optim.Optimizer, followers: Sequence[torch.optim.Optimizer]
    ) -> None:
        self.leader = leader
        self.followers = followers
        self._equal = [
            {key for key in CYCLED if key in own and key in first and own[key] == first[key]}
            for own, first in self._pairs()
        ]
        self._rates = [(base_rate(own), base_rate(first)) for own, first in self._pairs()]

    def follow(self) -> None:
        """Give the followers the present settings of the leader."""
        for (own, first), equal, rates in zip(self._pairs(), self._equal, self._rates, strict=True):
            own.update({key: first[key] for key in equal})
            if "lr" not in equal and rates[1]:
                own["lr"] = rates[0] * (first["lr"] / rates[1])

    def _pairs(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        groups = self.leader.param_groups
        return [
            (own, groups[i if len(follower.param_groups) == len(groups) else 0])
            for follower in self.followers
            for i, own in enumerate(follower.param_groups)
        ]


def base_rate(group: dict[str, Any]) -> float:
    """Return the learning rate of a group before its schedule."""
    return float(group.get("initial_lr", group.get("lr", 0.0)))


def check_tuned_settings(optimizer: torch.optim.Optimizer, space: Space) -> None:
    """Require that a setting of the optimizer that λ holds has its initial value in both places.

    Raises:
        BilevelError: the values differ.
    """
    for name, domain in space.items():
        setting = domain.optimizer
        if setting is None:
            continue
        start = float(domain.initial())
        values = [group[setting] for group in optimizer.param_groups if setting in group]
        if any(abs(float(value) - start) > 1e-6 * abs(start) for value in values):
            raise BilevelError(
                f"space.{name}.init={start:g} differs from {setting}={float(values[0]):g} of the "
                "optimizer; give both the same value, and make a schedule after attach"
            )
