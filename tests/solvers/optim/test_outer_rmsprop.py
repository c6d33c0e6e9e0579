"""Tests of RMSprop for hyperparameters: against PyTorch, a hand computation, and pure noise."""

import copy
import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from bilevel import BilevelError
from bilevel.problems import Quadratic
from bilevel.solvers import OuterRMSprop, SelfTuning
from tests.support.device_waits import no_waiting
from tests.support.solver_cases import normed, ready
from tests.support.solver_list import leaves_equal

FORMS = {
    "strict": {"signal_test": True, "threshold": 2.0},
    "plain": {},
    "shared": {"shared_scale": True},
    "tested": {"signal_test": True},
    "both": {"shared_scale": True, "signal_test": True},
    "corrected": {"bias_correction": True},
    "shared and corrected": {"shared_scale": True, "bias_correction": True},
    "all": {"shared_scale": True, "bias_correction": True, "signal_test": True},
}
all_forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def moved(optimizer, gradients, start):
    """Return where parameters go under a list of gradients."""
    u = start.clone().requires_grad_()
    stepping = optimizer([u])
    places = []
    for gradient in gradients:
        u.grad = gradient.clone()
        stepping.step()
        places.append(u.detach().clone())
    return places


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", [{}, {"lr": 0.5, "alpha": 0.9, "eps": 1e-3}])
def test_without_options_it_is_rmsprop_bit_for_bit(dtype, settings):
    draws = torch.Generator().manual_seed(0)
    gradients = [torch.randn(7, generator=draws, dtype=dtype) for _ in range(30)]
    settings = {"lr": 0.03, **settings}
    ours, theirs = (
        moved(partial(kind, **settings), gradients, torch.ones(7, dtype=dtype))
        for kind in (OuterRMSprop, torch.optim.RMSprop)
    )
    assert leaves_equal(ours, theirs)


def by_hand(gradients, lr, alpha, eps, beta, *, shared, corrected, tested, threshold):
    """Follow the docstring, entry by entry, in Python's numbers."""
    h = len(gradients[0])
    u, v, places = [0.0] * h, [0.0] * h, []
    for t in range(1, len(gradients) + 1):
        for k, g in enumerate(gradients[t - 1]):
            v[k] = alpha * v[k] + (1 - alpha) * g * g
        for k, g in enumerate(gradients[t - 1]):
            factor = 1.0
            if tested:
                weights = [beta ** (t - i) for i in range(1, t + 1)]
                weights = [w / sum(weights) for w in weights]
                mean = sum(w * gradients[i][k] for i, w in enumerate(weights))
                square_weights = [alpha ** (t - i) for i in range(1, t + 1)]
                square = sum(w * gradients[i][k] ** 2 for i, w in enumerate(square_weights))
                square /= sum(square_weights)
                s = sum(w * w for w in weights)
                variance = s * max(square - mean**2, 0.0) / (1 - s) if t > 1 else math.inf
                factor = max(0.0, 1 - threshold**2 * variance / mean**2)
            square = (max(v) if shared else v[k]) / (1 - alpha**t if corrected else 1)
            size = math.sqrt(square) + eps
            u[k] -= lr * factor * g / size
        places.append(torch.tensor(u, dtype=torch.float64))
    return places


@all_forms
def test_it_follows_the_formula(form):
    draws = torch.Generator().manual_seed(1)
    shift = torch.tensor([1.0, 0.0, 0.01], dtype=torch.float64)
    scale = torch.tensor([0.5, 1.0, 0.02], dtype=torch.float64)
    gradients = [
        shift + scale * torch.randn(3, generator=draws, dtype=torch.float64) for _ in range(40)
    ]
    settings = {"lr": 0.1, "alpha": 0.95, "eps": 1e-6, "beta": 0.8}
    ours = moved(partial(OuterRMSprop, **settings, **form), gradients, torch.zeros(3).double())
    settings["threshold"] = form.get("threshold", 1.0)
    names = {"shared": "shared_scale", "corrected": "bias_correction", "tested": "signal_test"}
    flags = {name: form.get(option, False) for name, option in names.items()}
    numbers = [gradient.tolist() for gradient in gradients]
    torch.testing.assert_close(ours, by_hand(numbers, **settings, **flags))


def test_a_correction_makes_the_first_step_as_long_as_the_others():
    gradients = [torch.ones(1)] * 3
    plain, corrected = (
        moved(partial(OuterRMSprop, lr=0.1, bias_correction=on), gradients, torch.zeros(1))
        for on in (False, True)
    )
    assert float(plain[0]) == pytest.approx(-1.0, rel=1e-4)  # 10 times the learning rate
    torch.testing.assert_close(torch.stack(corrected).flatten(), torch.tensor([-0.1, -0.2, -0.3]))


def test_a_shared_scale_keeps_the_proportions_of_gradients():
    gradients = [torch.tensor([2.0, 0.02, 0.0])] * 5
    own, shared = (
        moved(partial(OuterRMSprop, shared_scale=on), gradients, torch.zeros(3))[-1]
        for on in (False, True)
    )
    assert own[0] == pytest.approx(float(own[1]), rel=1e-4)
    assert shared[0] == pytest.approx(100 * float(shared[1]), rel=1e-4)
    assert own[2] == shared[2] == 0


def test_the_scale_is_shared_by_all_parameters_of_a_group():
    first, second = (torch.zeros(n, requires_grad=True) for n in (2, 3))
    optimizer = OuterRMSprop([first, second], lr=1.0, alpha=0.0, shared_scale=True)
    first.grad, second.grad = torch.full((2,), 4.0), torch.full((3,), 1.0)
    optimizer.step()
    torch.testing.assert_close(first.detach(), torch.full((2,), -1.0))
    torch.testing.assert_close(second.detach(), torch.full((3,), -0.25))


def way(mean, **settings):
    """Return the mean and the spread of the way of 2000 coordinates under noise of size 1."""
    draws = torch.Generator().manual_seed(2)
    gradients = [mean + torch.randn(2000, generator=draws) for _ in range(400)]
    places = moved(partial(OuterRMSprop, **settings), gradients, torch.zeros(2000))
    steps = torch.stack([(b - a).abs() for a, b in pairwise(places[200:])])
    last = places[-1] - places[200]
    return float(steps.mean()), float(last.std()), -float(last.mean())


def test_a_step_of_noise_is_a_small_part_of_a_full_one():
    """The part is E max(0, 1 − 1/z²) = 4 Q(1) − 2 φ(1) = 0.15, and more as |g| goes with |z|."""
    full, tested = (way(0.0, signal_test=on) for on in (False, True))
    assert 0.1 < tested[0] / full[0] < 0.25
    assert tested[1] < 0.95 * full[1]


def test_above_a_threshold_noise_moves_far_less_than_a_signal():
    strict = {"signal_test": True, "threshold": 2.0, "beta": 0.97}
    full, noise = way(0.0), way(0.0, **strict)
    assert noise[1] < 0.4 * full[1]
    assert way(1.0, **strict)[2] > 0.85 * way(1.0)[2]
    assert way(1.0, **strict)[2] > 20 * noise[1]


def test_a_constant_gradient_takes_the_steps_of_rmsprop_after_the_first():
    gradients = [torch.tensor([0.3, -2.0])] * 10
    ours, theirs = (
        moved(partial(OuterRMSprop, signal_test=on), gradients, torch.zeros(2))
        for on in (True, False)
    )
    assert torch.equal(ours[0], torch.zeros(2))
    torch.testing.assert_close(ours[-1] - ours[0], theirs[-1] - theirs[0])


@all_forms
def test_entries_without_a_gradient_stay_and_nothing_is_nan(form):
    gradients = [torch.tensor([0.0, 1.0])] * 3
    last = moved(partial(OuterRMSprop, **form), gradients, torch.zeros(2))[-1]
    assert last[0] == 0
    assert last.isfinite().all()


def test_a_rate_that_is_a_tensor_takes_the_same_steps():
    gradients = [torch.randn(4, generator=torch.Generator().manual_seed(3)) for _ in range(5)]
    ours, theirs = (
        moved(partial(OuterRMSprop, lr=lr), gradients, torch.zeros(4))[-1]
        for lr in (0.1, torch.tensor(0.1))
    )
    torch.testing.assert_close(ours, theirs)


# --- in a solver ---


@all_forms
def test_it_tunes_the_quadratic_and_resumes_with_the_same_bits(form):
    problem = Quadratic.random(weights=3, hypers=2, dtype=torch.float64)
    make = partial(SelfTuning, outer_optimizer=partial(OuterRMSprop, lr=0.05, **form))
    solver, resumed = ready(problem, make()), ready(problem, make(), seed=2)
    before = solver.core.search.u.detach().clone()
    for _ in range(4):
        solver.step()
    assert not torch.equal(before, solver.core.search.u)
    resumed.load_state_dict(copy.deepcopy(solver.state_dict()))
    for split in ("train", "valid"):
        state = getattr(solver.core.data, split).state_dict()
        getattr(resumed.core.data, split).load_state_dict(state)
    for _ in range(3):
        solver.step()
        resumed.step()
    assert leaves_equal(solver.state_dict(), resumed.state_dict())


@all_forms
def test_no_step_waits_for_the_device(form):
    solver = ready(normed(), SelfTuning(outer_optimizer=partial(OuterRMSprop, **form)))
    solver.step()
    with no_waiting():
        solver.step()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"lr": -1.0}, "^lr=-1.0 must be at least 0"),
        ({"eps": -1.0}, "^eps=-1.0 must be at least 0"),
        ({"alpha": 2.0}, "^alpha=2.0 must be between 0 and 1"),
        ({"threshold": -1.0}, "^threshold=-1.0 must be at least 0"),
        ({"beta": 1.0, "signal_test": True}, "^beta=1.0 must be between 0 and 1; 0.9 averages"),
    ],
)
def test_a_wrong_setting_is_one_sentence(settings, match):
    with pytest.raises(BilevelError, match=match):
        OuterRMSprop([torch.zeros(1)], **settings)
