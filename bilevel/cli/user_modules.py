"""Where imports come from: a user's own modules beside them, and folders of theirs that hide ours."""

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from bilevel.errors import BilevelError

PACKAGE = Path(__file__).resolve().parents[1]


def add_working_directory() -> None:
    """Let modules in the working directory be imported, after everything that is installed.

    A finder of its own at the end of `sys.meta_path` rather than an entry at the end of `sys.path`: an editable install is
    found by a finder that comes after all of `sys.path`, so that a folder `problems/` beside the user would hide it.
    """
    if _WorkingDirectory not in sys.meta_path:
        sys.meta_path.append(_WorkingDirectory)


def check_not_hidden(names: Sequence[str] = ("problems", "solvers")) -> None:
    """Raise where a folder of the user's own hides an installed package of ours.

    Raises:
        BilevelError: naming the folder.
    """
    for name in names:
        installed = (
            PACKAGE.parent / name
        )  # a wheel and an editable install alike put our packages side by side
        spec = importlib.util.find_spec(name)
        found = None if spec is None else _folder(spec)
        if found is None:
            raise BilevelError(
                f"the package `{name}`, a part of bilevel, is not installed; install bilevel anew with pip"
            )
        if found != installed:
            raise BilevelError(
                f"{found} hides bilevel's own package `{name}`, installed in {installed.parent}; rename yours or run elsewhere "
                "(`python -m` and PYTHONPATH put your folders first, the command `bilevel` does not)"
            )


class _WorkingDirectory:
    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [os.getcwd()]) if path is None else None


def _folder(spec: ModuleSpec) -> Path | None:
    """The folder of a package (the file of a module), regular or namespace."""
    for place in spec.submodule_search_locations or ():
        if os.path.isdir(place):  # an editable install lists a placeholder too
            return Path(place).resolve()
    return Path(spec.origin).resolve() if spec.origin else None
