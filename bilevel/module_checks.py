"""Checks and copies of a user's module, where `ModuleProblem` receives it."""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from bilevel.errors import BilevelError
from bilevel.text import describe

_WRAPPERS = {
    "DataParallel": "pass the module inside it, `.module`; `torchrun` trains on several devices",
    "DistributedDataParallel": "pass the module inside it, `.module`; `torchrun` trains on several "
    "devices",
    "FullyShardedDataParallel": "pass the module before it is sharded",
    "FSDPModule": "pass the module before it is sharded",
    "OptimizedModule": "pass the module before torch.compile, `._orig_mod`",
    "ScriptModule": "pass the module that it was made from, without torch.jit",
}
"""The advice for each class of modules whose weights cannot be replaced in a call."""

_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.sparse")


def check_module(module: nn.Module) -> None:
    """Require a module whose weights exist and can be replaced in every call.

    Raises:
        BilevelError: a layer is wrapped, scripted, compiled, quantized, lazy or without values.
    """
    for name, layer in module.named_modules():
        where = f"`{name}`" if name else "itself"
        kind = type(layer).__name__
        wrapper = next((c.__name__ for c in type(layer).__mro__ if c.__name__ in _WRAPPERS), None)
        if wrapper is not None:
            raise _refusal(module, f"is wrapped: {where} is a {kind}", _WRAPPERS[wrapper])
        if getattr(layer, "_compiled_call_impl", None) is not None:
            advice = "pass the module before you call `.compile()`"
            raise _refusal(module, f"is compiled in place: {where}, a {kind}", advice)
        if type(layer).__module__.startswith(_QUANTIZED):
            advice = "pass the float module, and quantize the trained one"
            raise _refusal(module, f"is quantized: {where} is a {kind} without gradient", advice)
    tensors = (*module.named_parameters(), *module.named_buffers())
    for name, tensor in tensors:
        if is_lazy(tensor):
            advice = "call the module once on a batch before you pass or return it"
            raise _refusal(module, f"is lazy: `{name}` has no shape yet", advice)
        if tensor.is_meta:
            advice = "create it on the CPU, or call `to_empty(device='cpu')` and initialize it"
            raise _refusal(module, f"has no values: `{name}` is on the meta device", advice)


def own_copy(module: nn.Module) -> nn.Module:
    """Return a copy of the module that a user passed.

    Raises:
        BilevelError: it cannot be copied.
    """
    try:
        return copy.deepcopy(module, _computed(module))
    except Exception as error:  # the copy of a user's own attribute
        advice = "pass a function that returns a new module"
        raise _refusal(module, _culprit(module, error), advice) from None


def without_weights(module: nn.Module, build: Callable[[], nn.Module]) -> nn.Module:
    """Return a copy whose parameters and buffers have shapes and no values.

    Every call brings its own values. `torch.utils.checkpoint` recomputes after the call and would
    use the module's own. It then fails, where initial weights would give a wrong gradient without
    an error. Instead of a module that cannot be copied, the next one of `build` is used.

    Raises:
        BilevelError: it cannot be copied, and `build` returns no new one.
    """
    memo = _computed(module) | {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()
    }
    memo |= {id(b): b.detach().to("meta") for b in module.buffers()}
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        fresh = build()
        shared = {id(m) for m in module.modules()} & {id(m) for m in fresh.modules()}
        if shared:
            what = f"{_culprit(module, error)}, and the function returns the same layers again"
            raise _refusal(module, what, "create all layers inside the function") from None
    memo = {}
    placeholders = _computed(fresh)
    for layer in fresh.modules():
        vars(layer).update({k: placeholders.get(id(v), v) for k, v in vars(layer).items()})
        for name, p in layer._parameters.items():
            if p is not None:
                meta = nn.Parameter(p.detach().to("meta"), p.requires_grad)
                layer._parameters[name] = memo.setdefault(id(p), meta)
        for name, b in layer._buffers.items():
            if b is not None:
                layer._buffers[name] = memo.setdefault(id(b), b.detach().to("meta"))
    return fresh


class Computed:
    """Stands for a tensor that a layer computed from its weights, until a call computes it anew.

    `torch.nn.utils.weight_norm` and `prune` compute such an attribute before every call.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = pytree.tree_leaves((args, kwargs or {}))
        raise next(leaf for leaf in leaves if isinstance(leaf, Computed))._error()

    def __getattr__(self, attribute: str) -> Any:
        raise AttributeError(attribute) if attribute.startswith("_") else self._error()

    def _error(self) -> BilevelError:
        return BilevelError(
            f"the attribute `{self._name}` of the module was computed from its weights before the "
            "call, so it does not follow w; compute it in `forward`"
        )


def computed_attributes(module: nn.Module) -> list[tuple[nn.Module, str, Computed]]:
    """Return the placeholders in a copied module, each with its layer and its name."""
    return [
        (layer, name, value)
        for layer in module.modules()
        for name, value in vars(layer).items()
        if isinstance(value, Computed)
    ]


def _computed(module: nn.Module) -> dict[int, Any]:
    """Return a placeholder for every attribute that is a computed tensor, by its id."""
    return {
        id(value): Computed(f"{path}.{name}" if path else name)
        for path, layer in module.named_modules()
        for name, value in vars(layer).items()
        if isinstance(value, Tensor) and not value.is_leaf
    }


def _culprit(module: nn.Module, error: Exception) -> str:
    """Return what cannot be copied: the first such attribute, or the error of the whole."""
    for name, layer in module.named_modules():
        for key, value in vars(layer).items():
            if key in ("_parameters", "_buffers", "_modules"):
                continue
            try:
                copy.deepcopy(value)
            except Exception:  # a user's attribute may raise anything
                place = f"`{name}.{key}`" if name else f"`{key}`"
                return f"cannot be copied: its attribute {place} is a {type(value).__name__}"
    return f"cannot be copied ({describe(error)})"


def _refusal(module: nn.Module, what: str, advice: str) -> BilevelError:
    return BilevelError(f"module={type(module).__name__} {what}; {advice}")
