"""A record of the torch functions that a network calls."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bilevel import Problem
from bilevel.embedding_options import LOOKUPS, lookup, padding_row
from bilevel.params import Batch, Carry, Hypers, Params

DERIVATIVES = {
    torch.autograd.grad,
    torch.autograd.backward,
    Tensor.backward,
    torch._VF._make_dual,
}
"""Calls by which a network differentiates itself; `torch.func` makes them too."""

TABLES = {
    *(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__, Tensor.add_),
    *(Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.repeat, Tensor.__getitem__),
}
"""Calls by which a weight [1, …, n] is used as a table of positions, or as a token."""


class CallRecorder(TorchFunctionMode):
    """Run `predict` once in training mode and record the functions that it calls.

    Attributes:
        functions: the torch functions that were called.
        axes: the axis of the scale, by name, for each weight that was used as a table of vectors:
            its scale belongs to the columns, not to the vocabulary or to the only entry of axis 0.
        padding: the row of such a table that is never trained (`padding_idx`), by name.
    """

    def __init__(
        self,
        problem: Problem,
        hypers: Hypers,
        params: Params,
        carry: Carry,
        batch: Batch,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.functions: set[Any] = set()
        self.axes: dict[str, int] = {}
        self.padding: dict[str, int] = {}
        self._names = {id(p): name for name, p in params.items()}
        with torch.no_grad(), self:
            problem.predict(hypers, params, carry, batch, train=True, generator=generator)

    @property
    def differentiates(self) -> bool:
        """Return whether the network takes derivatives of itself (forces, for example)."""
        return not self.functions.isdisjoint(DERIVATIVES)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.functions.add(func)
        if func in LOOKUPS:
            table, options = lookup(func, args, kwargs)
            if (name := self._names.get(id(table))) is not None:
                self.axes[name] = 1
                if (row := padding_row(table, options)) is not None:
                    self.padding[name] = row
        if func in TABLES:
            for x in args:
                name = self._names.get(id(x))
                if name is not None and x.ndim > 1 and x.shape[0] == 1:
                    self.axes[name] = x.ndim - 1
        return func(*args, **kwargs)
