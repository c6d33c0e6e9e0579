"""The command `bilevel-compare`: what it prints and writes, and what it says of bad input."""

import base64
import os
import re
import struct
from html.parser import HTMLParser

import numpy as np
import pytest

from bilevel.cli.compare import main
from bilevel.comparison.html_page import page, table
from bilevel.comparison.report import sections
from bilevel.comparison.runs import read_runs
from bilevel.comparison.table import Rows
from bilevel.domains import Positive
from bilevel.loggers.space_json import space_to_json
from bilevel.space import Space
from tests.support.comparison_runs import records, write_run

VOID = {"meta", "img"}


class Checked(HTMLParser):
    """Reads a page, and fails where elements do not nest or something would be fetched."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.tags = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.tags.append(tag)
        if tag == "img":
            assert named["alt"]
            assert named["src"].startswith("data:image/png;base64,")
            self.images.append(base64.b64decode(named["src"].partition(",")[2]))
        assert not {"href", "onload", "onclick"} & set(named)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def write_runs(place, problem="ridge", solvers=("fixed", "stn"), seeds=3, **more):
    space = space_to_json(Space(decay=Positive(init=1.0)))
    for offset, solver in enumerate(solvers):
        for seed in range(seeds):
            losses = [3.0, 1.0 + offset + 0.1 * seed, 2.0 + offset]
            told = records(
                losses, hypers__decay=[1.0, 0.5, 0.3 + 0.1 * seed], scales__decay=[1.0, 0.5, 0.5]
            )
            name = f"{problem}-{solver}-seed{seed}"
            write_run(
                place / name, told, problem=problem, solver=solver, seed=seed, space=space, **more
            )
    return place


@pytest.fixture
def out(tmp_path):
    return tmp_path / "report"


def test_a_report_tells_the_numbers_and_holds_its_pictures(tmp_path, out, capsys):
    assert main([str(write_runs(tmp_path / "runs")), "--out", str(out), "--x", "epochs"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    text = (out / "report.html").read_text()
    told = Checked(text)
    assert "script" not in told.tags
    assert not re.search(r"https?://|@import|url\(", text)
    assert "@media print" in text
    pictures = [
        (out / f"ridge-{name}.png").read_bytes()
        for name in ("curves", "paths", "perturbation", "pareto")
    ]
    assert told.images == pictures
    for png in pictures:
        width, height = struct.unpack(">II", png[16:24])
        assert png.startswith(b"\x89PNG")
        assert width > 500
        assert height > 300
    assert sorted(path.suffix for path in out.iterdir()) == [".html", *[".png"] * 4]
    for words in (
        "1.10 ± 0.10",
        "2.10 ± 0.10",
        "-1 ± ",
        "The target, 2.1,",
    ):  # best losses, their difference, the worst mean
        assert words in printed.out, words
    assert "1.10 ± 0.10" in text


def first_row(section, title):
    rows = section.table(title).rows
    return rows.titles, rows.cells[0]


def test_the_columns_are_those_of_the_runs(tmp_path):
    (section,) = sections(read_runs(write_runs(tmp_path / "runs")), target=1.05)
    table = section.table("Quality").rows
    quality = [dict(zip(table.titles, row, strict=True)) for row in table.cells]
    assert [row["solver"] for row in quality] == ["fixed", "stn"]
    assert quality[0]["n"] == "3"
    assert quality[0]["best valid loss"] == "1.10 ± 0.10"
    assert quality[0]["test accuracy"] == "90.00 ± 0.00 %"
    assert "valid accuracy" not in table.titles  # nobody measured it
    cost = dict(zip(*first_row(section, "Cost"), strict=True))
    assert cost["time to 1.05"] == "1.00 s (1 of 3)"
    assert cost["examples to 1.05"] == "20 (1 of 3)"
    assert cost["outer steps"] == "3 ± 0"
    step = dict(zip(*first_row(section, "Cost per step"), strict=True))
    assert step["ms per inner step"] == "500 ± 0"
    assert step["peak memory"] == "3 ± 0 MiB"


def test_runs_that_did_not_end_well_are_marked_and_take_part(tmp_path, out, capsys):
    place = write_runs(tmp_path / "runs", solvers=("fixed",))
    told = records([3.0, 0.5, None])
    for seed, ended in enumerate(("diverged", "interrupted", None)):
        write_run(place / f"stn{seed}", told, seed=seed, ended=ended)
    assert main([str(place), "--out", str(out)]) == 0
    printed, text = capsys.readouterr().out, (out / "report.html").read_text()
    for words in (
        "1 diverged, 1 interrupted, 1 not ended",
        "stn, seed 0: diverged at step 7",
        "stn, seed 2: the run has not ended",
    ):
        assert words in printed
        assert words in text
    assert "0.5 ± 0" in printed


def test_problems_have_a_section_each(tmp_path, out, capsys):
    write_runs(tmp_path / "runs", problem="ridge")
    write_runs(tmp_path / "runs", problem="digits/odd")
    assert main([str(tmp_path / "runs"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith(
        "2 problems, with one section each: digits/odd, ridge\n"
    )
    assert {path.name for path in out.glob("*curves.png")} == {
        "ridge-curves.png",
        "digits-odd-curves.png",
    }


def spoil(place):
    """Damage a valid run in one way each, and return the expected sentence."""
    runs = sorted(place.iterdir())
    (runs[0] / "config.yaml").unlink()
    (runs[1] / "summary.json").write_text("{half")
    (runs[2] / "metrics.jsonl").write_text("")
    (runs[2] / "summary.json").unlink()
    (runs[3] / "metrics.jsonl").write_text(
        '{"step": 0, "valid_loss": null}\n{"step": NaN, "valid_loss": NaN}\n'
    )
    (runs[3] / "summary.json").unlink()
    (runs[4] / "config.yaml").write_text("a: [b")
    (runs[4] / "run.json").write_text("[]")
    (runs[5] / "metrics.jsonl").unlink()
    (place / "empty").mkdir()
    return [
        "no settings in config.yaml",
        "summary.json (it is not JSON)",
        "has no evaluation in metrics.jsonl yet; this run is left out",
        "no evaluation with a finite validation loss",
        "config.yaml (it is not YAML)",
        "run.json (it holds no object)",
        "metrics.jsonl (No such file or directory); its summary is used",
        "nowhere does not exist",
        "a.txt is a file",
        "holds no run",
    ]


def test_each_fault_is_a_sentence_and_the_rest_is_reported(tmp_path, out, capsys):
    place = write_runs(tmp_path / "runs")
    due = spoil(place)
    (tmp_path / "a.txt").write_text("")
    more = [str(tmp_path / "nowhere"), str(tmp_path / "a.txt"), str(place / "empty")]
    assert main([str(place), *more, "--out", str(out)]) == 0
    said = capsys.readouterr().err.splitlines()
    assert all(line.startswith("bilevel-compare: ") for line in said)
    for sentence in due:
        assert sum(sentence in line for line in said) == 1, sentence
    assert len(said) == len(due)
    Checked((out / "report.html").read_text())
    runs = read_runs(place)
    assert len(runs) == 5
    assert sum(run.at_best("valid_loss") is not None for run in runs) == 4


def test_nothing_to_compare_is_status_1(tmp_path, out, capsys):
    assert main([str(tmp_path), "--out", str(out)]) == 1
    assert "no run can be compared" in capsys.readouterr().err
    assert not out.exists()


def test_where_nothing_may_be_written_the_tables_are_printed(tmp_path, capsys):
    place = write_runs(tmp_path / "runs")
    (tmp_path / "file").write_text("")
    assert main([str(place), "--out", str(tmp_path / "file" / "report")]) == 1
    printed = capsys.readouterr()
    assert "1.10 ± 0.10" in printed.out
    assert printed.err.count("\n") == 1
    assert "cannot make" in printed.err


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission(tmp_path, capsys):
    place = write_runs(tmp_path / "runs")
    (tmp_path / "closed").mkdir(mode=0o500)
    assert main([str(place), "--out", str(tmp_path / "closed")]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_one_picture_that_cannot_be_written_does_not_hold_up_the_report(tmp_path, out, capsys):
    (out / "ridge-curves.png").mkdir(parents=True)
    assert main([str(write_runs(tmp_path / "runs")), "--out", str(out)]) == 0
    assert "cannot write" in capsys.readouterr().err
    assert len(Checked((out / "report.html").read_text()).images) == 4


@pytest.mark.parametrize(
    "arguments",
    [[], ["runs", "--target", "low"], ["runs", "--x", "hours"], ["runs", "--target", "nan"]],
)
def test_wrong_arguments_are_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "bilevel-compare" in capsys.readouterr().err


def test_many_groups_are_all_in_the_tables_and_the_best_in_the_pictures(tmp_path):
    runs = write_runs(tmp_path / "runs", solvers=[f"solver{index}" for index in range(14)], seeds=2)
    (section,) = sections(read_runs(runs))
    assert len(section.table("Quality").rows.cells) == 14
    assert "12 groups of lowest mean loss; the tables have 2 more" in section.pictures[0].caption
    assert not section.all_pairs
    assert {pair.first for pair in section.pairs["best validation loss"]} == {"solver0"}


def test_hyperparameters_of_every_shape_and_runs_of_one_evaluation(tmp_path):
    generator = np.random.default_rng(0)
    for seed in range(2):
        told = records(
            [2.0, 1.0, 0.5],
            hypers__pair=generator.random((3, 2)).tolist(),
            hypers__many=generator.random((3, 3, 3)).tolist(),
            hypers__large=[
                {"mean": value, "min": 0.0, "max": 2.0} for value in generator.random(3)
            ],
            hypers__still=[1.0] * 3,
            exact__regret=[1.0, 0.1, 0.01],
        )
        write_run(tmp_path / "runs" / f"a{seed}", told, seed=seed)
        write_run(tmp_path / "runs" / f"b{seed}", told[:1], seed=seed, solver="fixed", ended=None)
    (section,) = sections(read_runs(tmp_path / "runs"), best_so_far=True)
    assert [picture.name for picture in section.pictures] == ["curves", "paths", "pareto"]
    assert "the best so far" in section.pictures[0].caption
    assert "regret" in section.pictures[0].caption


def test_what_a_run_is_called_cannot_break_the_page():
    text = page("<&>", [table(Rows(["<b>", ""], [["</td><script>", "1 diverged"]]))])
    assert "<script>" not in text
    assert "&lt;/td&gt;" in text
    Checked(text)
