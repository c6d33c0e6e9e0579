"""Test the comparison of one script that is tuned in three ways."""

import pytest

from benchmarks.experiments import five_minutes
from benchmarks.experiments.five_minutes import PLAIN, Job, added, run
from bilevel import BilevelError


def test_ten_lines_tune_the_script_and_no_way_takes_fewer():
    lines = {way.script: len(added(way.script)) for way in five_minutes.WAYS}
    assert lines.pop(PLAIN) == 0
    assert lines.pop("with_bilevel") <= 10 < min(lines.values())


def test_a_run_takes_the_settings_of_its_job(tmp_path, monkeypatch):
    monkeypatch.setattr(five_minutes, "SCRIPTS", tmp_path)
    (tmp_path / "a.py").write_text("SEED, EPOCHS, TRIALS = 0, 60, 20\nprint('test loss', SEED)")
    assert run(Job("a", seed=3, epochs=2, trials=1))[0] == 3
    (tmp_path / "b.py").write_text("SEED, EPOCHS = 0, 60\nprint('test loss', EPOCHS)")
    assert run(Job("b", seed=3, epochs=2, trials=1))[0] == 2
    (tmp_path / "c.py").write_text("raise ValueError('no data')")
    with pytest.raises(BilevelError, match=r"c.py ends with 1: ValueError: no data"):
        run(Job("c", seed=3, epochs=2, trials=1))


@pytest.mark.parametrize("script", [PLAIN, "with_bilevel", "with_optuna", "with_lightning"])
def test_the_scripts_run(script):
    if script == "with_lightning":
        pytest.importorskip("lightning")
    loss, seconds = run(Job(script, seed=100, epochs=3, trials=1))
    assert 0 < loss < 2.3
    assert seconds > 0
