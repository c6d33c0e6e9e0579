"""Assert the arrows between the parts, the absence of circles, and what a bare import may load."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.imports import (
    ROOT,
    arrows,
    cycles,
    dotted,
    folders,
    imported,
    levels,
    part,
    sources,
)

ALLOWED = {
    "bilevel": {"bilevel"},
    "bilevel.problems": {"bilevel", "bilevel.problems"},
    "bilevel.solvers": {"bilevel", "bilevel.solvers"},
}
KNOWN = sources()


def strays(source: str, name: str) -> set[str]:
    """Return the imports of a module that its part does not allow."""
    allowed = ALLOWED[part(name)]
    found = imported(source, name, {*KNOWN, name})
    bare = {target for target in found if target.split(".")[0] in ("solvers", "problems")}
    ours = {target for target in found if part(target) in ALLOWED}
    return bare | {target for target in ours if part(target) not in allowed}


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_follow_the_arrows(package):
    ours = {name: source for name, source in KNOWN.items() if part(name) == package}
    assert len(ours) > 20
    assert {name: found for name, source in ours.items() if (found := strays(source, name))} == {}


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("bilevel.run.loop", "import bilevel.solvers.fixed"),
        ("bilevel.run.loop", "from bilevel.solvers import Fixed"),
        ("bilevel.run.loop", "from bilevel import problems"),
        ("bilevel.run.loop", "from ..solvers import fixed"),
        ("bilevel.run", "from .. import solvers"),
        ("bilevel.run.loop", "def f():\n    from bilevel.solvers.fixed import Fixed"),
        ("bilevel.run.loop", "import importlib\nimportlib.import_module('bilevel.solvers.fixed')"),
        ("bilevel.problems.hyper_cleaning", "from bilevel.solvers import delta_stn"),
        ("bilevel.solvers.fixed", "from bilevel.problems.closed_form.quadratic import Quadratic"),
        ("bilevel.solvers.fixed", "from bilevel import problems"),
        ("bilevel.solvers.fixed", "from solvers.base import descent"),
    ],
)
def test_a_stray_import_is_seen(name, source):
    assert strays(source, name)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("bilevel.solvers.fixed", "from bilevel.solvers.base.descent import Descent"),
        ("bilevel.problems.hyper_cleaning", "from bilevel.params import Params\nimport torch"),
        ("bilevel.run.loop", "from bilevel.checks import laws"),
    ],
)
def test_an_allowed_import_is_not_a_stray(name, source):
    assert strays(source, name) == set()


@pytest.mark.parametrize("of", [lambda graph: graph, folders], ids=["modules", "folders"])
def test_there_are_no_circles(of):
    assert cycles(of(arrows(KNOWN))) == []


def test_a_circle_is_seen():
    """A circle between modules, and one between folders that is none between modules."""
    modules = arrows({"bilevel.a": "import bilevel.b", "bilevel.b": "def f(): import bilevel.a"})
    assert cycles(modules) == [["bilevel.a", "bilevel.b"]]
    texts = {
        "bilevel.x": "",
        "bilevel.x.one": "from bilevel.y import two",
        "bilevel.x.three": "",
        "bilevel.y": "",
        "bilevel.y.two": "from bilevel.x.three import f",
    }
    modules = arrows(texts)
    assert cycles(modules) == []
    assert cycles(folders(modules)) == [["bilevel.x", "bilevel.y"]]


def test_the_methods_stand_on_one_level():
    """No method imports another; only the package and the recipes are above them."""
    methods = ("evolution", "first_order", "fixed", "implicit", "penalty", "sama", "self_tuning")
    names = {f"bilevel.solvers.{name}" for name in (*methods, "soba", "unrolled")}
    graph = arrows(KNOWN)
    assert names <= graph.keys()
    assert {name: graph[name] & names for name in names if graph[name] & names} == {}


def test_levels_count_the_longest_chain():
    assert levels({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == 3


def test_no_test_file_imports_another():
    tests = {
        dotted(file.relative_to(ROOT)).removeprefix("bilevel."): file.read_text()
        for file in (ROOT / "tests").rglob("*.py")
    }
    assert len(tests) > 80

    def of_tests(source: str, name: str) -> set[str]:
        found = imported(source, name, {*tests, name})
        return {target for target in found if any(p.startswith("test_") for p in target.split("."))}

    assert of_tests("from tests.solvers.test_laws import SOLVERS", "tests.x")
    assert of_tests("from tests.solvers import test_laws", "tests.x")
    assert {name: found for name, text in tests.items() if (found := of_tests(text, name))} == {}


@pytest.mark.parametrize("package", ALLOWED)
def test_bare_imports_need_torch_einops_and_jaxtyping_alone(package):
    code = f"""
import sys, torch, einops, jaxtyping
def tops():
    return {{name.split(".")[0] for name in sys.modules}} - sys.stdlib_module_names
before = tops()
import {package}
print(*sorted(tops() - before))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(ROOT),
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.split() == ["bilevel"], done.stderr or done.stdout
