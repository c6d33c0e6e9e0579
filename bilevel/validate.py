"""Checks of settings: every message has the form `<setting>=<value> <what is wrong>; <remedy>`.

Each function takes settings by keyword, `positive(lr=lr, eps=eps)`, and raises `BilevelError` at
the first one that is wrong. A dictionary can give a dotted name:
`positive(**{"runner.epochs": n})`.
"""

import os
import sys
from collections.abc import Iterable
from numbers import Integral
from pathlib import Path
from typing import Any

from bilevel.errors import BilevelError
from bilevel.text import near


def wrong(setting: str, value: Any, what: str, remedy: str) -> BilevelError:
    """Return the error about a setting.

    Example:
        >>> str(wrong("clip_norm", -1, "must be positive", "set it to null for no clipping"))
        'clip_norm=-1 must be positive; set it to null for no clipping'
    """
    return BilevelError(f"{setting}={value!r} {what}; {remedy}")


def is_number(value: Any) -> bool:
    """Return whether a value is an int or a float; a bool is neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def finite(remedy: str | None = None, /, **settings: Any) -> None:
    """Require numbers that a float can hold.

    Example:
        >>> finite(low=float("inf"))
        Traceback (most recent call last):
        bilevel.errors.BilevelError: low=inf must be a finite number; choose one
    """
    for name, value in settings.items():
        if not (is_number(value) and abs(value) <= sys.float_info.max):
            raise wrong(name, value, "must be a finite number", remedy or "choose one")


def positive(remedy: str | None = None, /, **settings: Any) -> None:
    """Require positive and finite numbers.

    Example:
        >>> positive(lr=0.1)
        >>> positive(lr=0)
        Traceback (most recent call last):
        bilevel.errors.BilevelError: lr=0 must be positive and finite; choose a number above 0
    """
    for name, value in settings.items():
        if not (is_number(value) and 0 < value <= sys.float_info.max):
            raise wrong(
                name, value, "must be positive and finite", remedy or "choose a number above 0"
            )


def at_least(least: float, remedy: str | None = None, /, **settings: Any) -> None:
    """Require numbers that are not below `least`; infinity is allowed.

    Example:
        >>> at_least(1, inner_steps=0)
        Traceback (most recent call last):
        bilevel.errors.BilevelError: inner_steps=0 must be at least 1; choose 1 or more
    """
    for name, value in settings.items():
        if not (is_number(value) and least <= value):
            raise wrong(
                name, value, f"must be at least {least}", remedy or f"choose {least} or more"
            )


def whole(least: int, remedy: str | None = None, /, **settings: Any) -> None:
    """Require whole numbers that are not below `least`.

    Example:
        >>> whole(1, pairs=1.5)
        Traceback (most recent call last):
        bilevel.errors.BilevelError: pairs=1.5 must be a whole number of at least 1; choose 1, 2, …
    """
    for name, value in settings.items():
        integral = isinstance(value, Integral) and not isinstance(value, bool)
        if not (integral and int(value) >= least):
            what = f"must be a whole number of at least {least}"
            raise wrong(name, value, what, remedy or f"choose {least}, {least + 1}, …")


def between(low: float, high: float, remedy: str | None = None, /, **settings: Any) -> None:
    """Require numbers in the closed interval from `low` to `high`.

    Example:
        >>> between(0, 1, share=2)
        Traceback (most recent call last):
        bilevel.errors.BilevelError: share=2 must be between 0 and 1; choose a number in that range
    """
    for name, value in settings.items():
        if not (is_number(value) and low <= value <= high):
            what = f"must be between {low:g} and {high:g}"
            raise wrong(name, value, what, remedy or "choose a number in that range")


def one_of(known: Iterable[Any], /, **settings: Any) -> None:
    """Require values from a list; true, false and null are named as in YAML.

    Example:
        >>> one_of(["fp32", "bf16"], precision="bf1")
        Traceback (most recent call last):
        bilevel.errors.BilevelError: precision='bf1' is unknown (did you mean `bf16`?);
        choose fp32 or bf16
        >>> one_of(["auto", True, False], in_memory="yes")
        Traceback (most recent call last):
        bilevel.errors.BilevelError: in_memory='yes' is unknown; choose auto, true or false
    """
    choices = list(known)
    words = {"True": "true", "False": "false", "None": "null"}
    names = [words.get(repr(k), str(k)) for k in choices]
    for name, value in settings.items():
        if not any(value == k and isinstance(value, bool) == isinstance(k, bool) for k in choices):
            choice = " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
            raise wrong(name, value, f"is unknown{near(str(value), names)}", f"choose {choice}")


def seed_of(value: Any, setting: str = "seed") -> int:
    """Return a seed that generators of PyTorch take.

    Example:
        >>> seed_of("a")
        Traceback (most recent call last):
        bilevel.errors.BilevelError: seed='a' must be a whole number of at most 64 bits; choose
        0, 1, …
    """
    integral = isinstance(value, Integral) and not isinstance(value, bool)
    if not (integral and -(2**63) <= int(value) < 2**64):
        raise wrong(setting, value, "must be a whole number of at most 64 bits", "choose 0, 1, …")
    return int(value)


def path_of(**settings: Any) -> Path:
    """Return the one setting as a path.

    Example:
        >>> path_of(directory=3)
        Traceback (most recent call last):
        bilevel.errors.BilevelError: directory=3 is not a path; give a string or a pathlib.Path
    """
    [(name, value)] = settings.items()
    if not isinstance(value, (str, os.PathLike)) or "\0" in str(value):
        raise wrong(name, value, "is not a path", "give a string or a pathlib.Path")
    return Path(value)
