"""Test studies of Optuna on the command line: a run begins at one, and an export goes into one."""

import json
import sqlite3
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest
import yaml

from bilevel.cli.app import main
from bilevel.loggers.records import read_metrics

QUICK = (
    *("problem=ridge", "runner.epochs=2", "runner.warmup_epochs=0", "runner.progress=none"),
    *("runner.picture=false", "logger=jsonl", "hydra.run.dir=run"),
)
STORAGE = "sqlite:///tuned.db"
DECAY = "log_decay"

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def study():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.RDBStorage(STORAGE)
    made = optuna.create_study(study_name="mine", storage=storage)
    made.add_trial(trial(-1.5, 0.25))
    made.add_trial(trial(-4.0, 0.75))
    yield made
    storage.remove_session()
    storage.engine.dispose()
    optuna.logging.set_verbosity(before)


def trial(value, loss):
    ranges = {DECAY: optuna.distributions.FloatDistribution(-6.0, 6.0)}
    return optuna.trial.create_trial(params={DECAY: value}, distributions=ranges, value=loss)


def error_of(words, capsys):
    assert main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith("bilevel: ")
    assert error.count("\n") == 1
    return error


def test_a_run_starts_at_the_best_trial_and_keeps_values_alone(study):
    settings = [f"study.storage={STORAGE}", "study.name=mine"]
    assert main([*QUICK, *settings]) == 0
    assert read_metrics("run/metrics.jsonl")[0][f"hypers.{DECAY}"] == pytest.approx(-1.5)
    stored = yaml.safe_load(Path("run/config.yaml").read_text())
    assert stored["problem"]["space"][DECAY]["init"] == -1.5
    study.add_trial(trial(2.0, 0.0))  # a resumed run does not look
    Path("tuned.db").rename("moved.db")
    assert main(["resume=run", "runner.epochs=3"]) == 0
    assert read_metrics("run/metrics.jsonl")[0][f"hypers.{DECAY}"] == pytest.approx(-1.5)


def test_other_settings_of_the_space_stay(study):
    settings = [f"study.storage={STORAGE}", f"problem.space.{DECAY}.scale=0.7"]
    assert main([*QUICK, *settings]) == 0
    stored = yaml.safe_load(Path("run/config.yaml").read_text())
    assert stored["problem"]["space"] == {DECAY: {"init": -1.5, "scale": 0.7}}


def test_a_password_is_neither_kept_nor_printed(study, monkeypatch, capsys):
    secret = ["study.storage=postgresql://me:secret@127.0.0.1/x"]
    error = error_of([*QUICK, *secret], capsys)
    assert "storage=postgresql://127.0.0.1/x cannot be opened" in error

    @contextmanager
    def opened(storage, name):
        assert "secret" in storage
        yield study

    monkeypatch.setattr("bilevel.cli.study.opened", opened)
    for use in ("start", "history"):
        settings = ["solver=tpe", f"solver.ranges.{DECAY}=[-6,6]", f"study.use={use}"]
        assert main([*QUICK, *secret, *settings, f"hydra.run.dir={use}"]) == 0
        assert "secret" not in Path(use, "config.yaml").read_text()


def test_a_search_continues_from_all_trials(study):
    settings = ["solver=tpe", "trial.epochs=1", f"study.storage={STORAGE}", "study.use=history"]
    settings.append(f"solver.ranges.{DECAY}=[-6,6]")
    assert main([*QUICK, *settings]) == 0
    stored = yaml.safe_load(Path("run/config.yaml").read_text())
    assert [past["value"] for past in stored["solver"]["history"]] == [0.25, 0.75]
    assert main(["resume=run", "runner.epochs=3"]) == 0


def test_a_run_without_a_study_has_no_entry_of_it():
    assert main([*QUICK]) == 0
    assert "study" not in yaml.safe_load(Path("run/config.yaml").read_text())


def test_an_export_enqueues_the_best_values_or_adds_them(study, capsys):
    assert main([*QUICK]) == 0
    best = json.loads(Path("run/summary.json").read_text())["best"]
    words = ["export", "run", "--optuna", STORAGE, "--study", "mine"]
    assert main(words) == 0
    assert capsys.readouterr().out == "λ of run is the next trial of study mine\n"
    assert study.ask().suggest_float(DECAY, -6, 6) == pytest.approx(best["hypers"][DECAY])
    assert main([*words, "--completed"]) == 0
    added = study.trials[-1]
    assert added.state.name == "COMPLETE"
    assert added.params == pytest.approx(best["hypers"])
    assert added.value == pytest.approx(best["valid_loss"])
    assert not Path("run/hypers.json").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--optuna", "sqlite:///none.db"], "cannot be opened (there is no such file)"),
        (["--optuna", "sqlite:///other.db"], "cannot be opened (it is no storage of Optuna)"),
        (["--optuna", "nonsense"], "give the URL of Optuna's storage"),
        (["--optuna", STORAGE, "--study", "min"], "has no study 'min'; its studies are mine"),
        (["--optuna", STORAGE, "--format", "pt"], "leave --out and --format out"),
        (["--study", "mine"], "add --optuna sqlite:///file.db"),
    ],
)
def test_an_export_that_cannot_be_is_refused_in_a_sentence(words, expected, study, capsys):
    sqlite3.connect("other.db").execute("create table numbers (n)").connection.close()
    before = Path("other.db").read_bytes()
    assert main([*QUICK]) == 0
    assert expected in error_of(["export", "run", *words], capsys)
    assert not Path("none.db").exists()
    assert Path("other.db").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["study.name=mine"], "study.name=mine has no effect without a storage"),
        (["study.use=history"], "study.use=history has no effect without a storage"),
        (["study.use=all", f"study.storage={STORAGE}"], "study.use='all' is unknown"),
        (["study.storage=3"], "study.storage=3 is an int"),
        (["study=3"], "study=3"),
        (["study.storage=sqlite:///none.db"], "there is no such file"),
        ([f"study.storage={STORAGE}", "study.use=history"], "solver.history is not a setting"),
        ([f"study.storage={STORAGE}", "problem=digits"], f"`{DECAY}` is no tuned hyperparameter"),
    ],
)
def test_a_study_that_cannot_begin_a_run_is_one_sentence(words, expected, study, capsys):
    assert expected in error_of([*QUICK, *words], capsys)
    assert not Path("run").exists()
    assert not Path("none.db").exists()


def test_two_studies_need_a_name(study, capsys):
    optuna.create_study(study_name="other", storage=study._storage)
    expected = "needs the name of a study; its studies are"
    assert expected in error_of([*QUICK, f"study.storage={STORAGE}"], capsys)
