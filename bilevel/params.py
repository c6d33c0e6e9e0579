"""Weights and hyperparameters as dictionaries of tensors, with the functions on them."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary
from torch.utils import _pytree as pytree

from bilevel.errors import BilevelError
from bilevel.name_patterns import grouped

Params: TypeAlias = dict[str, Tensor]
"""w, named as in `torch.nn.Module.named_parameters`."""

Hypers: TypeAlias = dict[str, Tensor]
"""λ by name, in its own units; a leaf is [*shape], or [B, *shape] when drawn per example."""

Carry: TypeAlias = dict[str, Tensor]
"""State that `predict` passes on and nobody optimizes: batch-norm statistics, recurrent state."""

Batch: TypeAlias = Any
"""A pytree of tensors whose first axis is the example axis."""

Prediction: TypeAlias = Any
"""A tensor or a pytree of tensors."""

Metrics: TypeAlias = dict[str, Tensor]
"""Scalars that a step or an evaluation reports, by name."""


class PerExampleWeight:
    """A weight that varies from example to example without being formed.

    A solver mixes this class into a subclass of Tensor.
    """

    def parts(self) -> tuple[Tensor, ...]:
        """Return the tensors that make up the weight; the last has the example axis first."""
        raise NotImplementedError

    def with_parts(self, *parts: Tensor) -> Tensor:
        """Return the same weight with other `parts`, for instance those of some examples."""
        raise NotImplementedError


def squared_norm(
    params: Params, weights: Tensor | Mapping[str, Tensor | float] | None = None
) -> Tensor:
    """Return ‖w‖² summed over `params`, or Σ_i c_i w_i² with coefficients c.

    The result is [] for plain weights and [B] for weights that vary from example to example.

    Args:
        params: at least one parameter.
        weights: c, one number for each entry of w: [m], flat in the order of `params`. Or one
            number, [] or [B], for each pattern of names: `{"0.*": low, "*.bias": 0.0}`; weights
            that no pattern selects have c = 0.

    Raises:
        BilevelError: `params` is empty, `weights` has another size than w, or a pattern selects no
            weight or one that another pattern selects.

    Example:
        >>> squared_norm({"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
        tensor(6.)
        >>> params = {"weight": torch.ones(1, 2), "bias": torch.ones(1)}
        >>> squared_norm(params, torch.tensor([1.0, 2.0, 4.0]))
        tensor(7.)
        >>> squared_norm(params, {"*weight": torch.tensor(0.5)})
        tensor(1.)
    """
    if not params:
        raise BilevelError(
            "params={} of squared_norm must hold at least one parameter; select some weights"
        )
    if weights is None:
        terms = [squared_norm_of(p) for p in params.values()]
    elif isinstance(weights, Mapping):
        chosen = grouped({key: key for key in weights}, params, "weights", "weight")
        parts_of = {key: {n: params[n] for n in chosen if chosen[n] == key} for key in weights}
        terms = [weights[key] * squared_norm(part) for key, part in parts_of.items()]
    else:
        if weights.shape != (size := sum(p.numel() for p in params.values()),):
            layers = list(dict.fromkeys(name.rpartition(".")[0] or name for name in params))
            example = ", ".join(f"'{name}*': c[..., {i}]" for i, name in enumerate(layers[:2]))
            raise BilevelError(
                f"weights of squared_norm have the shape {list(weights.shape)} and must have one "
                f"entry for each of the {size} entries of w; for one coefficient c[..., i] for "
                f"each group of weights, pass a dict by patterns of names, {{{example}, …}}"
            )
        parts = weights.split([p.numel() for p in params.values()])
        terms = [squared_norm_of(p, part) for p, part in zip(params.values(), parts, strict=True)]
    return sum(terms[1:], start=terms[0])


def squared_norm_of(p: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return ‖p‖² of one tensor, or Σ_i c_i p_i² with flat coefficients.

    A tensor subclass can supply its own result through `__torch_function__`.
    """
    if has_torch_function_unary(p):
        return handle_torch_function(squared_norm_of, (p,), p, weights)
    flat = p.reshape(-1)
    # dot needs no temporary, unlike (p * p).sum(); a graph keeps c∘w, and would keep w² and more
    return flat.dot(flat) if weights is None else flat.dot(weights * flat)


def along_examples(leaf: Tensor, like: Tensor) -> Tensor:
    """View a hyperparameter leaf [] or [B] so that it broadcasts against `like` [B, …].

    Example:
        >>> along_examples(torch.zeros(4), torch.zeros(4, 3, 2)).shape
        torch.Size([4, 1, 1])
    """
    return leaf if leaf.ndim == 0 else leaf.reshape(-1, *[1] * (like.ndim - 1))


def count_examples(batch: Batch) -> int:
    """Return the length of the example axis.

    It is the first axis of the first tensor that has one and is longer than 1. A number [] and a
    tensor of shape [1, …] are shared by all examples. A batch without tensors counts as 1.

    Example:
        >>> count_examples({"temperature": torch.ones(1), "x": torch.ones(9, 2)})
        9
    """
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] != 1:
            return leaf.shape[0]
    return 1


def to_device(tree: Any, device: torch.device | str) -> Any:
    """Return the same pytree with its tensors on `device`."""
    return pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, tree)


def device_of(tensors: dict[str, Tensor]) -> torch.device:
    """Return the device of the first tensor, or the CPU if there is none."""
    return next((t.device for t in tensors.values()), torch.device("cpu"))


def detached(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same tensors, detached from the graph."""
    return {name: t.detach() for name, t in tensors.items()}


def widen(value: Tensor) -> Tensor:
    """Return the detached values in float64, for exact sums; in float32 on MPS, its widest type."""
    return value.detach().to(torch.float32 if value.device.type == "mps" else torch.float64)
