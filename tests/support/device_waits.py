"""Find operations that make CUDA wait for the device: on the CPU by name, on CUDA by its mode."""

import inspect
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bilevel.data import global_rng

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense: "a number is read: .item(), float(), int(), bool(), an `if`",
    aten.equal: "a comparison is read",
    aten.nonzero: "a shape depends on values",
    aten.masked_select: "a shape depends on values",
    aten._unique2: "a shape depends on values",
    aten.repeat_interleave: "a shape depends on values",
    aten.lift_fresh: "a tensor is made of Python numbers on the host, and copied",
}
"""Operations that make CUDA wait."""

READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.cpu}
"""Functions that run no operation on the CPU."""

SEEDED = inspect.unwrap(global_rng.seeded).__code__
"""The code that may read one number. On the host it seeds a global generator with a drawn number;
on CUDA it reads the generator's state instead, which lies on the host."""

COMPARED = inspect.unwrap(global_rng._Before.drew).__code__
"""The code that may compare two states of the host's global generator, which lie on the host."""


class Waited(AssertionError):
    """A step ran an operation that would wait for the device."""


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        reason = WAITS.get(func.overloadpacket)
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)
            for i in tree_leaves(args[1])
        ):
            reason = "a mask selects: a shape depends on values"
        if (
            reason
            and not (func.overloadpacket is aten._local_scalar_dense and called_by(SEEDED))
            and not (func.overloadpacket is aten.equal and called_by(COMPARED))
        ):
            raise Waited(f"{func}: {reason}")
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READS:
            raise Waited(f"{func.__name__}: values are read")
        return func(*args, **(kwargs or {}))


def called_by(code):
    """Return whether `code` is the innermost frame outside installed packages and these modes."""
    frame = sys._getframe(1)
    while (
        frame.f_code.co_name.startswith("__torch_")
        or "site-packages" in Path(frame.f_code.co_filename).parts
    ):
        frame = frame.f_back
    return frame.f_code is code


@contextmanager
def no_waiting():
    with Functions(), Operations():
        yield


@contextmanager
def no_waiting_on_cuda():
    """Raise where the host waits for the device; the mode is restored whatever fails.

    PyTorch warns once in a process that the mode is a prototype, and the tests turn warnings into
    errors.
    """
    before = torch.cuda.get_sync_debug_mode()
    try:
        _set_mode("error")
        yield
    finally:
        _set_mode(before)


def _set_mode(mode):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*debug mode is a prototype")
        torch.cuda.set_sync_debug_mode(mode)
