"""Splits in memory that are not tensors yet: NumPy arrays, and data sets of tensors."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Subset, TensorDataset

from bilevel.data import fields
from bilevel.errors import BilevelError

NUMBERS = "fiubc"
"""Kinds of NumPy types that hold numbers: floating, signed, unsigned, bool and complex."""


def in_memory(split: Any, name: str, *, single: bool = False) -> Any:
    """Return the tensors of a `TensorDataset`, and those of NumPy arrays; any other split as it is.

    Whole numbers become int64, which losses and embeddings take. An array of uint8 with several
    axes keeps its type, because it holds images. A tensor shares the memory of its array where the
    type stays and the array can be written to. A list of tuples, lists or mappings is a list of
    batches, and is returned as it is.

    Args:
        split: a split of the data.
        name: name of the split in errors.
        single: whether float64 arrays become float32, for a network of float32.

    Raises:
        BilevelError: an array holds objects, text or dates, or has a mask.

    Example:
        >>> x, labels = in_memory((np.ones((4, 2)), np.array([0, 1, 1, 0], "int8")), "train")
        >>> x.dtype, labels.dtype
        (torch.float64, torch.int64)
        >>> in_memory(np.ones((4, 2)), "train", single=True).dtype
        torch.float32
    """
    if isinstance(split, (TensorDataset, Subset)):
        return _of_dataset(split)
    if is_list_of_batches(split):
        return split
    found = {id(leaf): word for word, leaf in fields.leaves(split) if _is_array(leaf)}
    if not found:
        return split

    def converted(leaf: Any) -> Any:
        if not _is_array(leaf):
            return leaf
        field = found.get(id(leaf), fields.ALONE)
        return _tensor(leaf, fields.within(field, f"the {name} split"), single=single)

    return pytree.tree_map(converted, split)


def is_list_of_batches(split: Any) -> bool:
    """Return whether a split is a list of tuples, lists or mappings."""
    return type(split) is list and all(isinstance(x, (tuple, list, Mapping)) for x in split)


def is_single(module: torch.nn.Module) -> bool:
    """Return whether all floating-point weights of a module are float32."""
    return {p.dtype for p in module.parameters() if p.is_floating_point()} == {torch.float32}


def _of_dataset(data: Any) -> Any:
    """Return the tensors of a data set, or the data set if its examples are not their rows."""
    if isinstance(data, Subset):
        whole = _of_dataset(data.dataset)
        if not isinstance(whole, tuple) or type(data) is not Subset:
            return data
        rows = torch.as_tensor(data.indices)
        return tuple(t[rows.to(t.device)] for t in whole)
    if isinstance(data, TensorDataset) and type(data).__getitem__ is TensorDataset.__getitem__:
        return tuple(data.tensors)
    return data


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray)


def _tensor(array: np.ndarray, what: str, *, single: bool) -> Tensor:
    if isinstance(array, np.ma.MaskedArray):
        raise BilevelError(
            f"{what} is a masked array, whose mask a tensor would lose; fill it with filled(…)"
        )
    if array.dtype.kind not in NUMBERS:
        raise BilevelError(
            f"{what} is an array of {array.dtype}, which a tensor cannot hold; convert it to "
            "numbers: np.unique(labels, return_inverse=True)[1] numbers classes, and "
            "array.astype(float) reads numbers"
        )
    wanted = array.dtype.newbyteorder("=")
    if array.dtype.kind in "iu" and (array.dtype != np.uint8 or array.ndim == 1):
        wanted = np.dtype(np.int64)
    elif array.dtype.kind == "f" and array.dtype.itemsize >= 8:  # also NumPy's long double
        wanted = np.dtype(np.float32 if single else np.float64)
    writable = np.require(array.astype(wanted, copy=False), requirements=["C", "W"])
    return torch.from_numpy(writable)
