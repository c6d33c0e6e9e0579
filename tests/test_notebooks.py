"""Run the notebooks of docs/ in order, without Jupyter, and compare with their stored outputs."""

import json
from pathlib import Path

import pytest

from tests.support.notebooks import code_cells, execute, kinds

DOCS = Path(__file__).parent.parent / "docs"
NOTEBOOKS = sorted(DOCS.glob("**/*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_prints_what_it_has_stored(path, monkeypatch, tmp_path):
    """The words are compared and not the numbers, which differ from machine to machine."""
    monkeypatch.chdir(tmp_path)
    content = json.loads(path.read_text())
    stored = kinds(content)
    assert sum(map(len, stored)) > 0
    execute(content)
    assert kinds(content) == stored


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_its_links_lead_somewhere(path):
    assert path.stat().st_size < 100_000
    text = "".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"])
    for link in [part.split(")")[0] for part in text.split("](")[1:]]:
        assert (path.parent / link).exists(), link


def test_the_scikit_learn_notebook_repeats_its_table():
    """The table at the top has the numbers that the last comparison has printed."""
    content = json.loads((DOCS / "notebooks" / "scikit_learn.ipynb").read_text())
    rows = [line for line in content["cells"][0]["source"] if "`delta_stn`" in line]
    printed = [
        line
        for cell in code_cells(content)
        for output in cell["outputs"]
        for line in output.get("text", ())
        if "delta_stn: accuracy" in line
    ]
    assert len(rows) == len(printed) == 2
    for row, line in zip(rows, printed, strict=True):
        start, _, accuracy, loss, _ = (cell.strip() for cell in row.strip("| \n").split("|"))
        assert line.startswith(f"{start}, delta_stn: accuracy {accuracy}, log loss {loss}, ")


def test_outputs_are_those_of_the_cells():
    cells = ["x = 3\nprint('x is', x)", "from matplotlib import pyplot\n_ = pyplot.plot([x, 1e-3])"]
    content = {"cells": [{"cell_type": "code", "source": [source]} for source in cells]}
    execute(content)
    assert kinds(content) == [["x is #"], ["picture"]]
    assert [cell["execution_count"] for cell in content["cells"]] == [1, 2]
