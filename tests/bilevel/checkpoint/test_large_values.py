"""Large hyperparameters of a summary lie in one file, once, and are read back."""

import json

import pytest
import torch

from bilevel import BilevelError, Runner
from bilevel.checkpoint import large_values
from bilevel.checkpoint.checkpoints import best_solution, load
from bilevel.checkpoint.large_values import FILE, read_value
from bilevel.comparison.runs import read_runs
from bilevel.loggers.hyper_schedule import from_run
from bilevel.loggers.tables import final_tables
from bilevel.problems import Quadratic
from bilevel.solvers import Unrolled


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(large_values, "MOST", 64)
    problem = Quadratic.random(weights=4, hypers=70)
    runner = Runner(epochs=6, warmup_epochs=1, progress="none", picture=False)
    runner.run(problem, Unrolled(inner_steps=2), directory=tmp_path)
    return tmp_path


def summary(run):
    return json.loads((run / "summary.json").read_text())


def test_the_summary_describes_them_and_the_file_has_them(run):
    found = summary(run)
    assert (run / "summary.json").stat().st_size < 5000
    state = load(run)
    (name,) = found["hypers"]
    wanted = {
        "hypers": state["last"]["hypers." + name],
        "initial": {"mean": state["initial"][name].mean().item()},
    }
    for part, brief in wanted.items():
        assert found[part][name]["shape"] == [70]
        assert found[part][name]["mean"] == pytest.approx(brief["mean"])
        assert read_value(run, found[part][name]).mean().item() == pytest.approx(brief["mean"])
    best = read_value(run, found["best"]["hypers"][name])
    assert torch.equal(best, best_solution(run).hypers[name])
    assert not torch.equal(best, read_value(run, found["initial"][name]))
    assert read_value(run, 0.5).item() == 0.5
    assert final_tables(found)
    (read,) = read_runs(run, warn=lambda _: None)  # it has no config.yaml
    assert read.status == "finished"
    with pytest.raises(BilevelError, match="is too large"):
        from_run(run)


def test_equal_values_are_stored_once():
    values = large_values.LargeValues()
    entries = [values.entry(part, "x", torch.ones(2000)) for part in ("best.hypers", "hypers")]
    entries.append(values.entry("initial", "x", torch.zeros(2000)))
    assert [entry["entry"] for entry in entries] == ["best.hypers/x", "best.hypers/x", "initial/x"]
    assert set(values.tensors) == {"best.hypers/x", "initial/x"}


def test_a_file_of_somebody_else_is_a_sentence(run):
    (value,) = summary(run)["hypers"].values()
    for wrong in ({**value, "shape": [3]}, {**value, "entry": "none"}):
        with pytest.raises(BilevelError, match="give a whole run directory"):
            read_value(run, wrong)
    content = bytearray((run / FILE).read_bytes())
    content[100] ^= 1
    (run / FILE).write_bytes(content)
    with pytest.raises(BilevelError, match="is damaged"):
        read_value(run, value)
    (run / FILE).unlink()
    with pytest.raises(BilevelError, match=r"hypers\.pt cannot be read"):
        read_value(run, value)
