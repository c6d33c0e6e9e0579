"""The search distribution of λ: entropy, scales, draws, and perturbations of the weights."""

import math

import pytest
import torch
import torch.nn.functional as F

from bilevel import BilevelError, Integer, Interval, ModuleProblem, Positive, Real, Simplex, Space
from bilevel.solvers import Dense, ResponseWeight, SelfTuning
from bilevel.solvers.base.search_distribution import SearchDistribution
from tests.support.solver_cases import Decayed, all_flags, classifier, ready, sgd

SGD = sgd(0.1)


def distribution(*domains, tune_scale=True, per_example=True):
    space = Space(**{f"h{i}": domain for i, domain in enumerate(domains)})
    like = torch.zeros((), dtype=torch.float64)
    search = SearchDistribution(space, SGD, like=like)
    if tune_scale:
        search.train_scale(SGD)
    if per_example:
        search.vary_per_example()
    return search


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- the Gaussian ---


def test_entropy_of_three_unit_scales():
    """H = 3/2 log 2πe = 4.257 nats (PAPER 3.1)."""
    assert round(distribution(Real(init=0.0, shape=(3,))).entropy().item(), 3) == 4.257


def test_entropy_and_its_gradient():
    """H = Σ log(σ_k √(2πe)); ∂H/∂s = softplus′(s)/σ."""
    scales = (0.3, 1.0, 2.5)
    b = distribution(*(Real(init=0.0, scale=scale) for scale in scales))
    assert b.entropy().item() == pytest.approx(
        sum(math.log(s * math.sqrt(2 * math.pi * math.e)) for s in scales)
    )
    (gradient,) = torch.autograd.grad(b.entropy(), b.s)
    torch.testing.assert_close(gradient, torch.sigmoid(b.s) / F.softplus(b.s))


@pytest.mark.parametrize("tune_scale", [True, False])
def test_scales_start_as_declared(tune_scale):
    """σ = softplus(s), s = log(e^σ − 1); one leaf per hyperparameter, of its shape."""
    b = distribution(
        Real(init=0.0, scale=0.01),
        Interval(low=0.0, high=1.0, init=0.5, scale=30.0, shape=(2, 2)),
        tune_scale=tune_scale,
    )
    torch.testing.assert_close(
        b.sigma, torch.tensor([0.01, 30, 30, 30, 30], dtype=torch.float64), rtol=1e-12, atol=0
    )
    assert {name: leaf.shape for name, leaf in b.scales().items()} == {"h0": (), "h1": (2, 2)}
    assert b.s.requires_grad == tune_scale


def test_u_starts_at_the_initial_values_in_full_precision():
    """On (0, .95) at .05, u = log .05 − log .9; a float32 on the way would be off by 1e-8."""
    b = distribution(Interval(low=0.0, high=0.95, init=0.05), Positive(init=1e-3))
    expected = [math.log(0.05) - math.log(0.9), math.log(math.expm1(1e-3))]
    assert b.u.tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(b.u0, b.u)


def test_noise_is_standard_normal_and_independent():
    n = distribution(Real(init=0.0, shape=(3,))).noise(200_000, generator())
    torch.testing.assert_close(n.mean(0), torch.zeros(3).double(), atol=0.01, rtol=0)
    torch.testing.assert_close(n.T.cov(), torch.eye(3).double(), atol=0.015, rtol=0)
    torch.testing.assert_close(n.pow(4).mean(0), torch.full((3,), 3.0).double(), atol=0.1, rtol=0)


def test_noise_is_copied_within_a_batch_where_it_must_not_vary():
    n = distribution(
        Real(init=0.0), Simplex(init=1 / 3, shape=(3,)), Integer(low=0, high=5, init=2.0)
    ).noise(64, generator())
    assert n.shape == (64, 5)
    assert [column.unique().numel() for column in n.T] == [64, 1, 1, 1, 64]
    assert n[0].unique().numel() == 5


@pytest.mark.parametrize("per_example", [True, False])
def test_noise_without_examples(per_example):
    """The shape is [h] if every hyperparameter, or the response, has one perturbation per batch."""
    domain = Real(init=0.0, shape=(4,), per_example=not per_example)
    assert distribution(domain, per_example=per_example).noise(64, generator()).shape == (4,)


def test_perturbation_has_the_trained_scale_and_no_graph():
    b = distribution(Real(init=0.0, scale=0.5), Real(init=0.0, scale=2.0))
    draws = b.perturbation(100_000, generator())
    torch.testing.assert_close(draws.std(0), torch.tensor([0.5, 2.0]).double(), rtol=0.02, atol=0)
    assert not draws.requires_grad


def test_offset_is_differentiable_in_u_and_s():
    """δ = u − u₀ + σn: ∂δ/∂u = 1, ∂δ/∂s = softplus′(s) n."""
    b = distribution(Real(init=1.0), Real(init=-2.0, per_example=False))
    with torch.no_grad():
        b.u.add_(torch.tensor([0.25, -0.5]))
    n, offset = b.noise(6, generator(3)), b.offset(6, generator(3))
    torch.testing.assert_close(offset, torch.tensor([0.25, -0.5]).double() + b.sigma * n)
    weight = torch.randn(6, 2, dtype=torch.float64)
    to_u, to_s = torch.autograd.grad((weight * offset).sum(), [b.u, b.s])
    torch.testing.assert_close(to_u, weight.sum(0))
    torch.testing.assert_close(to_s, torch.sigmoid(b.s) * (weight * n).sum(0))


def test_offset_without_tuned_scale_has_no_noise():
    b = distribution(Real(init=1.0, shape=(2,)), tune_scale=False)
    offset = b.offset(6, generator())
    assert offset.tolist() == [0.0, 0.0]
    assert torch.autograd.grad(offset.sum(), b.u)[0].tolist() == [1.0, 1.0]


# --- how a perturbation reaches the weights ---


def mixed(rate_per_example, decay_per_example):
    """An MLP with three dropout rates and a weight decay, float64."""
    rates = {
        name: {"per_example": rate_per_example}
        for name in ("input_dropout", "dropout1", "dropout2")
    }
    return classifier(**rates, weight_decay={"init": 0.1, "per_example": decay_per_example})


@pytest.mark.parametrize("decay_per_example", [True, False])
def test_a_mixed_space_is_perturbed_as_each_hyperparameter_asks(decay_per_example):
    solver = ready(mixed(True, decay_per_example), away=0.3)
    offset = solver.core.search.perturbation(8, solver.core.generator)
    hypers = solver.core.problem.space.constrain(offset)
    assert hypers["dropout1"].unique().numel() == 8
    assert hypers["weight_decay"].shape == ((8,) if decay_per_example else ())
    assert offset[:, 3].unique().numel() == (8 if decay_per_example else 1)
    assert all(isinstance(w, ResponseWeight) for w in solver.method.respond(offset).values())
    solver.step()


@all_flags
@pytest.mark.parametrize("response", [None, Dense()], ids=["structured", "dense"])
def test_perturbed_per_batch_the_weights_are_plain(flags, response):
    solver = ready(
        mixed(response is not None, False), SelfTuning(response=response, **flags), away=0.3
    )
    offset = solver.core.search.perturbation(8, solver.core.generator)
    assert offset.shape == (4,)
    assert all(type(w) is torch.Tensor for w in solver.method.respond(offset).values())
    solver.step()


@all_flags
def test_one_perturbation_for_all_examples_is_the_per_batch_perturbation(flags):
    """Equal per-example weights give the loss and the gradients of plain dense ones."""
    solver, results = ready(mixed(True, True), SelfTuning(**flags), away=0.3), []
    noise, batch = torch.randn(4, dtype=torch.float64), solver.core.data.train.next()
    for offset in (noise, noise.expand(8, 4)):
        solver.core.generator.manual_seed(5)
        solver.core.search.perturbation = lambda *_, offset=offset: offset
        loss, _ = solver.method.perturbed_loss(solver.core.weights.tensors, {}, batch)
        results.append(
            [
                loss,
                *torch.autograd.grad(loss, solver.core.weights.leaves + solver.method.theta.leaves),
            ]
        )
    torch.testing.assert_close(results[0], results[1])


class Cutout(ModuleProblem):
    """Records the number of holes that every training pass is given."""

    def __init__(self, **domain):
        self.seen = []
        split = torch.randn(16, 3), torch.randn(16, 2)
        super().__init__(
            torch.nn.Linear(3, 2), Space(holes=Integer(low=0, high=5, **domain)), split, split
        )

    def inputs(self, hypers, batch, *, train, generator):
        if train:
            self.seen.append(hypers["holes"])
        return (batch[0],), {}

    def inner_objective(self, hypers, params, prediction, batch):
        return (prediction - batch[1]).square().mean()

    outer_objective = inner_objective


@pytest.mark.parametrize("init", [1.0, 1.5])
def test_an_integer_is_rounded_without_bias_in_both_training_passes(init):
    """λ₀ = 1 trains w₀ at 1 only, and λ₀ = 1.5 at 1 and 2 equally often.

    Rounding down would take half of the perturbed draws at 1 to 0.
    """
    problem = Cutout(init=init, scale=0.3)
    solver = ready(problem, away=0.3)
    problem.seen.clear()
    for _ in range(400):
        solver.method.separate_step(solver.core.data.train.peek())
    at_centre, perturbed = torch.stack(problem.seen[::2]), torch.cat(problem.seen[1::2])
    expected = 5 * torch.sigmoid(solver.core.search.u0 + 0.3 * torch.randn(100_000)).mean()
    assert abs(at_centre.mean() - init) < 0.1
    assert set(at_centre.tolist()) == ({1.0} if init == 1 else {1.0, 2.0})
    assert abs(perturbed.mean() - expected) < 0.05
    assert perturbed.frac().eq(0).all()


# --- the largest scale ---


@all_flags
def test_sigma_stops_at_its_largest_value(flags):
    """τ = 5 widens σ; the cap holds after every outer step, and σ may still shrink."""
    wide = {"entropy_weight": 5.0, "scale_optimizer": sgd(0.5), **flags}
    free, capped = (ready(classifier(), SelfTuning(max_scale=most, **wide)) for most in (None, 1.2))
    for _ in range(4):
        free.step()
        capped.step()
        assert float(capped.core.search.sigma.detach().max()) <= 1.2 * (1 + 1e-6)
    assert float(free.core.search.sigma.detach().min()) > 1.2
    assert float(capped.core.search.sigma.detach().min()) == pytest.approx(1.2)
    with torch.no_grad():
        capped.core.search.s.sub_(1.0)
    capped.core.search.cap_scale()
    assert float(capped.core.search.sigma.detach().max()) < 1.1


def test_an_initial_scale_above_the_largest_is_lowered():
    space = {"decay": Positive(init=0.1, scale=3.0), "other": Real(init=0.0, scale=0.2)}
    solver = ready(Decayed(torch.nn.Linear(4, 3), **space), SelfTuning(max_scale=0.5))
    torch.testing.assert_close(
        solver.core.search.sigma.detach(), torch.tensor([0.5, 0.2], dtype=torch.float64)
    )


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"max_scale": 0}, "^max_scale=0 must be positive and finite; set it to null"),
        ({"max_scale": 1.0, "tune_scale": False}, "^max_scale=1.0 needs tune_scale=True"),
    ],
)
def test_a_wrong_largest_scale_is_one_sentence(settings, match):
    with pytest.raises(BilevelError, match=match):
        SelfTuning(**settings)
