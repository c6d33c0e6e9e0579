"""Pictures of a report: bands without spikes, and ticks that do not collide."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bilevel.comparison import figures
from bilevel.comparison.cost_plot import draw_cost
from bilevel.comparison.curve_plots import draw_bands
from bilevel.comparison.curves import band
from bilevel.comparison.log_axis import log_ticks
from bilevel.comparison.plot_style import legend, logarithmic, styles
from bilevel.comparison.runs import group_runs, read_runs
from bilevel.loggers.plot import STYLE
from tests.support.comparison_runs import records, write_run


def runs_of(place, *losses, solver="stn", **options):
    for seed, values in enumerate(losses):
        write_run(place / f"{solver}{seed}", records(values), solver=solver, seed=seed, **options)
    return read_runs(place)


def axes(width=3.2, height=2.4):
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def collide(boxes):
    return any(
        one.overlaps(other) for at, one in enumerate(boxes) for other in boxes[:at] if one.width
    )


@settings(max_examples=40, deadline=None)
@given(
    low=st.floats(-8, 5),
    decades=st.floats(0.02, 12),
    horizontal=st.booleans(),
)
@example(low=-3.125, decades=0.375, horizontal=True)
def test_labels_of_a_logarithmic_axis_do_not_collide(low, decades, horizontal):
    with rc_context(STYLE):
        figure, ax = axes()
        limits = (10.0**low, 10.0 ** (low + decades))
        logarithmic(ax, horizontal=horizontal)
        (ax.set_xlim if horizontal else ax.set_ylim)(limits)
        figure.canvas.draw()
        axis = ax.xaxis if horizontal else ax.yaxis
        ticks = [tick for tick in axis.get_major_ticks() if tick.label1.get_text()]
        inside = [t for t in ticks if limits[0] * 0.999 <= t.get_loc() <= limits[1] * 1.001]
        assert 1 <= len(inside) <= 6
        boxes = [tick.label1.get_window_extent() for tick in inside]
        texts = [tick.label1.get_text() for tick in inside]
        assert not collide(boxes), texts
        assert len(set(texts)) == len(texts)


def test_the_usual_ticks_would_collide():
    """The law above fails for matplotlib's own labels of a short logarithmic axis."""
    with rc_context(STYLE):
        figure, ax = axes(2.0)
        ax.set_xscale("log")
        ax.set_xlim(2.0, 9.0)
        figure.canvas.draw()
        ticks = [*ax.xaxis.get_major_ticks(), *ax.xaxis.get_minor_ticks()]
        boxes = [tick.label1.get_window_extent() for tick in ticks if tick.label1.get_text()]
        assert collide([box for box in boxes if box.width])


def test_ticks_are_round_numbers():
    assert log_ticks(0.8, 4.0, 4) == [1.0, 2.0, 3.0]
    assert log_ticks(1e4, 3e5, 4) == [1e4, 3e4, 1e5, 3e5]
    assert log_ticks(1.0, 1.1, 4) == [1.0, 1.05, 1.1]


def filled(ax):
    """Return the edges of each band: lower and upper values at the same places."""
    return [path.vertices[:, 1] for area in ax.collections for path in area.get_paths()]


def test_a_band_on_a_logarithmic_axis_is_geometric_and_never_falls_to_the_axis(tmp_path):
    runs = runs_of(tmp_path, [8.0, 1.0, 0.001], [8.0, 1.0, 1.0])
    over = band(runs, points=3)
    middle, low, high = over.edges(log=True)
    assert middle[-1] == pytest.approx(np.sqrt(0.001))
    assert low[-1] * high[-1] == pytest.approx(0.001)
    assert np.log(high[-1] / middle[-1]) == pytest.approx(np.std(np.log([0.001, 1]), ddof=1))
    assert (over.mean - over.std)[-1] < 0  # a spike down to the axis
    _, ax = axes()
    draw_bands(ax, {"stn": runs})
    assert ax.get_yscale() == "log"
    (edges,) = filled(ax)
    assert edges.min() > 1e-5
    assert middle == pytest.approx([8.0, 1.0, np.sqrt(0.001)])


def test_a_run_at_zero_leaves_the_range_of_the_others(tmp_path):
    middle, low, high = band(runs_of(tmp_path, [8.0, 0.0], [8.0, 0.5]), points=2).edges(log=True)
    assert (middle[-1], low[-1], high[-1]) == (0.25, 0.5, 0.5)


def test_a_lower_edge_on_a_linear_axis_is_one_rule_for_the_whole_curve(tmp_path):
    over = band(runs_of(tmp_path, [2.0, 1.0, 1.0], [1.0, 1.0, 9.0], [1.0, 1.0, 1.0]), points=3)
    assert (over.mean - over.std)[-1] < 0
    _, low, _ = over.edges(log=False)
    assert low.tolist() == [1.0, 1.0, 1.0]
    _, low, high = band(runs_of(tmp_path / "b", [2.0, 1.0], [1.0, 1.0])).edges(log=False)
    assert low[0] == pytest.approx(1.5 - np.sqrt(0.5))
    assert high[0] == pytest.approx(1.5 + np.sqrt(0.5))


def test_no_band_of_accuracy_leaves_one(tmp_path):
    over = band(runs_of(tmp_path, [0.5, 1.0], [0.5, 0.7]), points=2)
    assert over.edges(log=False)[2][-1] > 1
    assert over.edges(log=False, most=1.0)[2][-1] == 1.0


def test_cost_against_quality_is_logarithmic_with_positive_bars(tmp_path):
    runs_of(tmp_path, [9.0, 1e-3], [9.0, 1.0], solver="a")
    runs = runs_of(tmp_path, [9.0, 0.5, 0.4, 0.3, 0.2, 0.2, 0.2, 0.2, 0.2], solver="b")
    (groups,) = group_runs(runs).values()
    _, ax = axes()
    draw_cost(ax, groups, styles(list(groups)), "examples")
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    (bars,) = [bars for bars in ax.containers if bars.get_label() == "a (n = 2)"]
    ends = [segment for lines in bars[2] for segment in lines.get_segments()]
    assert min(float(end.min()) for end in ends) > 0


def test_lines_of_groups_differ_by_their_markers_in_print(tmp_path):
    for solver in ("a", "b", "c"):
        runs = runs_of(tmp_path, [9.0, 1.0], [9.0, 2.0], solver=solver)
    (groups,) = group_runs(runs).values()
    _, ax = axes()
    draw_bands(ax, groups)
    markers = [line.get_marker() for line in ax.get_lines() if "(n" in str(line.get_label())]
    assert len(set(markers)) == 3


def test_a_legend_has_the_lines_of_every_panel_and_fits():
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 2.4), layout="constrained")
        FigureCanvasAgg(figure)
        first, second = figure.subplots(1, 2)
        first.plot([1, 2], label="stn (n = 3)")
        second.plot([1, 2], label="stn (n = 3)")
        second.plot([1, 2], label="a solver with a very long name " * 9 + "(n = 3)")
        legend(figure, [first, second])
        figure.canvas.draw()
    [drawn] = figure.legends
    one, other = (text.get_text() for text in drawn.get_texts())
    assert one == "stn (n = 3)"
    assert other.startswith("a solver")
    assert other.endswith("(n = 3)")
    box = drawn.get_window_extent()
    assert figure.bbox.x0 <= box.x0
    assert box.x1 <= figure.bbox.x1


def test_the_legend_of_a_picture_is_made_of_all_its_panels(monkeypatch):
    seen = []
    monkeypatch.setattr(figures, "legend", lambda drawn, axes: seen.extend(axes))
    panels = [lambda ax: ax.plot([1, 2], label="stn"), lambda ax: ax.plot([1, 2], label="fixed")]
    assert figures._grid(panels, labels=["stn", "fixed"]).startswith(b"\x89PNG")
    assert [ax.get_legend_handles_labels()[1] for ax in seen] == [["stn"], ["fixed"]]
