"""Within a share of a batch, what is drawn per example is drawn for the whole batch, so that all ranks' generators go alike."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bilevel.parallel.shards import Share

Normalize = Callable[..., Tensor]
"""What stands for `F.batch_norm` in training: called with a share, and with the arguments of that."""


class Shared(TorchFunctionMode):
    """Within it, what is drawn for a first axis of the share's length is drawn for the whole batch, and cut to the share.

    The masks are then the rows of those that a single process would have drawn, and the generator's state afterwards is that of
    a single process. A draw of another first axis is the same on all ranks: DropConnect, a word dropped everywhere. Batch norm,
    which looks at all examples, goes by `normalize`.
    """

    def __init__(self, share: Share, normalize: Normalize) -> None:
        super().__init__()
        self.share, self.normalize = share, normalize

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return self.normalize(self.share, *args, **kwargs)
        draw = DRAWS.get(func)
        return func(*args, **kwargs) if draw is None else draw(self.share, func, args, kwargs)


class Lengths(TorchFunctionMode):
    """Looks on, and notes the first axis of everything that is drawn.

    Attributes:
        seen: of every draw, in their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in DRAWS and isinstance(result, Tensor) and result.ndim:
            self.seen.append(len(result))
        return result


def _created(share: Share, func: Any, args: Any, kwargs: Any) -> Any:
    """`torch.rand(size)` and its kin; the size is named, or a sequence, or all of the arguments."""
    args = list(args)
    if func in (torch.rand, torch.randn) and args and isinstance(args[0], int):
        args, kwargs = [], {**kwargs, "size": tuple(args)}
    place = next((i for i, a in enumerate(args) if isinstance(a, (tuple, list))), None)
    if place is None and "size" not in kwargs:  # normal with tensors for its mean or deviation
        return _padded(share, func, args, kwargs)
    size = tuple(kwargs["size"] if place is None else args[place])
    if not size or size[0] != share.size:
        return func(*args, **kwargs)
    size = (share.whole, *size[1:])
    if place is None:
        kwargs = {**kwargs, "size": size}
    else:
        args[place] = size
    return func(*args, **kwargs)[share.rows]


def _like(share: Share, func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    if not _leads(share, x):
        return func(*args, **kwargs)
    return func(_blank(share, x), *args[1:], **kwargs)[share.rows]


def _in_place(share: Share, func: Any, args: Any, kwargs: Any) -> Any:
    x, *rest = args
    if not _leads(share, x):
        return func(*args, **kwargs)
    return x.copy_(func(_blank(share, x), *(_pad(share, a) for a in rest), **kwargs)[share.rows])


def _padded(share: Share, func: Any, args: Any, kwargs: Any) -> Any:
    """A function of rows that draws as many numbers whatever their values: of the batch, with other rows than the share's made
    up.
    """
    if not any(_leads(share, a) for a in (*args, *kwargs.values())):
        return func(*args, **kwargs)
    whole = func(
        *(_pad(share, a) for a in args), **{name: _pad(share, a) for name, a in kwargs.items()}
    )
    return whole[share.rows]


def _dropout(share: Share, func: Any, args: Any, kwargs: Any) -> Any:
    """X times the function of ones: the same kernel draws the same mask, and no activation is padded."""
    x, p, train, inplace = _dropout_arguments(*args, **kwargs)
    if not (train and p > 0 and _leads(share, x)):
        return func(*args, **kwargs)
    noise = func(x.new_ones(share.whole, *x.shape[1:]), p, True)[share.rows]
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


def _leads(share: Share, x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim > 0 and len(x) == share.size


def _blank(share: Share, x: Tensor) -> Tensor:
    return x.new_empty(share.whole, *x.shape[1:])


def _pad(share: Share, x: Any) -> Any:
    if not _leads(share, x):
        return x
    before, after = (
        x.new_full((n, *x.shape[1:]), 0.5) for n in (share.start, share.whole - share.stop)
    )
    return torch.cat([before, x, after])


DRAWS: dict[Any, Callable[[Share, Any, Any, Any], Any]] = {
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
"""How each function that draws is called for a share."""
