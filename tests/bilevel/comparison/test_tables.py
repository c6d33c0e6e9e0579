"""Tables of a report: hyperparameters, marks, wide tables, settings, notes and origin."""

import io
import json

import pytest
import torch
from rich.console import Console

from bilevel import Runner
from bilevel.comparison.notes import notes_on
from bilevel.comparison.provenance import origin
from bilevel.comparison.quality_table import QUALITY, quality_table
from bilevel.comparison.report import printed, sections
from bilevel.comparison.runs import group_runs, read_runs
from bilevel.comparison.step_table import STEP
from bilevel.comparison.table import Rows, rows
from bilevel.comparison.wide_table import blocks
from tests.support.comparison_runs import records, write_run
from tests.support.fakes import FakeProblem, FakeSolver


def written(place, losses, *, solver="stn", seed=0, more=None, **options):
    told = records(losses, **(more or {}))
    return write_run(place / f"{solver}{seed}", told, solver=solver, seed=seed, **options)


def table_of(place, title="Hyperparameters"):
    """Return the cells of a table by the text of their row and by title."""
    (section,) = sections(read_runs(place))
    content = section.table(title).rows
    return {row[0]: dict(zip(content.titles[1:], row[1:], strict=True)) for row in content.cells}


def test_hyperparameters_have_their_start_and_what_each_solver_found(tmp_path):
    for seed, last in enumerate((0.2, 0.4)):
        written(
            tmp_path,
            [3.0, 1.0],
            seed=seed,
            more={
                "hypers__decay": [1.0, last],
                "hypers__still": [0.5, 0.5],
                "hypers__pair": [[1.0, 3.0], [2.0 + seed, 6.0]],
                "hypers__large": [
                    {"mean": 1.0, "min": 1.0, "max": 1.0},
                    {"mean": 2.0 + seed, "min": 0.5, "max": 9.0},
                ],
            },
        )
    written(tmp_path, [3.0, 1.0], solver="fixed", more={"hypers__decay": [1.0, 1.0]})
    found = table_of(tmp_path)
    assert found["decay"] == {"start": "1", "stn": "0.30 ± 0.14", "fixed": "1"}
    assert found["still"] == {"start": "0.5", "stn": "0.5", "fixed": ""}
    assert found["pair [2]"]["start"] == "2 (1 to 3)"
    assert found["pair [2]"]["stn"] == "4.25 ± 0.35 (2 to 6)"  # entries 2, 6 and 3, 6
    assert found["large"] == {"start": "1", "stn": "2.50 ± 0.71 (0.5 to 9)", "fixed": ""}


def test_starts_that_differ_stand_beside_the_values(tmp_path):
    for solver, start in (("stn", 1.0), ("fixed", 2.0)):
        written(tmp_path, [3.0, 1.0], solver=solver, more={"hypers__decay": [start, 0.5]})
    expected = {"start": "differs", "fixed": "0.5 (from 2)", "stn": "0.5 (from 1)"}
    assert table_of(tmp_path)["decay"] == expected


def test_a_run_that_left_no_hyperparameters_has_no_table(tmp_path):
    written(tmp_path, [3.0, 1.0])
    (section,) = sections(read_runs(tmp_path))
    assert "Hyperparameters" not in [part.title for part in section.tables]


def marked(place, columns=QUALITY):
    """Return the titles and labels of the marked cells."""
    (groups,) = group_runs(read_runs(place)).values()
    content = rows(groups, columns)
    return {(content.titles[at], content.cells[row][0]) for row, at in content.marks}


def test_the_best_of_each_column_is_marked_lowest_loss_and_highest_accuracy(tmp_path):
    for solver, loss, accuracy in (("a", 1.0, 0.7), ("b", 2.0, 0.8)):
        for seed in range(2):
            more = {"valid_accuracy": [0.5, accuracy]}
            written(tmp_path, [9.0, loss + seed], solver=solver, seed=seed, more=more)
    assert marked(tmp_path) == {("best valid loss", "a"), ("valid accuracy", "b")}
    (groups,) = group_runs(read_runs(tmp_path)).values()
    content = quality_table(groups).rows
    assert content.text(0, 2) == "* 1.50 ± 0.71"
    assert content.text(1, 2) == "2.50 ± 0.71"


def test_a_group_that_diverged_or_lacks_a_number_gets_no_mark(tmp_path):
    written(tmp_path, [9.0, 1.0, None], solver="lost", ended="diverged")
    for seed in range(2):
        written(tmp_path, [9.0, 2.0], solver="whole", seed=seed, more={"exact__regret": [4, 2]})
    written(tmp_path, [9.0, 3.0], solver="part", seed=0, more={"exact__regret": [4.0, 0.1]})
    written(tmp_path, [9.0, 3.0], solver="part", seed=1)
    assert {
        ("best valid loss", "whole"),
        ("regret there", "whole"),
        ("regret of last λ", "whole"),
    } == marked(tmp_path)


def test_equal_values_and_a_single_group_are_not_marked(tmp_path):
    written(tmp_path, [9.0, 1.0], solver="a")
    assert marked(tmp_path) == set()
    written(tmp_path, [9.0, 1.0], solver="b")
    assert marked(tmp_path) == set()


def test_a_phase_without_work_has_no_column(tmp_path):
    idle = {"seconds__inner": [0.0, 1.0, 2.0], "seconds__outer": [0.0, 0.0, 0.0]}
    written(tmp_path, [9.0, 1.0, 1.0], more=idle)
    (groups,) = group_runs(read_runs(tmp_path)).values()
    titles = rows(groups, STEP).titles
    assert "inner phase" in titles
    assert "outer phase" not in titles


@pytest.mark.parametrize(("seeds", "warned"), [(2, True), (3, False)])
def test_fewer_than_three_runs_are_a_warning(tmp_path, seeds, warned):
    for seed in range(seeds):
        written(tmp_path, [9.0, 1.0], seed=seed)
        written(tmp_path, [9.0, 1.0], seed=seed, solver="other")
    written(tmp_path, [9.0, 1.0], seed=8, solver="other")
    (groups,) = group_runs(read_runs(tmp_path)).values()
    notes = [note for note in notes_on(groups) if "fewer than 3" in note]
    assert bool(notes) == warned
    assert all("runs in stn: mean, spread" in note for note in notes)  # `other` has three


def test_a_wide_table_is_cut_into_blocks_that_lose_nothing():
    titles = ["solver", "n", *(f"column {at}" for at in range(12))]
    cells = [[f"s{row}", "3", *(f"{row}.{at}" for at in range(12))] for row in range(2)]
    content = Rows(titles, cells, frozenset({(1, 13)}))
    made = blocks(content, 40, fixed=2)
    assert len(made) > 1
    assert [title for block in made for title in block.titles[2:]] == titles[2:]
    assert [cell for block in made for cell in block.cells[1][2:]] == cells[1][2:]
    for block in made:
        assert block.titles[:2] == ["solver", "n"]
        assert sum(block.width(at) + 2 for at in range(len(block.titles))) <= 40
    assert made[-1].text(1, len(made[-1].titles) - 1) == "* 1.11"
    assert blocks(content, 400) == [content]


def test_no_cell_is_cut_off_in_a_narrow_terminal(tmp_path):
    rates = {f"hypers__rate{at}": [0.1, 0.2] for at in range(3)}
    for solver in ("a_solver_with_a_long_name", "another_solver_with_a_long_name", "third"):
        for seed in range(2):
            lost = {"ended": "diverged"} if solver == "third" else {}
            more = {"valid_accuracy": [0.5, 0.6], "exact__regret": [1.0, 0.5], **rates}
            written(tmp_path, [9.0, 1.0 + seed], solver=solver, seed=seed, more=more, **lost)
    (section,) = sections(read_runs(tmp_path))
    console = Console(width=60, file=io.StringIO(), color_system=None)
    console.print(*printed(section, 60), sep="\n", markup=False)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 60
    text = console.file.getvalue()
    assert "…" not in text
    (*_, quality, _, _) = [part.rows for part in section.tables if part.title == "Quality"] * 3
    for words in (*quality.cells[0][1:], *quality.titles, "quality, continued", "2 diverged"):
        assert all(word in text for word in words.split()), words


def test_settings_that_differ_are_a_table(tmp_path):
    settings = {
        "a": {"lr": {"inner": 0.1}, "solver": {"_target_": "x.A", "inner_steps": 5, "tau": 1}},
        "b": {"lr": {"inner": 0.2}, "solver": {"_target_": "x.B", "inner_steps": 5}},
    }
    for solver, chosen in settings.items():
        for seed in range(2):
            written(tmp_path, [9.0, 1.0], solver=solver, seed=seed, settings=chosen)
    found = table_of(tmp_path, "Settings that differ")
    labels = [f"{solver} lr.inner=0.{n}" for solver, n in (("a", 1), ("b", 2))]
    assert found == {
        "lr.inner": dict(zip(labels, ("0.1", "0.2"), strict=True)),
        "solver": dict(zip(labels, ("A", "B"), strict=True)),
    }  # tau is that of one solver alone


def facts(place, runs=None):
    part = origin(read_runs(place) if runs is None else runs, "bilevel-compare runs --x epochs")
    return dict(part.rows.cells), part.note


def test_the_origin_names_command_dates_device_commit_and_versions(tmp_path):
    for seed in range(2):
        path = written(tmp_path, [9.0, 1.0], seed=seed) / "run.json"
        told = json.loads(path.read_text())
        told |= {"device": "cpu", "commit": "abc", "versions": {"torch": "2.9", "bilevel": "1"}}
        path.write_text(json.dumps(told))
    found, note = facts(tmp_path)
    assert found["report"].endswith("by bilevel-compare runs --x epochs")
    assert found["runs"].startswith("2 runs, 20")
    assert (found["device"], found["commit"], found["torch"]) == ("cpu", "abc", "2.9")
    assert found["threads, python"] == "not recorded"
    assert note == ""


def test_runs_with_other_threads_are_not_compared_by_their_times(tmp_path):
    """The runs name their environment themselves."""
    for threads in (1, 2):
        runner = Runner(epochs=1, threads=threads, progress="none", picture=False, device="cpu")
        runner.run(FakeProblem(), FakeSolver(), directory=tmp_path / str(threads))
    found, note = facts(tmp_path)
    assert found["threads"] == "1 (1 run), 2 (1 run)"
    assert found["device"].startswith("cpu: ")
    assert found["torch"] == torch.__version__
    assert note == "The runs differ in threads, so do not compare their times."


def test_a_hyperparameter_with_the_name_of_a_fact_is_none(tmp_path):
    path = written(tmp_path, [9.0, 1.0]) / "run.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({"best": {"threads": 0.5}, **told, "environment": {"threads": 4}}))
    assert facts(tmp_path)[0]["threads"] == "4"


def test_the_origin_warns_where_runs_differ(tmp_path):
    for seed, device in enumerate(("cpu", "cuda", None)):
        path = written(tmp_path, [9.0, 1.0], seed=seed) / "run.json"
        told = json.loads(path.read_text()) | {"commit": f"c{seed % 2}"}
        path.write_text(json.dumps(told | ({"device": device} if device else {})))
    found, note = facts(tmp_path)
    assert found["device"] == "cpu (1 run), cuda (1 run), not recorded (1 run)"
    assert "differ in device, so do not compare their times" in note
    assert "differ in commit, which may change their other numbers" in note
