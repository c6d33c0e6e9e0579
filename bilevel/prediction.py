"""The check that a prediction is a tensor or a pytree of tensors; every solver makes it at set-up.

Solvers look for the tensors of a prediction, to linearize it for example. In a container that
PyTorch does not know they find none, and would take the whole prediction for a constant.
"""

import dataclasses
from collections.abc import Mapping
from enum import Enum
from numbers import Number
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel.data.tensor_stream import Data
from bilevel.errors import Refused
from bilevel.params import to_device
from bilevel.problem import Problem

CONSTANTS = (Number, str, bytes, Enum, type, type(None), torch.dtype, torch.device, torch.Size)
"""Types of leaves that a prediction may hold beside its tensors."""


def check_prediction(problem: Problem, data: Data, device: torch.device) -> None:
    """Refuse a problem whose prediction is no pytree of tensors, or needs gradients to be on.

    Raises:
        Refused: that, with the type and what to return.
    """
    start = problem.init(torch.Generator().manual_seed(0))
    params, carry = to_device(start, device)
    floating = [p.dtype for p in params.values() if p.is_floating_point()]
    u = problem.space.init(floating[0] if floating else None).to(device)
    hypers = problem.space.constrain(u)
    for train in (True, False):
        batch = (data.train if train else data.valid).peek()
        draws = torch.Generator(device).manual_seed(0) if train else None
        try:
            with torch.no_grad():
                prediction, _ = problem.predict(
                    hypers, params, carry, batch, train=train, generator=draws
                )
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            raise Refused(
                "the network takes a derivative of itself and fails where gradients are off, as in "
                "an evaluation; take the derivative inside `with torch.enable_grad():`"
            ) from None
        for leaf in pytree.tree_leaves(prediction):
            if not isinstance(leaf, (Tensor, *CONSTANTS)):
                raise Refused(_sentence(leaf, alone=leaf is prediction))


def _sentence(leaf: Any, *, alone: bool) -> str:
    kind, verb = type(leaf).__name__, "is" if alone else "holds"
    remedy = "return a tensor, or a tuple, list or dict of tensors"
    if isinstance(leaf, Mapping):
        remedy += f"; dict(…) makes one of a `{kind}`"
    elif dataclasses.is_dataclass(leaf):
        remedy += f", or call torch.export.register_dataclass({kind}) once"
    elif hasattr(leaf, "__dict__") and not callable(leaf):
        remedy += f"; vars(…) makes a dict of a `{kind}`"
    return f"the prediction {verb} a `{kind}`, in which a solver finds no tensors; {remedy}"
