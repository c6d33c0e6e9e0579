"""The picture of a run: its legends, and the test scores."""

import re

import pytest
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bilevel.loggers.logger import RunInfo
from bilevel.loggers.plot import PICTURE, STYLE, CurvesPlot, draw
from bilevel.loggers.plot_texts import fit_texts
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


LONG = "hyperparameter with a rather long name " * 6


@pytest.mark.parametrize("columns", [1, 3])
def test_long_texts_stay_in_their_places(columns):
    with rc_context(STYLE):
        figure = Figure(figsize=(3.4 * columns, 5.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, columns, squeeze=False).flatten()
        figure.suptitle(LONG)
        for ax in axes:
            ax.set_title(LONG)
            ax.set_ylabel(LONG)
        fit_texts(figure)
        figure.canvas.draw()
    boxes = [text.get_window_extent() for ax in axes for text in (ax.title, ax.yaxis.label)]
    for box in (*boxes, figure._suptitle.get_window_extent()):
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0
        assert box.y1 <= figure.bbox.y1
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert axes[0].get_title().endswith("…")


def test_numbers_are_not_shown_as_differences_from_another_number(tmp_path):
    told = records(1000.0)
    for at, record in enumerate(told):
        record["hypers.rate"] += 0.1 * at
    assert not any(text.startswith("+") for text in texts(tmp_path, told))


def test_a_letter_that_the_font_lacks_causes_no_warning(tmp_path):
    draw(records(0.5), tmp_path / "curves.png", title="\u6f22")
    assert (tmp_path / "curves.png").exists()
