"""Records: what evaluation measures, and what is written of it."""

import json
import math
import shutil

import pytest
import torch

from bilevel import BilevelError, Runner, Solution, Space, evaluate, stream
from bilevel.errors import FaultWarning
from bilevel.files import strict_json
from bilevel.loggers.jsonl import JsonLines
from bilevel.loggers.logger import Logger, RunInfo
from bilevel.loggers.plot import PICTURE, draw
from bilevel.loggers.records import make_record, read_metrics
from bilevel.run.budget import Budget
from tests.support.fakes import FakeProblem, FakeSolver

KEYS = {
    "problem",
    "solver",
    "seed",
    "best",
    "last",
    "hypers",
    "scales",
    "seconds",
    "examples",
    "steps",
    "peak_memory_bytes",
    "diverged",
}


class Counting(FakeProblem):
    """Metrics of every kind, and a carry that counts batches."""

    def predict(self, hypers, params, carry, batch, *, train, generator):
        assert not train
        assert not torch.is_grad_enabled()
        return batch[0] * (1 + carry["count"]), {"count": carry["count"] + 1}

    def metrics(self, hypers, params, prediction, batch):
        return {
            "loss": prediction,
            "batch": prediction.mean(),
            "tokens": prediction.expand(2, -1),
            "exact": prediction > 3,
        }


def split(*values):
    s = stream((torch.tensor(values),), 1, torch.Generator())
    s.evaluation_batch_size = 2
    return s


def solution():
    return Solution({}, {}, {"count": torch.zeros(())})


def test_evaluate_averages_over_items_and_threads_the_carry():
    measured = evaluate(
        Counting(), solution(), split(1.0, 3.0, 4.0)
    )  # batches [1, 3] and [4], the second one doubled
    assert measured == {"loss": 4.0, "batch": 4.0, "tokens": 4.0, "exact": pytest.approx(1 / 3)}


def test_evaluate_stops_at_its_limit():
    assert evaluate(Counting(), solution(), split(1.0, 3.0, 4.0), limit=1)["loss"] == 1.0


def test_evaluate_wants_a_loss():
    class Lossless(Counting):
        def metrics(self, *args):
            return {"accuracy": torch.ones(2)}

    with pytest.raises(BilevelError, match=r"Lossless\.metrics reports no `loss`"):
        evaluate(Lossless(), solution(), split(1.0, 2.0))


def record(**hypers):
    measured = {
        "train": {"loss": 1.0},
        "valid": {"loss": 2.0},
        "metrics": {"inner_loss": 0.5},
        "scales": {},
    }
    return make_record(
        step=1,
        epoch=0.5,
        seconds=0.1,
        examples=2,
        hypers=hypers,
        peak_memory_bytes=None,
        **measured,
    )


def test_hyperparameters_are_numbers_lists_or_their_range():
    large = torch.arange(65.0)
    line = record(decay=torch.tensor(0.25), weights=torch.tensor([0.5, 0.5]), large=large)
    assert line["hypers.decay"] == 0.25
    assert line["hypers.weights"] == [0.5, 0.5]
    assert line["hypers.large"] == {"mean": 32.0, "min": 0.0, "max": 64.0}
    assert line["inner_loss"] == 0.5


def test_json_is_strict():
    text = strict_json({"a": math.nan, "b": [math.inf, 1.5], "c": {"d": -math.inf}, "e": "σ"})
    assert json.loads(text, parse_constant=lambda c: pytest.fail(c)) == {
        "a": None,
        "b": [None, 1.5],
        "c": {"d": None},
        "e": "σ",
    }


def test_json_lines_go_on_at_the_checkpoint(tmp_path):
    info = RunInfo(directory=tmp_path, problem="p", solver="s", seed=0, space=Space())
    lines = JsonLines()
    lines.start(info, {})
    lines.log({"step": 0})
    state = lines.state()
    lines.log({"step": 1, "more": "than the line that comes in its place"})
    lines.close()
    again = JsonLines()
    again.start(info, state)
    again.log({"step": 2})
    assert again.state()["lines"] == 2
    again.close()
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [0, 2]


@pytest.mark.parametrize(
    ("spoil", "kept", "words"),
    [
        (lambda file: file.unlink(), [], "lacks 2 of the 2 lines"),
        (lambda file: file.write_text(""), [], "lacks 2 of the 2 lines"),
        (lambda file: file.write_bytes(file.read_bytes()[:12]), [0], "lacks 1 of the 2 lines"),
        (
            lambda file: file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n")),
            [0, 1],
            "differs from the 2 lines",
        ),
        (lambda file: file.write_text('{"step": 0}\nno\n{"step": 1}\n'), [0, 1], "differs from"),
        (lambda file: file.write_text('{"step": 7}\n[1]\n'), [7], "lacks 1 of the 2 lines"),
    ],
    ids=["missing", "empty", "cut", "crlf", "damaged", "replaced"],
)
def test_the_checkpoint_decides_about_a_changed_log(tmp_path, spoil, kept, words):
    info = RunInfo(directory=tmp_path, problem="p", solver="s", seed=0, space=Space())
    file = tmp_path / "metrics.jsonl"
    lines = JsonLines()
    lines.start(info, {})
    lines.log({"step": 0})
    lines.log({"step": 1})
    state = lines.state()
    lines.close()
    spoil(file)
    changed = file.read_bytes() if file.exists() else b""
    again = JsonLines()
    with pytest.warns(FaultWarning, match=words):
        again.start(info, state)
    again.log({"step": 2})
    state = again.state()
    again.close()
    assert [record["step"] for record in read_metrics(file)] == [*kept, 2]
    copy = tmp_path / "metrics-replaced.jsonl"
    assert (copy.read_bytes() if copy.exists() else b"") == changed
    once_more = JsonLines()
    once_more.start(info, state)  # the repaired file fits its new checkpoint
    once_more.close()


def test_what_a_run_leaves(tmp_path):
    runner = Runner(epochs=2, warmup_epochs=1, progress="none", device="cpu")
    returned = runner.run(
        FakeProblem(), FakeSolver(), directory=tmp_path, names=("fake", "walk"), seed=3
    )
    older = {"checkpoint-step0.pt", "checkpoint-step6.pt"}
    left = {"run.json", "metrics.jsonl", "summary.json", "checkpoint.pt", PICTURE, *older}
    assert {file.name for file in tmp_path.iterdir()} == left
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == returned
    assert set(summary) >= KEYS
    assert {"step", "valid_loss", "valid_accuracy", "test_loss", "test_accuracy"} <= set(
        summary["best"]
    ) & set(summary["last"])
    assert (summary["problem"], summary["solver"], summary["seed"]) == ("fake", "walk", 3)
    assert summary["initial"]["decay"] == pytest.approx(0.01)
    assert summary["hypers"]["decay"] != summary["initial"]["decay"]
    assert summary["scales"] == {"decay": 1.0, "drop": 1.0}
    assert summary["peak_memory_bytes"] > 2**20
    lines = read_metrics(tmp_path / "metrics.jsonl")
    expected = {
        "step",
        "epoch",
        "seconds",
        "examples",
        "train_loss",
        "train_accuracy",
        "valid_loss",
        "valid_accuracy",
        "inner_loss",
    }
    assert expected | {"hypers.decay", "hypers.drop", "scales.decay", "scales.drop"} <= set(
        lines[-1]
    )
    assert lines[-1]["hypers.drop"] == summary["hypers"]["drop"]
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "records", [[], [{"epoch": 0.0, "valid_loss": None, "train_loss": None, "hypers.decay": None}]]
)
def test_a_picture_of_next_to_nothing(tmp_path, records):
    draw(records, tmp_path / "curves.png", warmup_epochs=1, space=FakeProblem().space)
    assert (tmp_path / "curves.png").stat().st_size


def test_a_schedule_plans_in_steps():
    plan = Budget(steps_per_epoch=10, steps=25, warmup_steps=12, evaluate_every=0.1)
    assert [plan.limit(step) for step in (0, 11, 12, 24)] == [12, 1, 13, 1]
    assert [plan.evaluations(step) for step in range(4)] == [0, 1, 2, 3]
    assert Budget(steps_per_epoch=10).limit(7) is None
    assert (
        Budget(steps_per_epoch=10, evaluate_every=0.1 + 0.2).evaluations(3) == 1
    )  # 0.1 + 0.2 > 0.3
    assert plan.spent(5, 1.0, 1) == {"epochs": 0.2}


def test_a_checkpoint_of_another_run_is_not_resumed_and_nothing_is_cut(tmp_path):
    """A run with other settings has other lines, so the file must not change."""
    for name, scale in (("one", 1.0), ("other", 2.0)):
        Runner(epochs=3, progress="none", picture=False).run(
            FakeProblem(), FakeSolver(rate=0.01 * scale), directory=tmp_path / name
        )
    shutil.copy(tmp_path / "other" / "checkpoint.pt", tmp_path / "one" / "checkpoint.pt")
    lines = (tmp_path / "one" / "metrics.jsonl").read_bytes()
    with pytest.raises(BilevelError, match=r"solver.rate=0.02, not solver.rate=0.01"):
        Runner(epochs=5, progress="none", picture=False).run(
            FakeProblem(), FakeSolver(rate=0.01), directory=tmp_path / "one", resume=True
        )
    assert (tmp_path / "one" / "metrics.jsonl").read_bytes() == lines


class Struck(Logger):
    """A logger in whose `finish` the process ends, as by a kill."""

    def __init__(self, strikes):
        self.strikes, self.finished = strikes, 0

    def start(self, run, state):
        pass

    def log(self, record):
        pass

    def finish(self, summary):
        self.finished += 1
        if self.finished <= self.strikes:
            raise SystemExit(137)


@pytest.mark.parametrize("strikes", [1, 2])
def test_a_run_that_is_killed_while_its_loggers_finish_is_not_finished(tmp_path, strikes):
    logger = Struck(strikes)

    def run(resume):
        return Runner(epochs=2, warmup_epochs=1, progress="none").run(
            FakeProblem(), FakeSolver(), directory=tmp_path, loggers=[logger], resume=resume
        )

    for attempt in range(strikes):
        with pytest.raises(SystemExit):
            run(resume=attempt > 0)
        assert not (tmp_path / "summary.json").exists()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    summary = run(resume=True)
    assert logger.finished == strikes + 1
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert (tmp_path / PICTURE).exists()


class BadTest(FakeProblem):
    """Its test split has a row that trained weights cannot take; `how` says where it fails."""

    how = "metric"

    def init(self, generator):
        params, carry = super().init(generator)
        self.start = {"w": params["w"].clone()}
        return params, carry

    def data(self, device, generator):
        made = super().data(device, generator)
        self.first = next(iter(made.test.once()))[0][0]
        return made

    def metrics(self, hypers, params, prediction, batch):
        trained = not torch.equal(params["w"], self.start["w"])
        if trained and torch.equal(batch[0][0], self.first):
            if self.how == "metric":
                raise IndexError("Target 3 is out of bounds.")
            prediction = prediction.to(torch.complex64) < 0  # PyTorch refuses it
        return super().metrics(hypers, params, prediction, batch)


@pytest.mark.parametrize("how", ["metric", "type"])
def test_a_bad_test_split_takes_the_test_figures_and_nothing_else(tmp_path, how):
    problem = BadTest()
    problem.how = how
    words = r"the test split cannot be evaluated \((Index|Runtime|NotImpl)"
    with pytest.warns(FaultWarning, match=words):
        summary = Runner(epochs=2, progress="none", picture=False).run(
            problem, FakeSolver(), directory=tmp_path
        )
    assert summary["best"]["valid_loss"] > 0
    assert summary["best"]["test_loss"] is None
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
