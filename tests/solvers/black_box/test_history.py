"""A search continues from the trials of an earlier study."""

import math

import pytest
import torch

from bilevel import BilevelError, Integer, Interval, Positive, Runner, Space
from bilevel.problems import Ridge
from bilevel.solvers import gp, random_search, tpe
from bilevel.solvers.black_box.history import past_trials
from bilevel.solvers.black_box.ranges import ranges_of
from bilevel.solvers.black_box.samplers import GP, TPE, RandomSearch
from bilevel.solvers.black_box.trials import Trials
from tests.support.solver_cases import ready, sgd

SPACE = Space(decay=Positive(init=0.1), rate=Interval(low=0.0, high=1.0, init=0.5, shape=(2,)))
POINTS = [(0.2, 0.1, 0.9), (0.01, 0.4, 0.3), (3.0, 0.6, 0.2), (0.5, 0.8, 0.7)]
VALUES = [0.5, 2.0, math.inf, 0.25]


def past(points=POINTS, values=VALUES):
    return [
        {"params": {"decay": d, "rate[0]": a, "rate[1]": b}, "value": value}
        for (d, a, b), value in zip(points, values, strict=True)
    ]


@pytest.mark.parametrize("sampler", [TPE(startup=2), GP(startup=2)], ids=["tpe", "gp"])
def test_a_past_trial_counts_as_one_of_the_search(sampler):
    """The same trials, as past or as record, give the same proposal; and they change it."""
    box = ranges_of(SPACE)
    before = Trials(sampler, None, box, 1, past=past_trials(past(), box, sampler))
    points = [box.to_z(SPACE.unconstrain(h)) for h in map(hypers, POINTS)]
    ours = Trials(sampler, None, box, 1)
    ours.replay(
        [
            {"z": z.tolist(), "scores": [value], "state": "complete"}
            for z, value in zip(points, VALUES, strict=True)
        ]
    )
    proposed = before.begin(7)
    torch.testing.assert_close(proposed, ours.begin(7), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(proposed, Trials(sampler, None, box, 1).begin(7), rtol=0.01)
    assert len(before.record) == 1


def hypers(point):
    decay, *rates = point
    return {"decay": torch.tensor(decay).double(), "rate": torch.tensor(rates).double()}


def test_a_search_passes_its_history_on_and_resumes_with_it(tmp_path):
    (name,) = Ridge.synthetic().space
    values = (-2.5, -2.0, -1.5, -1.0, 0.5)
    history = [{"params": {name: v}, "value": abs(v + 2)} for v in values]
    found = {}
    for epochs, place, resume in ((4, "whole", False), (2, "part", False), (4, "part", True)):
        solver = tpe(
            sampler=TPE(startup=2), trial_epochs=1, inner_optimizer=sgd(0.01), history=history
        )
        runner = Runner(epochs=epochs, warmup_epochs=0, progress="none", picture=False)
        runner.run(Ridge.synthetic(), solver, directory=tmp_path / place, resume=resume)
        found[place] = [trial["z"] for trial in solver.trials.record]
        assert [p.value for p in solver.trials.past] == [h["value"] for h in history]
    assert found["whole"] == found["part"]


FAULTS = {
    "value": ([{"params": {"decay": 0.1}}], r"history\[0\].value=None must be a number"),
    "params": ([3], r"history\[0\]=3 must have params and value"),
    "name": ([{"params": {"decai": 0.1}, "value": 1}], r"did you mean `decay`"),
    "domain": ([{"params": {"decay": -1}, "value": 1}], r"history\[0\]: hyperparameter `decay`"),
    "range": (
        [{"params": {"decay": 1e9}, "value": 1}],
        r"history\[0\]: decay=1000000000.0 lies outside the range of the search; widen "
        r"solver.ranges.decay",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_history_that_does_not_fit_is_refused_in_a_sentence(name):
    history, words = FAULTS[name]
    with pytest.raises(BilevelError, match=words):
        past_trials(history, ranges_of(Space(decay=Positive(init=0.1))), GP())


def test_random_draws_refuse_a_history():
    (name,) = Ridge.synthetic().space
    history = [{"params": {name: -2.0}, "value": 1.0}]
    with pytest.raises(BilevelError, match="history has no effect on RandomSearch"):
        ready(Ridge.synthetic(), random_search(history=history))
    assert past_trials(None, ranges_of(SPACE), RandomSearch()) == []
    assert ready(Ridge.synthetic(), gp(history=history))


def test_the_ends_of_a_range_are_points_of_it():
    space = Space(count=Integer(low=1, high=4, init=2.0))
    history = [{"params": {"count": n}, "value": 1.0} for n in (1, 4)]
    found = past_trials(history, ranges_of(space), TPE())
    assert [trial.z for trial in found] == [[1.0], [4.0]]
