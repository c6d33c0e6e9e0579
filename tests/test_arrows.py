"""The arrows of the house: problems → bilevel ← solvers, and what a bare import may load."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "bilevel": {"bilevel"},
    "problems": {"bilevel", "problems"},
    "solvers": {"bilevel", "solvers"},
}
OPTIONAL = (
    "hydra",
    "omegaconf",
    "wandb",
    "kornia",
    "optuna",
    "matplotlib",
    "rich",
    "sklearn",
    "torchvision",
)


def imported(source: str, package: str) -> set[str]:
    """Top-level packages that a module of `package` imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(package if node.level else (node.module or "").split(".")[0])
        elif isinstance(node, ast.Call) and getattr(
            node.func, "attr", getattr(node.func, "id", "")
        ) in (
            "import_module",
            "__import__",
        ):
            names |= {
                str(arg.value).split(".")[0] for arg in node.args if isinstance(arg, ast.Constant)
            }
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_follow_the_arrows(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        strays = (imported(file.read_text(), package) & set(ALLOWED)) - ALLOWED[package]
        assert not strays, f"{file.relative_to(ROOT)} imports {strays}"


@pytest.mark.parametrize(
    "source",
    [
        "import solvers.fixed",
        "from solvers import x",
        "def f():\n    import solvers",
        "import importlib\nimportlib.import_module('solvers.fixed')",
    ],
)
def test_a_stray_import_is_seen(source):
    assert "solvers" in imported(source, "bilevel")


def test_bare_imports_need_torch_einops_and_jaxtyping_alone():
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
import bilevel, solvers, bilevel.problems.closed_form.quadratic
loaded = set({OPTIONAL!r}) & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
