"""Fused operations written out in elementary ones, where PyTorch's kernels lack the derivatives that a linearization needs."""

from collections.abc import Callable, Set
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from bilevel.solvers.response.recurrent_rules import gru, lstm
from bilevel.solvers.response.rules import affine

Table = dict[Any, Callable[..., Any]]


class Decomposed(TorchFunctionMode):
    """Within it, the functions of `table` are replaced, and attention runs on its mathematical kernel."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table

    def __enter__(self) -> "Decomposed":
        self._attention = ExitStack()
        self._attention.enter_context(sdpa_kernel(SDPBackend.MATH))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._attention.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.table.get(func, func)(*args, **(kwargs or {}))


def _glu(x: Tensor, dim: int = -1) -> Tensor:
    value, gate = x.chunk(2, dim)
    return value * torch.sigmoid(gate)


def _hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    return F.relu6(x + 3) / 6


def _standardized(x: Tensor, axes: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # as the fused kernels do
    mean = wide.mean(axes, keepdim=True)
    variance = (wide - mean).square().mean(axes, keepdim=True)
    return ((wide - mean) * torch.rsqrt(variance + eps)).to(x.dtype), mean, variance


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    tail = [1] * (x.ndim - 2)
    if training or running_mean is None or running_var is None:
        normalized, mean, variance = _standardized(x, [0, *range(2, x.ndim)], eps)
        if running_mean is not None and running_var is not None:
            items = x.numel() // x.shape[1]
            with torch.no_grad():
                running_mean.lerp_(mean.reshape(-1), momentum)
                running_var.lerp_(variance.reshape(-1) * items / (items - 1), momentum)
    else:
        normalized = (x - running_mean.reshape(-1, *tail)) * torch.rsqrt(
            running_var.reshape(-1, *tail) + eps
        )
    return affine(normalized, weight, bias, lambda p: p.reshape(*p.shape, *tail))


def _layer_norm(
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    between = x.ndim - 1 - len(normalized_shape)
    normalized, _, _ = _standardized(x, list(range(x.ndim - len(normalized_shape), x.ndim)), eps)
    return affine(
        normalized, weight, bias, lambda p: p.reshape(p.shape[0], *[1] * between, *p.shape[1:])
    )


def _group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    groups = x.reshape(x.shape[0], num_groups, -1)
    normalized = _standardized(groups, [2], eps)[0].reshape(x.shape)
    return affine(normalized, weight, bias, lambda p: p.reshape(*p.shape, *[1] * (x.ndim - 2)))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if running_mean is not None or not use_input_stats:
        raise NotImplementedError(
            "double backward is not implemented for instance norm that tracks running statistics"
        )
    normalized, _, _ = _standardized(x, list(range(2, x.ndim)), eps)
    return affine(normalized, weight, bias, lambda p: p.reshape(*p.shape, *[1] * (x.ndim - 2)))


FORWARD_MODE: Table = {
    torch._VF.lstm: lstm,
    torch._VF.gru: gru,
    F.glu: _glu,
    F.hardsigmoid: _hardsigmoid,
}
"""What has no forward-mode derivative, or one without a backward pass of its own."""

ATTENTION = {F.scaled_dot_product_attention, F.multi_head_attention_forward}
"""What needs the mathematical kernel, and `Decomposed` for that alone."""

RECURRENT = {torch._VF.lstm, torch._VF.gru, torch._VF.rnn_tanh, torch._VF.rnn_relu}

DOUBLE_BACKWARD: Table = FORWARD_MODE | {
    torch._weight_norm: _weight_norm,
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
}
"""What cannot be differentiated backward twice either: training batch norm raises, weight norm comes out wrong."""


def twice_differentiable(functions: Set[Any]) -> AbstractContextManager[Any]:
    """Within it, what a network calls can be differentiated twice; nothing changes where it can be as it is.

    Args:
        functions: the torch functions that the network calls (`Descent.functions`).
    """
    return (
        nullcontext()
        if functions.isdisjoint(DOUBLE_BACKWARD.keys() | ATTENTION)
        else Decomposed(DOUBLE_BACKWARD)
    )
