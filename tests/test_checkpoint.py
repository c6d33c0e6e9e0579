"""A checkpoint is whole or is the one before it, and every other file is refused in one sentence."""

import zipfile

import pytest
import torch

from bilevel import BilevelError
from bilevel.checkpoint import CHECKPOINT, VERSION, Identity, best_solution, load, save

IDENTITY = Identity("digits", "stn", 0)
STATE = {"w": torch.arange(3.0), "counts": {"a": 1}, "best": None, "text": "σ"}


def test_what_is_saved_is_loaded(tmp_path):
    save(tmp_path, IDENTITY, STATE)
    state = load(tmp_path, IDENTITY)
    assert torch.equal(state.pop("w"), STATE["w"])
    assert state == {"counts": {"a": 1}, "best": None, "text": "σ"}
    assert [file.name for file in tmp_path.iterdir()] == [CHECKPOINT]


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, IDENTITY, STATE)

    def fails(content, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(BilevelError, match="No space left on device"):
        save(tmp_path, IDENTITY, {"counts": {"a": 2}})
    assert load(tmp_path)["counts"] == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == [CHECKPOINT]


@pytest.mark.parametrize("kept", [0, 1, 100, -1, -30])
def test_a_truncated_checkpoint_is_named_so(tmp_path, kept):
    save(tmp_path, IDENTITY, STATE)
    content = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(content[:kept])
    with pytest.raises(BilevelError, match="is truncated"):
        load(tmp_path, IDENTITY)


def test_a_damaged_checkpoint_is_named_so(tmp_path):
    save(tmp_path, IDENTITY, STATE)
    content = bytearray((tmp_path / CHECKPOINT).read_bytes())
    content[60:200] = bytes(140)
    (tmp_path / CHECKPOINT).write_bytes(bytes(content))
    with pytest.raises(BilevelError, match="is damaged"):
        load(tmp_path, IDENTITY)


def test_foreign_files_are_named_so(tmp_path):
    path = tmp_path / CHECKPOINT
    path.write_text("not a checkpoint")
    with pytest.raises(BilevelError, match="is no checkpoint of bilevel"):
        load(tmp_path)
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(BilevelError, match="is no checkpoint of bilevel"):
        load(tmp_path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme", "an archive")
    with pytest.raises(BilevelError, match="no checkpoint of bilevel"):
        load(tmp_path)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return pytest.fail, ("the checkpoint ran code",)

    torch.save({"format": "bilevel-checkpoint", "x": Harmful()}, tmp_path / CHECKPOINT)
    with pytest.raises(BilevelError, match="is damaged, or no checkpoint"):
        load(tmp_path)


def test_what_could_not_be_read_again_is_found_when_first_saved(tmp_path):
    with pytest.raises(BilevelError, match=r"could not be resumed.*Identity"):
        save(tmp_path, IDENTITY, {"solver": IDENTITY})


def test_another_version_is_refused(tmp_path):
    save(tmp_path, IDENTITY, STATE)
    content = torch.load(tmp_path / CHECKPOINT)
    torch.save({**content, "version": VERSION + 1}, tmp_path / CHECKPOINT)
    with pytest.raises(BilevelError, match=f"has version {VERSION + 1} and this bilevel reads version {VERSION}"):
        load(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("problem", "mnist"), ("solver", "fixed"), ("seed", 1)])
def test_a_checkpoint_of_another_run_is_refused(tmp_path, field, value):
    save(tmp_path, IDENTITY, STATE)
    with pytest.raises(BilevelError, match=f"{field}={getattr(IDENTITY, field)}, not {field}={value}"):
        load(tmp_path, IDENTITY._replace(**{field: value}))


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(BilevelError, match=r"checkpoint\.pt is missing"):
        load(tmp_path)
    with pytest.raises(BilevelError, match="there is no such directory"):
        load(tmp_path / "nowhere")


def test_a_run_without_a_best_has_no_best_solution(tmp_path):
    save(tmp_path, IDENTITY, STATE)
    with pytest.raises(BilevelError, match="never had a finite validation loss"):
        best_solution(tmp_path)


def test_flipped_bytes_are_noticed(tmp_path):
    """torch.load does not look at the checksums; damaged weights would load, and train on."""
    save(tmp_path, Identity("p", "s", 0), {"w": torch.arange(1000.0)})
    path = tmp_path / CHECKPOINT
    content = bytearray(path.read_bytes())
    middle = content.index(torch.arange(400.0, 404.0).numpy().tobytes())
    content[middle] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(BilevelError, match="damaged"):
        load(tmp_path)
