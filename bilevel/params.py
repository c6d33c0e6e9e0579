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
"""What a step or an evaluation tells, by name."""


class PerExampleWeight:
    """A weight that a solver lets vary from example to example without forming it: a mixin of a subclass of Tensor."""

    def parts(self) -> tuple[Tensor, ...]:
        """The tensors that it is made of; the last has the example axis, first."""
        raise NotImplementedError

    def with_parts(self, *parts: Tensor) -> Tensor:
        """The same weight of other `parts`, of some of the examples for instance."""
        raise NotImplementedError


def squared_norm(params: Params, weights: Tensor | None = None) -> Tensor:
    """‖w‖² summed over `params`, or Σ_i c_i w_i²: [] for plain weights, [B] for weights that vary from example to example.

    Args:
        params: one at least.
        weights: c, one number for each entry of w: [m], flat in the order of `params`.

    Example:
        >>> squared_norm({"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
        tensor(6.)
        >>> squared_norm({"weight": torch.ones(1, 2), "bias": torch.ones(1)}, torch.tensor([1.0, 2.0, 4.0]))
        tensor(7.)
    """
    if not params:
        raise BilevelError(
            "squared_norm of no parameters: the selection that was passed is empty; select at least one"
        )
    if weights is None:
        terms = [squared_norm_of(p) for p in params.values()]
    else:
        if weights.shape != (size := sum(p.numel() for p in params.values()),):
            raise BilevelError(
                f"weights are {list(weights.shape)} and the parameters have {size} entries; give one for each"
            )
        parts = weights.split([p.numel() for p in params.values()])
        terms = [squared_norm_of(p, part) for p, part in zip(params.values(), parts, strict=True)]
    return sum(terms[1:], start=terms[0])


def squared_norm_of(p: Tensor, weights: Tensor | None = None) -> Tensor:
    """‖p‖² of one tensor, or with flat weights; a tensor subclass may answer it its own way (`__torch_function__`)."""
    if has_torch_function_unary(p):
        return handle_torch_function(squared_norm_of, (p,), p, weights)
    flat = p.reshape(-1)
    return (
        flat.dot(flat) if weights is None else weights.dot(flat.square())
    )  # dot: no temporary, unlike (p * p).sum()


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


def widen(value: Tensor) -> Tensor:
    """Return the detached values in float64, for exact sums; in float32 on MPS, its widest type."""
    return value.detach().to(torch.float32 if value.device.type == "mps" else torch.float64)
