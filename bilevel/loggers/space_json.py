"""The hyperparameter space as JSON, which `run.json` keeps for later readers."""

from dataclasses import fields
from typing import Any

from bilevel import domains
from bilevel.domains import Domain
from bilevel.errors import BilevelError
from bilevel.space import Space

LARGE = 64
"""Number of entries above which a hyperparameter is recorded by mean, min and max."""


def space_to_json(space: Space) -> dict[str, Any]:
    """Return the domains of a space in JSON's types.

    Large domains and domains of a user's own class are left out.

    Example:
        >>> space_to_json(Space(decay=domains.Positive(init=0.1, scale=0.5)))
        {'decay': {'domain': 'Positive', 'init': 0.1, 'scale': 0.5}}
    """
    return {name: _fields(domain) for name, domain in space.items() if _is_plain(domain)}


def space_from_json(description: Any) -> Space:
    """Return the space of a description; entries that do not describe a domain are left out.

    Example:
        >>> space = Space(p=domains.Interval(init=0.1, low=0.0, high=0.9, shape=(2,)))
        >>> space_from_json(space_to_json(space))["p"].shape
        (2,)
    """
    known: dict[str, Domain] = {}
    for name, entry in (description if isinstance(description, dict) else {}).items():
        cls = getattr(domains, str(entry.get("domain")), None) if isinstance(entry, dict) else None
        if isinstance(cls, type) and issubclass(cls, Domain) and cls is not Domain:
            try:
                known[name] = cls(**{key: value for key, value in entry.items() if key != "domain"})
            except (BilevelError, TypeError):
                continue
    return Space(**known)


def _is_plain(domain: Domain) -> bool:
    return type(domain).__module__ == domains.__name__ and domain.numel <= LARGE


def _fields(domain: Domain) -> dict[str, Any]:
    entries: dict[str, Any] = {"domain": type(domain).__name__, "init": domain.initial().tolist()}
    for field in fields(domain):
        value = getattr(domain, field.name)
        if field.name != "init" and value != field.default:
            entries[field.name] = list(value) if isinstance(value, tuple) else value
    return entries
