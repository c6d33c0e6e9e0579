"""Types of settings: check values of a configuration against annotations of a constructor."""

import inspect
import types
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, Union, get_args, get_origin

from torch import Tensor

from bilevel.cli.locate import locate
from bilevel.errors import BilevelError
from bilevel.text import near
from bilevel.validate import is_number

PLAIN = (bool, int, float, str, type(None), list, tuple)


def check_type(value: Any, annotation: Any, role: str) -> None:
    """Raise if a plain value of the configuration cannot be what the annotation asks for.

    Numbers, strings, truth values, None, lists and the classes of nodes are checked, and only
    against annotations with plain values or abstract classes. The constructor checks the rest.

    Example:
        >>> check_type(3, float, "decay")
        >>> check_type("many", int | None, "epochs")
        Traceback (most recent call last):
        bilevel.errors.BilevelError: epochs='many' is a str; give int or null

    Raises:
        BilevelError: the message has the setting, its value, and what to give.
    """
    union = get_origin(annotation) in (Union, types.UnionType)
    members = get_args(annotation) if union else (annotation,)
    if isinstance(value, Mapping):
        made = _made(value, role)
        if made is None or any(_holds(member, made) for member in members):
            return
        found = f"{role} makes a {made.__name__}"
    elif not isinstance(value, PLAIN) or any(_admits(member, value) for member in members):
        return
    elif value is None:
        found = f"{role}=null must have a value"
    elif choices := [c for m in members if get_origin(m) is Literal for c in get_args(m)]:
        found = f"{role}={value!r} is unknown{near(str(value), choices)}"
    else:
        kind = type(value).__name__
        found = f"{role}={value!r} is {'an' if kind == 'int' else 'a'} {kind}"
    wanted = " or ".join(_name(member) for member in members)
    if any(map(inspect.isabstract, members)):
        wanted += ", as {_target_: …}"
    raise BilevelError(f"{found}; give {wanted}")


def _made(node: Mapping[str, Any], role: str) -> type | None:
    """Return the class that a node becomes, or None if that is not known beforehand."""
    if "_target_" not in node:
        return dict
    if node.get("_partial_"):
        return partial
    target = locate(node["_target_"], role)
    return target if inspect.isclass(target) else None


def _holds(member: Any, made: type) -> bool:
    """Return whether a `made` fits the annotation `member`; True if that is not decidable."""
    if inspect.isabstract(member):
        return issubclass(made, member)
    return member not in (bool, int, float, str, None, type(None))


def _admits(member: Any, value: Any) -> bool:
    """Return whether `value` fits the annotation `member`; True if that is not decidable."""
    if get_origin(member) is Literal:
        return value in get_args(member)
    if member is type(None) or member is None:
        return value is None
    if member is bool:
        return isinstance(value, bool)
    if member is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if member is float:
        return is_number(value)
    if member is str:
        return isinstance(value, str)
    if get_origin(member) in (list, Sequence) and isinstance(value, PLAIN):
        entries = get_args(member)[0]
        return isinstance(value, (list, tuple)) and all(
            entries not in (bool, int, float, str)
            if isinstance(item, Mapping)
            else _admits(entries, item)
            for item in value
        )
    if inspect.isabstract(member):
        return isinstance(value, member)
    return member is not Tensor  # configuration holds no tensors


def _name(member: Any) -> str:
    if get_origin(member) is Literal:
        return " or ".join(repr(choice) for choice in get_args(member))
    if get_origin(member) in (list, Sequence):
        return f"a list of {_name(get_args(member)[0])}"
    return "null" if member is type(None) else getattr(member, "__name__", str(member))
