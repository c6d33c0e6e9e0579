"""Calls of a module with weights and buffers from outside."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.errors import BilevelError
from bilevel.module_checks import computed_attributes

Slot = tuple[dict[str, Any], str]
"""The dictionary of a submodule that holds a tensor, and the name of the tensor in it."""


class ModuleCall:
    """A module as a function of its weights and buffers: `torch.func.functional_call`.

    The places of all tensors are looked up once, and tied tensors have several. PyTorch's function
    looks them up in every call, which takes longer than a small network itself. On CUDA a recurrent
    layer would rewrite new weights in place as one block for cuDNN; here the weights are left where
    they are.

    Args:
        module: the module.

    Example:
        >>> call = ModuleCall(nn.Linear(2, 1))
        >>> weights = {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}
        >>> call(weights, (torch.tensor([1.0, 2.0]),), {})
        tensor([3.])
    """

    def __init__(self, module: nn.Module) -> None:
        self.__setstate__(module)

    def __getstate__(self) -> nn.Module:
        return self.module

    def __setstate__(self, module: nn.Module) -> None:
        self.module = module  # a copy of a module has dictionaries of its own
        for layer in module.modules():
            if isinstance(layer, nn.RNNBase):
                vars(layer)["flatten_parameters"] = _leave_weights
        self._slots = _slots(module)
        self._computed = computed_attributes(module)
        # scripted modules wrap their dictionaries, and PyTorch's function refuses some modules
        self._plain = not any(
            isinstance(m, (torch.jit.ScriptModule, nn.DataParallel)) for m in module.modules()
        )

    def __call__(self, tensors: dict[str, Tensor], args: Any, kwargs: dict[str, Any]) -> Any:
        """Return the module's output at `tensors`, by name.

        A tensor that the module assigns in the call, instead of writing into the given one, takes
        its place in `tensors`.
        """
        slots = self._slots
        if not self._plain or not tensors.keys() <= slots.keys():
            return torch.func.functional_call(self.module, tensors, args, kwargs)
        own: list[tuple[str, dict[str, Any], str, Any]] = []
        try:
            for name, tensor in tensors.items():
                for owner, key in slots[name]:
                    own.append((name, owner, key, owner[key]))
                    owner[key] = tensor
            return self.module(*(args if isinstance(args, tuple) else (args,)), **kwargs)
        finally:
            for name, owner, key, _ in own:
                tensors[name] = owner.get(key, tensors[name])
            for _, owner, key, before in reversed(own):
                owner[key] = before
            for layer, name, placeholder in self._computed:  # `weight_norm` or `prune` wrote there
                vars(layer)[name] = placeholder


def arguments(given: Any) -> tuple[Any, dict[str, Any]]:
    """Return the positional and the keyword arguments that `ModuleProblem.inputs` gave.

    Raises:
        BilevelError: it gave something else.
    """
    if isinstance(given, (tuple, list)) and len(given) == 2 and isinstance(given[1], Mapping):
        return given[0], dict(given[1])
    entries = [type(entry).__name__ for entry in given] if isinstance(given, (tuple, list)) else []
    shown = type(given).__name__ + (f" of {', '.join(entries)}" if entries else "")
    raise BilevelError(
        f"`inputs` returns a {shown}; return a tuple of the positional arguments and a dict of "
        "those by keyword, ((x,), {})"
    )


def _leave_weights() -> None:
    """Do nothing, in place of `nn.LSTM.flatten_parameters`: the weights belong to the caller."""


def _slots(module: nn.Module) -> dict[str, list[Slot]]:
    """Return the places of each tensor by each of its names; its own place is the last one."""
    places: dict[str, Slot] = {}
    for prefix, submodule in module.named_modules(remove_duplicate=False):
        for owner in (submodule._parameters, submodule._buffers):
            for key, tensor in owner.items():
                if tensor is not None:
                    places[f"{prefix}.{key}" if prefix else key] = owner, key
    tied: dict[int, list[Slot]] = {}
    for owner, key in places.values():
        known = tied.setdefault(id(owner[key]), [])
        if not any(owner is other and key == name for other, name in known):
            known.append((owner, key))
    return {
        name: sorted(tied[id(owner[key])], key=lambda slot: slot[0] is owner and slot[1] == key)
        for name, (owner, key) in places.items()
    }
