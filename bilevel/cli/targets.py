"""Nodes of a configuration that name a constructor by `_target_`: found, held against its signature, built."""

import importlib
import inspect
import os
import re
import types
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from bilevel.errors import BilevelError
from bilevel.text import near

SPECIAL = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")
PLAIN = (bool, int, float, str, type(None), list, tuple)


def build(node: Any, role: str) -> Any:
    """What the node of the configuration called `role` describes.

    Raises:
        BilevelError: a target that cannot be found, a setting that it does not have (with the near misses), a value of a wrong
            type or out of its domain.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    if not isinstance(node, Mapping) or "_target_" not in node:
        raise BilevelError(f"`{role}` names no class; give {role}._target_=the.dotted.path.of.one")
    check(node, role)
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, BilevelError):
            raise BilevelError(f"`{role}`: {cause}") from error
        unknown = (
            re.search(r"unexpected keyword argument '(\w+)'", str(cause))
            if isinstance(cause, TypeError)
            else None
        )
        if unknown and (name := unknown[1]) in node:  # handed on by a target that takes any name
            known = _settings(locate(node["_target_"], role))[0]
            said = f"{near(name, known)}; there are {', '.join(known) or 'none'}"
            raise BilevelError(f"`{role}` has no setting `{name}`{said}") from error
        reason = f"{type(cause).__name__}: {cause}" if cause is not None else str(error)
        raise BilevelError(
            f"`{role}` cannot be built from {node['_target_']}: {_first_line(reason)}"
        ) from error


def check(node: Any, role: str) -> None:
    """Hold a node, and all below it, against the constructors that it names.

    Raises:
        BilevelError: see `build`.
    """
    if isinstance(node, (list, tuple)):
        for index, item in enumerate(node):
            check(item, f"{role}.{index}")
    if not isinstance(node, Mapping):
        return
    for key, value in node.items():
        check(value, f"{role}.{key}")
    for flag in ("_partial_", "_recursive_"):
        if flag in node:
            check_type(node[flag], bool, f"{role}.{flag}")
    if "_target_" in node:
        _check_arguments(node, role, locate(node["_target_"], role))


def locate(path: Any, role: str) -> Callable[..., Any]:
    """The class or function at a dotted path.

    Raises:
        BilevelError: there is none, or its module cannot be imported.
    """
    try:
        target = _resolved(str(path))
    except Exception as error:  # importing a user's module may raise anything
        reason = f"{type(error).__name__}: {_first_line(str(error))}"
        package = str(path).split(".")[0]
        own = os.path.join(os.getcwd(), package)
        if package == "bilevel" and os.path.isdir(own):
            reason += (
                f" ({own} has the name of the installed package, and is not looked at; rename it)"
            )
        advice = "give the dotted path of a class or function"
        raise BilevelError(
            f"`{role}._target_` = {path} cannot be imported: {reason}; {advice}"
        ) from error
    if not callable(target):
        raise BilevelError(
            f"`{role}._target_` = {path} is a {type(target).__name__}; give the dotted path of a class"
        )
    return target


def check_type(value: Any, annotation: Any, role: str) -> None:
    """Raise where a plain value of the configuration cannot be what the annotation says.

    Numbers, strings, truth values, None, lists and the classes of nodes are judged, and only against annotations that speak of
    plain values or of abstract classes; a constructor's own checks see the rest.

    Example:
        >>> check_type(3, float, "decay")
        >>> check_type("many", int | None, "epochs")
        Traceback (most recent call last):
        bilevel.errors.BilevelError: `epochs` = 'many' is a str; give int or None

    Raises:
        BilevelError: naming the setting, its value, and what would do.
    """
    union = get_origin(annotation) in (Union, types.UnionType)
    members = get_args(annotation) if union else (annotation,)
    if isinstance(value, Mapping):
        made = _made(value, role)
        if made is None or any(_holds(member, made) for member in members):
            return
        found = f"would be a {made.__name__}"
    elif not isinstance(value, PLAIN) or any(_admits(member, value) for member in members):
        return
    else:
        kind = type(value).__name__
        found = (
            "is null"
            if value is None
            else f"= {value!r} is {'an' if kind == 'int' else 'a'} {kind}"
        )
    wanted = " or ".join(_name(member) for member in members)
    if any(map(inspect.isabstract, members)):
        wanted += ", as {_target_: …}"
    raise BilevelError(f"`{role}` {found}; give {wanted}")


def _made(node: Mapping[str, Any], role: str) -> type | None:
    """The class of what a node becomes, where that is known beforehand."""
    if "_target_" not in node:
        return dict
    if node.get("_partial_"):
        return partial
    target = locate(node["_target_"], role)
    return target if inspect.isclass(target) else None


def _holds(member: Any, made: type) -> bool:
    """Whether a `made` may be passed where `member` is annotated; True where that cannot be told."""
    if inspect.isabstract(member):
        return issubclass(made, member)
    return member not in (bool, int, float, str, None, type(None))


def _admits(member: Any, value: Any) -> bool:
    """Whether `value` may be passed where `member` is annotated; True where that cannot be told."""
    if get_origin(member) is Literal:
        return value in get_args(member)
    if member is type(None) or member is None:
        return value is None
    if member is bool:
        return isinstance(value, bool)
    if member is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if member is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
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
    return "None" if member is type(None) else getattr(member, "__name__", str(member))


def _resolved(path: str) -> Any:
    """The object at a dotted path; an import that fails inside the module is not mistaken for a module that is not there."""
    parts = path.split(".")
    for count in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:count])
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if count == 1 or error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            continue
        for attribute in parts[count:]:
            found = getattr(found, attribute)
        return found
    raise ImportError("no module is named before the class")


def _check_arguments(node: Mapping[str, Any], role: str, target: Callable[..., Any]) -> None:
    known, hints, open_ended = _settings(target)
    for key, value in node.items():
        if key in SPECIAL:
            continue
        if key in known:
            parameter = known[key]
            if type(value) is not type(parameter.default) or value != parameter.default:
                check_type(value, hints.get(key, Any), f"{role}.{key}")
        elif not open_ended:
            meant = near(
                key, known
            )  # or else it is left of another class, into which this one has been merged
            out = "" if meant else f"; '~{role}.{key}' takes it out"
            raise BilevelError(
                f"`{role}` has no setting `{key}`{meant}; there are {', '.join(known) or 'none'}{out}"
            )


def _settings(
    target: Callable[..., Any],
) -> tuple[dict[str, inspect.Parameter], dict[str, Any], bool]:
    """The settings of a target, their types, and whether any other name is taken too.

    A recipe, `def delta_stn(**options) -> SelfTuning`, has those of the class that it makes; one with settings of its own (it
    may be a classmethod) has them beside these.
    """
    known, open_ended = _parameters(target)
    hints = _hints(target)
    made = getattr(target, "__self__", None) or hints.get("return")
    if not (open_ended and inspect.isclass(made)):
        return known, hints, open_ended
    more, others = _parameters(made)
    return (
        {**known, **{k: p for k, p in more.items() if k not in known}},
        {**_hints(made), **hints},
        bool(known) or others,
    )


def _parameters(target: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """The parameters that can be given by name, and whether any other name is taken too."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return {}, True  # a builtin without a signature: its own errors must do
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return {p.name: p for p in parameters if p.kind in by_name}, open_ended


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # a user's annotation that does not evaluate says nothing about the value
        return {}


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else text
