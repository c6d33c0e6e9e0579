"""Import a user's own modules beside the installed ones, and check the links to our own packages."""

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


def check_links(package: Path = PACKAGE) -> None:
    """Raise where the symbolic links to the problems, the solvers or the configuration are broken.

    Raises:
        BilevelError: names the broken link.
    """
    for name in ("problems", "solvers", "conf"):
        if not (package / name / "__init__.py").is_file():
            raise BilevelError(
                f"{package / name} must be a folder or a symbolic link to one; clone again with "
                "`git clone -c core.symlinks=true`, or install a wheel"
            )


class _WorkingDirectory:
    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [os.getcwd()]) if path is None else None
