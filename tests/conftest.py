"""Configure every test session: shapes checked at run time, one thread, seeds."""

import logging
import sys
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from beartype import beartype
from jaxtyping import AbstractArray, install_import_hook


def shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Enforce annotations of shape at run time.

    mypy checks the other annotations. Tests of bad input must get past those.
    """
    hints = {name: hint for name, hint in function.__annotations__.items() if _has_shape(hint)}
    if not hints:
        return function
    function.__annotations__ = hints
    return beartype(function)


def _has_shape(hint: Any) -> bool:
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(
        _has_shape(part) for part in get_args(hint)
    )


# The hook must come before the first import of ours. It takes the checker by name, because it
# writes that name into the source that it loads.
sys.modules["shape_checker"] = sys.modules[__name__]
install_import_hook(["bilevel"], "shape_checker.shapes")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep tests that share a fixture of their module on one worker, so that it is made once."""
    for item in items:
        known = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
        if any(found[-1].scope == "module" for found in known.values()):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(autouse=True)
def _deterministic():
    """Seed the global generator, and use one thread, so that xdist's workers do not compete."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Run a command in an empty working directory, and restore logging and environment."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
