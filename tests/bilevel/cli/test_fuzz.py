"""Fuzz configurations and checkpoints: each gives one clear sentence or a correct run."""

import warnings
from collections import Counter
from copy import deepcopy

import pytest

from bilevel import BilevelError
from bilevel.checkpoint.checkpoints import load
from bilevel.cli.run_config import run_config
from tests.soak import fuzz

pytestmark = [pytest.mark.usefixtures("elsewhere"), pytest.mark.filterwarnings("ignore")]


def test_damaged_checkpoints(tmp_path):
    files = fuzz.CheckpointFiles(tmp_path)
    fuzz.examples(250, 0, files.strategy(), files.check)
    assert min(files.outcomes[how] for how in ("refused", "the newest", "an older one")) > 10


def test_every_byte_of_a_checkpoint_counts(tmp_path):
    """One flipped bit, at whatever place: never the state that was not saved."""
    files = fuzz.CheckpointFiles(tmp_path)
    content = files.contents["checkpoint.pt"]
    step = max(1, files.size // 150)
    for at in (*range(0, files.size, step), *range(files.size - 100, files.size)):
        files.check([(0, ("flip", at, at % 8))])
    assert files.outcomes == {"an older one": len(range(0, len(content), step)) + 100}


@pytest.mark.parametrize("sealing", [False, True])
def test_a_forged_checkpoint_runs_no_code(tmp_path, sealing):
    (tmp_path / "checkpoint.pt").write_bytes(fuzz.harmful(sealing=sealing))
    with pytest.raises(BilevelError, match="is not a checkpoint of bilevel"):
        load(tmp_path)
    assert not (tmp_path / "harm").exists()


def test_random_settings(tmp_path):
    configs = fuzz.Configurations(tmp_path)
    fuzz.examples(100, 0, configs.strategy(), configs.check)
    assert min(configs.outcomes[how] for how in ("refused", "ran")) > 15


@pytest.mark.parametrize("part", ["loggers", "names", "seed", "problem", "solver", "runner"])
def test_a_part_that_is_missing_is_named(part, tmp_path):
    config = deepcopy(fuzz.Configurations(tmp_path).configs[0])
    del config[part]
    with pytest.raises(BilevelError, match=f"^{part}"):
        run_config(config, tmp_path / "run", resumed=False)


def test_random_command_lines(tmp_path):
    configs, ended = fuzz.Configurations(tmp_path), Counter()
    fuzz.examples(
        20,
        0,
        fuzz.command_lines(configs),
        lambda line: ended.update([fuzz.check_command_line(line, tmp_path)]),
    )
    assert ended["refused"] > 5


def test_what_is_wrong_is_found(tmp_path, monkeypatch):
    """The laws themselves: a state that is not what was saved, an error that nothing explains."""
    files = fuzz.CheckpointFiles(tmp_path)
    monkeypatch.setattr(
        "bilevel.checkpoint.file_format._verified",
        lambda file: fuzz.file_format._SEAL.search(file.read()),
    )
    with pytest.raises(AssertionError), warnings.catch_warnings():
        fuzz.examples(100, 0, files.strategy(), files.check)
    configs = fuzz.Configurations(tmp_path)
    monkeypatch.setattr("bilevel.cli.targets.check", lambda *_: None)
    with pytest.raises(AssertionError):
        fuzz.examples(200, 0, configs.strategy(), configs.check, shrink=False)
