"""A mode that follows the fields of a batch through PyTorch's functions, up to a failing one."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from bilevel.cross_entropy import cross_entropy
from bilevel.data.fields import all_finite, tensors
from bilevel.embedding_options import LOOKUPS, lookup
from bilevel.params import Batch, Params

CLASS_LOSSES = (F.cross_entropy, F.nll_loss, cross_entropy)
GATHERS = (torch.gather, Tensor.gather)
"""Functions with which a loss takes the scores of the classes itself."""
PAIRED_LOSSES = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
"""Losses that pair the entries of two tensors, and broadcast where their shapes differ."""


class Call(NamedTuple):
    """One call of a PyTorch function, with the fields and the weights among its arguments.

    Attributes:
        name: the name of the function.
        func: the function.
        args: its positional arguments.
        kwargs: its arguments by name.
        fields: for each tensor argument that follows from the batch, the names of these fields.
        weights: the names of the weights among the arguments, with the tensors.
    """

    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    fields: list[tuple[Tensor, frozenset[str]]]
    weights: dict[str, Tensor]

    def argument(self, position: int, name: str) -> Any:
        """Return an argument by its position or its name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name)


class Calls(TorchFunctionMode):
    """Follow the fields of a batch; note the call that raises, and the first that is not finite.

    A loss of [n] and [n, 1] would pair every example with every other one; it raises here.

    On a GPU a class or an index out of range would end the process group of the device in an error
    that no later call survives. So such arguments are compared with the range before the call.

    Args:
        batch: the batch.
        params: w.
        watch: look for the first result that is not finite; this waits for the device.

    Attributes:
        failed: the last call that raised, or None.
        not_finite: the first call with finite arguments and another result, or None.
        opened: the entry of a batch that is one tensor, if the problem took `batch[entry]`.
    """

    def __init__(self, batch: Batch, params: Params, *, watch: bool = False) -> None:
        super().__init__()
        self.batch = batch
        self.watch = watch
        self.failed: Call | None = None
        self.not_finite: Call | None = None
        self.opened: int | None = None
        self._weights = {id(p): name for name, p in params.items()}
        self._fields = {id(t): frozenset([name]) for name, t in tensors(batch).items()}
        self._kept: list[Tensor] = []  # so that no id is used twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__getitem__ and args[0] is self.batch and type(args[1]) is int:
            self.opened = args[1]
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        try:
            _require_range(func, args, kwargs)
            _require_pairs(func, args, kwargs)
            result = func(*args, **kwargs)
        except Exception:  # noted, and raised again
            self.failed = self._call(func, args, kwargs, given)
            raise
        origin = frozenset[str]().union(*(self._fields.get(id(t), ()) for t in given))
        made = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)] if origin else []
        for t in made:
            if id(t) not in self._fields:
                self._fields[id(t)] = origin
                self._kept.append(t)
        looks = self.watch and self.not_finite is None
        if looks and not all(map(all_finite, made)) and all(map(all_finite, given)):
            self.not_finite = self._call(func, args, kwargs, given)
        return result

    def _call(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Call:
        fields = [(t, self._fields[id(t)]) for t in given if id(t) in self._fields]
        weights = {self._weights[id(t)]: t for t in given if id(t) in self._weights}
        return Call(getattr(func, "__name__", "a call"), func, args, kwargs, fields, weights)


def loss_arguments(args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the scores and the target of a loss."""
    named = dict(zip(("input", "target"), args, strict=False)) | dict(kwargs)
    named = {"input": kwargs.get("logits"), "target": kwargs.get("labels")} | named
    return named["input"], named["target"]


def gathered(args: Any, kwargs: Mapping[str, Any]) -> tuple[int, Tensor] | None:
    """Return the entries from which `gather` takes, as a number, and the index; None if wrong."""
    named = dict(zip(("input", "dim", "index"), args, strict=False)) | dict(kwargs)
    try:
        return named["input"].shape[named["dim"]], named["index"]
    except (LookupError, AttributeError, TypeError):  # the function itself raises
        return None


def class_outside(scores: Tensor, target: Tensor, kwargs: Mapping[str, Any]) -> int | None:
    """Return a class that has no score, or None."""
    counted = target[target != kwargs.get("ignore_index", -100)]
    return outside(counted, scores.shape[1 if scores.ndim > 1 else 0])


def indices(options: Mapping[str, Any]) -> Any:
    """Return the indices among the options of a lookup."""
    return options.get("input", options.get("indices"))


def outside(index: Tensor, size: int) -> int | None:
    """Return an index that is not in [0, size), or None."""
    if index.numel() == 0 or index.is_floating_point() or index.is_complex():
        return None
    try:
        low, high = (int(x) for x in index.aminmax())
    except RuntimeError:  # a tensor inside torch.func.vmap has no value yet
        return None
    return low if low < 0 else high if high >= size else None


def _require_range(func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise what the CPU raises, where the device of the arguments would not survive the call."""
    if func in CLASS_LOSSES:
        scores, target = loss_arguments(args, kwargs)
        if target.device.type == "cpu" or target.dtype != torch.int64:
            return
        if (bad := class_outside(scores, target, kwargs)) is not None:
            raise IndexError(f"Target {bad} is out of bounds.")
    elif func in GATHERS and (found := gathered(args, kwargs)) is not None:
        size, index = found
        if index.device.type != "cpu" and outside(index, size) is not None:
            raise IndexError("index out of bounds")
    elif func in LOOKUPS:
        table, options = lookup(func, args, kwargs)
        index = indices(options)
        if index.device.type != "cpu" and outside(index, len(table)) is not None:
            raise IndexError("index out of range in self")


def _require_pairs(func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise if a loss would expand both its tensors, as [n] and [n, 1] become [n, n]."""
    if func not in PAIRED_LOSSES:
        return
    both = loss_arguments(args, kwargs)
    if not all(isinstance(t, Tensor) for t in both):
        return
    try:
        shape = torch.broadcast_shapes(*(t.shape for t in both))
    except RuntimeError:  # the loss itself raises
        return
    if shape.numel() > max(t.numel() for t in both):
        raise ValueError(f"both would be expanded to {list(shape)}")
