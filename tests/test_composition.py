"""Assert that solvers override no concrete method, and that settings are spelled once."""

import ast
import functools
import importlib
import inspect
import pkgutil
import re
import textwrap
from abc import ABC, abstractmethod
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

import bilevel.solvers
from bilevel import Solver
from bilevel.solvers.base.descent import Descent
from bilevel.solvers.base.method import Method
from bilevel.solvers.base.settings import InnerSettings, OuterSettings

ROOT = Path(__file__).resolve().parents[1]
SHARED = (
    *("inner_steps", "inner_optimizer", "inner_scheduler", "clip_norm"),
    *("outer_optimizer", "outer_scheduler"),
)


def classes() -> set[type]:
    """Return every class defined in `bilevel.solvers`, and `Solver` with its bases."""
    found: set[type] = set(Solver.__mro__)
    for module in pkgutil.walk_packages(bilevel.solvers.__path__, "bilevel.solvers."):
        held = vars(importlib.import_module(module.name)).values()
        found |= {x for x in held if inspect.isclass(x) and x.__module__ == module.name}
    return found


def functions(cls: type) -> dict[str, object]:
    """Return the functions that a class itself defines in its source, by name."""
    found = {}
    for name, value in vars(cls).items():
        function = value.fget if isinstance(value, property) else value
        function = getattr(function, "func", function)  # functools.cached_property
        function = inspect.unwrap(getattr(function, "__func__", function))
        written = getattr(getattr(function, "__code__", None), "co_filename", "<string>")
        if not written.startswith("<"):  # a dataclass makes methods from strings
            found[name] = function
    return found


@functools.cache
def is_hook(function: object) -> bool:
    """Return whether a method is abstract, or its body is an empty answer."""
    if getattr(function, "__isabstractmethod__", False):
        return True
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    body = [node for node in tree.body[0].body if not _is_docstring(node)]
    return all(
        isinstance(node, ast.Pass) or _returns_nothing(node) or _raises_not_implemented(node)
        for node in body
    )


def _raises_not_implemented(node: ast.stmt) -> bool:
    error = node.exc if isinstance(node, ast.Raise) else None
    return isinstance(error, ast.Name) and error.id == "NotImplementedError"


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _returns_nothing(node: ast.stmt) -> bool:
    if not isinstance(node, ast.Return):
        return False
    value = node.value
    if isinstance(value, ast.Dict):
        return not value.keys
    if isinstance(value, (ast.List, ast.Tuple)):
        return not value.elts
    return value is None or (isinstance(value, ast.Constant) and not value.value)


def overridden(cls: type) -> list[str]:
    """Return the concrete methods of bases of ours that a class overrides."""
    ours = [base for base in cls.__mro__[1:] if base.__module__.split(".")[0] != "builtins"]
    ours = [base for base in ours if base.__module__.startswith(("bilevel.", "tests.", "test_"))]
    return [
        f"{cls.__qualname__}.{name} overrides {base.__qualname__}.{name}"
        for name in functions(cls)
        for base in ours
        if name in functions(base) and not is_hook(functions(base)[name])
    ]


def test_no_solver_overrides_a_concrete_method():
    found = classes()
    assert {Solver, Descent, Method, bilevel.solvers.SelfTuning} <= found
    assert len(found) > 60
    assert [line for cls in found for line in overridden(cls)] == []


class Base(ABC):
    def concrete(self):
        """Return a number."""
        return 1

    @property
    def known(self):
        return 2

    @abstractmethod
    def asked(self):
        return 3

    def hook(self):
        """Return nothing."""

    def empty(self):
        return {}


Base.__module__ = "bilevel.solvers.made"


@pytest.mark.parametrize("name", ["concrete", "known"])
def test_an_override_of_a_concrete_method_is_found(name):
    class Odd(Base):
        pass

    def body(self):
        return 4

    setattr(Odd, name, property(body) if name == "known" else body)
    assert overridden(Odd) == [f"{Odd.__qualname__}.{name} overrides Base.{name}"]


def test_hooks_and_abstract_methods_may_be_overridden():
    class Fine(Base):
        def asked(self):
            return 4

        def hook(self):
            return 5

        def empty(self):
            return {"six": 6}

    assert overridden(Fine) == []


def test_the_interface_of_a_solver_fits_on_one_screen():
    assert len(inspect.getsource(Solver).splitlines()) <= 70
    assert len(inspect.getsource(Method).splitlines()) <= 100


def test_shared_settings_are_spelled_once_in_python():
    defined = {f.name for settings in (InnerSettings, OuterSettings) for f in fields(settings)}
    assert set(SHARED) <= defined
    sources = {p: p.read_text(encoding="utf-8") for p in (ROOT / "solvers").rglob("*.py")}
    other = {"inner_steps": {"first_order.py", "unrolled.py", "soba.py"}}  # another default
    other |= {"outer_steps": {"unrolled.py", "soba.py", "evolution.py"}}  # always 1
    other |= {"outer_optimizer": {"soba.py"}, "clip_norm": {"optimized.py"}}
    for name in SHARED:
        line = re.compile(rf"^    {name}: ", re.MULTILINE)
        spelled = {p.name for p, text in sources.items() if line.search(text)}
        assert "settings.py" in spelled
        assert spelled <= {"settings.py"} | other.get(name, set()), name
    for solver in (getattr(bilevel.solvers, name) for name in bilevel.solvers.__all__):
        if inspect.isclass(solver) and issubclass(solver, Solver):
            assert is_dataclass(solver)
            assert "__init__" not in functions(solver)


def test_shared_settings_are_spelled_once_in_yaml():
    own = {}
    for path in (ROOT / "conf" / "solver").glob("*.yaml"):
        own[path.stem] = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert len(own) >= 18
    repeated = {
        (name, key)
        for name, settings in own.items()
        for key in {*SHARED, "outer_steps"} & settings.keys()
    }
    different = {"first_order", "unrolled", "unrolled_forward"}
    assert repeated == {("soba", "outer_optimizer")} | {(name, "inner_steps") for name in different}
