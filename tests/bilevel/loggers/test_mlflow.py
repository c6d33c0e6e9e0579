"""Runs in a real database of MLflow, read back with its own client; and servers that fail."""

import json
import logging
import os
import shutil
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bilevel import BilevelError, Runner
from bilevel.cli.app import main
from bilevel.loggers import mlflow_logger
from bilevel.loggers.dashboard import sections
from bilevel.loggers.mlflow_logger import MLflowLogger
from bilevel.loggers.mlflow_sender import Sender
from bilevel.loggers.records import read_metrics
from tests.support.fakes import FakeProblem, FakeSolver

pytest.importorskip("mlflow")

from mlflow import MlflowClient

pytestmark = [
    # third parties: SQLAlchemy warns about MLflow
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("elsewhere"),
]

CONFIG = {"solver": {"rate": 0.05, "names": ["a"], "none": None, "text": "y" * 7000}}
FINISHED, KILLED, FAILED = "FINISHED", "KILLED", "FAILED"


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """Return a database that is made once: MLflow takes seconds for it."""
    file = tmp_path_factory.mktemp("mlflow") / "empty.db"
    MlflowClient(tracking_uri=f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def client(empty, tmp_path, elsewhere, monkeypatch):
    shutil.copy(empty, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address := f"sqlite:///{tmp_path / 'mlflow.db'}")
    return MlflowClient(tracking_uri=address)


def run(directory="run", resume=False, problem=None, solver=None, **settings):
    chosen = {"epochs": 3, "warmup_epochs": 1, "progress": "none", "picture": False, **settings}
    return Runner(device="cpu", **chosen).run(
        problem or FakeProblem(),
        solver or FakeSolver(),
        directory=directory,
        names=("fake", "walk"),
        config=CONFIG,
        loggers=[MLflowLogger()],
        resume=resume,
    )


def runs(client, experiment="bilevel"):
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def steps(client, run_id, name="epoch"):
    return [metric.step for metric in client.get_metric_history(run_id, name)]


def test_metrics_have_the_names_the_steps_and_the_times_of_the_records(client):
    summary = run()
    (found,) = runs(client)
    assert (found.info.run_name, found.info.status) == ("walk-seed0", FINISHED)
    assert found.data.tags.items() >= {"problem": "fake", "solver": "walk"}.items()
    records = read_metrics("run/metrics.jsonl")
    run_id = found.info.run_id
    first = client.get_metric_history(run_id, "epoch")[0].timestamp
    for name in sections(records[-1]).keys() - {"step"}:
        history = client.get_metric_history(run_id, name)
        held = [record for record in records if name in sections(record)]
        assert [m.value for m in history] == [sections(record)[name] for record in held]
        assert [m.step for m in history] == [record["step"] for record in held]
        seconds = [(m.timestamp - first) / 1000 for m in history]
        assert seconds == pytest.approx([record["seconds"] for record in held], abs=2e-3)
    assert {"hypers/decay", "train/accuracy", "solver/inner_loss"} <= found.data.metrics.keys()
    by_examples = steps(client, run_id, "by_examples/valid_loss")
    assert by_examples == [record["examples"] for record in records]
    assert found.data.metrics["outcome/best/test_loss"] == summary["best"]["test_loss"]


def test_the_configuration_is_in_the_parameters(client):
    run()
    (found,) = runs(client)
    assert found.data.params == {
        "seed": "0",
        "solver.rate": "0.05",
        "solver.names": '["a"]',
        "solver.none": "null",
        "solver.text": "y" * 6000,
    }


class Pictured(FakeProblem):
    def pictures(self, hypers, generator):
        return {"augmented": torch.rand(3, 3, 70, 70, generator=generator)}


def test_pictures_and_the_summary_are_artifacts(client, tmp_path):
    run(problem=Pictured(), epochs=4, picture=True)
    (found,) = runs(client)
    run_id = found.info.run_id
    assert {file.path for file in client.list_artifacts(run_id)} == {
        *("pictures", "curves.png", "summary.json")
    }
    names = [file.path for file in client.list_artifacts(run_id, "pictures")]
    assert names == [f"pictures/augmented-{step}.png" for step in (0, 18, 6)]
    place = Path(client.download_artifacts(run_id, "", str(tmp_path)))
    assert json.loads((place / "summary.json").read_text())["solver"] == "walk"
    assert (place / "curves.png").read_bytes() == Path("run/curves.png").read_bytes()
    pixels = np.asarray(Image.open(place / names[0]))
    draws = torch.rand(3, 3, 70, 70, generator=torch.Generator().manual_seed(0))
    expected = 255 * draws[1].permute(1, 2, 0).numpy()
    assert np.abs(pixels[2:72, 74:144].astype(float) - expected).max() <= 1


def logged():
    return [record["step"] for record in read_metrics("run/metrics.jsonl")]


def fail():
    raise RuntimeError("a bug")


def test_a_resumed_run_continues_and_no_step_is_there_twice(client):
    with pytest.raises(RuntimeError):
        run(epochs=8, checkpoint_every=4, solver=FakeSolver(hooks={45: fail}))
    (found,) = runs(client)
    killed = steps(client, found.info.run_id)
    run(resume=True, epochs=8)
    (found,) = runs(client)
    lines = read_metrics("run/metrics.jsonl")
    assert killed == [line["step"] for line in lines][: len(killed)]
    assert len(killed) > 5  # beyond the checkpoint after the fifth evaluation
    for name in ("epoch", "valid/loss", "by_examples/valid_loss"):
        taken = steps(client, found.info.run_id, name)
        assert len(set(taken)) == len(taken) == len(lines)
    assert found.info.status == FINISHED


def test_a_resumed_run_sends_what_a_killed_one_could_not(client, monkeypatch):
    log_batch = MlflowClient.log_batch

    def cut(self, run_id, *arguments, metrics=(), **named):
        if not any(m.step >= 12 for m in metrics if m.key == "epoch"):
            log_batch(self, run_id, *arguments, metrics=metrics, **named)

    with monkeypatch.context() as lost:
        lost.setattr(MlflowClient, "log_batch", cut)
        run(epochs=3)
    (found,) = runs(client)
    assert steps(client, found.info.run_id) == [0, 6]
    run(resume=True, epochs=4)
    assert steps(client, found.info.run_id) == logged()


def test_a_step_that_is_there_in_part_is_sent_again(client, monkeypatch):
    log_batch = MlflowClient.log_batch

    def cut(self, run_id, *arguments, metrics=(), **named):
        first = sum(m.step == 6 for m in metrics) == len(metrics) > 0
        if first and any(m.key == "solver/inner_loss" for m in metrics):
            raise ConnectionError("gone")
        log_batch(self, run_id, *arguments, metrics=metrics, **named)

    monkeypatch.setattr(mlflow_logger, "METRICS_OF_A_BATCH", 3)
    monkeypatch.setattr(MlflowClient, "log_batch", cut)
    with pytest.warns(UserWarning, match="gone"):
        run(epochs=3)
    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    (found,) = runs(client)
    assert 6 in steps(client, found.info.run_id, "train/loss")
    run(resume=True, epochs=4)
    assert steps(client, found.info.run_id) == logged()
    assert 6 in steps(client, found.info.run_id, "solver/inner_loss")


def test_a_run_that_is_gone_from_mlflow_begins_anew(client):
    run(epochs=2)
    (found,) = runs(client)
    client.delete_run(found.info.run_id)
    run(resume=True, epochs=3)
    (again,) = runs(client)
    assert again.info.run_id != found.info.run_id
    assert steps(client, again.info.run_id) == [0, 6, 12, 18]


@pytest.mark.filterwarnings("default::UserWarning")
def test_the_status_is_that_of_the_run(client):
    assert run(solver=FakeSolver(poison_at=8))["diverged"]
    (found,) = runs(client)
    assert found.info.status == FAILED


def test_the_names_come_from_the_settings_or_from_the_environment(client, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "other")
    run()
    assert len(runs(client, "other")) == 1
    with pytest.raises(BilevelError, match=r"mlflow\.name=' ' must be a name"):
        MLflowLogger(name=" ")


def test_variables_hold_for_the_run_alone(client, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    seen = {}
    look = {7: lambda: seen.update(os.environ)}
    run(solver=FakeSolver(hooks=look))
    assert seen["MLFLOW_HTTP_REQUEST_TIMEOUT"] == os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "3"
    assert seen["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "2"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


# --- failures ---


def test_a_server_that_is_down_is_one_sentence_and_the_run_goes_on(client, monkeypatch, caplog):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    good = os.environ["MLFLOW_TRACKING_URI"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{port}")
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        run()
    assert time.monotonic() - began < 20
    (sentence,) = [r.getMessage() for r in caplog.records if r.name == mlflow_logger.__name__]
    assert f"http://127.0.0.1:{port} cannot be reached" in sentence
    assert "bilevel log run logger=mlflow" in sentence
    assert "secret" not in caplog.text
    monkeypatch.setenv("MLFLOW_TRACKING_URI", good)
    run(resume=True, epochs=4)
    assert steps(client, runs(client)[0].info.run_id) == logged()


def test_a_server_that_fails_during_a_run_is_one_warning(client, monkeypatch):
    log_batch = MlflowClient.log_batch

    def broken(self, run_id, *arguments, metrics=(), **named):
        if any(metric.step == 6 for metric in metrics):
            raise ConnectionError("gone")
        log_batch(self, run_id, *arguments, metrics=metrics, **named)

    monkeypatch.setattr(MlflowClient, "log_batch", broken)
    with pytest.warns(UserWarning, match="MLflowLogger") as warned:
        run()
    assert len(warned) == 1
    assert "(ConnectionError: gone); the run continues" in str(warned[0].message)
    (found,) = runs(client)
    assert steps(client, found.info.run_id) == [0]


def test_a_step_does_not_wait_and_the_end_waits_for_a_limited_time(client, monkeypatch, caplog):
    release, reached = threading.Event(), []
    log_batch = MlflowClient.log_batch

    def slow(self, run_id, *arguments, metrics=(), **named):
        if metrics:
            release.wait(60)
        log_batch(self, run_id, *arguments, metrics=metrics, **named)

    monkeypatch.setattr(MlflowClient, "log_batch", slow)
    monkeypatch.setattr(mlflow_logger, "FINISH_SECONDS", 0.2)
    run(solver=FakeSolver(hooks={18: lambda: reached.append(release.is_set())}))
    assert reached == [False]
    assert "MLflow has not received the run within 0.2 s" in caplog.text
    release.set()


@pytest.mark.parametrize("address", ["mlruns", "nonsense://x", "sqlite:////dev/null/m.db"])
def test_an_address_that_cannot_be_used_is_refused_before_the_run(address, client, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(BilevelError, match=r"cannot be used .*; set it to sqlite:///mlflow\.db"):
        run()
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ
    assert read_metrics("run/metrics.jsonl") == []


def test_a_missing_mlflow_is_one_error(monkeypatch):
    monkeypatch.setattr("bilevel.loggers.mlflow_logger.find_spec", lambda name: None)
    with pytest.raises(BilevelError, match=r"pip install 'bilevel\[mlflow\]'"):
        MLflowLogger()


def test_the_command_line_logs_to_mlflow_and_logs_again(client):
    quick = ["problem=quadratic", "solver=fixed", "solver.inner_steps=1", "runner.epochs=4"]
    quiet = ["runner.progress=none", "runner.picture=false", "runner.device=cpu"]
    chosen = ["logger=mlflow", "mlflow.experiment=mine", "mlflow.name=first", "hydra.run.dir=r"]
    assert main([*quick, *quiet, *chosen]) == 0
    (found,) = runs(client, "mine")
    assert found.info.run_name == "first"
    assert found.data.params["solver.inner_steps"] == "1"
    before = steps(client, found.info.run_id)
    summary = steps(client, found.info.run_id, "outcome/best/valid_loss")
    assert main(["log", "r"]) == 0
    assert steps(client, found.info.run_id) == before
    assert steps(client, found.info.run_id, "outcome/best/valid_loss") == summary
    client.delete_run(found.info.run_id)
    assert main(["log", "r"]) == 0
    (again,) = runs(client, "mine")
    assert steps(client, again.info.run_id) == before


# --- the thread ---


def test_a_sender_raises_an_error_once_and_drops_what_follows():
    sender, done = Sender(), []
    sender.send(fail)
    with pytest.raises(RuntimeError, match="a bug"):
        sender.wait(5)
    sender.send(lambda: done.append(1))
    assert sender.wait(5)
    assert done == []
    sender.end()
