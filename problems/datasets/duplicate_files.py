"""Files with the same bytes in two splits of a data set."""

import hashlib
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence

from bilevel import DataWarning

MOST_FILES = 100_000
"""Number of files above which nothing is compared; opening more would delay a run by minutes."""
HEAD = 4096
"""Bytes that are read first; only files that agree in them are read to their end."""

Group = list[tuple[str, str]]
"""Files that may be equal, each with the name of its split."""


def warn_of_duplicates(splits: Mapping[str, Sequence[str]]) -> None:
    """Warn where files of two splits have the same bytes.

    Args:
        splits: paths of the files, by the name of the split.

    Warns:
        DataWarning: with the number of such files and the first two of them.
    """
    files = [(name, path) for name, paths in splits.items() for path in paths]
    if len(files) > MOST_FILES:
        return
    groups = [files]
    for key in (os.path.getsize, lambda path: _digest(path, HEAD), _digest):
        groups = [part for group in groups for part in _parted(group, key)]
    copies = sum(len(group) for group in groups) - len(groups)
    if groups:
        one, other = next(
            (one, other) for one in groups[0] for other in groups[0] if one[0] != other[0]
        )
        warnings.warn(
            f"image files occur in more than one split ({copies} copies), such as {one[1]} in "
            f"{one[0]} and {other[1]} in {other[0]}, so the losses of the splits are too close to "
            "each other; delete the copies",
            DataWarning,
            stacklevel=3,
        )


def _parted(group: Group, key: Callable[[str], Hashable]) -> list[Group]:
    """Return the parts of a group with equal keys that have files of two splits."""
    parts: dict[Hashable, Group] = defaultdict(list)
    for name, path in group:
        try:
            parts[key(path)].append((name, path))
        except OSError:  # reading the image will name the file
            continue
    return [part for part in parts.values() if len({name for name, _ in part}) > 1]


def _digest(path: str, size: int = -1) -> bytes:
    with open(path, "rb") as file:
        return hashlib.blake2b(file.read(size), digest_size=16).digest()
