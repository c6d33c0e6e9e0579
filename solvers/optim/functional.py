"""An optimizer of `torch.optim` as a pure, differentiable function."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel import Hypers, Params, Refused, Space
from bilevel.solvers.optim.optimized import Optimized
from bilevel.solvers.optim.settings import SELECTED, Decay, decay_of, settings_of
from bilevel.solvers.optim.updates import UPDATES, Settings, Slots, is_plain, sgd, square_root


class Moments(NamedTuple):
    """The memory of an optimizer for each weight, and the number of steps that the weight took.

    A step without a gradient does not count.
    """

    slots: dict[str, Slots]
    steps: dict[str, int]


DECOUPLED = "decoupled_weight_decay"

UNKNOWN = ("amsgrad", "capturable", "fused", DECOUPLED)
"""Options of PyTorch's optimizers that no function here has."""


class FunctionalOptimizer:
    """The optimizer of an `Optimized` as a function, with its clipping, settings and memory.

    A learning rate that λ holds follows its schedule too: it is multiplied by the factor by which
    the schedule has changed the initial learning rate.

    Args:
        optimized: the weights and their optimizer.
        space: the space of the problem; the optimizer settings in it replace those of the
            optimizer.

    Attributes:
        tuned: the optimizer settings that λ holds, by hyperparameter. A frozen hyperparameter is a
            constant of the optimizer and not listed.

    Raises:
        Refused: the optimizer or one of its options has no differentiable form here, or the
            optimizer lacks a setting that the space tunes.
    """

    def __init__(self, optimized: Optimized, space: Space) -> None:
        kind, group = type(optimized.optimizer), optimized.optimizer.param_groups[0]
        if kind not in UPDATES:
            known = ", ".join(f"torch.optim.{k.__name__}" for k in UPDATES)
            raise Refused(
                f"inner_optimizer={kind.__name__} has no differentiable form here; choose one of "
                f"{known}"
            )
        decoupled = (torch.optim.AdamW, torch.optim.NAdam)
        supported = {DECOUPLED} if kind in decoupled else set()
        if odd := [name for name in UNKNOWN if group.get(name) and name not in supported]:
            raise Refused(
                f"inner_optimizer.{odd[0]}=true of {kind.__name__} has no differentiable form "
                "here; leave it out"
            )
        groups = optimized.optimizer.param_groups
        if any(_without_decay(other) != _without_decay(group) for other in groups):
            raise Refused(
                "inner_optimizer has several groups of parameters that differ in more than "
                "weight_decay, which have no differentiable form here; give all of them the same "
                "settings"
            )
        self.optimized = optimized
        self.space = space
        self.update = UPDATES[kind]
        # a schedule stores the initial value, and may have changed the present one already
        self.base_lr = group.get("initial_lr", group["lr"])
        self.tuned = {
            name: domain.optimizer
            for name, domain in space.items()
            if domain.optimizer is not None and not domain.frozen
        }
        self._decays: dict[str, Decay] = {}
        if len(groups) > 1:
            names = {id(leaf): name for name, leaf in optimized.tensors.items()}
            for each in groups:
                decay = decay_of(each, space)
                self._decays |= {names[id(leaf)]: decay for leaf in each["params"]}
        for name, setting in self.tuned.items():
            if setting not in settings_of(group):
                raise Refused(
                    f"`{name}` sets `{setting}`, but inner_optimizer={kind.__name__} has no such "
                    "setting; choose another inner_optimizer"
                )

    def read(self) -> tuple[Params, Moments]:
        """Return the weights and the memory as constants.

        They are views; a step of the optimizer itself changes them in place.
        """
        counts = {name: int(state.get("step", 0)) for name, state in self._states()}  # on the host
        return self.optimized.detached(), Moments(self.slots(), counts)

    def slots(self) -> dict[str, Slots]:
        """Return the memory of the optimizer for each weight, without the numbers of steps."""
        return {
            name: {
                key: value for key, value in state.items() if key != "step" and value is not None
            }
            for name, state in self._states()
        }

    def _states(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the state of the optimizer for each weight, by name."""
        states = self.optimized.optimizer.state
        return [(name, states.get(leaf, {})) for name, leaf in self.optimized.tensors.items()]

    @torch.no_grad()
    def write(self, params: Params, moments: Moments) -> None:
        """Set the weights and the memory of the optimizer itself."""
        if any("initial_lr" in group for group in self.optimized.optimizer.param_groups):
            # the leaves have no gradients, so this step changes nothing; the schedule warns without
            self.optimized.optimizer.step()
        for name, leaf in self.optimized.tensors.items():
            leaf.copy_(params[name])
            # copies: a graph may hold the old tensors, and autograd may return shared memory
            state = {
                key: value.clone(memory_format=torch.contiguous_format)
                for key, value in moments.slots[name].items()
            }
            if self.update is not sgd and state:
                count = float(moments.steps[name])
                state["step"] = torch.full((), count, dtype=torch.float32, device="cpu")
            self.optimized.optimizer.state[leaf] = state

    def settings(self, hypers: Hypers) -> Settings:
        """Return the settings of the optimizer, with those that λ holds in their place."""
        own = settings_of(group := self.optimized.optimizer.param_groups[0])
        own |= {setting: hypers[name] for name, setting in self.tuned.items()}
        with torch.enable_grad():  # a checkpointed step reads them in a custom backward
            if self._decays:
                own["weight_decay"] = {n: d.value(hypers) for n, d in self._decays.items()}
            if "lr" in self.tuned.values() and group["lr"] != self.base_lr:
                own["lr"] = own["lr"] * (group["lr"] / self.base_lr)
        return own

    def step(
        self,
        params: Params,
        moments: Moments,
        gradients: Iterable[Tensor | None],
        settings: Settings,
    ) -> tuple[Params, Moments]:
        """Return the weights and the memory after one step.

        Args:
            params: the weights.
            moments: the memory.
            gradients: one for each weight, in order; None for a weight that does not move.
            settings: the settings of the step.
        """
        gradients = self._clipped(list(gradients))
        after, slots, steps = dict(params), dict(moments.slots), dict(moments.steps)
        decays = self._decays and settings["weight_decay"]
        plain = self.update is sgd and not decays and is_plain(settings)
        for name, gradient in zip(params, gradients, strict=True):
            if gradient is None:
                continue
            steps[name] += 1
            if plain:
                after[name] = torch.add(params[name], gradient, alpha=-settings["lr"])
            else:
                own = {**settings, "weight_decay": decays[name]} if decays else settings
                after[name], slots[name] = self.update(
                    params[name], gradient, slots[name], steps[name], own
                )
        return after, Moments(slots, steps)

    def _clipped(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        if self.optimized.clip_norm is None:
            return gradients
        squares = torch.stack(
            [g.reshape(-1).dot(g.reshape(-1)) for g in gradients if g is not None]
        )
        factor = (self.optimized.clip_norm / (square_root(squares.sum()) + 1e-6)).clamp(max=1.0)
        return [None if g is None else g * factor for g in gradients]


def _without_decay(group: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k not in ("params", "weight_decay", SELECTED)}
