"""Running statistics of normalizations, as functions of the weights.

L_V in evaluation mode reads running statistics. They are averages over training batches, and so
they follow w. `Moments` finds the statistics of a training batch as functions of w, and
`Evaluated` lets L_V be differentiated in the statistics.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary

from bilevel.params import Carry


class Call(NamedTuple):
    """The arguments of a batch or instance norm that its statistics depend on.

    Attributes:
        input: x, [B, C, …].
        mean: the running mean, [C], or None.
        var: the running variance, [C], or None.
        weight: the gain, [C], or None.
        bias: the shift, [C], or None.
        by_batch: True where the statistics are those of the input, and the running ones follow.
        momentum: the weight of the input in the running statistics.
        eps: is added to the variance.
    """

    input: Tensor
    mean: Tensor | None = None
    var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    by_batch: bool | None = None
    momentum: float = 0.1
    eps: float = 1e-5


def call_of(func: Any, args: Any, kwargs: Any) -> Call | None:
    """Return the call of a norm that holds running statistics; None for any other function."""
    if func not in (F.batch_norm, F.instance_norm):
        return None
    names = {
        "running_mean": "mean",
        "running_var": "var",
        "training": "by_batch",
        "use_input_stats": "by_batch",
    }
    call = Call(*args, **{names.get(name, name): value for name, value in kwargs.items()})
    if call.by_batch is None:
        call = call._replace(by_batch=func is F.instance_norm)
    return None if call.mean is None or call.var is None else call


class Moments(TorchFunctionMode):
    """A mode that finds the statistics of a batch for every norm with running statistics.

    Args:
        buffers: the running statistics by name, the very tensors that the network passes on.

    Attributes:
        found: mean and unbiased variance by the name of the running one, differentiable in w. A
            norm that is called several times has the average that its momentum leads to.
    """

    def __init__(self, buffers: Carry) -> None:
        super().__init__()
        self.found: Carry = {}
        self._names = {id(t): name for name, t in buffers.items()}
        self._weights: dict[str, float] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = call_of(func, args, kwargs)
        if call is not None and call.by_batch and call.momentum > 0:
            moments = moments_of(call.input, per_example=func is F.instance_norm)
            for running, value in zip((call.mean, call.var), moments, strict=True):
                if (name := self._names.get(id(running))) is not None:
                    self._add(name, value, call.momentum)
        return func(*args, **kwargs)

    def _add(self, name: str, value: Tensor, momentum: float) -> None:
        """Average with earlier calls, as c ← (1 − m) c + m s does after many batches."""
        before = self._weights.get(name, 0.0) * (1 - momentum)
        weight = self._weights[name] = before + momentum
        known = self.found.get(name)
        self.found[name] = (
            value if known is None else known * (before / weight) + value * (momentum / weight)
        )


def moments_of(x: Tensor, *, per_example: bool = False) -> tuple[Tensor, Tensor]:
    """Return the mean and the unbiased variance of every channel, [C] each.

    Args:
        x: [B, C, …].
        per_example: average the statistics of the examples, as instance norm does.
    """
    if has_torch_function_unary(x):  # several processes replace it
        return handle_torch_function(moments_of, (x,), x, per_example=per_example)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    axes = [axis for axis in range(x.ndim) if axis != 1 and not (per_example and axis == 0)]
    var, mean = torch.var_mean(wide, axes, correction=1)
    return (mean.mean(0), var.mean(0)) if per_example else (mean, var)


class Evaluated(TorchFunctionMode):
    """A mode in which evaluation is differentiable in the running statistics.

    PyTorch's kernels take them for constants. Without a gradient in them, nothing changes.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = call_of(func, args, kwargs)
        if (
            call is None
            or call.by_batch
            or call.mean is None
            or call.var is None
            or not (call.mean.requires_grad or call.var.requires_grad)
        ):
            return func(*args, **kwargs)
        x, tail = call.input, [-1, *[1] * (call.input.ndim - 2)]
        gain = torch.rsqrt(call.var + call.eps)
        gain = gain if call.weight is None else gain * call.weight
        y = (x - call.mean.reshape(tail)) * gain.reshape(tail)
        y = y if call.bias is None else y + call.bias.reshape(tail)
        return y.to(x.dtype)
