"""Calls of dropout functions in a module, with rates of hyperparameters in place of numbers."""

import inspect
import types as python_types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bilevel.dropout.kinds import Dropout
from bilevel.dropout.sites import Rate
from bilevel.errors import BilevelError
from bilevel.params import Hypers, PerExampleWeight, along_examples

ALPHA = -1.7580993408473766
"""The value −λα of SELU, which alpha dropout puts in place of a dropped activation."""


class TunedCalls(TorchFunctionMode):
    """A mode in which functions that receive a `Rate` of a hyperparameter drop with its value.

    Args:
        hypers: λ; a rate is [], or [B] with one for each example.
        drop: the kind of dropout.
        generator: for the masks.
        reached: collects the names of the sites whose rates arrived at a function.
    """

    def __init__(
        self, hypers: Hypers, drop: Dropout, generator: torch.Generator | None, reached: set[str]
    ) -> None:
        super().__init__()
        self.hypers = hypers
        self.drop = drop
        self.generator = generator
        self.reached = reached

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (apply := CALLS.get(func)) is None:
            return func(*args, **kwargs)
        result = apply(self, *args, **kwargs)
        return func(*args, **kwargs) if result is None else result

    def tunes(self, p: Any, training: bool = True) -> bool:
        """Return whether a function drops with a tuned rate."""
        if not (training and isinstance(p, Rate) and p.hyper is not None):
            return False
        self.reached.add(p.site)
        return True

    def dropped(self, x: Tensor, p: Rate) -> Tensor:
        """Return x after dropout, with the rate of each example on its own rows."""
        rate, rows = self.hypers[p.hyper or ""], self.rate_of_rows(x, p)
        if rows is rate:
            return self.drop(x, rate, self.generator)
        # the draws begin with the example axis, as several processes need it
        return self.drop(x.unflatten(0, (len(rate), -1)), rate, self.generator).flatten(0, 1)

    def rate_of_rows(self, x: Tensor, p: Rate) -> Tensor:
        """Return the rate, [] or one for each row of x.

        The first axis of x is B, B·k with the k rows of each example together, or 1 for a mask that
        all examples share.

        Raises:
            BilevelError: there is a rate for each example, and the first axis is another one.
        """
        rate = self.hypers[p.hyper or ""]
        if rate.ndim == 0 or (x.ndim and x.shape[0] in (1, len(rate))):
            return rate
        if x.ndim == 0 or x.shape[0] % len(rate):
            raise BilevelError(
                f"dropout `{p.site}` has an input of shape {list(x.shape)}, whose first axis is "
                f"not that of the {len(rate)} examples with a rate each; set per_example=False on "
                f"`{p.hyper}`"
            )
        return rate.repeat_interleave(x.shape[0] // len(rate))


# Each function has the signature of the one that it replaces, and returns None for a call that is
# left as it is.


def _elementwise(
    mode: TunedCalls, input: Tensor, p: Any = 0.5, training: bool = True, inplace: bool = False
) -> Tensor | None:
    return mode.dropped(input, p) if mode.tunes(p, training) else None


def _torch_dropout(mode: TunedCalls, input: Tensor, p: Any, train: bool) -> Tensor | None:
    return _elementwise(mode, input, p, train)


def _by_channel(axes: int) -> Callable[..., Tensor | None]:
    """Return dropout of whole channels with `axes` further axes."""

    def apply(
        mode: TunedCalls, input: Tensor, p: Any = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor | None:
        if not mode.tunes(p, training):
            return None
        return input * mode.dropped(_channels(input, axes), p)

    return apply


def _channels(x: Tensor, axes: int) -> Tensor:
    """Return ones for the channels of x: [B, C, 1, …], or [C, 1, …] for a single example."""
    # PyTorch takes the input [a, b, c] of 2d dropout for a batch of sequences
    lead = 1 if x.ndim == axes + 1 and axes != 2 else 2
    return x.new_ones(*x.shape[:lead], *[1] * (x.ndim - lead))


def _alpha(by_channel: bool) -> Callable[..., Tensor | None]:
    """Return alpha dropout: mean and variance of standardized activations stay.

    With a mask m ~ Bernoulli(1 − p) and α = ALPHA: a (m x + (1 − m) α) − a α p, where
    a = ((1 − p)(1 + p α²))^(−½). Source: Klambauer et al., NeurIPS 2017, equation 17.
    """

    def apply(
        mode: TunedCalls, input: Tensor, p: Any = 0.5, training: bool = False, inplace: bool = False
    ) -> Tensor | None:
        if not mode.tunes(p, training):
            return None
        ones = input.new_ones(*input.shape[:2], *[1] * (input.ndim - 2)) if by_channel else None
        kept = mode.dropped(torch.ones_like(input) if ones is None else ones, p) != 0
        rate = along_examples(mode.rate_of_rows(input, p).detach(), input).to(input.dtype)
        a = ((1 - rate) * (1 + rate * ALPHA**2)).rsqrt()
        return a * torch.where(kept, input, ALPHA) - a * ALPHA * rate

    return apply


def _attention(
    mode: TunedCalls,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: Any = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Return softmax(q kᵀ · scale + mask) after dropout, times v."""
    if not mode.tunes(dropout_p):
        return None
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scores = query @ key.transpose(-2, -1)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        bias = attn_mask.dtype != torch.bool
        scores = scores + attn_mask if bias else scores.masked_fill(~attn_mask, float("-inf"))
    return mode.dropped(scores.softmax(-1), dropout_p) @ value


def _multi_head(mode: TunedCalls, *args: Any, **kwargs: Any) -> Any:
    """Run the attention layer of PyTorch, so that the mode sees the dropout in it."""
    call = MULTI_HEAD.bind(*args, **kwargs)
    call.apply_defaults()
    p = call.arguments["dropout_p"]
    if not mode.tunes(p, call.arguments["training"]):
        return None
    # PyTorch skips the dropout of a rate of 0
    call.arguments["dropout_p"] = Rate(max(p, 0.5), p.site, p.hyper)
    weights = (a for a in call.arguments.values() if isinstance(a, PerExampleWeight))
    if (weight := next(weights, None)) is not None:
        with mode:
            overloaded: Any = type(weight)
            return overloaded.__torch_function__(
                F.multi_head_attention_forward, (overloaded,), call.args, call.kwargs
            )
    with mode:
        return _OPENED(*call.args, **call.kwargs)


MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)

_OPENED: Any = python_types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda _: False},  # a mode would receive the whole call again
    argdefs=F.multi_head_attention_forward.__defaults__,
)

CALLS: dict[Any, Callable[..., Any]] = {
    F.dropout: _elementwise,
    torch.dropout: _torch_dropout,
    F.dropout1d: _by_channel(1),
    F.dropout2d: _by_channel(2),
    F.dropout3d: _by_channel(3),
    F.alpha_dropout: _alpha(by_channel=False),
    F.feature_alpha_dropout: _alpha(by_channel=True),
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head,
}
"""The replacement of each function that drops."""

RECURRENT = (torch._VF.lstm, torch._VF.gru, torch._VF.rnn_tanh, torch._VF.rnn_relu)
"""Functions whose kernel drops between layers, with a constant rate."""

_PARAMETERS = {
    func: [*inspect.signature(apply).parameters][1:] for func, apply in CALLS.items()
} | {F.multi_head_attention_forward: [*MULTI_HEAD.parameters]}


def rate_of_call(func: Any, args: Any, kwargs: Any) -> float:
    """Return the rate with which a function drops; 0 if it drops nothing.

    Example:
        >>> rate_of_call(F.dropout, (torch.ones(2), 0.5), {"training": True})
        0.5
    """
    if func in RECURRENT:
        place = -4 if isinstance(args[-3], bool) else -3  # of a batch, or of packed sequences
        return args[place] if args[place + 1] else 0.0
    named = dict(zip(_PARAMETERS.get(func, ()), args, strict=False)) | kwargs
    on = named.get("training", named.get("train", True))
    return named.get("p", named.get("dropout_p", 0.0)) if on else 0.0
