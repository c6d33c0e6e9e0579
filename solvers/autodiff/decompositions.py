"""Fused operations in elementary ones, for derivatives that PyTorch's kernels lack."""

from collections.abc import Callable, Set
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from bilevel.solvers.autodiff import norm_tangents
from bilevel.solvers.response.embedding_bag import embedding_bag
from bilevel.solvers.response.norm_rules import batch_norm, group_norm, instance_norm, layer_norm
from bilevel.solvers.response.recurrent_rules import gru, lstm

Table = dict[Any, Callable[..., Any]]
"""The decomposition of each torch function."""


class Decomposed(TorchFunctionMode):
    """A context that replaces the functions of `table` and selects the mathematical attention."""

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


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _standardize(x: Tensor, axes: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (x − mean)/std over `axes`, the mean and the variance."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # as the fused kernels do
    mean = wide.mean(axes, keepdim=True)
    variance = (wide - mean).square().mean(axes, keepdim=True)
    return ((wide - mean) * torch.rsqrt(variance + eps)).to(x.dtype), mean, variance


def _normalize_batch(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    _weight: None,
    _bias: None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    if not training and running_mean is not None and running_var is not None:
        tail = [1] * (x.ndim - 2)
        scale = torch.rsqrt(running_var.reshape(-1, *tail) + eps)
        return (x - running_mean.reshape(-1, *tail)) * scale
    normalized, mean, variance = _standardize(x, [0, *range(2, x.ndim)], eps)
    if running_mean is not None and running_var is not None:
        items = x.numel() // x.shape[1]
        with torch.no_grad():
            unbiased = variance.reshape(-1) * items / (items - 1)
            running_mean.lerp_(mean.reshape(-1).to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    return normalized


def _normalize_layer(x: Tensor, shape: Any, _weight: None, _bias: None, eps: float) -> Tensor:
    return _standardize(x, list(range(x.ndim - len(shape), x.ndim)), eps)[0]


def _normalize_groups(x: Tensor, groups: int, _weight: None, _bias: None, eps: float) -> Tensor:
    return _standardize(x.reshape(x.shape[0], groups, -1), [2], eps)[0].reshape(x.shape)


def _normalize_instances(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    _weight: None,
    _bias: None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if running_mean is not None or not use_input_stats:
        raise NotImplementedError(
            "double backward is not implemented for instance norm that tracks running statistics"
        )
    return _standardize(x, list(range(2, x.ndim)), eps)[0]


FORWARD_MODE: Table = {
    torch._VF.lstm: lstm,
    torch._VF.gru: gru,
    F.embedding_bag: embedding_bag,
    F.glu: _glu,
    F.hardsigmoid: _hardsigmoid,
    torch._weight_norm: _weight_norm,
}
"""Functions whose forward-mode derivative is missing, or has no backward pass of its own."""

FUSED_NORMS: Table = {
    F.batch_norm: partial(batch_norm, normalize=norm_tangents.batch_norm),
    F.layer_norm: partial(layer_norm, normalize=norm_tangents.layer_norm),
    F.group_norm: partial(group_norm, normalize=norm_tangents.group_norm),
    F.instance_norm: partial(instance_norm, normalize=norm_tangents.instance_norm),
}
"""Normalizations whose forward mode is faster by a fused kernel, where the primal is a constant."""

ATTENTION = {F.scaled_dot_product_attention, F.multi_head_attention_forward}
"""Functions that need the mathematical attention kernel; `Decomposed` selects it."""

RECURRENT = {torch._VF.lstm, torch._VF.gru, torch._VF.rnn_tanh, torch._VF.rnn_relu}
"""Fused recurrent layers, which cuDNN differentiates once only."""

DOUBLE_BACKWARD: Table = FORWARD_MODE | {
    F.batch_norm: partial(batch_norm, normalize=_normalize_batch),
    F.layer_norm: partial(layer_norm, normalize=_normalize_layer),
    F.group_norm: partial(group_norm, normalize=_normalize_groups),
    F.instance_norm: partial(instance_norm, normalize=_normalize_instances),
}
"""Functions that cannot be differentiated backward twice either.

Training batch norm raises; weight norm returns a wrong second derivative.
"""

NOT_TWICE = frozenset(DOUBLE_BACKWARD.keys() | ATTENTION | RECURRENT)
"""Functions for which `twice_differentiable`, or turning cuDNN off, changes anything."""


def twice_differentiable(functions: Set[Any]) -> AbstractContextManager[Any]:
    """Return a context in which the functions of a network can be differentiated twice.

    The context changes nothing if all of them can be already.

    Args:
        functions: the torch functions that the network calls.
    """
    needed = DOUBLE_BACKWARD.keys() | ATTENTION
    return nullcontext() if functions.isdisjoint(needed) else Decomposed(DOUBLE_BACKWARD)
