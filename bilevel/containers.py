"""Containers of tensors that PyTorch's pytrees do not open by themselves.

PyTorch opens tuples, lists, dicts and named tuples. Any other object is one leaf, so its tensors
are not seen: they are not counted, not moved, not cut and not differentiated.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from bilevel.errors import BilevelError

ALLOWED = (
    "a tensor, or a tuple, list, dict (or another mapping), named tuple or dataclass of tensors"
)
"""The kinds of trees that are opened, for errors."""

_CLOSED = (Tensor, str, bytes, int, float, complex, type(None))


class _Shape:
    """The names of the entries of a container, and an example of it; equal where the names are."""

    def __init__(self, container: Any, names: Sequence[Any]) -> None:
        self.container = container
        self.names = tuple(names)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Shape)
            and type(self.container) is type(other.container)
            and self.names == other.names
        )

    def __hash__(self) -> int:
        return hash((type(self.container), self.names))

    def __repr__(self) -> str:
        return f"{type(self.container).__name__}{list(self.names)}"


def open_containers(tree: Any, what: str, remedy: str) -> None:
    """Register the containers in a tree as pytrees; refuse objects that hide tensors.

    Mappings, dataclasses, and subclasses of tuples and lists are registered once for their type.

    Args:
        tree: a batch, a split or a prediction.
        what: name of the tree in errors, for instance "the train batch".
        remedy: advice after the semicolon.

    Raises:
        BilevelError: an object holds tensors and cannot be opened, or is a packed sequence.

    Example:
        >>> from collections import UserDict
        >>> import torch
        >>> class Tokens(UserDict): ...
        >>> batch = Tokens(ids=torch.ones(3))
        >>> open_containers(batch, "the train batch", "convert it")
        >>> [leaf.shape for leaf in pytree.tree_leaves(batch)]
        [torch.Size([3])]
    """
    for leaf in pytree.tree_leaves(tree, is_leaf=lambda x: isinstance(x, PackedSequence)):
        if isinstance(leaf, PackedSequence):
            raise BilevelError(
                f"{what} holds a PackedSequence, in which the examples are mixed; give the padded "
                "tensor and the lengths of its rows instead"
            )
        if isinstance(leaf, _CLOSED):
            continue
        if not _holds_tensors(leaf):
            continue
        flatten, *fillers = _parts(leaf)
        for fill in fillers:
            if _survives(leaf, flatten, fill):
                pytree.register_pytree_node(type(leaf), flatten, fill)
                for child in flatten(leaf)[0]:
                    open_containers(child, what, remedy)
                break
        else:
            raise BilevelError(
                f"{what} holds a {type(leaf).__name__}, whose tensors cannot be reached; it may be "
                f"{ALLOWED}; {remedy}"
            )


def _parts(container: Any) -> tuple[Any, ...]:
    """Return the function that takes a container apart, and those that may put it together."""
    if isinstance(container, MutableMapping):
        return _flatten_mapping, _fill_mapping, _make_mapping
    if isinstance(container, Mapping):
        return _flatten_mapping, _make_mapping
    if is_dataclass(container):
        return _flatten_dataclass, _fill_dataclass
    if isinstance(container, (tuple, list)):
        return _flatten_sequence, _make_sequence
    return (None,)


def _flatten_mapping(mapping: Mapping[Any, Any]) -> tuple[list[Any], _Shape]:
    return list(mapping.values()), _Shape(mapping, list(mapping))


def _fill_mapping(values: Iterable[Any], shape: _Shape) -> Any:
    filled = copy.copy(shape.container)
    for name, value in zip(shape.names, values, strict=True):
        filled[name] = value
    return filled


def _make_mapping(values: Iterable[Any], shape: _Shape) -> Any:
    return type(shape.container)(dict(zip(shape.names, values, strict=True)))


def _flatten_sequence(items: Sequence[Any]) -> tuple[list[Any], _Shape]:
    return list(items), _Shape(items, range(len(items)))


def _make_sequence(values: Iterable[Any], shape: _Shape) -> Any:
    return type(shape.container)(list(values))


def _flatten_dataclass(value: Any) -> tuple[list[Any], _Shape]:
    names = [field.name for field in fields(value) if hasattr(value, field.name)]
    return [getattr(value, name) for name in names], _Shape(value, names)


def _fill_dataclass(values: Iterable[Any], shape: _Shape) -> Any:
    filled = copy.copy(shape.container)
    for name, value in zip(shape.names, values, strict=True):
        object.__setattr__(filled, name, value)  # a frozen one has no assignment of its own
    return filled


def _survives(
    container: Any,
    flatten: Callable[[Any], tuple[list[Any], _Shape]],
    fill: Callable[[Iterable[Any], _Shape], Any],
) -> bool:
    """Return whether a new container holds other tensors, and the given one those it had."""
    children: list[Any] = []
    shape = _Shape(container, ())
    with suppress(Exception):  # the constructor is a user's own code
        children, shape = flatten(container)
        others = [child.detach() if isinstance(child, Tensor) else child for child in children]
        filled = fill(others, shape)
        found, names = flatten(filled)
        kept, _ = flatten(container)
        if shape == names and _same(found, others) and _same(kept, children):
            return not _is_stale(filled, others)
    if isinstance(container, MutableMapping):
        for name, child in zip(shape.names, children, strict=False):
            container[name] = child
    return False


def _is_stale(filled: Any, others: Sequence[Any]) -> bool:
    """Return whether a new container holds a tensor beside its entries, which would stay as is."""
    known = {id(leaf) for leaf in pytree.tree_leaves(list(others))}
    attributes = pytree.tree_leaves(list(getattr(filled, "__dict__", {}).values()))
    return any(isinstance(leaf, Tensor) and id(leaf) not in known for leaf in attributes)


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return all(a is b for a, b in zip(some, others, strict=True))


def _holds_tensors(value: Any, depth: int = 3) -> bool:
    """Return whether an object is, or holds in its attributes or items, a tensor."""
    if isinstance(value, Tensor):
        return True
    if isinstance(value, (*_CLOSED, type)) or depth == 0:
        return False
    held: list[Any] = []
    with suppress(Exception):  # a property or an iterator of a user's own
        if isinstance(value, Mapping):
            held += value.values()
        elif isinstance(value, (tuple, list, set)):
            held += value
        held += vars(value).values()
    for slot in getattr(type(value), "__slots__", ()):
        held += [getattr(value, slot, None)] if isinstance(slot, str) else []
    return any(_holds_tensors(part, depth - 1) for part in held)
