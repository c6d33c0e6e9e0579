"""Options of embeddings that change weights or gradients behind a solver's back."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bilevel.errors import Refused
from bilevel.params import Params

LOOKUPS = (F.embedding, F.embedding_bag, torch.embedding, torch.embedding_bag)
"""The functions that look rows of a table up."""

_POSITIONS: dict[Any, tuple[str, ...]] = {
    F.embedding: ("input", "weight"),
    F.embedding_bag: ("input", "weight"),
    torch.embedding: ("weight", "indices", "padding_idx", "scale_grad_by_freq", "sparse"),
    torch.embedding_bag: (
        *("weight", "indices", "offsets", "scale_grad_by_freq", "mode", "sparse"),
        *("per_sample_weights", "include_last_offset", "padding_idx"),
    ),
}


def lookup(func: Any, args: Any, kwargs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Return the table of a lookup and its options, as a torch-function mode receives them."""
    options = {**dict(zip(_POSITIONS[func], args, strict=False)), **kwargs}
    return options["weight"], options


def padding_row(table: Tensor, options: Mapping[str, Any]) -> int | None:
    """Return the row of the padding, counted from 0; None without one."""
    row, rows = options.get("padding_idx"), table.shape[0]
    if row is None or (row == -1 and "indices" in options):  # -1 is none for torch.embedding
        return None
    return row + rows if row < 0 else row


class EmbeddingOptions(TorchFunctionMode):
    """A context that refuses the options of embeddings with which no solver is exact.

    Args:
        params: w, whose names the refusals use.
    """

    def __init__(self, params: Params) -> None:
        super().__init__()
        self._names = {id(p): f"`{name}`" for name, p in params.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in LOOKUPS:
            self._require_plain(func, *lookup(func, args, kwargs))
        return func(*args, **kwargs)

    def _require_plain(self, func: Any, table: Tensor, options: Mapping[str, Any]) -> None:
        name = self._names.get(id(table), "a table")
        if (most := options.get("max_norm")) is not None:
            raise Refused(
                f"max_norm={most} of the embedding {name} rewrites its weights whenever it is "
                "called, also in an evaluation; set max_norm=None, and shorten the result e "
                f"instead: e * ({most} / e.norm(dim=-1, keepdim=True).clamp(min={most}))"
            )
        if options.get("scale_grad_by_freq"):
            raise Refused(
                f"scale_grad_by_freq=True of the embedding {name} replaces the gradient of L_T by "
                "another vector, so that w does not tend to a minimum of L_T; set "
                "scale_grad_by_freq=False"
            )
        if options.get("sparse"):
            raise Refused(
                f"sparse=True of the embedding {name} gives sparse gradients, which solvers do not "
                "take; set sparse=False"
            )
        row = padding_row(table, options)
        if row is None or "bag" in func.__name__ or id(table) not in self._names:
            return
        if bool(table[row].any()):
            raise Refused(
                f"row {row} of the embedding {name} is its padding_idx={options['padding_idx']}, "
                "but it is not 0, and no derivative in it exists; set this row to 0, or set "
                "padding_idx=None"
            )


def use_dense_gradients(module: nn.Module) -> None:
    """Switch `sparse=True` off in the embeddings of a module; the values stay the same."""
    for layer in module.modules():
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
            layer.sparse = False
