"""Run directories from somebody else: nothing is executed, nothing hangs, nothing is lost."""

import shutil
from pathlib import Path

import pytest
import yaml

from bilevel.checkpoint import file_format
from bilevel.cli.app import main
from bilevel.cli.stored import check_trusted
from bilevel.comparison.run_files import parse_records, read_config
from bilevel.errors import BilevelError
from bilevel.files import write_atomically
from bilevel.text import printable
from bilevel.untrusted_files import read_bytes, read_yaml
from tests.soak import hostile

pytestmark = [
    pytest.mark.usefixtures("elsewhere"),
    pytest.mark.filterwarnings("default::UserWarning"),  # the runs are short
]

SOME = (
    *("target torch.nn.functional.torch.load", "target planted.attack", "target at wandb"),
    *("environment in a setting", "environment in a name", "directory in a name", "aliases"),
    *("escapes in a name", "dollars in a name", "lists for numbers", "executing checkpoint"),
    *("checkpoint that unpacks to much", "link metrics.jsonl to a file", "pipe config.yaml"),
    *("link curves.png to a file", "link summary.json to /dev/zero"),
)
"""One case of each kind; `python -m tests.soak hostile` runs all of them."""


@pytest.fixture
def attacked(monkeypatch):
    monkeypatch.setenv("SECRET", "hidden-value")
    hostile.prepare()


def test_hostile_directories(attacked):
    cases = hostile.cases()
    assert len(cases) >= 40
    wrong = {name: found for name in SOME if (found := hostile.faults(cases[name]))}
    assert not wrong


def test_the_checks_find_an_attack(attacked, monkeypatch):
    """Without the check of targets, the same case executes code."""
    monkeypatch.setattr("bilevel.cli.resume.check_trusted", lambda *_: None)
    assert "it executed code" in hostile.faults(hostile.cases()["target torch.load"])


@pytest.mark.parametrize(
    ("path", "trusted"),
    [
        ("bilevel.solvers.delta_stn", True),
        ("bilevel.problems.Ridge.synthetic", True),
        ("bilevel.problems.datasets.load_digits", True),
        ("bilevel.Runner", True),
        ("bilevel.loggers.wandb_logger.WandB", True),
        ("torch.optim.SGD", True),
        ("torch.optim.lr_scheduler.StepLR", True),
        ("torch.nn.Linear", True),
        *((path, False) for path in hostile.OUTSIDE),
        ("torch.nn.utils.rnn.pad_sequence", False),  # a function of torch.nn
        ("bilevel.checkpoint.checkpoints.load", False),
    ],
)
def test_what_a_stored_configuration_may_name(path, trusted):
    stored = {"problem": {"inner": [{"_target_": path}]}}
    if trusted:
        check_trusted(stored, {}, Path("run"))
    else:
        with pytest.raises(BilevelError, match=r"problem\.inner\.0\._target_=.*add trust=true"):
            check_trusted(stored, {}, Path("run"))
    check_trusted(stored, {"solver": {"_target_": path}}, Path("run"))  # the user names it


def test_trust_and_naming_it_both_continue_a_run_with_an_own_class(capfd):
    Path("own.py").write_text(
        "from bilevel.solvers import Fixed\n\n\nclass Mine(Fixed):\n    pass\n"
    )
    own = ("solver=fixed", "solver._target_=own.Mine")
    assert main([*hostile.QUICK, *own, "hydra.run.dir=mine"]) == 0
    capfd.readouterr()
    assert main(["resume=mine", "runner.epochs=3"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "solver._target_=own.Mine" in line
    assert "trust=true" in line
    assert main(["resume=mine", "runner.epochs=3", "trust=true"]) == 0
    assert yaml.safe_load(Path("mine/config.yaml").read_text())["trust"] is False
    assert main(["resume=mine", "runner.epochs=4", *own]) == 0
    assert main(["resume=mine", "runner.epochs=5", "trust=3"]) == 1


@pytest.mark.parametrize("content", [None, "", "{a: [", "a: 3\n", "- 1\n"])
def test_the_checkpoint_replaces_a_lost_configuration(capfd, content):
    assert main([*hostile.QUICK, "hydra.run.dir=mine"]) == 0
    before = Path("mine/config.yaml").read_text()
    Path("mine/config.yaml").unlink()
    if content is not None:
        Path("mine/config.yaml").write_text(content)
    capfd.readouterr()
    assert main(["resume=mine", "runner.epochs=3"]) == 0
    assert "the configuration in the checkpoint replaces it" in capfd.readouterr().err
    after = Path("mine/config.yaml").read_text()
    assert after.replace("epochs: 3", "epochs: 2") == before


def test_temporary_files_have_names_that_nobody_can_foresee(tmp_path, monkeypatch):
    seen = []
    for _ in range(2):
        write_atomically(
            tmp_path / "a.json",
            lambda file: (file.write("x"), seen.extend(p.name for p in tmp_path.glob(".a*"))),
        )
    assert len(set(seen)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_yaml_and_bytes_have_limits(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("a: &x [1]\nb: *x\n")
    with pytest.raises(ValueError, match="has the alias"):
        read_yaml(file)
    said = []
    assert read_config(file, said.append) == {}
    assert "alias" in said[0]
    file.write_text("a: " + "[" * 60 + "]" * 60)
    with pytest.raises(ValueError, match="nested more than 50"):
        read_yaml(file)
    with pytest.raises(OSError, match="above the limit of 10 bytes"):
        read_bytes(file, 10)
    file.write_text("a: [1, {b: 2}]\n")
    assert read_yaml(file) == {"a": [1, {"b": 2}]}
    with pytest.raises(OSError, match="not a regular file"):
        read_bytes(Path("/dev/zero"))
    with pytest.raises(OSError, match="not a regular file"):
        parse_records(tmp_path)


def test_an_archive_that_would_unpack_to_more_than_its_size_is_not_loaded(tmp_path):
    file = tmp_path / "a.pt"
    file.write_bytes(hostile.bomb())
    assert file.stat().st_size < 2**20
    with pytest.raises(file_format.Unreadable, match=r"would unpack .* to 256\.0 MiB"):
        file_format.read(file)


def test_text_for_a_terminal_commands_nothing():
    assert printable("a\x1b]0;x\x07\u202e\n") == "a\\x1b]0;x\\x07\\u202e\n"


def test_a_name_of_a_run_stays_in_its_directory():
    assert main([*hostile.QUICK, "names.problem=../../outside"]) == 0
    (run,) = Path("runs").iterdir()
    assert run.name.startswith("-..-outside-implicit_cg-seed1-")
    assert not Path("../outside").exists()
    shutil.rmtree("runs")
