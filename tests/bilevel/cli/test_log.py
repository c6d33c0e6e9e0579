"""`bilevel log` logs a run again whose dashboards lack a part of it."""

import json
from pathlib import Path

import pytest

from bilevel.cli.app import main
from bilevel.loggers.records import read_metrics
from bilevel.loggers.wandb_file import missing_steps
from bilevel.loggers.wandb_logger import MARK
from bilevel.run.directory_lock import DirectoryLock
from tests.support.wandb_files import of_kind, read_file

pytestmark = [
    pytest.mark.usefixtures("elsewhere"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # third parties: wandb, protobuf
    pytest.mark.filterwarnings("default::bilevel.errors.FaultWarning"),
]

RUN = (
    *("problem=quadratic", "solver=fixed", "runner.epochs=6", "runner.warmup_epochs=1"),
    *("runner.evaluate_every=1", "solver.inner_steps=1"),
    *("runner.progress=none", "runner.picture=false", "hydra.run.dir=mine"),
)


@pytest.fixture
def run():
    """A run without a dashboard."""
    assert main([*RUN, "logger=jsonl"]) == 0
    return Path("mine")


def items(entries):
    return {
        "/".join(entry.nested_key) or entry.key: json.loads(entry.value_json) for entry in entries
    }


def parts(run):
    return sorted(run.glob("wandb/offline-run-*"), key=lambda part: part.stat().st_mtime)


def steps(run):
    return [
        history.step.num
        for part in parts(run)
        for file in part.glob("*.wandb")
        for history in of_kind(read_file(file), "history")
    ]


def test_wandb_that_lacks_records_is_told_and_logged_again(monkeypatch, capfd):
    import wandb

    finish = wandb.Run.finish

    def cut(self, *arguments, **named):
        """A full disk takes no more, and W&B reports nothing."""
        finish(self, *arguments, **named)
        (file,) = Path(self.dir).parent.glob("*.wandb")
        assert missing_steps(file.parent, range(7)) is None  # W&B's own process has ended
        while len(of_kind(read_file(file), "history")) > 3:
            file.write_bytes(file.read_bytes()[:-300])

    with monkeypatch.context() as full:
        full.setattr(wandb.Run, "finish", cut)
        assert main(RUN) == 0
    assert (
        "lacks 4 of 7 records, most often because the disk was full; metrics.jsonl has them, so "
        "make room and log the run again with: bilevel log " in capfd.readouterr().err
    )
    run = Path("mine")
    (part,) = parts(run)
    assert not (part / MARK).exists()
    (before,) = of_kind(read_file(next(part.glob("*.wandb"))), "run")

    assert main(["log", "mine"]) == 0
    assert capfd.readouterr().out == "mine: 7 records and its summary were logged to WandB\n"
    (part,) = parts(run)
    records = read_file(next(part.glob("*.wandb")))
    lines = read_metrics(run / "metrics.jsonl")
    history = [items(h.item) for h in of_kind(records, "history")]
    assert [row["step"] for row in history] == [line["step"] for line in lines]
    assert [row["valid/loss"] for row in history] == [line["valid_loss"] for line in lines]
    (begun,) = of_kind(records, "run")
    same = ("run_id", "display_name", "run_group", "job_type", "project")
    assert [getattr(begun, name) for name in same] == [getattr(before, name) for name in same]
    config = {entry.key: json.loads(entry.value_json) for entry in begun.config.update}
    assert config["runner"]["epochs"] == 6
    final = {}
    for update in of_kind(records, "summary"):
        final |= items(update.update)
    summary = json.loads((run / "summary.json").read_text())
    assert final["best/valid_loss"] == summary["best"]["valid_loss"]
    assert of_kind(records, "exit")[0].exit_code == 0
    assert len(list(run.glob("wandb/replaced-offline-run-*"))) == 1

    assert main(["resume=mine", "runner.epochs=8"]) == 0  # no step is logged twice
    assert steps(run) == [line["step"] for line in read_metrics(run / "metrics.jsonl")]


def test_a_run_without_a_dashboard_gets_one(run, capfd):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(["log", "mine"]) == 1
    assert "mine has no dashboard; add logger=wandb" in capfd.readouterr().err
    for _ in range(2):  # the second time replaces the first
        assert main(["log", "mine", "logger=tensorboard"]) == 0
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("valid/loss")]
    lines = read_metrics(run / "metrics.jsonl")
    assert losses == [(line["step"], pytest.approx(line["valid_loss"])) for line in lines]
    assert main(["log", "mine", "logger=wandb", "wandb.project=other"]) == 0
    (part,) = parts(run)
    assert of_kind(read_file(next(part.glob("*.wandb"))), "run")[0].project == "other"
    assert "logger=wandb" not in (run / "config.yaml").read_text()


def test_a_run_in_progress_and_wrong_settings_are_sentences(run, capfd):
    with DirectoryLock() as lock:
        lock.take(run)
        assert main(["log", "mine", "logger=wandb"]) == 1
    assert main(["log", "none"]) == 1
    assert main(["log", "mine", "logger=wandb", "wandb.mode=disabled"]) == 1
    assert main(["log", "mine", "logger=wandb", "seed=3"]) == 1
    assert main(["log", "logger=wandb"]) == 1
    (run / "metrics.jsonl").write_text('{"step": "no"}\n' + (run / "metrics.jsonl").read_text())
    assert main(["log", "mine", "logger=wandb"]) == 1  # it logs the lines that can be read
    assert len(steps(run)) == 7
    said = capfd.readouterr().err.splitlines()
    wanted = (
        "mine is in use by another run",
        "cannot read none/metrics.jsonl",
        "wandb.mode=disabled logs nothing",
        "`seed=3` is not a setting of a logger that is on (wandb)",
        "log has no run",
        "1 lines of mine/metrics.jsonl are damaged",
    )
    assert len(said) == len(wanted)
    assert all(part in line for part, line in zip(wanted, said, strict=True))


def test_a_directory_of_somebody_else_changes_nothing_outside(run, capfd):
    Path("other/run-1-a").mkdir(parents=True)
    (run / "wandb").symlink_to(Path("other").absolute())
    assert main(["log", "mine", "logger=wandb"]) == 1
    assert "mine/wandb is a symbolic link" in capfd.readouterr().err
    assert Path("other/run-1-a").is_dir()


def test_a_logger_of_somebody_else_is_not_built(run, capfd):
    config = (run / "config.yaml").read_text()
    config = config.replace("loggers: {}", "loggers: {theirs: true}\ntheirs: {_target_: os.system}")
    (run / "config.yaml").write_text(config)
    assert main(["log", "mine"]) == 1
    assert "log mine would run theirs._target_=os.system" in capfd.readouterr().err
