"""Displays show every number that the issue lists, in any terminal, and change none."""

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from bilevel import Runner, Space
from bilevel.loggers.display import LiveDisplay, PlainDisplay, display
from bilevel.loggers.logger import Place, Progress, RunInfo
from bilevel.loggers.records import read_metrics
from tests.support.fakes import FakeProblem, FakeSolver

INFO = {"problem": "digits", "solver": "delta_stn", "seed": 3, "epochs": 20, "warmup_epochs": 5}
SUMMARY_WORDS = [
    "best",
    "last",
    "valid loss",
    "valid accuracy",
    "test loss",
    "test accuracy",
    "decay",
    "drop",
    "examples",
    "peak memory",
    "saved in",
]


@pytest.fixture
def info(tmp_path):
    return RunInfo(directory=tmp_path, space=Space(), initial={"decay": 0.01}, **INFO)


def console(**settings):
    return Console(file=io.StringIO(), width=100, **settings)


def written(c):
    return c.file.getvalue()


RECORD = {
    "step": 8,
    "epoch": 1.3,
    "train_loss": 0.5,
    "valid_loss": 0.75,
    "valid_accuracy": 0.915,
    "hypers.decay": 0.02,
    "scales.decay": 1.5,
}


def test_live_shows_where_the_run_is_and_where_each_hyperparameter_went(info):
    c = console(force_terminal=True)
    live = LiveDisplay(c)
    live.start(info, {})
    live.advance(Progress(0, 0.0, 0.0))
    live.log(RECORD)
    live.advance(Progress(8, 1.5, 0.25))
    live.show()
    live.close()
    for text in (
        "digits · delta_stn · seed 3",
        "epoch 1.5/20",
        "warm-up",
        "left",
        "0.75",
        "91.50 %",
        "0.01",
        "→",
        "0.02",
        "1.5",
    ):
        assert text in written(c), text


def test_plain_lines_come_no_more_often_than_asked(info):
    c = console()
    plain = PlainDisplay(c, interval=1e6)
    plain.start(info, {})
    for step in range(5):
        plain.log({**RECORD, "step": step})
    lines = written(c).splitlines()
    assert len(lines) == 2
    assert (
        lines[1]
        == "epoch 1.3/20 | train loss 0.5 | valid loss 0.75 | valid accuracy 91.50 % | decay 0.02"
    )


def test_auto_is_live_in_a_terminal_alone(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(display("auto", console(force_terminal=True))[0], LiveDisplay)
    assert isinstance(display("auto", console())[0], PlainDisplay)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(display("auto", console(force_terminal=True))[0], PlainDisplay)
    assert display("none") == []


@pytest.mark.parametrize("kind", ["live", "plain"])
def test_the_last_table_has_every_number(tmp_path, capsys, kind):
    summary = Runner(epochs=2, warmup_epochs=0, progress=kind, picture=False, device="cpu").run(
        FakeProblem(), FakeSolver(), directory=tmp_path / "run", names=("fake", "walk")
    )
    out = capsys.readouterr().out
    for text in (
        *SUMMARY_WORDS,
        f"{summary['best']['test_loss']:.4g}",
        f"{summary['last']['valid_loss']:.4g}",
        f"{summary['hypers']['drop']:.4g}",
    ):
        assert text in out, text


def test_displays_change_no_number(tmp_path):
    lines = []
    for kind in ("none", "plain", "live"):
        torch.manual_seed(0)
        runner = Runner(epochs=3, warmup_epochs=1, progress=kind, picture=False, device="cpu")
        runner.run(FakeProblem(), FakeSolver(), directory=tmp_path / kind)
        records = read_metrics(tmp_path / kind / "metrics.jsonl")
        lines.append(
            [
                {k: v for k, v in r.items() if not k.startswith(("seconds", "peak_memory_bytes"))}
                for r in records
            ]
        )
    assert lines[0] == lines[1] == lines[2]


@pytest.mark.parametrize("make", [LiveDisplay, PlainDisplay])
def test_a_terminal_without_greek_is_served(info, make):
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    shown = make(Console(file=ascii_only, width=100, force_terminal=make is LiveDisplay))
    shown.start(info, {})
    shown.log(RECORD)
    outcome = {"step": 8, "valid_loss": 0.75}
    summary = {
        "message": None,
        "diverged": False,
        "best": outcome,
        "last": outcome,
        "initial": {},
        "hypers": {"decay": 0.02},
        "scales": {},
    }
    shown.finish(
        {
            **summary,
            "seconds": 1.0,
            "examples": 9,
            "steps": 8,
            "outer_steps": 2,
            "peak_memory_bytes": None,
        }
    )
    shown.close()
    ascii_only.flush()
    assert b"seed 3" in ascii_only.buffer.getvalue()


def test_a_record_that_is_not_finite_is_shown(info):
    c = console()
    plain = PlainDisplay(c)
    plain.start(info, {})
    plain.log({**RECORD, "valid_loss": float("nan")})
    assert "valid loss nan" in written(c)


@pytest.mark.parametrize("make", [LiveDisplay, PlainDisplay])
@pytest.mark.parametrize(
    ("place", "words"),
    [
        (Place("today", 3, 12), "run 3 of 12 · digits · delta_stn · seed 3"),
        (Place("today", 3), "run 3 · digits · delta_stn · seed 3"),
    ],
)
def test_a_sweep_shows_which_run_of_how_many(info, make, place, words):
    c = console(force_terminal=make is LiveDisplay)
    shown = make(c)
    shown.start(replace(info, place=place), {})
    shown.close()
    assert words in written(c)


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr("bilevel.loggers.display.time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_time_left_follows_the_budget_of_this_process(info, clock):
    shown = PlainDisplay(console())
    shown.start(replace(info, warmup_epochs=0), {})
    shown.advance(Progress(8, 4.0, 0.4))  # resumed: two fifths were not this process's
    assert shown.time_left() == ""
    clock.now += 30
    shown.advance(Progress(14, 7.0, 0.7))
    assert shown.time_left() == "30.0 s left"  # 0.3 took 30 s, and 0.3 are left
    clock.now += 30
    shown.advance(Progress(20, 10.0, 1.0))
    assert shown.time_left() == "0.0 s left"


def test_time_left_is_estimated_anew_when_rounds_begin_to_take_longer(info, clock):
    shown = PlainDisplay(console())
    shown.start(info, {})  # five epochs of warm-up, of twenty
    shown.advance(Progress(0, 0.0, 0.0))
    clock.now += 5
    shown.advance(Progress(5, 5.0, 0.25))
    assert shown.time_left() == ""  # nothing is known yet of rounds with outer steps
    clock.now += 10
    shown.advance(Progress(10, 10.0, 0.5))
    assert shown.time_left() == "20.0 s left"


def test_patience_makes_the_time_left_a_bound_and_shows_how_far_it_is_used(info, clock):
    c = console()
    shown = PlainDisplay(c, interval=0)
    shown.start(replace(info, warmup_epochs=0, patience=10), {})
    shown.advance(Progress(0, 0.0, 0.0))
    clock.now += 10
    shown.advance(Progress(10, 10.0, 0.5, stalled=3))
    shown.log(RECORD)
    assert "no new best for 3 of 10 | at most 10.0 s left" in written(c)


@pytest.mark.parametrize(
    "budget",
    [
        {"epochs": 4},
        {"seconds": 0.3},
        {"examples": 90},
        {"epochs": 4, "seconds": 60.0},
        {"epochs": 200, "patience": 3},
    ],
)
def test_under_every_budget_the_fraction_grows_to_the_end(tmp_path, monkeypatch, budget):
    seen = []
    monkeypatch.setattr(
        PlainDisplay, "tick", lambda self: seen.append((self.progress, self.time_left()))
    )
    solver = FakeSolver(rate=0.0) if "patience" in budget else FakeSolver()
    runner = Runner(warmup_epochs=0, progress="plain", picture=False, device="cpu", **budget)
    summary = runner.run(FakeProblem(), solver, directory=tmp_path)
    fractions = [progress.fraction for progress, _ in seen]
    assert fractions == sorted(fractions)
    assert 0 < fractions[0] < 1
    left = [text for _, text in seen[1:]]
    assert all(text.endswith(" left") for text in left)
    if "patience" in budget:
        assert summary["stopped"] == "patience"
        assert all(text.startswith("at most ") for text in left)
        assert seen[-1][0].stalled == 3
        assert fractions[-1] < 1
    else:
        assert fractions[-1] == 1
        assert left[-1] == "0.0 s left"
