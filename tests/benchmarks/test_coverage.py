"""The table of docs/coverage.md lists what runs, and what is exact."""

import importlib.util
import warnings

import pytest

from benchmarks import coverage
from benchmarks.architectures import ARCHITECTURES
from bilevel.solvers import SelfTuning

PAGE = coverage.rows(coverage.PAGE.read_text(encoding="utf-8"))
REMEASURED = (
    *("nn.TransformerDecoderLayer", "nn.Bilinear", "torchvision vit", "timm swin"),
    *("timm convnext", "BERT", "GPT-2", "T5 encoder"),
)


def test_the_page_lists_every_architecture_and_each_number_is_rounding():
    assert PAGE.keys() == ARCHITECTURES.keys()
    for name, cells in PAGE.items():
        assert len(cells) == len(coverage.COLUMNS)
        for cell in cells:
            assert cell.startswith(("runs", "refused: ")), name
            assert not cell.startswith("runs, ") or size(cell) < 1e-12, name


@pytest.mark.parametrize("name", REMEASURED)
def test_a_row_holds_what_is_measured(name):
    architecture = ARCHITECTURES[name]
    if importlib.util.find_spec(architecture.package) is None:
        pytest.skip(f"{architecture.package} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages, when they are imported
        found = coverage.cell(architecture, SelfTuning)
    listed = PAGE[name][0]
    if listed.startswith("refused"):
        assert found == listed
    else:
        assert size(found) < 1e-12


def size(cell):
    return float(cell.removeprefix("runs, "))
