"""Test the commands `bilevel export` and `bilevel refit` on a tiny run."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bilevel import BilevelError, best_solution
from bilevel.cli.app import main
from bilevel.loggers import hyper_schedule
from bilevel.loggers.records import read_metrics
from bilevel.run.initial_params import read_params

SETTINGS = (
    *("problem=digits", "problem.hidden=[4]", "problem.batch_size=256", "solver=delta_stn"),
    *("runner.epochs=2", "runner.warmup_epochs=0", "runner.progress=none", "runner.picture=false"),
    *("logger=jsonl", "seed=5"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "tuned"
    assert main([*SETTINGS, f"hydra.run.dir={directory}"]) == 0
    return directory


@pytest.fixture(autouse=True)
def _elsewhere(elsewhere):
    """Run every command in an empty working directory."""


def record(directory):
    return json.loads((directory / "run.json").read_text())


def test_an_export_has_the_values_the_schedule_and_the_weights(run, tmp_path, capsys):
    out = tmp_path / "found"
    assert main(["export", str(run), "--out", str(out)]) == 0
    files = [out / name for name in ("hypers.json", "schedule.json", "model.safetensors")]
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    summary = json.loads((run / "summary.json").read_text())
    assert json.loads(files[0].read_text()) == {
        "origin": {"problem": "digits", "solver": "delta_stn", "seed": 5},
        "environment": summary["environment"],
        "hypers": summary["hypers"],
    }
    schedule = json.loads(files[1].read_text())
    assert schedule["environment"] == summary["environment"]
    assert hyper_schedule.read(files[1]).hypers == hyper_schedule.from_run(run).hypers
    hypers, params, carry = best_solution(run)
    stored = load_file(files[2])
    assert stored.keys() == {**params, **carry}.keys()
    assert all(torch.equal(stored[name], value) for name, value in params.items())
    with safe_open(files[2], "pt") as file:
        about = {
            name: json.loads(text) for name, text in file.metadata().items() if name != "format"
        }
    assert about["hypers"] == {name: leaf.tolist() for name, leaf in hypers.items()}
    assert about["step"] == summary["best"]["step"]
    assert about["environment"] == summary["environment"]
    assert all(torch.equal(read_params(files[2])[name], value) for name, value in params.items())


def test_a_run_in_progress_can_be_exported(run, tmp_path, capsys):
    """Without a summary, the values are those of the last record; `pt` needs no safetensors."""
    for name in ("checkpoint.pt", "metrics.jsonl"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    assert main(["export", str(tmp_path), "--format", "pt"]) == 0
    last = read_metrics(run / "metrics.jsonl")[-1]
    hypers = json.loads((tmp_path / "hypers.json").read_text())["hypers"]
    assert hypers == {name: last[f"hypers.{name}"] for name in hypers}
    assert torch.load(tmp_path / "model.pt", weights_only=True).keys()
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "summary.json").write_bytes((run / "summary.json").read_bytes())
    assert main(["export", str(tmp_path), "--format", "pt"]) == 0
    assert "no schedule is written" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["export", "refit"])
def test_a_directory_without_a_run_is_refused_in_a_sentence(command, tmp_path, capsys):
    assert main([command, str(tmp_path / "none")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("bilevel: ")
    assert error.count("\n") == 1
    assert "none" in error


def test_an_export_that_cannot_be_written_is_refused(run, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["export", str(run), "--out", str(tmp_path / "file")]) == 1
    assert "cannot be made" in capsys.readouterr().err
    (tmp_path / "bad.safetensors").write_text("nothing")
    with pytest.raises(BilevelError, match="is no file of safetensors"):
        read_params(tmp_path / "bad.safetensors")
    with pytest.raises(BilevelError, match="cannot be read"):
        read_params(tmp_path / "missing.safetensors")


def test_a_refit_trains_at_the_last_values_and_names_its_origin(run, tmp_path, capsys):
    assert main(["refit", str(run), "--out", str(tmp_path / "again")]) == 0
    again = tmp_path / "again"
    found = json.loads((run / "summary.json").read_text())["hypers"]
    summary = json.loads((again / "summary.json").read_text())
    assert summary["hypers"] == pytest.approx(found)
    assert summary["steps"] == json.loads((run / "summary.json").read_text())["steps"]
    assert summary["outer_steps"] == 0
    assert summary["solver"] == record(again)["solver"] == "refit-delta_stn"
    origin = {"run": str(run), "hypers": "final", "on": "train", "weights": "new"}
    assert record(again)["origin"] == origin
    first, other = (read_metrics(one / "metrics.jsonl")[0] for one in (again, run))
    assert first["hypers.weight_decay"] == pytest.approx(found["weight_decay"])
    assert first["hypers.weight_decay"] != pytest.approx(other["hypers.weight_decay"], rel=1e-3)
    assert main([f"resume={again}", "runner.epochs=3"]) == 0


def test_a_refit_takes_over_a_tuned_setting_of_the_optimizer(tmp_path):
    settings = ["problem=digits", "problem.hidden=[8]", "problem.weight_decay=false"]
    settings += ["+problem.space.wd={optimizer: weight_decay, init: 0.01}", "wandb.mode=disabled"]
    settings += ["runner.epochs=2", "runner.warmup_epochs=1", "runner.progress=none"]
    assert main([*settings, f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    assert main(["refit", str(tmp_path / "run"), "--out", str(tmp_path / "again")]) == 0
    found, again = (
        json.loads((tmp_path / name / "summary.json").read_text())["hypers"]["wd"]
        for name in ("run", "again")
    )
    assert found != 0.01
    assert again == pytest.approx(found)


def test_a_refit_follows_the_schedule_from_the_weights_on_both_splits(run, tmp_path):
    options = ["--schedule", "--from-weights", "--on", "train+valid", "--epochs", "1"]
    assert main(["refit", str(run), *options]) == 0
    [again] = (tmp_path / "runs").iterdir()
    assert again.name.startswith("digits-refit-delta_stn-seed5-")
    origin = {"run": str(run), "hypers": "schedule", "on": "train+valid", "weights": "best"}
    assert record(again)["origin"] == origin
    first, last = read_metrics(again / "metrics.jsonl")
    best = json.loads((run / "summary.json").read_text())["best"]
    # the weights are the best ones; the schedule begins at the first values
    assert first["valid_loss"] == pytest.approx(best["valid_loss"], rel=1e-4)
    start = read_metrics(run / "metrics.jsonl")[0]
    assert first["hypers.weight_decay"] == pytest.approx(start["hypers.weight_decay"])
    both = json.loads((run / "summary.json").read_text())["steps"] / 2  # steps of an epoch
    assert last["step"] > both
    assert main([f"resume={again}", "runner.epochs=2"]) == 0


def test_a_refit_of_what_does_not_lie_in_memory_is_refused(run, tmp_path, capsys):
    from bilevel.data.tensor_stream import Data, FullBatch
    from bilevel.problems import digits
    from bilevel.run.pooled_data import PooledData

    problem = digits(hidden=[4])
    problem.data = lambda device, generator: Data(FullBatch((torch.ones(2),)), FullBatch())
    with pytest.raises(BilevelError, match="cannot join a FullBatch"):
        PooledData(problem).data(torch.device("cpu"), torch.Generator())
    config = (run / "config.yaml").read_text()
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes())
    (copy / "config.yaml").write_text(config.replace("bilevel.problems.digits", "os.system"))
    assert main(["refit", str(copy)]) == 1
    error = capsys.readouterr().err
    assert f"run={copy} would run problem._target_=os.system" in error
    assert "add --trust" in error


@pytest.mark.filterwarnings("default::bilevel.checkpoint.checkpoints.CheckpointWarning")
@pytest.mark.parametrize("command", ["export", "refit"])
def test_a_damaged_file_that_another_one_replaces_is_one_line(run, command, tmp_path, capsys):
    damaged = shutil.copytree(run, tmp_path / "damaged")
    checkpoint, config = damaged / "checkpoint.pt", damaged / "config.yaml"
    if command == "export":
        checkpoint.write_bytes(checkpoint.read_bytes()[:900])
    else:
        config.write_bytes(config.read_bytes()[:60])
    capsys.readouterr()
    more = ["--epochs", "1"] if command == "refit" else []
    assert main([command, str(damaged), "--out", str(tmp_path / "out"), *more]) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("bilevel: warning: ")
    assert "replaces it" in line
