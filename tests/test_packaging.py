"""Build an sdist, and a wheel from it: complete, and with one top-level package."""

import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from tests.support.imports import PARTS, ROOT

LINKS = (*PARTS, "conf")
BUILD = "from setuptools import build_meta; build_meta.{hook}({target!r})"


def shipped(suffixes=(".py", ".yaml", ".typed")):
    """Return the files of the product by the paths that they have once installed."""
    files = [
        file.relative_to(ROOT)
        for top in ("bilevel", *LINKS)
        for file in (ROOT / top).rglob("*")
        if file.suffix in suffixes
    ]
    return {str(file) if file.parts[0] == "bilevel" else f"bilevel/{file}" for file in files}


def build(folder, hook, target):
    code = BUILD.format(hook=hook, target=str(target))
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = target.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Return the names in a wheel that is built from an sdist of a copy of the sources."""
    pytest.importorskip("setuptools", minversion="77")
    place = tmp_path_factory.mktemp("packaging")
    source, sdist, wheels = (place / name for name in ("source", "sdist", "wheel"))
    unpacked = place / "unpacked"
    for made in (sdist, wheels):
        made.mkdir()
    for part in ("bilevel", *LINKS):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / part, source / part, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    with tarfile.open(build(source, "build_sdist", sdist)) as archive:
        archive.extractall(unpacked, filter="data")
    (folder,) = unpacked.iterdir()
    with zipfile.ZipFile(build(folder, "build_wheel", wheels)) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize("name", LINKS)
def test_the_sources_are_linked_into_the_package(name):
    link = ROOT / "bilevel" / name
    assert link.is_symlink()
    assert link.readlink().parts == ("..", name)


def test_the_wheel_is_complete(wheel):
    assert len(shipped()) > 200
    assert {name for name in wheel if name.startswith("bilevel/")} == shipped()


def test_the_wheel_holds_one_top_level_package_and_the_licence(wheel):
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"bilevel"}
    assert any(name.endswith("licenses/LICENSE") for name in wheel)
