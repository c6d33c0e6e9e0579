"""Dotted paths of a configuration: find the class or function that they name."""

import importlib
import os
from collections.abc import Callable
from typing import Any

from bilevel.errors import BilevelError
from bilevel.text import describe


def locate(path: Any, role: str) -> Callable[..., Any]:
    """Return the class or function at a dotted path.

    Raises:
        BilevelError: there is none, or its module cannot be imported.
    """
    try:
        target = resolved(str(path))
    except Exception as error:  # importing a user's module may raise anything
        raise BilevelError(
            f"{role}._target_={path} cannot be imported ({describe(error)}); {_advice(path)}"
        ) from error
    if not callable(target):
        kind = type(target).__name__
        raise BilevelError(
            f"{role}._target_={path} is a {kind}; give the dotted path of a class or function"
        )
    return target


def _advice(path: Any) -> str:
    """Return what to do about a dotted path that cannot be imported."""
    package, _, rest = str(path).partition(".")
    own = os.path.join(os.getcwd(), package)
    if package == "bilevel" and os.path.isdir(own):
        return f"rename {own}, since only the installed package of that name is searched"
    if package in ("solvers", "problems"):
        try:
            resolved(f"bilevel.{path}")
        except (ImportError, AttributeError):
            return f"bilevel.{package} has replaced that package; look the name up there"
        return f"write bilevel.{package}.{rest} for one of bilevel"
    return "give the dotted path of a class or function"


def resolved(path: str) -> Any:
    """Return the object at a dotted path.

    An import that fails inside an existing module raises its own error.
    """
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
