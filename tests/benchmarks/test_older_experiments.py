"""Tests of the blocks of digits and language against the tables of their pages."""

import re
import statistics

import pytest

from benchmarks.experiments import digits, digits_bad_start, digits_random_grid, language_table
from benchmarks.experiments.harness import ROOT, Context, find
from benchmarks.experiments.language_table import PAIRS, Size
from benchmarks.experiments.pages import blocks


def of_page(experiment: str) -> str:
    return blocks((ROOT / "docs" / find(experiment)[experiment].page).read_text())[experiment]


def rows(text: str) -> list[list[str]]:
    lines = [
        line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")
    ]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def words(text: str) -> list[list[str]]:
    """Return every row with its numbers replaced; bold is ignored."""
    return [
        [re.sub(r"[−+-]?\d+(\.\d+)?( ± \d+(\.\d+)?)?", "#", cell.replace("**", "")) for cell in row]
        for row in rows(text)
    ]


def summary(loss: float, accuracy: float = 0.5, **more: object) -> dict:
    return {"best": {"valid_loss": loss, "test_accuracy": accuracy}, "diverged": False, **more}


def test_the_bad_start_is_paired_by_seed():
    fixed, ours = [1.0, 1.5, 1.2], [0.5, 0.9, 0.9]
    groups = {
        "fixed": [summary(x, 0.8) for x in fixed],
        "delta_stn": [summary(x, 0.9) for x in ours],
    }
    groups["fixed"][0]["diverged"] = True
    text = digits_bad_start.block(groups)
    assert rows(text)[1:] == [
        ["`fixed`, 1 diverged", "1.2333 ± 0.2517", "80.00 ± 0.00 %"],
        ["`delta_stn`", "0.7667 ± 0.2309", "90.00 ± 0.00 %"],
    ]
    # of −0.5, −0.6, −0.3: −0.46667 / (0.15275 / √3)
    assert text.endswith("Paired difference in validation loss −0.4667 ± 0.1528, t = −5.3, n = 3.")
    groups["fixed"][0]["diverged"] = False
    assert words(digits_bad_start.block(groups)) == words(of_page("digits_bad_start"))


def test_the_best_of_the_grid_and_what_the_other_runs_cost():
    def seed(factor: float) -> list[dict]:
        ours = summary(0.2, 0.95, seconds=12.0 * factor, examples=30)
        return [
            ours,
            *(
                summary(x, x, seconds=s, examples=20)
                for x, s in [(0.4, 2.0), (0.1, 3.0), (0.3, 1.0)]
            ),
        ]

    text = digits_random_grid.block({7: seed(1.0), 8: seed(2.0)})
    assert rows(text)[0][2] == "best of 3"
    assert rows(text)[1:] == [
        ["7", "0.2000", "0.1000", "2.000", "6.00", "1.50", "95.00 / 10.00 %"],
        ["8", "0.2000", "0.1000", "2.000", "12.00", "1.50", "95.00 / 10.00 %"],
        ["mean ± std", "", "", "2.000 ± 0.000", "9.00 ± 4.24", "1.50 ± 0.00", ""],
    ]
    as_page = words(digits_random_grid.block(dict.fromkeys(range(5), seed(1.0))))
    assert as_page == words(of_page("digits_random_grid"))


def test_the_random_grid_is_drawn_from_the_seed_alone():
    first, again, other = (digits_random_grid.jobs(seed, 4, 100) for seed in (0, 0, 1))
    assert first == again
    assert first[0] == digits.Job("delta_stn", 0, digits.BAD_START, 100)
    assert [job.solver for job in first[1:]] == ["fixed"] * 4
    starts = [tuple(job.start.values()) for job in first[1:] + other[1:]]
    assert len(set(starts)) == 8
    for *rates, decay in starts:
        assert all(1e-3 <= rate < 0.95 for rate in rates)
        assert 1e-6 <= decay <= 1e-1


def row(perplexity: float, rate: float, seed: int) -> dict:
    best = {
        "valid_perplexity": perplexity,
        "test_perplexity": perplexity + 20,
        "epoch": 20.0 + seed,
    }
    return {
        "best": best,
        "hypers": {"output_dropout": rate},
        "seconds": 30.0 + seed,
        "diverged": False,
    }


def test_the_table_of_language_is_its_pages():
    arms = ["start", *dict.fromkeys(name for pair in PAIRS for name in pair)]
    held = {"start": 0.05, "best": 0.7, "gaussian": 0.7, "sinusoid": 0.63}
    runs = {
        seed: {
            name: row(60 + k * (seed + 1), held.get(name, 0.75 + seed / 10), seed)
            for k, name in enumerate(arms)
        }
        | {"stn": row(50.0, 0.75 + seed / 10, seed)}
        for seed in range(3)
    }
    losses = dict(
        zip((0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), (4.5, 4.4, 4.3, 4.2, 4.1, 4.0, 4.6), strict=True)
    )
    text, page = language_table.block(losses, runs), of_page("language_table")
    assert words(text) == words(page)
    assert "0.6: 4.100, **0.7: 4.000**, 0.8: 4.600." in text
    table = {cells[0]: cells[1:] for cells in rows(text)}
    assert table["*STN*, from 0.05"] == [
        "**50.00 ± 0.00**",
        "**70.00 ± 0.00**",
        "0.85 ± 0.10",
        "21.0 ± 1.0",
        "31 ± 1",
    ]
    assert table["*best*: 0.7, fixed"][2] == "0.70"
    values = [50.0 - (60 + arms.index("best") * (seed + 1)) for seed in range(3)]
    mean = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
    assert table["STN − best"] == [
        *(f"{value:+.2f}".replace("-", "−") for value in values),
        mean.replace("-", "−"),
    ]


def test_rows_that_follow_stn_follow_its_run():
    runs = language_table.at_seed(
        (100, 0.4, Size(seeds=(100,), grid=(), epochs=2, train=1300, held_out=900))
    )
    rates = {
        name: (run["initial"]["output_dropout"], run["hypers"]["output_dropout"])
        for name, run in runs.items()
    }
    end = rates["stn"][1]
    assert abs(end - 0.05) > 1e-4
    assert rates["schedule"] == pytest.approx((0.05, end), rel=1e-6)
    assert rates["final"] == pytest.approx((end, end), rel=1e-6)
    assert rates["best"] == pytest.approx((0.4, 0.4), rel=1e-6)
    assert {run["seed"] for run in runs.values()} == {100}


@pytest.mark.parametrize("module", [digits_bad_start, digits_random_grid, language_table])
def test_the_reduced_size_is_on_seeds_that_no_protocol_uses(module, tmp_path):
    jobs = []

    class Stop(Exception):
        pass

    class Counted(Context):
        def map(self, function, given):
            jobs.extend(given)
            if function is language_table.at_rate:
                return [4.0, 5.0]
            raise Stop

    settings = {"figures": tmp_path, "runs": tmp_path, "workers": 0, "quick": True}
    with pytest.raises(Stop):
        module.report(Counted("one", module.EXPERIMENT, **settings))
    seeds = (
        [job.seed for job in jobs]
        if module is not language_table
        else [job[0] for job in jobs if isinstance(job[0], int)]
    )
    assert set(seeds) in ({100, 101}, {101, 102})
