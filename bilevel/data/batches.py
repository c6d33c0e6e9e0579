"""The rules for a batch, checked where batches enter: its containers and its example axis."""

import torch
from torch import Tensor

from bilevel.containers import ALLOWED, open_containers
from bilevel.data.fields import strangers, tensors, within
from bilevel.errors import BilevelError
from bilevel.params import Batch

RULE = f"a batch is {ALLOWED}, whose first axis holds the examples"


def open_batch(batch: Batch, name: str) -> None:
    """Make the tensors of a batch visible to pytrees.

    Args:
        batch: a batch of a user's own loader or stream.
        name: name of the split in errors.

    Raises:
        BilevelError: the batch is None, or holds an object whose tensors cannot be reached.
    """
    if batch is None:
        raise BilevelError(
            f"the {name} loader returns None as a batch; {RULE}, so leave such a batch out in the "
            "loader"
        )
    open_containers(batch, f"the {name} batch", "convert it, for instance in collate_fn")


def require_examples(batch: Batch, name: str) -> None:
    """Require that the tensors of a batch have one number of examples.

    A number [] and a tensor whose first axis is 1 are shared by all examples.

    Raises:
        BilevelError: the tensors have first axes of two lengths, or no tensor has an example axis.
    """
    lengths: dict[int, str] = {}
    for field, leaf in tensors(batch).items():
        _require_even(leaf, within(field, f"the {name} batch"))
        if leaf.ndim:
            lengths.setdefault(leaf.shape[0], field)
    if not lengths:
        kinds = ", ".join(strangers(batch)) or "it is empty"
        raise BilevelError(
            f"the {name} batch holds no tensor with an example axis ({kinds}); {RULE}; "
            "convert arrays and numbers in collate_fn"
        )
    several = {length: field for length, field in lengths.items() if length != 1}
    if len(several) > 1:
        found = " and of ".join(f"{length} rows ({field})" for length, field in several.items())
        raise BilevelError(
            f"the {name} batch holds tensors of {found}, so its examples cannot be counted; "
            f"{RULE}; give a tensor that all examples share a first axis of 1, or keep it in the "
            "problem"
        )


def count_rows(leaf: Tensor, what: str) -> int:
    """Return the number of rows of a tensor in memory, after a check that rows can be drawn.

    Raises:
        BilevelError: the tensor is nested, sparse, a number or without values.
    """
    _require_even(leaf, what)
    if leaf.layout != torch.strided:
        layout = str(leaf.layout).removeprefix("torch.")
        raise BilevelError(
            f"{what} is a tensor of layout {layout}, whose rows cannot be drawn; call "
            "to_dense() on it"
        )
    if leaf.ndim == 0:
        raise BilevelError(
            f"{what} is a tensor of shape [], which has no example axis; give one row per "
            "example, or keep the number in the problem"
        )
    return leaf.shape[0]


def _require_even(leaf: Tensor, what: str) -> None:
    """Refuse a nested tensor, and one without values."""
    if leaf.is_meta:
        raise BilevelError(
            f"{what} is on the meta device, where it has no values; create it on the CPU"
        )
    if leaf.is_nested:
        raise BilevelError(
            f"{what} is a nested tensor, whose rows differ in length; pad it with "
            "torch.nested.to_padded_tensor(x, 0.0), and mask the padding in the losses"
        )
