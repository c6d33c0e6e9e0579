"""A user's own `solvers` and `problems` coexist with ours, and a broken link has a remedy."""

import subprocess
import sys
from pathlib import Path

import pytest

from bilevel import symlinks
from bilevel.cli.app import main

QUICK = (
    *("wandb.mode=disabled", "runner.progress=none", "runner.picture=false"),
    *("problem=quadratic", "runner.epochs=2"),
)
ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("elsewhere")


def python(*arguments, cwd=None):
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)


def broken(folder):
    """A package whose `solvers` is a text file, as git writes it without symbolic links."""
    for name in ("problems", "conf"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()
    (folder / "solvers").write_text("../solvers")
    return folder


@pytest.fixture
def own_modules():
    """A user's own `solvers.py` and `problems/` in the working directory."""
    Path("solvers.py").write_text("from bilevel.solvers import delta_stn\n\nmine = delta_stn\n")
    Path("problems").mkdir()
    Path("problems/mine.py").write_text("from bilevel.problems import Quadratic as Toy\n")


def test_a_script_beside_its_own_solvers_finds_ours_and_all_solvers(own_modules):
    Path("script.py").write_text(
        "import solvers\n"
        "from bilevel import check_problem\n"
        "from bilevel.problems import Quadratic\n"
        "from bilevel.solvers import delta_stn\n"
        "from problems.mine import Toy\n"
        "assert solvers.mine is delta_stn and Toy is Quadratic\n"
        "print(check_problem(Quadratic.random(weights=2, hypers=1)))\n"
    )
    done = python("script.py")
    assert done.returncode == 0, done.stderr
    tuned = next(line for line in done.stdout.splitlines() if "solvers that can tune it" in line)
    assert {"delta_stn", "stn", "fixed"} <= {*tuned.partition(":")[2].replace(",", " ").split()}


def test_the_command_beside_them_runs_ours_and_theirs(own_modules):
    own = ["solver._target_=solvers.mine", "problem._target_=problems.mine.Toy.random"]
    done = python("-m", "bilevel", *QUICK, *own)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["solvers", "problems", "solvers.fixed"])
def test_the_source_folders_are_not_imported_by_their_own_name(name):
    done = python("-c", f"import {name}", cwd=ROOT)
    package = name.partition(".")[0]
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        f"ImportError: `{package}` is the source folder of bilevel.{package}; "
        "import it by that name"
    )


def test_symlinks_that_are_whole_are_left_alone():
    assert symlinks.broken_link() is None
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        import bilevel.nowhere  # noqa: F401


def test_a_broken_link_is_one_sentence(tmp_path, monkeypatch, capfd):
    sentence = f"{tmp_path / 'solvers'} must be a folder or a symbolic link to one; clone"
    monkeypatch.setattr(symlinks, "PACKAGE", broken(tmp_path))
    assert symlinks.broken_link().startswith(sentence)
    (finder,) = (f for f in sys.meta_path if f is symlinks._BrokenLinks)
    with pytest.raises(ImportError, match=r"core\.symlinks=true"):
        finder.find_spec("bilevel.solvers")
    assert finder.find_spec("solvers") is None
    assert main([*QUICK]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"bilevel: {sentence}")
