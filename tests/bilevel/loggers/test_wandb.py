"""W&B's offline files, read back and uploaded, and runs without a network."""

import gzip
import json
import logging
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bilevel import BilevelError, Runner
from bilevel.loggers.jsonl import SummaryFile
from bilevel.loggers.logger import Place
from bilevel.loggers.records import read_metrics
from bilevel.loggers.wandb_logger import MARK, WandB
from bilevel.problems import Quadratic, digits
from bilevel.problems.classification.recipes import augmented_images
from bilevel.problems.datasets import standard_images
from bilevel.solvers import GaussNewton, implicit_cg
from tests.support.fakes import FakeProblem, FakeSolver
from tests.support.wandb_files import of_kind, read_file

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # third parties: wandb, protobuf


def run(directory, logger, resume=False, problem=None, solver=None, place=None, **settings):
    runner = Runner(
        **{
            "epochs": 3,
            "warmup_epochs": 1,
            "progress": "none",
            "picture": False,
            "device": "cpu",
            **settings,
        }
    )
    return runner.run(
        problem or FakeProblem(),
        solver or FakeSolver(),
        directory=directory,
        names=("fake", "walk"),
        config={"solver": {"rate": 0.05}},
        loggers=[logger],
        resume=resume,
        place=place,
    )


class Pictured(FakeProblem):
    """With pictures that depend on λ and on a draw."""

    def pictures(self, hypers, generator):
        return {"augmented": hypers["drop"] + torch.rand(9, 1, 8, 8, generator=generator)}


def break_down():
    raise RuntimeError("a bug")


def read_back(directory):
    """Return the records of every offline file, in order.

    W&B's own process may still be writing when a run has ended.
    """
    records = []
    files = directory.glob("wandb/offline-run-*/*.wandb")
    for path in sorted(files, key=lambda path: path.stat().st_mtime):
        deadline = time.monotonic() + 10
        while not of_kind(written := read_file(path), "exit") and time.monotonic() < deadline:
            time.sleep(0.05)
        records += written
    return records


def items(entries):
    return {
        "/".join(entry.nested_key) or entry.key: json.loads(entry.value_json) for entry in entries
    }


def test_an_offline_run_holds_everything(tmp_path, capfd):
    summary = run(tmp_path, WandB())
    assert capfd.readouterr() == ("", "")
    records = read_back(tmp_path)
    (begun,) = of_kind(records, "run")
    assert (begun.project, begun.run_group, begun.job_type, list(begun.tags)) == (
        "bilevel",
        "fake",
        "walk",
        ["fake", "walk"],
    )
    assert begun.display_name == "walk-seed0"
    config = {entry.key: json.loads(entry.value_json) for entry in begun.config.update}
    assert config["solver"] == {"rate": 0.05}
    assert config["names"] == {"problem": "fake", "solver": "walk"}

    axes = {
        metric.name or metric.glob_name: metric.step_metric for metric in of_kind(records, "metric")
    }
    by_epoch = (
        "valid/loss",
        "exact/regret",
        "valid/*",
        "hypers/*",
        "train/*",
        "hypergradient/*",
        "seconds/*",
        "pictures/*",
    )
    assert {axes[name] for name in by_epoch} == {"epoch"}
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
    assert final["best/test_loss"] == summary["best"]["test_loss"]
    assert final["best/valid_accuracy"] == summary["best"]["valid_accuracy"]
    assert (final["examples"], final["outer_steps"]) == (
        summary["examples"],
        summary["outer_steps"],
    )
    assert final["peak_memory_bytes"] == summary["peak_memory_bytes"]
    assert of_kind(records, "exit")[0].exit_code == 0


def test_wandb_has_ended_before_the_summary_is_written(tmp_path, monkeypatch):
    """A run that is killed after its summary.json counts as finished."""
    marks = []
    finish = SummaryFile.finish

    def note(self, summary):
        marks.extend(tmp_path.glob(f"wandb/offline-run-*/{MARK}"))
        finish(self, summary)

    monkeypatch.setattr(SummaryFile, "finish", note)
    run(tmp_path, WandB())
    assert len(marks) == 1


def test_a_resumed_run_goes_on_under_its_id(tmp_path):
    run(tmp_path, WandB(), epochs=2)
    run(tmp_path, WandB(), epochs=3, resume=True)
    first, second = of_kind(read_back(tmp_path), "run")
    assert first.run_id == second.run_id
    assert list(first.tags) == ["fake", "walk"]
    assert list(second.tags) == ["fake", "walk", "resumed"]
    steps = [items(h.item)["step"] for h in of_kind(read_back(tmp_path), "history")]
    assert steps == [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")]


def test_what_a_killed_run_logged_after_its_checkpoint_is_not_logged_again(tmp_path):
    with pytest.raises(RuntimeError):
        run(
            tmp_path,
            WandB(),
            epochs=8,
            checkpoint_every=4,
            solver=FakeSolver(hooks={45: break_down}),
        )
    before = [items(h.item)["step"] for h in of_kind(read_back(tmp_path), "history")]
    run(tmp_path, WandB(), resume=True, epochs=8)
    steps = [items(h.item)["step"] for h in of_kind(read_back(tmp_path), "history")]
    assert steps == [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps[len(before) - 1] == before[-1] > 25  # the checkpoint's step


def test_a_run_goes_on_under_its_id_after_a_part_without_wandb(tmp_path):
    run(tmp_path, WandB(), epochs=1)
    run(tmp_path, WandB(mode="disabled"), resume=True, epochs=2)
    run(tmp_path, WandB(), resume=True, epochs=3)
    first, last = of_kind(read_back(tmp_path), "run")
    assert first.run_id == last.run_id


def test_a_run_of_a_sweep_is_tagged_with_it(tmp_path):
    run(tmp_path, WandB(tags=("mine",)), place=Place("2026-01-01", 3, 12))
    (begun,) = of_kind(read_back(tmp_path), "run")
    assert list(begun.tags) == ["fake", "walk", "sweep-2026-01-01", "mine"]


def test_pictures_come_at_the_first_second_fourth_evaluation(tmp_path):
    run(tmp_path, WandB(), problem=Pictured(), epochs=4)
    history = [items(h.item) for h in of_kind(read_back(tmp_path), "history")]
    assert [
        number for number, row in enumerate(history, 1) if "pictures/augmented/path" in row
    ] == [1, 2, 4]
    size = history[0]["pictures/augmented/width"], history[0]["pictures/augmented/height"]
    assert size == (8 * 66 + 2, 2 * 66 + 2)  # 8 × 8 pixels magnified to 64, eight to a row
    files = {
        row["step"]: row["pictures/augmented/path"]
        for row in history
        if "pictures/augmented/path" in row
    }
    for line in read_metrics(tmp_path / "metrics.jsonl"):
        if line["step"] in files:
            (file,) = tmp_path.glob(f"wandb/offline-run-*/files/{files[line['step']]}")
            pixels = torch.from_numpy(np.asarray(Image.open(file).convert("RGB")).copy())
            draws = torch.rand(9, 1, 8, 8, generator=torch.Generator().manual_seed(0))
            wanted = 255 * (line["hypers.drop"] + draws).clamp(0, 1)
            first, ninth = (
                pixels[2:66:8, 2:66:8, 0],
                pixels[68:132:8, 2:66:8, 1],
            )  # between lines of 2 white pixels
            assert (first - wanted[0, 0]).abs().max() <= 1
            assert (ninth - wanted[8, 0]).abs().max() <= 1
            assert (pixels[:2] == 255).all()


def test_an_image_problem_shows_what_its_strengths_do():
    images = standard_images.load_digits()
    problem = augmented_images(images, channels=[4, 8], augment=["affine", "colour"])
    hypers = problem.space.constrain(problem.space.init())

    def rows(hypers):
        return problem.pictures(hypers, torch.Generator().manual_seed(0))["augmented"].unflatten(
            0, (4, 8)
        )

    shown = rows(hypers)
    assert shown.shape == (4, 8, 1, 8, 8)
    assert 0 <= shown.min() <= shown.max() <= 1
    torch.testing.assert_close(shown[0], images.train[0][:8] / images.train[0].max())
    torch.testing.assert_close(shown, rows(hypers))
    assert all((shown[0] - row).abs().amax(dim=(1, 2, 3)).min() > 0.05 for row in shown[1:])
    still = rows({name: torch.zeros(()) for name in hypers})
    torch.testing.assert_close(still[1:], still[0].expand(3, -1, -1, -1, -1))
    plain = digits(hidden=[8])
    assert plain.pictures(plain.space.constrain(plain.space.init()), torch.Generator()) == {}


def test_where_the_truth_is_known_the_hypergradient_is_held_against_it(tmp_path):
    problem = Quadratic.random(seed=1, dtype=torch.float64)
    solver = implicit_cg(curvature=GaussNewton(), inner_steps=1, stationarity=1e6)
    run(tmp_path, WandB(), problem=problem, solver=solver, epochs=40, evaluate_every=20)
    history = [items(h.item) for h in of_kind(read_back(tmp_path), "history")]
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["hypergradient/cosine"] for row in history] == [
        line["hypergradient.cosine"] for line in lines
    ]
    assert [row["by_seconds/regret"] for row in history] == [line["exact.regret"] for line in lines]
    assert {"seconds/inner", "seconds/response", "seconds/outer", "seconds/evaluation"} <= set(
        history[-1]
    )


class WandBServer(BaseHTTPRequestHandler):
    """Serve the part of W&B's API that `wandb sync` needs; `server.runs` holds the uploads."""

    def do_PUT(self):
        self.body()
        self.answer({})

    def do_POST(self):
        asked = json.loads(self.body() or b"{}") if "otel" not in self.path else {}
        if "file_stream" in self.path:
            for name, part in asked.get("files", {}).items():
                if name == "wandb-history.jsonl":
                    assert part["offset"] == len(self.server.history)
                    self.server.history += [json.loads(line) for line in part["content"]]
                elif name == "wandb-summary.json":
                    self.server.summary.update(json.loads(part["content"][-1]))
            return self.answer({"exitcode": None, "limits": {}})
        query, variables = asked.get("query", ""), asked.get("variables", {})
        port = self.server.server_port
        if "upsertBucket" in query:
            self.server.runs.append(variables)
            project = {"id": "p", "name": "bilevel", "entity": {"id": "e", "name": "me"}}
            bucket = {
                "id": "b",
                "name": variables["name"],
                "displayName": "",
                "config": "{}",
                "project": project,
            }
            return self.answer({"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}})
        if "createRunFiles" in query:
            files = [
                {"name": name, "uploadUrl": f"http://127.0.0.1:{port}/{name}"}
                for name in variables["files"]
            ]
            return self.answer(
                {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
            )
        if "historyLineCount" in query:  # how far a run is that goes on
            rows = self.server.history
            known = {
                "id": "b",
                "name": "",
                "summaryMetrics": json.dumps(self.server.summary),
                "displayName": "",
                "logLineCount": 0,
                "historyLineCount": len(rows),
                "eventsLineCount": 0,
                "historyTail": json.dumps([json.dumps(rows[-1])] if rows else []),
                "eventsTail": "[]",
                "config": "{}",
                "tags": [],
                "wandbConfig": json.dumps({"t": {}}),  # a run that has begun
            }
            model = {
                "id": "p",
                "name": "bilevel",
                "entity": {"id": "e", "name": "me"},
                "bucket": known if rows else None,
            }
            return self.answer({"data": {"model": model}})
        return self.answer({"data": {}})

    def body(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT

    def log_message(self, *_):
        pass


@pytest.fixture
def wandb_server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), WandBServer)
    server.runs, server.history, server.summary = [], [], {}
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_wandb_sync_uploads_a_run_and_its_resumption(tmp_path, wandb_server):
    run(tmp_path, WandB(), epochs=2)
    summary = run(tmp_path, WandB(), epochs=3, resume=True)
    first, second = read_back_directories(tmp_path)
    done = subprocess.run(
        [Path(sys.executable).with_name("wandb"), "sync", first, second],
        env={
            **os.environ,
            "WANDB_BASE_URL": f"http://127.0.0.1:{wandb_server.server_port}",
            "WANDB_API_KEY": 40 * "a",
        },
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("Finished syncing") == 2
    uploaded = wandb_server.runs[0]
    assert (uploaded["project"], uploaded["groupName"], uploaded["jobType"]) == (
        "bilevel",
        "fake",
        "walk",
    )
    assert {tuple(run["tags"]) for run in wandb_server.runs if run.get("tags")} == {
        ("fake", "walk"),
        ("fake", "walk", "resumed"),
    }
    assert {run["name"] for run in wandb_server.runs} == {uploaded["name"]}
    assert json.loads(uploaded["config"])["solver"]["value"] == {"rate": 0.05}
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in wandb_server.history] == [line["step"] for line in lines]
    assert [row["_step"] for row in wandb_server.history] == [line["step"] for line in lines]
    assert [row["valid/loss"] for row in wandb_server.history] == [
        line["valid_loss"] for line in lines
    ]
    assert wandb_server.summary["best/valid_loss"] == summary["best"]["valid_loss"]


def read_back_directories(directory):
    read_back(directory)  # waits for W&B's own process
    return sorted(directory.glob("wandb/offline-run-*"), key=lambda path: path.stat().st_mtime)


def test_a_run_that_raises_is_marked_as_failed(tmp_path):
    with pytest.raises(RuntimeError, match="a bug"):
        Runner(epochs=3, progress="none", device="cpu").run(
            FakeProblem(), FakeSolver(hooks={9: break_down}), directory=tmp_path, loggers=[WandB()]
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


@pytest.mark.parametrize(
    ("reachable", "reason"), [(False, "cannot be reached"), (True, "wandb login")]
)
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
    (warning,) = [
        record.getMessage() for record in caplog.records if record.name.startswith("bilevel")
    ]
    assert reason in warning
    assert "wandb sync" in warning
    assert len(of_kind(read_back(tmp_path / "run"), "history")) == 4


def test_what_wandb_had_not_yet_written_is_logged_when_the_run_goes_on(tmp_path):
    """W&B's process buffers lines and ends with ours, so files of a killed run lack their end."""
    run(tmp_path, WandB(), epochs=2)
    first = [items(h.item)["step"] for h in of_kind(read_back(tmp_path), "history")]
    run(tmp_path, WandB(), epochs=5, resume=True)
    files = tmp_path.glob("wandb/offline-run-*/*.wandb")
    file = max(files, key=lambda path: path.stat().st_mtime)
    while len(left := of_kind(read_file(file), "history")) > 1:
        file.write_bytes(file.read_bytes()[:-100])  # most often in the middle of a record
    (file.parent / MARK).unlink()
    assert len(first) + len(left) < len(read_metrics(tmp_path / "metrics.jsonl")) - 1

    run(tmp_path, WandB(), epochs=6, resume=True)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    history = [items(h.item) for h in of_kind(read_back(tmp_path), "history")]
    assert [row["step"] for row in history] == [line["step"] for line in lines]
    assert [row["valid/loss"] for row in history] == [line["valid_loss"] for line in lines]
    assert [row["hypers/decay"] for row in history] == [line["hypers.decay"] for line in lines]
    assert len({h.run_id for h in of_kind(read_back(tmp_path), "run")}) == 1
    assert len(list(tmp_path.glob("wandb/killed-offline-run-*/*.wandb"))) == 1  # nothing is deleted
