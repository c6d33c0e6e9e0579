"""Imports of a user's own modules, from the working directory."""

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def add_working_directory() -> None:
    """Let modules in the working directory be imported, after everything that is installed.

    This is a finder at the end of `sys.meta_path`, not an entry of `sys.path`: an editable install
    has a finder that comes after all of `sys.path`, so a folder there could hide an installed one.
    """
    if _WorkingDirectory not in sys.meta_path:
        sys.meta_path.append(_WorkingDirectory)


class _WorkingDirectory:
    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        try:
            return PathFinder.find_spec(name, [os.getcwd()]) if path is None else None
        except FileNotFoundError:  # the working directory was removed
            return None
