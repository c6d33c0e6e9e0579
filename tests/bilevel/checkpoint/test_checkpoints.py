"""A checkpoint is intact or an older one replaces it; other files are refused in one sentence."""

import errno
import json
import os
import shutil
import zipfile
from itertools import product

import pytest
import torch

from bilevel import BilevelError, Runner
from bilevel.checkpoint.checkpoints import (
    CHECKPOINT,
    Checkpoints,
    CheckpointWarning,
    Identity,
    best_solution,
    kept,
    load,
)
from bilevel.checkpoint.file_format import VERSION
from bilevel.loggers.records import read_metrics
from tests.support.fakes import FakeProblem, FakeSolver

IDENTITY = Identity("digits", "stn", 0)
STATE = {"step": 7, "w": torch.arange(3.0), "counts": {"a": 1}, "best": None, "text": "σ"}


def save(directory, *steps, keep=3):
    """The checkpoints of a run that saved at `steps`, each with its own weights."""
    checkpoints = Checkpoints(directory, IDENTITY, keep)
    for step in steps or (7,):
        checkpoints.save({**STATE, "step": step, "weights": torch.full((300,), float(step))})
    return checkpoints


def names(directory):
    return sorted(file.name for file in directory.iterdir())


def damage(path, at=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 0x10
    path.unlink()  # not in place: a second name of the same file stays whole
    path.write_bytes(content)


def test_what_is_saved_is_loaded(tmp_path):
    Checkpoints(tmp_path, IDENTITY).save(STATE)
    state = load(tmp_path, IDENTITY)
    assert torch.equal(state.pop("w"), STATE["w"])
    assert state == {"step": 7, "counts": {"a": 1}, "best": None, "text": "σ"}
    assert names(tmp_path) == [CHECKPOINT]


def test_it_is_an_ordinary_file_of_pytorch(tmp_path):
    save(tmp_path)
    content = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert (content["problem"], content["state"]["step"]) == ("digits", 7)
    assert zipfile.ZipFile(tmp_path / CHECKPOINT).comment.startswith(
        b"bilevel-checkpoint 3 sha256 "
    )


@pytest.mark.parametrize("shape", [(), (0,), (1,), (300, 500)])
def test_whatever_its_size_the_sum_is_that_of_the_file(tmp_path, shape):
    Checkpoints(tmp_path, IDENTITY).save({"step": 0, "w": torch.ones(shape), "s": "x" * 3000})
    assert load(tmp_path)["w"].shape == shape


# --- several kept ---


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_so_many_stay_and_the_newest_keeps_its_name(tmp_path, keep):
    save(tmp_path, 0, 5, 10, 15, 15, keep=keep)
    assert names(tmp_path) == sorted(
        [CHECKPOINT, *(f"checkpoint-step{step}.pt" for step in (10, 5)[: keep - 1])]
    )
    assert [torch.load(path)["state"]["step"] for path in kept(tmp_path)] == [15, 10, 5][:keep]


def test_without_hard_links_a_copy_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(
        os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here"))
    )
    save(tmp_path, 5, 10)
    assert [torch.load(path)["state"]["step"] for path in kept(tmp_path)] == [10, 5]
    assert names(tmp_path) == ["checkpoint-step5.pt", CHECKPOINT]


CALLS = [(module, name) for module, name in product([os], ["link", "replace", "fsync", "unlink"])]


@pytest.mark.parametrize("at", range(1, 9))
def test_at_every_moment_of_a_save_there_is_a_whole_one(tmp_path, monkeypatch, at):
    """End the process at the `at`-th call that touches the directory, and resume the run."""

    class Killed(BaseException):
        pass

    save(tmp_path, 5, 10, keep=2)
    checkpoints, count = Checkpoints(tmp_path, IDENTITY, 2), 0
    checkpoints.load()

    def counted(call):
        def counting(*arguments, **named):
            nonlocal count
            count += 1
            if count == at:
                raise Killed
            return call(*arguments, **named)

        return counting

    with monkeypatch.context() as patched:
        for module, name in CALLS:
            patched.setattr(module, name, counted(getattr(module, name)))
        try:
            checkpoints.save({**STATE, "step": 15, "weights": torch.ones(3)})
        except Killed:
            assert count == at
        else:
            assert at > 4
    assert load(tmp_path)["step"] in (10, 15)
    others = [torch.load(path)["state"]["step"] for path in kept(tmp_path)]
    assert others == sorted(others, reverse=True)
    again = Checkpoints(tmp_path, IDENTITY, 2)
    before = again.load()["step"]
    again.save({**STATE, "step": 20})
    assert [torch.load(path)["state"]["step"] for path in kept(tmp_path)] == [20, before]
    assert len(names(tmp_path)) == 2


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    checkpoints = save(tmp_path, 5)

    def fails(content, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(BilevelError, match="No space left on device"):
        checkpoints.save({**STATE, "step": 10})
    assert load(tmp_path)["step"] == 5
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]
    monkeypatch.undo()
    checkpoints.save({**STATE, "step": 15})
    assert [torch.load(path)["state"]["step"] for path in kept(tmp_path)] == [15, 5]


@pytest.mark.parametrize(("number", "left"), [(errno.ENOSPC, [15, 10]), (errno.EACCES, [10, 5])])
def test_where_the_disk_is_full_the_older_ones_give_way(tmp_path, monkeypatch, number, left):
    """The newest stays until there is a newer one; another error is none that room would help."""
    checkpoints, write = save(tmp_path, 5, 10), torch.save

    def full(content, file):
        if (tmp_path / "checkpoint-step5.pt").exists():
            raise OSError(number, "no")
        assert load(tmp_path)["step"] == 10
        write(content, file)

    monkeypatch.setattr(torch, "save", full)
    state = {**STATE, "step": 15}
    if number == errno.ENOSPC:
        checkpoints.save(state)
    else:
        with pytest.raises(BilevelError, match="cannot write"):
            checkpoints.save(state)
    assert load(tmp_path)["step"] == left[0]
    assert [torch.load(path)["state"]["step"] for path in kept(tmp_path)] == (
        [15] if left[0] == 15 else [10, 10, 5]
    )


def test_without_hard_links_a_full_disk_costs_the_older_ones_and_no_checkpoint(
    tmp_path, monkeypatch
):
    """A copy that stops in the middle leaves nothing, and what follows has the room."""
    checkpoints = save(tmp_path, 5, 10)

    def no_link(*_):
        raise OSError(errno.EPERM, "no links here")

    def full(source, target):
        target.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "link", no_link)
    monkeypatch.setattr(shutil, "copyfile", full)
    checkpoints.save({**STATE, "step": 15})
    assert load(tmp_path)["step"] == 15
    assert names(tmp_path) == [CHECKPOINT]


def test_a_damaged_newest_is_no_reason_to_let_the_older_ones_go(tmp_path, monkeypatch):
    save(tmp_path, 5, 10)
    damage(tmp_path / CHECKPOINT)
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    with pytest.warns(CheckpointWarning):
        checkpoints.load()
    monkeypatch.setattr(
        torch, "save", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full"))
    )
    with pytest.raises(BilevelError, match="cannot write"):
        checkpoints.save({**STATE, "step": 8})
    assert (tmp_path / "checkpoint-step5.pt").exists()


# --- damage ---


@pytest.mark.parametrize("how", ["damaged", "truncated", "missing", "foreign"])
def test_an_older_one_stands_in_and_says_so(tmp_path, how):
    save(tmp_path, 5, 10, 15)
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step}) + "\n" for step in (0, 5, 10, 15, 18))
    )
    path = tmp_path / CHECKPOINT
    if how == "damaged":
        damage(path)
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-30])
    elif how == "foreign":
        path.write_text("not a checkpoint")
    else:
        path.unlink()
    what = {"foreign": "is not a checkpoint of bilevel"}.get(how, f"is {how}")
    said = (
        rf"checkpoint\.pt {what}.*; checkpoint-step10\.pt, of step 10, replaces it, "
        "and the run repeats at least 8 lost"
    )
    with pytest.warns(CheckpointWarning, match=said) as warned:
        state = load(tmp_path, IDENTITY)
    assert len(warned) == 1
    assert state["step"] == 10
    assert torch.equal(state["weights"], torch.full((300,), 10.0))


def test_two_that_are_damaged_are_passed_over_and_go_when_the_run_goes_on(tmp_path):
    save(tmp_path, 5, 10, 15)
    damage(tmp_path / CHECKPOINT)
    damage(tmp_path / "checkpoint-step10.pt")
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    with pytest.warns(
        CheckpointWarning,
        match=r"checkpoint\.pt is damaged.*step10\.pt is damaged.*step5\.pt, of step 5, replaces",
    ):
        assert checkpoints.load()["step"] == 5
    checkpoints.save({**STATE, "step": 8})
    assert names(tmp_path) == ["checkpoint-step5.pt", CHECKPOINT]
    assert load(tmp_path)["step"] == 8


def test_where_all_are_damaged_one_sentence_names_them(tmp_path):
    save(tmp_path, 5, 10)
    for path in kept(tmp_path):
        damage(path)
    with pytest.raises(
        BilevelError,
        match=r"checkpoint\.pt is damaged.*, and .*step5\.pt is damaged.*; restore one from a copy",
    ):
        load(tmp_path, IDENTITY)


@pytest.mark.parametrize("kept_bytes", [0, 1, 100, -1, -30, -92, -94, -100])
def test_a_truncated_checkpoint_is_named_so(tmp_path, kept_bytes):
    save(tmp_path)
    content = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(content[:kept_bytes])
    with pytest.raises(
        BilevelError, match=r"is truncated.*; restore it from a copy, or start a new run"
    ):
        load(tmp_path, IDENTITY)


def test_foreign_files_are_named_so(tmp_path):
    path = tmp_path / CHECKPOINT
    path.write_text("not a checkpoint")
    with pytest.raises(BilevelError, match="is not a checkpoint of bilevel"):
        load(tmp_path)
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(BilevelError, match="is not a checkpoint of bilevel"):
        load(tmp_path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme", "an archive")
    with pytest.raises(BilevelError, match="is not a checkpoint of bilevel"):
        load(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(BilevelError, match=r"checkpoint\.pt is missing"):
        load(tmp_path)


class Harmful:
    def __reduce__(self):
        return pytest.fail, ("the checkpoint ran code",)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"format": "bilevel-checkpoint", "x": Harmful()}, tmp_path / CHECKPOINT)
    with pytest.raises(BilevelError, match="is not a checkpoint of bilevel"):
        load(tmp_path)


def test_nor_is_it_where_the_checksum_is_right(tmp_path):
    with pytest.raises(BilevelError, match=r"holds .*Fail.*could not be resumed"):
        Checkpoints(tmp_path, IDENTITY).save({**STATE, "solver": Harmful()})
    with pytest.raises(BilevelError, match="is damaged, or is not a checkpoint"):
        load(tmp_path)


def test_what_could_not_be_read_again_is_found_when_first_saved(tmp_path):
    with pytest.raises(BilevelError, match=r"holds .*Identity, so the run could not be resumed"):
        Checkpoints(tmp_path, IDENTITY).save({**STATE, "solver": IDENTITY})


# --- versions and identities ---


def test_an_older_version_is_refused_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("bilevel.checkpoint.file_format.VERSION", 2)
    save(tmp_path, 5, 10)
    monkeypatch.undo()
    said = (
        r"has format 2, from before solvers and problems moved into bilevel\.solvers and "
        r"bilevel\.problems; resume with the bilevel that wrote it, or start a new run"
    )
    for read in (load, best_solution):
        with pytest.raises(BilevelError, match=said):
            read(tmp_path)


def test_the_oldest_version_has_no_checksum(tmp_path):
    content = {"format": "bilevel-checkpoint", "version": 1, "state": STATE}
    torch.save(content, tmp_path / CHECKPOINT)
    said = r"is not a checkpoint of bilevel \(it has no checksum\); restore it"
    with pytest.raises(BilevelError, match=said):
        load(tmp_path)


def test_a_newer_version_is_refused(tmp_path, monkeypatch):
    save(tmp_path, 5)
    monkeypatch.setattr("bilevel.checkpoint.file_format.VERSION", VERSION + 1)
    save(tmp_path, 10)
    monkeypatch.undo()
    with pytest.raises(
        BilevelError, match=rf"has format {VERSION + 1}, which is newer.*; update bilevel"
    ):
        load(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"), [("problem", "mnist"), ("solver", "fixed"), ("seed", 1)]
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, field, value):
    save(tmp_path)
    with pytest.raises(
        BilevelError, match=f"{field}={getattr(IDENTITY, field)}, not {field}={value}"
    ):
        load(tmp_path, IDENTITY._replace(**{field: value}))


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(BilevelError, match=r"checkpoint\.pt is missing"):
        load(tmp_path)
    with pytest.raises(BilevelError, match="there is no such directory"):
        load(tmp_path / "nowhere")


# --- a whole run ---


def run(directory, resume=False, **settings):
    torch.manual_seed(0)  # the solver draws from the global state
    settings = {
        "epochs": 6,
        "warmup_epochs": 1,
        "progress": "none",
        "device": "cpu",
        "picture": False,
        **settings,
    }
    return Runner(**settings).run(FakeProblem(), FakeSolver(), directory=directory, resume=resume)


def told(directory):
    return [
        {k: v for k, v in r.items() if not k.startswith(("seconds", "peak"))}
        for r in read_metrics(directory / "metrics.jsonl")
    ]


@pytest.mark.parametrize("damaged", [1, 2])
def test_a_run_whose_newest_is_damaged_goes_on_to_the_same_bits(tmp_path, damaged):
    run(tmp_path / "whole")
    run(tmp_path / "short", epochs=4)
    for path in kept(tmp_path / "short")[:damaged]:
        damage(path)
    with pytest.warns(CheckpointWarning, match=f"at least {6 if damaged == 1 else 10} lost steps"):
        run(tmp_path / "short", resume=True)
    assert told(tmp_path / "whole") == told(tmp_path / "short")
    ours, theirs = (load(tmp_path / name) for name in ("short", "whole"))
    assert torch.equal(ours["solver"]["params"]["w"], theirs["solver"]["params"]["w"])
    assert [path.name for path in kept(tmp_path / "short")] == [
        path.name for path in kept(tmp_path / "whole")
    ]


def test_the_best_solution_is_that_of_the_older_one(tmp_path):
    run(tmp_path)
    best = best_solution(tmp_path)
    damage(tmp_path / CHECKPOINT)
    with pytest.warns(CheckpointWarning, match="replaces it"):
        older = best_solution(tmp_path)
    assert older.params["w"].shape == best.params["w"].shape


def test_a_run_without_a_best_has_no_best_solution(tmp_path):
    save(tmp_path)
    with pytest.raises(BilevelError, match="never had a finite validation loss"):
        best_solution(tmp_path)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    run(tmp_path / "whole")
    run(tmp_path / "killed", epochs=1)
    for path in kept(tmp_path / "killed"):
        path.unlink()
    with pytest.raises(
        BilevelError, match="already holds a run"
    ):  # work that somebody has removed the checkpoints of
        run(tmp_path / "killed")
    records = tmp_path / "killed" / "metrics.jsonl"
    records.write_text(records.read_text().splitlines(keepends=True)[0])
    run(tmp_path / "killed")
    assert told(tmp_path / "whole") == told(tmp_path / "killed")


def test_how_many_are_kept_may_change_when_a_run_goes_on(tmp_path):
    run(tmp_path / "run", epochs=4)
    assert len(kept(tmp_path / "run")) == 3
    shutil.copytree(tmp_path / "run", tmp_path / "one")
    run(tmp_path / "one", resume=True, keep_checkpoints=1)
    assert len(kept(tmp_path / "one")) == 1


@pytest.mark.parametrize(
    ("value", "said"), [(0, "at least 1"), (1.5, "a whole number"), (True, "a whole number")]
)
def test_how_many_is_a_count(value, said):
    with pytest.raises(BilevelError, match=said):
        Runner(epochs=1, keep_checkpoints=value)
