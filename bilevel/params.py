"""Weights and hyperparameters as dictionaries of tensors, and the few functions that both solvers and problems use on them."""

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary
from torch.utils import _pytree as pytree

from bilevel.errors import BilevelError

Params: TypeAlias = dict[str, Tensor]
"""w, named as in `torch.nn.Module.named_parameters`."""

Hypers: TypeAlias = dict[str, Tensor]
"""λ by name, in its own units; a leaf is [*shape], or [B, *shape] when drawn per example."""

Carry: TypeAlias = dict[str, Tensor]
"""What `predict` passes on without its being optimized: batch-norm statistics, recurrent state."""

Batch: TypeAlias = Any
"""A pytree of tensors whose first axis is the example axis."""

Prediction: TypeAlias = Any
"""A tensor or a pytree of tensors."""

Metrics: TypeAlias = dict[str, Tensor]


def squared_norm(params: Params) -> Tensor:
    """‖w‖² summed over `params`: [] for plain weights, [B] for weights that vary from example to example.

    Example:
        >>> squared_norm({"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
        tensor(6.)
    """
    if not params:
        raise BilevelError("squared_norm of no parameters: the selection that was passed is empty; select at least one")
    terms = [squared_norm_of(p) for p in params.values()]
    return sum(terms[1:], start=terms[0])


def squared_norm_of(p: Tensor) -> Tensor:
    """‖p‖² of one tensor; a tensor subclass may answer it its own way (`__torch_function__`)."""
    if has_torch_function_unary(p):
        return handle_torch_function(squared_norm_of, (p,), p)
    flat = p.reshape(-1)
    return flat.dot(flat)  # one kernel and no temporary, unlike (p * p).sum()


def along_examples(leaf: Tensor, like: Tensor) -> Tensor:
    """View a hyperparameter leaf [] or [B] so that it broadcasts against `like` [B, …].

    Example:
        >>> along_examples(torch.zeros(4), torch.zeros(4, 3, 2)).shape
        torch.Size([4, 1, 1])
    """
    return leaf if leaf.ndim == 0 else leaf.reshape(-1, *[1] * (like.ndim - 1))


def count_examples(batch: Batch) -> int:
    """Length of the example axis: the first axis of the first tensor of the batch; 1 for a batch without tensors."""
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf.shape[0]
    return 1


def to_device(tree: Any, device: torch.device | str) -> Any:
    """The same pytree with its tensors on `device`."""
    return pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, tree)


def detached(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, cut from the graph."""
    return {name: t.detach() for name, t in tensors.items()}
