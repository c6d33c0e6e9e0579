"""Random draws per example: made for the whole batch on every rank, then cut to its shard."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bilevel.norm_statistics import moments_of
from bilevel.parallel.batch_norm import BatchStatistics
from bilevel.parallel.shards import Shard

Normalize = Callable[..., Tensor]
"""A replacement of `F.batch_norm` in training, called with a shard and the same arguments."""


class WholeBatchDraws(TorchFunctionMode):
    """A mode in which draws with the length of the shard are made for the whole batch.

    The masks are then the rows of those of a single process, and the generator ends in the same
    state. A draw with another first axis is the same on all ranks: DropConnect, or a word dropped
    everywhere. Batch norm uses all examples, so it goes through `normalize`.
    """

    def __init__(self, shard: Shard, normalize: Normalize) -> None:
        super().__init__()
        self.shard = shard
        self.normalize = normalize

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return self.normalize(self.shard, *args, **kwargs)
        if func is moments_of and isinstance(self.normalize, BatchStatistics):
            return self.normalize.moments(self.shard, *args, **kwargs)
        draw = DRAWS.get(func)
        return func(*args, **kwargs) if draw is None else draw(self.shard, func, args, kwargs)


class DrawLengths(TorchFunctionMode):
    """A mode that records the first axis of every draw.

    Attributes:
        seen: length of the first axis of every draw, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in DRAWS and isinstance(result, Tensor) and result.ndim:
            self.seen.append(len(result))
        return result


def _created(shard: Shard, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle `torch.rand(size)` and similar functions.

    The size is a keyword, a sequence, or all positional arguments.
    """
    args = list(args)
    if func in (torch.rand, torch.randn) and args and isinstance(args[0], int):
        args, kwargs = [], {**kwargs, "size": tuple(args)}
    place = next((i for i, a in enumerate(args) if isinstance(a, (tuple, list))), None)
    if place is None and "size" not in kwargs:  # normal with tensors for its mean or deviation
        return _padded(shard, func, args, kwargs)
    size = tuple(kwargs["size"] if place is None else args[place])
    if not size or size[0] != shard.size:
        return func(*args, **kwargs)
    size = (shard.whole, *size[1:])
    if place is None:
        kwargs = {**kwargs, "size": size}
    else:
        args[place] = size
    return func(*args, **kwargs)[shard.rows]


def _like(shard: Shard, func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    if not _leads(shard, x):
        return func(*args, **kwargs)
    return func(_blank(shard, x), *args[1:], **kwargs)[shard.rows]


def _in_place(shard: Shard, func: Any, args: Any, kwargs: Any) -> Any:
    x, *rest = args
    if not _leads(shard, x):
        return func(*args, **kwargs)
    return x.copy_(func(_blank(shard, x), *(_pad(shard, a) for a in rest), **kwargs)[shard.rows])


def _padded(shard: Shard, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle functions of rows that draw the same count for any values of the rows.

    The function is applied to the whole batch; rows outside the shard are made up.
    """
    if not any(_leads(shard, a) for a in (*args, *kwargs.values())):
        return func(*args, **kwargs)
    whole = func(
        *(_pad(shard, a) for a in args), **{name: _pad(shard, a) for name, a in kwargs.items()}
    )
    return whole[shard.rows]


def _dropout(shard: Shard, func: Any, args: Any, kwargs: Any) -> Any:
    """Multiply x by the function of ones.

    The same kernel then draws the same mask, and no activation is padded.
    """
    x, p, train, inplace = _dropout_arguments(*args, **kwargs)
    if not (train and p > 0 and _leads(shard, x)):
        return func(*args, **kwargs)
    noise = func(x.new_ones(shard.whole, *x.shape[1:]), p, True)[shard.rows]
    return x.mul_(noise) if inplace else x * noise


def _dropout_arguments(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    train: bool | None = None,
) -> tuple[Tensor, float, bool, bool]:
    return input, p, training if train is None else train, inplace


def _leads(shard: Shard, x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim > 0 and len(x) == shard.size


def _blank(shard: Shard, x: Tensor) -> Tensor:
    return x.new_empty(shard.whole, *x.shape[1:])


def _pad(shard: Shard, x: Any) -> Any:
    if not _leads(shard, x):
        return x
    before, after = (
        x.new_full((n, *x.shape[1:]), 0.5) for n in (shard.start, shard.whole - shard.stop)
    )
    return torch.cat([before, x, after])


DRAWS: dict[Any, Callable[[Shard, Any, Any, Any], Any]] = {
    **dict.fromkeys((torch.rand, torch.randn, torch.randint, torch.normal), _created),
    **dict.fromkeys((torch.rand_like, torch.randn_like, torch.randint_like), _like),
    **dict.fromkeys(
        (
            Tensor.uniform_,
            Tensor.normal_,
            Tensor.bernoulli_,
            Tensor.random_,
            Tensor.exponential_,
            Tensor.geometric_,
            Tensor.cauchy_,
            Tensor.log_normal_,
        ),
        _in_place,
    ),
    **dict.fromkeys(
        (
            torch.bernoulli,
            Tensor.bernoulli,
            torch.multinomial,
            Tensor.multinomial,
            F.alpha_dropout,
            F.feature_alpha_dropout,
            F.gumbel_softmax,
        ),
        _padded,
    ),
    **dict.fromkeys(
        (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, torch.feature_dropout),
        _dropout,
    ),
}
"""The handler of each drawing function for a shard."""
