"""Groups of names (of weights, of layers) that patterns select."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from bilevel.errors import BilevelError
from bilevel.text import near

Patterns: TypeAlias = str | Sequence[str]
"""One pattern or several, as in a shell: `*` stands for any text, dots included."""

SHOWN = 6
"""Names that an error lists."""


def matches(name: str, patterns: Patterns) -> bool:
    """Return whether a pattern fits `name`; `*.x` also fits `x` itself.

    Example:
        >>> matches("0.weight", "*.weight"), matches("weight", "*.weight"), matches("bias", "w*")
        (True, True, False)
    """
    given = [patterns] if isinstance(patterns, str) else patterns
    return any(fnmatchcase(name, p) or fnmatchcase(f".{name}", p) for p in given)


def grouped(
    groups: Mapping[str, Patterns], names: Iterable[str], setting: str, kind: str
) -> dict[str, str]:
    """Return the group of every name that a pattern selects.

    Args:
        groups: the patterns of each group.
        names: the names to select from.
        setting: the setting that holds the patterns, for errors.
        kind: what the names are, for errors.

    Example:
        >>> grouped({"all": "*"}, ["0.weight", "0.bias"], "params", "weight")
        {'0.weight': 'all', '0.bias': 'all'}
        >>> grouped({"all": "2.*"}, ["0.weight", "0.bias"], "params", "weight")
        Traceback (most recent call last):
        bilevel.errors.BilevelError: params={'all': '2.*'} matches no weight;
        choose among 0.weight, 0.bias

    Raises:
        BilevelError: a group has no patterns or selects nothing, or two select the same name.
    """
    known, chosen = list(names), dict[str, str]()
    for group, patterns in groups.items():
        if not _are_patterns(patterns):
            raise BilevelError(
                f"{setting}={ {group: patterns} } must be patterns of names; write '*' for every "
                f"{kind}"
            )
        found = [name for name in known if matches(name, patterns)]
        if not found:
            shown = ", ".join(known[:SHOWN]) + ", …" * (len(known) > SHOWN)
            remedy = f"choose among {shown}" if known else f"there is no {kind}"
            raise BilevelError(
                f"{setting}={ {group: patterns} } matches no {kind}{_near(patterns, known)}; "
                f"{remedy}"
            )
        for name in found:
            if (other := chosen.setdefault(name, group)) != group:
                raise BilevelError(
                    f"{setting}={ {key: groups[key] for key in (other, group)} } selects the "
                    f"{kind} `{name}` twice; make the patterns disjoint"
                )
    return chosen


def _are_patterns(given: object) -> bool:
    if isinstance(given, (list, tuple)):
        return all(isinstance(pattern, str) for pattern in given)
    return isinstance(given, str)


def _near(patterns: Patterns, names: Sequence[str]) -> str:
    """Return a hint with the parts of names that are close to a part of a pattern."""
    parts = {part: None for name in names for part in name.split(".")}
    given = [patterns] if isinstance(patterns, str) else patterns
    words = [word for p in given for word in p.replace("*", ".").split(".") if word not in parts]
    return next((hint for word in words if word and (hint := near(word, parts))), "")
