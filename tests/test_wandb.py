"""W&B's offline file, read back: groups, axes, metrics, summary; and what happens without a network."""

import json
import logging
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from fakes import FakeProblem, FakeSolver

from bilevel import BilevelError, Runner
from bilevel.records import read_metrics
from bilevel.wandb_logger import WandB

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # third parties: wandb, protobuf

BLOCK = 32768


def run(directory, logger, resume=False, **settings):
    runner = Runner(**{"epochs": 3, "warmup_epochs": 1, "progress": "none", "picture": False, "device": "cpu", **settings})
    return runner.run(
        FakeProblem(),
        FakeSolver(),
        directory=directory,
        names=("fake", "walk"),
        config={"solver": {"rate": 0.05}},
        loggers=[logger],
        resume=resume,
    )


def read_back(directory):
    """The records of every offline file, in order; W&B's own process may still be writing when a run has ended."""
    records = []
    for path in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        deadline = time.monotonic() + 10
        while not of_kind(written := read_file(path), "exit") and time.monotonic() < deadline:
            time.sleep(0.05)
        records += written
    return records


def read_file(path):
    """LevelDB's log format: a header of 7 bytes, then blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    records, content, position, part = [], path.read_bytes(), 7, b""
    assert content[:4] in (b":W&B", b"")
    while position + 7 <= len(content):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        _, size, kind = struct.unpack("<IHB", content[position : position + 7])
        part += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4) and position <= len(content):  # the whole of a record, or its end
            records.append(wandb_internal_pb2.Record())
            records[-1].ParseFromString(part)
            part = b""
    return records


def of_kind(records, kind):
    return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]


def items(entries):
    return {"/".join(entry.nested_key) or entry.key: json.loads(entry.value_json) for entry in entries}


def test_an_offline_run_holds_everything(tmp_path, capfd):
    summary = run(tmp_path, WandB())
    assert capfd.readouterr() == ("", "")
    records = read_back(tmp_path)
    (begun,) = of_kind(records, "run")
    assert (begun.project, begun.run_group, begun.job_type, list(begun.tags)) == ("bilevel", "fake", "walk", ["fake", "walk"])
    assert begun.display_name == "walk-seed0"
    config = {entry.key: json.loads(entry.value_json) for entry in begun.config.update}
    assert config["solver"] == {"rate": 0.05}
    assert config["names"] == {"problem": "fake", "solver": "walk"}

    axes = {metric.name or metric.glob_name: metric.step_metric for metric in of_kind(records, "metric")}
    assert axes["valid/loss"] == axes["hypers/*"] == axes["train/*"] == "epoch"
    assert axes["by_seconds/*"] == "seconds"
    assert axes["by_examples/*"] == "examples"

    history = [items(h.item) for h in of_kind(records, "history")]
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert len(history) == len(lines) == 4
    for shown, line in zip(history, lines, strict=True):
        for name in ("valid/loss", "by_seconds/valid_loss", "by_examples/valid_loss"):
            assert shown[name] == line["valid_loss"]
        for name in ("epoch", "seconds", "examples"):
            assert shown[name] == line[name]
        assert shown["hypers/decay"] == line["hypers.decay"]
        assert shown["scales/drop"] == line["scales.drop"]
        assert shown["train/accuracy"] == line["train_accuracy"]
    assert history[-1]["solver/inner_loss"] == lines[-1]["inner_loss"]

    final = {}
    for part in of_kind(records, "summary"):
        final |= items(part.update)
    assert final["best"]["test_loss"] == summary["best"]["test_loss"]
    assert of_kind(records, "exit")[0].exit_code == 0


def test_a_resumed_run_goes_on_under_its_id(tmp_path):
    run(tmp_path, WandB(), epochs=2)
    run(tmp_path, WandB(), epochs=3, resume=True)
    first, second = of_kind(read_back(tmp_path), "run")
    assert first.run_id == second.run_id
    steps = [items(h.item)["step"] for h in of_kind(read_back(tmp_path), "history")]
    assert steps == [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")]


def test_a_run_that_raises_is_marked_as_failed(tmp_path):
    def fail():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        Runner(epochs=3, progress="none", device="cpu").run(
            FakeProblem(), FakeSolver(hooks={9: fail}), directory=tmp_path, loggers=[WandB()]
        )
    assert of_kind(read_back(tmp_path), "exit")[0].exit_code == 1


def test_disabled_does_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would raise
    run(tmp_path, WandB(mode="disabled"))
    assert not (tmp_path / "wandb").exists()


def test_an_unknown_mode_is_refused():
    with pytest.raises(BilevelError, match="did you mean `online`"):
        WandB(mode="onlin")


class Answering(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(404)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = HTTPServer(("127.0.0.1", 0), Answering)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("reachable", "reason"), [(False, "cannot be reached"), (True, "wandb login")])
def test_online_without_a_network_or_an_account_goes_on_and_says_so_once(
    tmp_path, monkeypatch, caplog, server, reachable, reason
):
    import wandb

    monkeypatch.setenv("WANDB_BASE_URL", server if reachable else "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    wandb.teardown()  # it reads the environment once
    with caplog.at_level(logging.WARNING, logger="bilevel"):
        run(tmp_path / "run", WandB(mode="online"))
    wandb.teardown()
    (warning,) = [record.getMessage() for record in caplog.records if record.name.startswith("bilevel")]
    assert reason in warning
    assert "wandb sync" in warning
    assert len(of_kind(read_back(tmp_path / "run"), "history")) == 4
