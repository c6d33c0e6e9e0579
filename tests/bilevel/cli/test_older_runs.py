"""Runs from before solvers and problems moved are refused with the reason."""

from pathlib import Path

import pytest

from bilevel import BilevelError
from bilevel.checkpoint import file_format
from bilevel.cli import compare
from bilevel.cli.app import main
from bilevel.cli.locate import locate
from bilevel.comparison.runs import read_runs
from bilevel.solvers import Replayed

QUICK = (
    *("wandb.mode=disabled", "runner.progress=none", "runner.picture=false"),
    *("problem=quadratic", "solver=fixed", "runner.epochs=2"),
)
REASON = (
    "has format 2, from before solvers and problems moved into bilevel.solvers and "
    "bilevel.problems; resume with the bilevel that wrote it, or start a new run"
)

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def old(monkeypatch):
    """A run with checkpoints of format 2, whose configuration names packages at the top level."""
    with monkeypatch.context() as patched:
        patched.setattr(file_format, "VERSION", 2)
        assert main([*QUICK, "hydra.run.dir=old"]) == 0
    config = Path("old/config.yaml")
    text = config.read_text()
    for package in ("solvers", "problems"):
        text = text.replace(f"_target_: bilevel.{package}.", f"_target_: {package}.")
    assert "_target_: solvers." in text
    assert "_target_: problems." in text
    config.write_text(text)
    return Path("old")


@pytest.mark.parametrize(
    "arguments",
    [
        ["resume=old"],
        [*QUICK, "resume=auto", "hydra.run.dir=old"],
        [*QUICK, "runner.initial_params=old", "hydra.run.dir=new"],
    ],
    ids=["resume", "auto", "initial_params"],
)
def test_they_are_refused_in_one_sentence(old, arguments, capfd):
    before = {path: path.read_bytes() for path in old.iterdir()}
    capfd.readouterr()
    assert main(arguments) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert REASON in line
    assert {path: path.read_bytes() for path in old.iterdir()} == before
    assert not Path("new").exists()


def test_a_name_of_the_old_packages_has_the_new_one_as_its_remedy(capfd):
    assert main([*QUICK, "solver._target_=solvers.delta_stn"]) == 1
    assert "write bilevel.solvers.delta_stn" in capfd.readouterr().err


def test_they_are_compared_with_newer_ones_under_one_label(old):
    assert main([*QUICK, "hydra.run.dir=new", "seed=1"]) == 0
    assert len({run.label for run in read_runs("old", "new")}) == 1
    assert compare.main(["old", "new"]) == 0
    assert Path("report/report.html").is_file()


def test_their_hyperparameter_schedules_are_replayed(old):
    assert Replayed(old).schedule.steps[0] == 0


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        ("solvers.Fixed", "write bilevel.solvers.Fixed for one of bilevel"),
        ("problems.datasets.cifar10", "bilevel.problems has replaced that package; look"),
    ],
)
def test_an_old_path_is_advised_only_where_the_new_one_exists(path, advice):
    with pytest.raises(BilevelError, match=advice):
        locate(path, "problem")
