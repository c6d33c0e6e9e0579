"""The symbolic links `bilevel/{solvers,problems,conf}`, which a checkout may have broken.

Git without symbolic links writes a text file with the path of the target in place of each link.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent
LINKED = ("problems", "solvers", "conf")


def broken_link(package: Path | None = None) -> str | None:
    """Return a sentence about the first broken link in `package`, or None."""
    package = package or PACKAGE
    for name in LINKED:
        if not (package / name / "__init__.py").is_file():
            return (
                f"{package / name} must be a folder or a symbolic link to one; clone the "
                "repository again with `git clone -c core.symlinks=true`, or install a wheel"
            )
    return None


def explain_broken_links() -> None:
    """Make the import of a package behind a broken link raise an error that has the remedy."""
    if _BrokenLinks not in sys.meta_path:
        sys.meta_path.append(_BrokenLinks)


class _BrokenLinks:
    """A finder that comes last, so it only sees modules that no other finder has found."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        linked = name.removeprefix("bilevel.") in LINKED and name.startswith("bilevel.")
        if linked and (sentence := broken_link()) is not None:
            raise ImportError(sentence)
        return None
