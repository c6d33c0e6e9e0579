"""Test the estimators of scikit-learn: their own checks, the tuning, and refused settings."""

import numpy as np
import pytest
import torch
from sklearn.datasets import make_classification, make_regression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import bilevel
from bilevel import BilevelError, SelfTuningClassifier, SelfTuningRegressor

QUICK = {"hidden": [8], "epochs": 10, "batch_size": 128, "learning_rate": 0.1, "solver": "sama"}


# sklearn ends its own warnings' filters around single checks
@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks([SelfTuningClassifier(**QUICK), SelfTuningRegressor(**QUICK)])
def test_the_checks_of_scikit_learn_pass(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def tables():
    return make_classification(80, n_informative=4, n_clusters_per_class=1, random_state=0)


@pytest.mark.parametrize("solver", ["delta_stn", "penalty"])
def test_a_fit_tunes_what_it_is_told_to(solver, tables):
    x, y = tables
    model = SelfTuningClassifier(
        [8], tune=("decay", "dropout"), solver=solver, epochs=15, warmup=0, random_state=3
    )
    state = torch.random.get_rng_state()
    model.fit(x, y)
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator keeps its state"
    assert model.best_params_.keys() == {"decay", "dropout"}
    path = model.schedule_.hypers
    assert path["decay"][0] == pytest.approx(1e-3), "two steps before the first outer step"
    assert path["decay"][-1] != path["decay"][0]
    assert path["input_noise"] == pytest.approx([0.1] * 15)
    again = SelfTuningClassifier(**model.get_params()).fit(x, y)
    assert again.best_params_ == model.best_params_
    assert np.array_equal(again.predict_proba(x), model.predict_proba(x))


def test_the_predictions_are_those_of_the_best_epoch_in_the_units_of_the_target():
    x, y = make_regression(100, 4, random_state=0)
    y = 1000 + 50 * y
    model = SelfTuningRegressor([], epochs=60, random_state=0, **{"solver": "sama"}).fit(x, y)
    assert "dropout" not in model.best_params_, "a linear model has no hidden units"
    assert model.score(x, y) > 0.95
    assert abs(model.predict(x).mean() - y.mean()) < 0.1 * y.std()


def test_an_estimator_works_in_pipelines_and_searches(tables):
    x, y = tables
    model = make_pipeline(StandardScaler(), SelfTuningClassifier(**QUICK, random_state=0))
    grid = {"selftuningclassifier__hidden": [[], [4]]}
    labels = np.array(["no", "yes"])[y]
    search = GridSearchCV(model, grid, cv=2, error_score="raise").fit(x, labels)
    assert set(search.predict(x)) <= {"no", "yes"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solver": "delta_stm"}, r"solver='delta_stm' is unknown \(did you mean `delta_stn`\?\)"),
        ({"solver": "tpe"}, "solver=Search starts trainings of its own"),
        ({"tune": ["momentum"]}, "tune='momentum' is unknown"),
        ({"tune": []}, "every hyperparameter is frozen"),
        ({"epochs": 0}, "epochs=0 must be"),
        ({"hidden": [0]}, "hidden=0 must be"),
        ({"valid_fraction": 1.0}, "valid_fraction=1.0 must be between 0 and 1"),
        ({"dropout": 0.95}, "dropout: init=0.95 lies outside"),
        ({"learning_rate": -1}, "learning_rate=-1 must be positive"),
    ],
)
def test_a_wrong_setting_is_one_sentence(changes, message, tables):
    with pytest.raises(BilevelError, match=message) as raised:
        SelfTuningClassifier(**{**QUICK, **changes}).fit(*tables)
    assert "\n" not in str(raised.value)


def test_the_names_are_found_on_the_package_alone_when_asked():
    assert bilevel.SelfTuningClassifier is SelfTuningClassifier
    with pytest.raises(AttributeError, match="has no attribute 'SelfTuning'"):
        bilevel.SelfTuning  # noqa: B018
