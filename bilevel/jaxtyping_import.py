"""Import jaxtyping although a folder named `typeguard` lies beside the user."""

import importlib.util
import sys
from importlib import metadata


def import_jaxtyping() -> None:
    """Import jaxtyping, which takes any folder `typeguard` for that package and asks its version.

    Python finds a folder without an `__init__.py` as a package too. A typeguard that is not
    installed is hidden while jaxtyping is imported.
    """
    name = "typeguard"
    if name in sys.modules or importlib.util.find_spec(name) is None or _is_installed(name):
        return
    sys.modules[name] = None  # type: ignore[assignment]  # importlib then finds no such module
    try:
        import jaxtyping  # noqa: F401
    finally:
        del sys.modules[name]


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


import_jaxtyping()
