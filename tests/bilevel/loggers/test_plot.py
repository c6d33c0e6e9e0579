"""The picture of a run: its legends, and the test scores."""

import re

import pytest

from bilevel.loggers.logger import RunInfo
from bilevel.loggers.plot import PICTURE, CurvesPlot, draw
from bilevel.space import Space


def records(hyper, **first):
    """Return three evaluations; `first` is added to the first one."""
    scores = [{"train_loss": 2.0 / n, "valid_loss": 3.0 / n} for n in (1, 2, 3)]
    made = [
        {"step": at, "epoch": float(at), **score, "hypers.rate": hyper}
        for at, score in enumerate(scores)
    ]
    made[0] |= first
    return made


def texts(tmp_path, told):
    """Return the texts of the picture: an SVG names each as a comment."""
    draw(told, tmp_path / "curves.svg")
    return set(re.findall(r"<!-- (.*?) -->", (tmp_path / "curves.svg").read_text()))


@pytest.mark.parametrize(
    ("hyper", "entries"),
    [
        (0.5, {"λ"}),
        ([0.5, 0.2], {"λ[0]", "λ[1]"}),
        ([[0.5, 0.2, 0.3], [0.5, 0.2, 0.3]], {"λ"}),
        ({"mean": 0.5, "min": 0.1, "max": 0.9}, {"mean of λ", "min to max"}),
    ],
    ids=["number", "few", "many", "large"],
)
def test_the_line_of_a_hyperparameter_has_a_legend(tmp_path, hyper, entries):
    found = texts(tmp_path, records(hyper))
    assert {"train", "valid"} | entries <= found
    assert "test" not in found


def test_the_scores_of_the_test_split_are_in_the_picture(tmp_path):
    assert "test" in texts(tmp_path, records(0.5, test_loss=2.5))


def test_a_run_draws_the_test_scores_of_its_summary(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("bilevel.loggers.plot.read_metrics", lambda path: records(0.5))
    monkeypatch.setattr("bilevel.loggers.plot.draw", lambda told, path, **_: drawn.extend(told))
    plot = CurvesPlot()
    plot.start(RunInfo(directory=tmp_path, problem="p", solver="s", seed=0, space=Space()), {})
    plot.finish({"best": {"step": 1, "test_loss": 4.0}, "last": {"step": 2, "test_loss": 5.0}})
    assert [told.get("test_loss") for told in drawn] == [None, 4.0, 5.0]
    assert PICTURE == "curves.png"
