"""Test the way from a study of Optuna to a space and back."""

import optuna
import pytest
import torch

from bilevel import BilevelError, Integer, Interval, Positive, Real, Simplex, Space, studies
from bilevel.problems import Ridge
from bilevel.solvers import SAMA
from bilevel.studies import params_of, space_at
from tests.support.runs import run

SPACE = Space(
    decay=Positive(init=0.1),
    rates=Interval(low=0.0, high=0.9, init=0.3, shape=(2, 2)),
    count=Integer(low=1, high=4, init=2.0),
    mix=Simplex(init=0.5, shape=(2,)),
    fixed=Real(init=3.0, frozen=True),
)
PARAMS = {
    "decay": 0.02,
    **{"rates[0,0]": 0.1, "rates[0,1]": 0.2, "rates[1,0]": 0.3, "rates[1,1]": 0.4},
    "count": 4,
    **{"mix[0]": 0.25, "mix[1]": 0.75},
}
DECAY = Space(decay=Positive(init=0.1))


@pytest.fixture(autouse=True)
def _quiet():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


def study_of(*trials, ranges=(1e-4, 1.0), **options):
    """Return a study with complete trials; each is its parameters and its value."""
    study = optuna.create_study(**options)
    for params, value in trials:
        kinds = {
            name: optuna.distributions.IntDistribution(1, 4)
            if isinstance(number, int)
            else optuna.distributions.FloatDistribution(*ranges)
            for name, number in params.items()
        }
        key = "values" if isinstance(value, list) else "value"
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=kinds, **{key: value})
        )
    return study


def test_the_best_trial_is_the_start_entry_by_entry_and_back():
    worse = {**PARAMS, "decay": 0.5}
    for direction, best in (("minimize", PARAMS), ("maximize", worse)):
        study = study_of((PARAMS, 1.0), (worse, 2.0), direction=direction)
        space = studies.start(SPACE, study)
        hypers = space.constrain(space.init(torch.float64))
        assert params_of(hypers, space) == pytest.approx(best)
        assert hypers["rates"].tolist()[1][0] == pytest.approx(0.3)
        assert type(params_of(hypers, space)["count"]) is int
    assert SPACE["decay"].init == 0.1


def test_history_is_every_complete_trial():
    study = study_of(({"decay": 0.5}, 2.0), ({"decay": 0.25}, 1.0))
    study.enqueue_trial({"decay": 0.125})
    study.tell(study.ask(), state=optuna.trial.TrialState.FAIL)
    assert studies.history(study) == [
        {"params": {"decay": 0.5}, "value": 2.0},
        {"params": {"decay": 0.25}, "value": 1.0},
    ]


NO_STARTS = {
    "empty": (study_of, "has no complete trial"),
    "several": (
        lambda: study_of(({"decay": 0.1}, [1.0, 2.0]), directions=["minimize"] * 2),
        "has 2 objectives",
    ),
    "unknown": (
        lambda: study_of(({"decay": 0.1, "deccay": 0.1}, 1.0)),
        r"`deccay` is no tuned hyperparameter \(did you mean `decay`\?\)",
    ),
    "missing": (lambda: study_of(({}, 1.0)), "has no parameter `decay`"),
    "outside": (
        lambda: study_of(({"decay": -0.5}, 1.0), ranges=(-1.0, 1.0)),
        "hyperparameter `decay`: init=-0.5 must be above low=0",
    ),
}


@pytest.mark.parametrize("name", NO_STARTS)
def test_a_study_that_is_no_start_is_refused_in_a_sentence(name):
    make, words = NO_STARTS[name]
    with pytest.raises(BilevelError, match=words):
        studies.start(DECAY, make())


def test_a_parameter_that_is_no_number_is_refused():
    with pytest.raises(BilevelError, match="trial 3: decay='low' must be a number"):
        space_at(DECAY, {"decay": "low"}, "trial 3")


def test_a_loss_has_no_place_in_a_study_that_maximizes():
    study = study_of(({"decay": 0.1}, 1.0), direction="maximize")
    with pytest.raises(BilevelError, match="maximizes, and the value of a run is a loss"):
        studies.history(study)
    with pytest.raises(BilevelError, match="maximizes"):
        studies.add(study, {"decay": 0.1}, 1.0)
    studies.enqueue(study, {"decay": 0.1})  # has no value


def test_an_enqueued_trial_is_the_next_one_and_keeps_the_ranges():
    study = study_of(({"decay": 0.1}, 1.0))
    studies.enqueue(study, {"decay": 0.125})
    assert study.ask().suggest_float("decay", 1e-4, 1.0) == 0.125
    for params, words in (
        ({"decay": 2.0}, r"decay=2 lies outside the range \[0.0001, 1\]"),
        ({"dekay": 0.1}, "parameter `decay` is no tuned hyperparameter"),
        ({"decay": 0.1, "more": 0.1}, "has no parameter `more`"),
    ):
        with pytest.raises(BilevelError, match=words):
            studies.enqueue(study, params)
    chosen = optuna.create_study()
    chosen.optimize(lambda trial: len(trial.suggest_categorical("decay", ["a"])), n_trials=1)
    with pytest.raises(BilevelError, match="is one of several choices there"):
        studies.enqueue(chosen, {"decay": 0.1})


def test_an_added_trial_is_complete_with_the_ranges_of_the_study():
    study = study_of(({"decay": 0.1}, 1.0))
    studies.add(study, {"decay": 0.125}, 0.5)
    assert study.best_trial.params == {"decay": 0.125}
    assert study.trials[0].distributions == study.trials[1].distributions
    with pytest.raises(BilevelError, match="valid_loss=nan cannot be the value of a trial"):
        studies.add(study, {"decay": 0.125}, float("nan"))
    with pytest.raises(BilevelError, match="the ranges of its parameters are unknown"):
        studies.add(study_of(), {"decay": 0.125}, 0.5)


def test_a_value_that_is_not_finite_is_no_parameter():
    with pytest.raises(BilevelError, match=r"rates\[1\]=inf cannot be given to a study"):
        params_of({"rates": torch.tensor([0.0, torch.inf])}, Space())


def test_a_result_goes_into_a_study(tmp_path):
    result, _ = run(tmp_path, problem=Ridge.synthetic(), solver=SAMA())
    best, study = result.solution().hypers, optuna.create_study()
    result.to_study(study)
    trial = study.ask()
    (name,) = best
    assert trial.suggest_float(name, -50, 50) == best[name].item()
    study.tell(trial, 1.0)
    result.to_study(study, "last", completed=True)
    added = study.trials[-1]
    assert added.params == {name: result["hypers"][name]}
    assert added.value == result["last"]["valid_loss"]
