"""Every file of a run names its versions, its commit, its device and its threads."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from bilevel import Runner
from bilevel.checkpoint import file_format
from bilevel.checkpoint.checkpoints import CHECKPOINT, CheckpointWarning
from bilevel.loggers.records import environment_of
from bilevel.problems import digits
from bilevel.run import environment as module
from bilevel.run.environment import commit, environment, name_of
from bilevel.solvers import Fixed
from tests.support.fakes import FakeProblem, FakeSolver

CPU = torch.device("cpu")
ENTRIES = {"bilevel", "torch", "python", "commit", "bilevel_commit", "device", "threads"}


def git(*words, at):
    options = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", *options, *words], cwd=at, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    place = tmp_path / "repository"
    place.mkdir()
    git("init", at=place)
    git("commit", "--allow-empty", "-m", "a", at=place)
    return place


def test_the_commit_is_that_of_git(checkout, monkeypatch):
    head = git("rev-parse", "HEAD", at=checkout)
    assert commit(checkout) == head
    below = checkout / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert environment(CPU)["commit"] == head
    git("commit", "--allow-empty", "-m", "b", at=checkout)
    git("pack-refs", "--all", at=checkout)
    assert commit(checkout) == git("rev-parse", "HEAD", at=checkout) != head
    git("checkout", "--detach", head, at=checkout)
    assert commit(checkout) == head


def test_the_commit_of_a_worktree_is_its_own(checkout, tmp_path):
    git("worktree", "add", "-b", "other", str(tmp_path / "tree"), at=checkout)
    git("commit", "--allow-empty", "-m", "b", at=tmp_path / "tree")
    assert commit(tmp_path / "tree") == git("rev-parse", "other", at=checkout)
    git("pack-refs", "--all", at=checkout)
    assert commit(tmp_path / "tree") == git("rev-parse", "other", at=checkout) != commit(checkout)


def test_without_a_readable_commit_there_is_none(tmp_path, monkeypatch):
    git_folder = tmp_path / ".git"
    assert commit(tmp_path) is None
    git_folder.mkdir()
    for content in ("ref: refs/heads/none", "no hash", "ref: ../../secret"):
        (git_folder / "HEAD").write_text(content)
        assert commit(tmp_path) is None
    (git_folder / "HEAD").write_bytes(b"\xff")
    assert commit(tmp_path) is None
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert environment(CPU)["commit"] is None


def test_an_installed_copy_has_no_commit_of_its_own(tmp_path, monkeypatch):
    """A virtual environment may lie in a checkout of the user, whose commit is not bilevel's."""
    root = Path(module.__file__).parents[2]
    assert environment(CPU)["bilevel_commit"] == commit(root)
    monkeypatch.setattr(module, "__file__", str(tmp_path / "bilevel" / "run" / "environment.py"))
    assert environment(CPU)["bilevel_commit"] is None


def test_the_device_has_a_name(monkeypatch):
    assert len(name_of(CPU)) > 2
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert environment(torch.device("cuda", 0), 4)["device"] == "cuda: NVIDIA H200"


def run(directory, epochs=2, threads=1, resume=False):
    runner = Runner(epochs=epochs, threads=threads, progress="none", device="cpu", picture=False)
    return runner.run(FakeProblem(), FakeSolver(), directory=directory, resume=resume)


def test_every_file_names_the_environment(tmp_path):
    result = run(tmp_path, threads=2)
    now = environment(CPU, 2)
    assert now.keys() == ENTRIES
    assert result["environment"] == now
    for name in ("run.json", "summary.json"):
        assert json.loads((tmp_path / name).read_text())["environment"] == now
    assert file_format.read(tmp_path / CHECKPOINT)["environment"] == now


def test_few_weights_have_one_thread_and_the_files_say_so(tmp_path):
    assert run(tmp_path, threads=None)["environment"]["threads"] == 1


def test_a_resumed_run_has_the_environment_of_its_last_session(tmp_path, monkeypatch):
    run(tmp_path, threads=1)
    assert environment_of(tmp_path)["threads"] == 1
    before = json.loads((tmp_path / "run.json").read_text())
    monkeypatch.setattr(torch, "__version__", "9.9")
    with pytest.warns(CheckpointWarning, match=r"was written with torch .* \(now 9.9\)"):
        run(tmp_path, epochs=3, threads=2, resume=True)
    after = json.loads((tmp_path / "run.json").read_text())
    assert after["environment"] == environment(CPU, 2) != before["environment"]
    assert {**after, "environment": 0} == {**before, "environment": 0}
    (tmp_path / "run.json").write_text("damaged")
    run(tmp_path, epochs=4, threads=2, resume=True)
    assert (tmp_path / "run.json").read_text() == "damaged"


def test_a_checkpoint_of_an_older_bilevel_names_its_versions(tmp_path):
    run(tmp_path)
    content = file_format.read(tmp_path / CHECKPOINT)
    content["versions"] = {**content.pop("environment"), "torch": "1.0", "device": "cuda: other"}
    with (tmp_path / CHECKPOINT).open("wb") as file:
        file_format.write(content, file)
    with pytest.warns(CheckpointWarning, match=r"written with torch 1.0 \(now [^)]*\); the run"):
        run(tmp_path, epochs=3, resume=True)


def test_large_values_and_saved_weights_name_the_environment(tmp_path):
    problem = digits(hidden=[32], weight_decay="per_weight")
    runner = Runner(epochs=1, warmup_epochs=0, progress="none", picture=False, device="cpu")
    result = runner.run(problem, Fixed(), directory=tmp_path)
    stored = file_format.read(tmp_path / "hypers.pt")
    assert stored["environment"] == result["environment"]
    assert stored["values"]
    result.save(tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["environment"]) == result["environment"]
