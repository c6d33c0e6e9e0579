"""Text for messages: errors, sizes, counts and names as one line that a reader understands."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def first_line(error: BaseException | str) -> str:
    r"""Return the first line of an error's message, or the name of its class where it has none.

    Example:
        >>> first_line(ValueError("one\ntwo")), first_line(KeyError())
        ('one', 'KeyError')
    """
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def describe(error: BaseException) -> str:
    """Return the class and the first line of an error.

    Example:
        >>> describe(ValueError("too long")), describe(ValueError())
        ('ValueError: too long', 'ValueError')
    """
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


def printable(text: str) -> str:
    r"""Return text without characters that command a terminal; `\x1b` is written out instead.

    Line ends and tabs stay.

    Example:
        >>> printable("a\x1b[2J")
        'a\\x1b[2J'
    """
    return _COMMANDS.sub(lambda found: ascii(found[0])[1:-1], text)


def without_password(address: str) -> str:
    """Return an address without the user and the password that it may hold.

    Example:
        >>> without_password("https://me:secret@host/x"), without_password("sqlite:///x.db")
        ('https://host/x', 'sqlite:///x.db')
    """
    return re.sub("//[^/]*@", "//", address)


def near(word: str, known: Iterable[Any]) -> str:
    """Return ' (did you mean `x`?)' for the words of `known` that are close, or nothing.

    Example:
        >>> near("digit", ["digits", "mnist"]), near("x", ["digits"])
        (' (did you mean `digits`?)', '')
    """
    close = get_close_matches(word, [str(k) for k in known], n=3)
    return f" (did you mean {' or '.join(f'`{c}`' for c in close)}?)" if close else ""


def byte_size(count: int) -> str:
    """Return a number of bytes in the largest unit that it fills.

    Example:
        >>> byte_size(12), byte_size(3 * 2**20), byte_size(5 * 2**30)
        ('12 bytes', '3.0 MiB', '5.0 GiB')
    """
    for unit, least in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= least:
            return f"{count / least:,.1f} {unit}"
    return f"{count} bytes"


def short_count(value: float) -> str:
    """Return a count in a form that is short enough for an axis.

    Example:
        >>> short_count(20_000), short_count(1.5e6), short_count(64)
        ('20k', '1.5M', '64')
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def file_name(name: object) -> str:
    """Return a name as a part of a file name; it names no other directory.

    Example:
        >>> file_name("my problem"), file_name("..")
        ('my-problem', 'unnamed')
    """
    return re.sub(r"[^\w.+-]+", "-", str(name)).lstrip(".") or "unnamed"
