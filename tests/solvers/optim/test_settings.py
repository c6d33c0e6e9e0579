"""Settings of the optimizer that λ holds, with several groups of parameters."""

from functools import partial

import pytest
import torch
import torch.nn as nn
from torch.optim import SGD, Adam, AdamW

from bilevel import BilevelError, Space
from bilevel.domains import optimizer_setting
from bilevel.solvers import Fixed, PopulationBased, Search, Unrolled
from bilevel.solvers.optim.optimized import Optimized
from bilevel.solvers.optim.settings import configured
from tests.support.solver_cases import Decayed, ready

TENSORS = {"w": torch.ones(2, 2), "b": torch.ones(2), "c": torch.ones(3)}


def groups(make, *settings, **options):
    """Return an optimizer with one group for each parameter, with `settings` of its own."""
    return lambda params: make(
        [{"params": [p]} | own for p, own in zip(params, settings, strict=False)], **options
    )


def tuned(make, **settings):
    return Optimized(TENSORS, configured(make, settings)).optimizer.param_groups


PROPORTIONAL = {
    "rates": ("lr", groups(SGD, {"lr": 0.1}, {"lr": 1.0}, {"lr": 0.5}), [0.02, 0.2, 0.1]),
    "the default rate": ("lr", groups(Adam, {}, {"lr": 0.02}, {}, lr=0.01), [0.1, 0.2, 0.1]),
    "one rate": ("lr", groups(SGD, {}, {}, {}, lr=0.7), [0.2, 0.2, 0.2]),
    "decay of weights alone": (
        "weight_decay",
        groups(AdamW, {}, {"weight_decay": 0.0}, {"weight_decay": 0.0}),
        [0.2, 0.0, 0.0],
    ),
    "biases first": (
        "weight_decay",
        groups(SGD, {"weight_decay": 0.0}, {"weight_decay": 0.3}, {"weight_decay": 0.1}, lr=1.0),
        [0.0, 0.2, 0.2 / 3],
    ),
    "no decay": ("weight_decay", groups(SGD, {}, {}, {}, lr=1.0), [0.2, 0.2, 0.2]),
}


@pytest.mark.parametrize(("setting", "make", "expected"), PROPORTIONAL.values(), ids=PROPORTIONAL)
def test_groups_keep_their_proportions(setting, make, expected):
    got = [group[setting] for group in tuned(make, **{setting: 0.2})]
    assert got == pytest.approx(expected, rel=1e-12)


DIFFERENT = {
    "momentum": groups(SGD, {"momentum": 0.9}, {"momentum": 0.5}, {}, lr=0.1),
    "beta1": groups(Adam, {"betas": (0.9, 0.999)}, {"betas": (0.8, 0.999)}, {}),
    "alpha": groups(torch.optim.RMSprop, {}, {"alpha": 0.5}, {}),
}


@pytest.mark.parametrize(("setting", "make"), DIFFERENT.items(), ids=DIFFERENT)
def test_different_values_that_cannot_be_scaled_are_refused(setting, make):
    message = f"inner_optimizer.{setting}=0.9.* differs between groups of parameters, .*{setting}"
    with pytest.raises(BilevelError, match=message):
        tuned(make, **{setting: 0.3})
    other = {"momentum": "weight_decay", "beta1": "beta2", "alpha": "momentum"}[setting]
    assert len(tuned(make, **{other: 0.3})) == 3  # equal in all groups


def two_groups(params):
    params = list(params)
    return SGD(
        [
            {"params": [p for p in params if p.ndim > 1]},
            {"params": [p for p in params if p.ndim <= 1], "lr": 0.5, "momentum": 0.9},
        ],
        lr=0.1,
        momentum=0.9,
    )


def problem(**settings):
    made = Decayed(nn.Linear(4, 3))
    extra = {f"own_{name}": optimizer_setting(name, init=v) for name, v in settings.items()}
    made.space = Space(**made.space, **extra)
    return made


def test_a_search_and_a_population_keep_the_proportions():
    search = ready(
        problem(lr=0.2, momentum=0.5), Search(trial_epochs=1, inner_optimizer=two_groups)
    )
    for _ in range(4):
        slow, quick = search.core.weights.optimizer.param_groups
        assert slow["lr"] == pytest.approx(quick["lr"] / 5, rel=1e-6)
        assert slow["momentum"] == quick["momentum"] != 0.9
        search.step()
    assert len(search.trials.record) > 2

    half = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    population = ready(
        problem(lr=0.2),
        PopulationBased(population=2, inner_optimizer=two_groups, inner_scheduler=half),
    )
    before = [m.weights.optimizer.param_groups[1]["lr"] for m in population.members]
    for _ in range(6):
        population.step()
    for member, start in zip(population.members, before, strict=True):
        slow, quick = member.weights.optimizer.param_groups
        assert slow["lr"] == pytest.approx(quick["lr"] / 5, rel=1e-6)
        assert member.weights.scheduler.base_lrs == pytest.approx(
            [group["initial_lr"] for group in (slow, quick)]
        )
        assert quick["lr"] < start or quick["initial_lr"] != start


def test_a_frozen_setting_keeps_the_proportions_and_the_twin_refuses_groups():
    frozen = problem()
    frozen.space = Space(**frozen.space, rate=optimizer_setting("lr", init=0.4, frozen=True))
    fixed = ready(frozen, Fixed(inner_optimizer=two_groups))
    rates = [group["lr"] for group in fixed.core.weights.optimizer.param_groups]
    assert rates == pytest.approx([0.08, 0.4])
    with pytest.raises(
        BilevelError, match=r"several groups of parameters.*give all of them the same"
    ):
        ready(problem(lr=0.2), Unrolled(inner_optimizer=two_groups))
