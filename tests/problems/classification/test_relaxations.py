"""Tests of dropout with a derivative in its rate, and of a weight decay per weight."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F

import bilevel
from bilevel import BilevelError, Interval, Need, Refused, Space, problems, solvers, squared_norm
from bilevel.cli import targets
from bilevel.problems import MLP, Classification
from bilevel.problems.datasets.labelled_images import Images
from bilevel.problems.networks.dropout import (
    concrete_dropout,
    dropout,
    dropout_by_name,
    gaussian_dropout,
)
from bilevel.requirements import check_space

CPU, F64 = torch.device("cpu"), torch.float64
RELAXED = {"gaussian": gaussian_dropout, "concrete": concrete_dropout}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=RELAXED)
def relaxed(request):
    return RELAXED[request.param]


@pytest.fixture
def double():
    """Use float64 for weights, inputs and draws of classification."""
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


def small(**options):
    """Return a problem of twelve images of nine pixels and two layers."""

    def split(n, seed):
        return torch.randint(
            0, 256, (n, 1, 3, 3), generator=generator(seed), dtype=torch.uint8
        ), torch.arange(n) % 4

    images = Images(split(12, 0), split(8, 1), split(8, 2), mean=100.0, std=50.0)
    return Classification(lambda: MLP([9, 8, 4]), images, sites=2, batch_size=4, **options)


# --- what is drawn ---


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("form", [dropout, gaussian_dropout])
def test_gaussian_dropout_has_the_mean_and_variance_of_bernoullis(form, rate):
    n = 400_000
    mask = form(torch.ones(1, n, dtype=F64), torch.tensor(rate, dtype=F64), generator())
    variance = rate / (1 - rate)
    fourth = ((mask - 1) ** 4).mean()
    assert abs(mask.mean() - 1) < 5 * (variance / n) ** 0.5
    assert (
        abs(((mask - 1) ** 2).mean() - variance)
        < 5 * ((fourth - variance**2).clamp_min(0) / n) ** 0.5 + 1e-9
    )


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_concrete_dropout_has_its_distributions_mean_and_variance(rate, temperature):
    v = (torch.arange(2_000_000, dtype=F64) + 0.5) / 2_000_000  # the midpoint rule
    z = torch.special.expit(
        (torch.special.logit(torch.tensor(rate, dtype=F64)) + torch.special.logit(v)) / temperature
    )
    mask = concrete_dropout(
        torch.ones(1, n := 400_000, dtype=F64),
        torch.tensor(rate, dtype=F64),
        generator(),
        temperature,
    )
    wanted = (1 - z) / (1 - rate)
    fourth = ((wanted - wanted.mean()) ** 4).mean()
    assert abs(mask.mean() - wanted.mean()) < 5 * (wanted.var() / n) ** 0.5
    assert abs(mask.var() - wanted.var()) < 5 * ((fourth - wanted.var() ** 2) / n) ** 0.5
    dropped = (mask * (1 - rate) < 0.5).double().mean()
    assert abs(dropped - rate) < 5 * (rate * (1 - rate) / n) ** 0.5


def test_concrete_dropout_becomes_bernoullis_as_the_temperature_falls():
    x, rate = torch.ones(1, 1_000_000), torch.tensor(0.5)
    sampled = dropout(x, rate, generator())
    distances = [
        (concrete_dropout(x, rate, generator(), t) - sampled).abs().mean().item()
        for t in (0.1, 0.01, 0.001)
    ]
    # E|z − 1[v > ½]| = 2 t log 2 · f(0), with the logistic density f(0) = ¼; the mask is twice that
    assert distances[1:] == pytest.approx([0.01 * 0.693147, 0.001 * 0.693147], rel=0.05)
    assert distances[0] > 9 * distances[1]


@pytest.mark.parametrize("shape", [(6, 5), (6, 2, 3, 3)])
@pytest.mark.parametrize("form", [dropout, gaussian_dropout, concrete_dropout])
def test_equal_rates_per_example_are_one_rate(form, shape):
    x = torch.randn(shape)
    once = form(x, torch.tensor(0.3), generator())
    assert torch.equal(form(x, torch.full((6,), 0.3), generator()), once)
    varied = form(x, torch.tensor([0.3, 0.9, 0.3, 0.3, 0.3, 0.3]), generator())
    assert torch.equal(varied[2:], once[2:])
    assert not torch.equal(varied[1], once[1])


@pytest.mark.parametrize("form", [dropout, gaussian_dropout, concrete_dropout])
def test_no_rate_is_no_dropout(form):
    x = torch.randn(4, 50)
    assert torch.equal(form(x, torch.tensor(0.0), generator()), x)


# --- its derivatives ---


@pytest.mark.parametrize("per_example", [False, True])
def test_derivatives_in_the_rate_are_right_to_second_order(relaxed, per_example):
    x = torch.randn(3, 4, generator=generator(1), dtype=F64)
    rate = torch.tensor([0.1, 0.5, 0.9] if per_example else 0.3, dtype=F64, requires_grad=True)

    def loss(rate):
        return torch.tanh(relaxed(x, rate, generator())).square().sum()

    assert torch.autograd.gradcheck(loss, rate)
    assert torch.autograd.gradgradcheck(loss, rate)


@pytest.mark.parametrize("kind", RELAXED)
def test_derivative_of_the_inner_loss_by_central_differences(kind, double):
    problem = small(
        dropout=kind, temperature=0.5 if kind == "concrete" else None
    )  # smooth at the scale of a difference
    params, carry = problem.init(generator())
    batch = problem.data(CPU, generator()).train.next()

    def loss(rate):
        hypers = {
            "input_dropout": rate,
            "dropout1": torch.tensor(0.2),
            "weight_decay": torch.tensor(1e-3),
        }
        return problem.inner_loss(hypers, params, carry, batch, generator(3))[0]

    for rate in (torch.tensor(0.3), torch.tensor([0.05, 0.3, 0.6, 0.9])):
        (ours,) = torch.autograd.grad(loss(rate.requires_grad_()), rate)
        step = 1e-6
        moves = step * torch.eye(rate.numel()).reshape(-1, *rate.shape)
        differences = [
            (loss(rate + move) - loss(rate - move)).detach() / (2 * step) for move in moves
        ]
        torch.testing.assert_close(ours.reshape(-1), torch.stack(differences), rtol=1e-6, atol=1e-8)
        assert ours.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("per_example", [False, True])
def test_second_derivatives_are_finite_at_extreme_rates(relaxed, per_example, dtype):
    """As the rate goes to 0 in u, its slope vanishes, and the slope of √rate diverges."""
    x, domain = torch.randn(4, 50, dtype=dtype), Interval(low=0.0, high=0.95, init=0.05)
    for at in (-1000.0, -100.0, -80.0, -40.0, -30.0, -10.0, 0.0, 10.0, 40.0, 100.0):
        u = torch.full((4,) if per_example else (), at, dtype=dtype, requires_grad=True)
        weight = torch.randn(50, dtype=dtype, requires_grad=True)
        loss = (relaxed(x, domain.constrain(u, None), generator()) @ weight).square().mean()
        first = torch.autograd.grad(loss, (u, weight), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (u, weight))
        assert all(bool(torch.isfinite(t).all()) for t in (loss, *first, *second)), at


def test_a_rate_near_zero_still_has_a_slope():
    rate = torch.tensor(1e-6, requires_grad=True)
    (slope,) = torch.autograd.grad(
        gaussian_dropout(torch.ones(1, 1), rate, generator()).sum(), rate
    )
    noise = torch.randn(1, 1, generator=generator())
    assert slope.item() == pytest.approx(
        noise.item() / (2 * 1e-3), rel=1e-4
    )  # d√p/dp, with p/(1 − p) ≈ p


def test_one_mask_for_value_and_tangent(relaxed):
    x, rate = torch.randn(4, 50), torch.full((4,), 0.5)
    with forward_ad.dual_level():
        primal, tangent = forward_ad.unpack_dual(
            relaxed(forward_ad.make_dual(x, 3 * x), rate, generator())
        )
    torch.testing.assert_close(tangent, 3 * primal)


# --- the problem ---


@pytest.mark.parametrize("kind", RELAXED)
def test_a_relaxed_rate_is_declared_differentiable_and_the_problem_is_clean(kind):
    problem = small(dropout=kind)
    assert all(problem.space[name].differentiable for name in problem.space)
    check_space("Implicit", problem.space, {Need.INNER_DERIVATIVE}, ())
    report = bilevel.check_problem(
        problem, solvers={"delta_stn": solvers.delta_stn(), "stn": solvers.stn()}
    )
    assert (report.findings, report.refused_by) == ([], {})
    with pytest.raises(
        Refused, match=r"`input_dropout` is sampled .* relax it where .* problem.dropout=gaussian"
    ):
        check_space("Implicit", small().space, {Need.INNER_DERIVATIVE}, ())


@pytest.mark.parametrize("kind", RELAXED)
def test_dropout_acts_in_training_alone(kind):
    problem = small(dropout=kind)
    params, carry = problem.init(generator())
    batch = problem.data(CPU, generator()).train.next()
    hypers = problem.space.constrain(problem.space.init())
    passes = [
        problem.predict(hypers, params, carry, batch, train=train, generator=generator())[0]
        for train in (True, False)
    ]
    assert not torch.allclose(*passes)
    clean = small().predict(hypers, params, carry, batch, train=False, generator=None)[0]
    assert torch.equal(passes[1], clean)


def test_an_unknown_dropout_is_one_sentence():
    with pytest.raises(
        BilevelError,
        match=r"dropout='gausian' is unknown \(did you mean `gaussian`\?\); choose",
    ):
        small(dropout="gausian")
    with pytest.raises(
        BilevelError,
        match=r"problem.dropout='gausian' is unknown \(did you mean `gaussian`\?\)",
    ):
        targets.check({"_target_": "bilevel.problems.digits", "dropout": "gausian"}, "problem")
    with pytest.raises(BilevelError, match="does not apply to gaussian dropout"):
        small(dropout="gaussian", temperature=0.1)
    with pytest.raises(BilevelError, match="temperature=0 must be positive"):
        small(dropout="concrete", temperature=0)
    with pytest.raises(BilevelError, match="weight_decay='per_layer' is unknown"):
        small(weight_decay="per_layer")


def test_the_temperature_is_passed_on():
    x, rate = torch.ones(2, 100), torch.tensor(0.5)
    assert torch.equal(
        dropout_by_name("concrete", 0.7)(x, rate, generator()),
        concrete_dropout(x, rate, generator(), 0.7),
    )
    assert torch.equal(
        dropout_by_name("concrete")(x, rate, generator()),
        concrete_dropout(x, rate, generator(), 0.1),
    )


# --- a decay for every weight ---


def test_a_decay_per_weight_is_flat_in_the_order_of_the_parameters(double):
    problem = small(
        weight_decay="per_weight", space={"input_dropout": {"frozen": True, "init": 0.0}}
    )
    problem.space = Space(**{**problem.space, "dropout1": problem.space["input_dropout"]})
    params, carry = problem.init(generator())
    m = sum(p.numel() for p in params.values())
    assert problem.space["weight_decay"].shape == (m,)
    assert problem.space.numel == m
    decay = torch.rand(m, requires_grad=True)
    hypers = {**problem.space.constrain(problem.space.init()), "weight_decay": decay}
    batch = problem.data(CPU, generator()).train.next()
    loss, _ = problem.inner_loss(hypers, params, carry, batch, generator())
    w = torch.cat([p.reshape(-1) for p in params.values()])
    plain = F.cross_entropy(
        problem.predict(hypers, params, carry, batch, train=False, generator=None)[0], batch[1]
    )
    torch.testing.assert_close(loss, plain + 0.5 * (w @ torch.diag(decay) @ w))
    torch.testing.assert_close(torch.autograd.grad(loss, decay)[0], 0.5 * w**2)
    assert list(small(weight_decay=False).space) == ["input_dropout", "dropout1"]
    assert small(weight_decay=True).space["weight_decay"].shape == ()


def test_equal_decays_are_one_decay(double):
    params, _ = small().init(generator())
    decay = torch.full((sum(p.numel() for p in params.values()),), 0.3)
    torch.testing.assert_close(squared_norm(params, decay), 0.3 * squared_norm(params))
    with pytest.raises(
        BilevelError,
        match=r"the shape \[3\] and must have one entry for each of the 116 entries of w",
    ):
        squared_norm(params, torch.ones(3))


def test_a_million_decays_need_no_matrix():
    problem = problems.digits(hidden=[1000, 1000], weight_decay="per_weight", dropout="gaussian")
    m = problem.space["weight_decay"].numel
    assert m == 64 * 1000 + 1000 * 1000 + 1000 * 10 + 2010
    params, carry = problem.init(generator())
    params = {name: p.requires_grad_() for name, p in params.items()}
    u = problem.space.init().requires_grad_()
    batch = problem.data(CPU, generator()).train.next()
    loss, _ = problem.inner_loss(problem.space.constrain(u), params, carry, batch, generator())
    gradient = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    (cross,) = torch.autograd.grad(gradient, u, list(params.values()))  # wᵀ ∂²L_T/∂w∂u
    w = torch.cat([p.detach().reshape(-1) for p in params.values()])
    torch.testing.assert_close(
        cross[-m:], w**2 * torch.sigmoid(u.detach()[-m:]), rtol=1e-4, atol=1e-9
    )


def test_self_tuning_solvers_say_what_memory_a_response_to_every_decay_would_need():
    problem = problems.digits(hidden=[1000, 1000], weight_decay="per_weight")
    rows, m = 2 * (1000 + 1000 + 10), problem.space.numel
    gibibytes = f"{(rows * m + m - 3) * 4 / 2**30:.1f}".replace(".", r"\.")
    message = (
        rf"1,076,013 hyperparameters \(most of them `weight_decay`\) would need {gibibytes} GiB "
        "and as much again for"
    )
    with pytest.raises(Refused, match=message):
        solvers.delta_stn().setup(problem, problem.data(CPU, generator()), CPU, generator())


def test_a_response_must_fit_with_its_gradient(monkeypatch):
    problem = small(weight_decay="per_weight", dropout="gaussian")
    params, _ = problem.init(generator())
    needed = (
        solvers.Structured().size(params, problem.space.numel)
        * next(iter(params.values())).element_size()
    )
    monkeypatch.setattr("bilevel.solvers.base.dry_run.MOST_RESPONSE_BYTES", 2 * needed)
    solvers.delta_stn().check(problem, problem.data(CPU, generator()), CPU)
    monkeypatch.setattr("bilevel.solvers.base.dry_run.MOST_RESPONSE_BYTES", 2 * needed - 1)
    with pytest.raises(
        Refused,
        match=rf"would need {needed / 2**10:.1f} KiB and as much again .*, and the limit is",
    ):
        solvers.delta_stn().check(problem, problem.data(CPU, generator()), CPU)


@pytest.mark.parametrize("solver", [solvers.delta_stn, solvers.stn])
def test_self_tuning_solvers_tune_a_decay_per_weight_where_it_fits(solver):
    problem, solver = small(weight_decay="per_weight", dropout="gaussian"), solver(inner_steps=2)
    assert bilevel.check_problem(problem, solvers={"it": solver}).refused_by == {}
    solver.setup(problem, problem.data(CPU, generator()), CPU, generator())
    before = solver.solution().hypers["weight_decay"].clone()
    for _ in range(3):
        solver.step()
    after = solver.solution().hypers["weight_decay"]
    assert bool((after != before).all())
    assert len(after.unique()) > 10
