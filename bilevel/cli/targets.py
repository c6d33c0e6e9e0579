"""Nodes of a configuration with a `_target_`: find the constructor, check the settings, build."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_type_hints

from bilevel.cli.hints import rate_hint
from bilevel.cli.locate import locate
from bilevel.cli.setting_types import check_type
from bilevel.errors import BilevelError
from bilevel.text import describe, first_line, near

SPECIAL = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")


def build(node: Any, role: str) -> Any:
    """Return what the node of the configuration called `role` describes.

    Raises:
        BilevelError: the target cannot be found, it does not have a setting (the message has near
            misses), or a value has a wrong type or lies outside its domain.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    if not isinstance(node, Mapping) or "_target_" not in node:
        raise BilevelError(
            f"{role} has no _target_; give {role}._target_=the dotted path of a class"
        )
    check(node, role)
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, BilevelError):
            raise BilevelError(_with_role(str(cause), role, str(error))) from error
        unknown = re.search(
            r"(?:unexpected|multiple values for) (?:keyword )?argument '(\w+)'", str(cause)
        )
        if isinstance(cause, TypeError) and unknown and (name := unknown[1]) in node:
            # The target takes any name and passes it on, or sets this one itself.
            known = [k for k in _settings(locate(node["_target_"], role))[0] if k != name]
            raise BilevelError(_unknown(role, name, known)) from error
        reason = str(error) if cause is None else describe(cause)
        raise BilevelError(
            f"{role}._target_={node['_target_']} raised {first_line(reason)}; change its settings"
        ) from error


def check(node: Any, role: str) -> None:
    """Check a node, and everything below it, against the constructors that it names.

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


def _with_role(sentence: str, role: str, hydra: str) -> str:
    """Put the node before the sentence of a constructor, as in `solver.clip_norm=-1 must be …`."""
    key = re.search(r"full_key: (\S+)$", hydra)
    place = f"{role}.{key[1]}" if key else role
    if sentence.startswith(f"{role}."):
        return sentence
    between = "." if re.match(r"[a-z_]\w*=", sentence) else ": "
    return f"{place}{between}{sentence}"


def _unknown(role: str, name: str, known: Iterable[str]) -> str:
    """Return the sentence about a setting that a target does not have."""
    known = list(known)
    meant = near(name, known)
    # a name without a near miss may come from another class, whose node this one was merged into
    remove = "" if meant else f", or remove it with '~{role}.{name}'"
    listed = f"choose from {', '.join(known)}" if known else "it has no settings"
    listed = rate_hint(name) or listed
    return f"{role}.{name} is not a setting of its target{meant}; {listed}{remove}"


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
            raise BilevelError(_unknown(role, key, known))


def _settings(
    target: Callable[..., Any],
) -> tuple[dict[str, inspect.Parameter], dict[str, Any], bool]:
    """Return the settings of a target, their types, and whether it takes any other name too.

    A recipe, `def delta_stn(**options) -> SelfTuning`, has the settings of the class that it makes.
    A recipe or classmethod with settings of its own has both.
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
    """Return the parameters that can be given by name, and whether any other name is taken too."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return {}, True  # a builtin without a signature raises its own errors
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return {p.name: p for p in parameters if p.kind in by_name}, open_ended


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # a user's annotation may not evaluate
        return {}
