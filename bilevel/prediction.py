"""The check that a prediction is a tensor or a pytree of tensors; every solver makes it at set-up.

Solvers look for the tensors of a prediction, to linearize it for example. In an object that PyTorch
does not open they find none, and would take the whole prediction for a constant.
"""

from enum import Enum
from numbers import Number

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel.containers import ALLOWED, open_containers
from bilevel.data.tensor_stream import Data
from bilevel.embedding_options import EmbeddingOptions
from bilevel.errors import BilevelError, Refused
from bilevel.params import to_device
from bilevel.problem import Problem

CONSTANTS = (Number, str, bytes, Enum, type, type(None), torch.dtype, torch.device, torch.Size)
"""Types of leaves that a prediction may hold beside its tensors."""

REMEDY = "return one of these from `predict` (from the forward of the module)"


def check_prediction(problem: Problem, data: Data, device: torch.device) -> None:
    """Open the containers of a prediction; refuse one that is no tree of tensors.

    A prediction that exists only where gradients are on is refused too, and so are complex weights
    and embeddings with options that change weights or gradients.

    Raises:
        Refused: that, with the type and what to return.
    """
    start = problem.init(torch.Generator().manual_seed(0))
    params, carry = to_device(start, device)
    for name, p in params.items():
        if p.is_complex():
            raise Refused(
                f"the weight `{name}` is {str(p.dtype).removeprefix('torch.')}, and all weights "
                "must be real; hold torch.view_as_real of it, and call torch.view_as_complex in "
                "the network"
            )
    floating = [p.dtype for p in params.values() if p.is_floating_point()]
    u = problem.space.init(floating[0] if floating else None).to(device)
    hypers = problem.space.constrain(u)
    for train in (True, False):
        batch = (data.train if train else data.valid).peek()
        draws = torch.Generator(device).manual_seed(0) if train else None
        try:
            with torch.no_grad(), EmbeddingOptions(params):
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
        try:
            open_containers(prediction, "the prediction", REMEDY)
        except BilevelError as error:
            raise Refused(str(error)) from None
        for leaf in pytree.tree_leaves(prediction):
            if not isinstance(leaf, (Tensor, *CONSTANTS)):
                raise Refused(
                    f"the prediction holds a {type(leaf).__name__}, in which no tensors are "
                    f"found; it may be {ALLOWED}; {REMEDY}"
                )
