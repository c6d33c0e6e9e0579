"""Evolution strategies: the expectation of the estimate in closed form, and tuned problems."""

import io
import itertools
import math
from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_leaves

from bilevel import (
    BilevelError,
    Data,
    FullBatch,
    Integer,
    Problem,
    Refused,
    Runner,
    SolverWarning,
    Space,
)
from bilevel.problems import Quadratic, Ridge, digits
from bilevel.solvers import Fixed
from bilevel.solvers.evolution import EvolutionMethod, EvolutionStrategies
from bilevel.solvers.optim.functional import Moments
from bilevel.solvers.unroll.trajectory import InnerState
from tests.support.device_waits import no_waiting
from tests.support.solver_cases import CPU, Recurrent, every_domain, normed, ready, set_to, sgd

LR, K = 0.3, 3
STILL = partial(torch.optim.SGD, lr=0.0)


def quadratic(weights=4, hypers=2, **options):
    return Quadratic.random(weights=weights, hypers=hypers, seed=3, dtype=torch.float64, **options)


def strategies(problem, *, seed=1, away=0.0, **options):
    options = {"inner_steps": K, "inner_optimizer": sgd(LR), "outer_optimizer": STILL} | options
    return ready(problem, EvolutionStrategies(**options), seed=seed, away=away)


def response(problem, steps):
    """Return ∂w_n/∂λ = −η Σ_{j<n} (I − ηA)^j B of n steps of gradient descent.

    The initial w does not depend on λ.
    """
    step = torch.eye(len(problem.A)).double() - LR * problem.A
    return -LR * sum(torch.linalg.matrix_power(step, j) for j in range(steps)) @ problem.B


def hypergradient(problem, w, u, steps):
    """dL_V/dλ where w is what `steps` steps have led to."""
    return response(problem, steps).T @ problem.M @ (w - problem.w_bar) + problem.P @ (
        u - problem.lambda_bar
    )


def signs(solver, rounds):
    """Perturb by ±σ in each of the next rounds, in all combinations.

    For a quadratic loss they give the same expectation as Gaussian perturbations.
    """
    h = solver.core.search.u.numel()
    every = (
        torch.tensor(list(itertools.product([-1.0, 1.0], repeat=h * rounds)))
        .double()
        .reshape(-1, rounds, h)
    )
    assert len(every) == solver.pairs
    taken = itertools.count()
    solver.method.noise = lambda: solver.method.sigma * every[:, next(taken) % rounds]


def quickly(solver):
    """Replace the steps of the solver by bare gradient descent on the quadratic.

    Thousands of particles then take a second.
    """
    A, B, d = solver.core.problem.A, solver.core.problem.B, solver.core.problem.d
    group, slow = solver.core.weights.optimizer.param_groups[0], solver.method.trajectory.step

    def step(point, u, batch, *, create_graph):
        w, (slots, steps) = point.params["w"], point.moments
        change = A @ w + B @ u + d
        if group["momentum"]:
            change = change + group["momentum"] * slots["w"].get(
                "momentum_buffer", torch.zeros_like(w)
            )
            slots = {"w": {"momentum_buffer": change}}
        return InnerState({"w": w - group["lr"] * change}, Moments(slots, steps), {}), None

    batch, u = solver.core.data.train.peek(), torch.ones_like(solver.core.search.u)
    ends = []
    for how in (step, slow):
        point = InnerState(*solver.method.optimizer.read(), {})
        for _ in range(2):
            point, _ = how(point, u, batch, create_graph=False)
        ends.append(point.params["w"])
    torch.testing.assert_close(*ends)
    solver.method.trajectory.step = step
    return solver


# --- the expectation of the estimate ---


@pytest.mark.parametrize("persistent", [True, False])
def test_expectation_is_the_unrolled_hypergradient(persistent):
    """The equality is exact for a quadratic loss, with a σ per coordinate and a direct term."""
    problem = quadratic(direct=0.5, hypers=3)
    solver = strategies(problem, pairs=8, persistent=persistent)
    set_to(solver.core.search.s, torch.tensor([0.1, 1.0, -2.0]).double())
    set_to(solver.core.search.u, torch.tensor([0.3, -1.0, 2.0]).double())
    solver.core.search.recentre()
    signs(solver, 1)
    solver.inner_phase(K, warmup=False)
    exact = hypergradient(problem, solver.core.weights.detached()["w"], solver.core.search.u0, K)
    torch.testing.assert_close(solver.hypergradient(), exact, rtol=1e-10, atol=1e-12)
    one_step_short = hypergradient(
        problem, solver.core.weights.detached()["w"], solver.core.search.u0, K - 1
    )
    assert (one_step_short - exact).norm() > 0.1 * exact.norm()


def test_the_mean_of_many_pairs_is_the_unrolled_hypergradient():
    """Within 4 standard errors, which are small enough that a bias of 10 % would be seen."""
    problem = quadratic(weights=2, hypers=1)
    solver = quickly(strategies(problem, pairs=3400, inner_steps=2))
    solver.inner_phase(2, warmup=False)
    exact = hypergradient(problem, solver.core.weights.detached()["w"], solver.core.search.u0, 2)
    error = (2 / solver.pairs) ** 0.5 * exact.abs()  # Var[z² g] = 2g², for a standard normal z
    assert (4 * error < 0.1 * exact.abs()).all()
    assert ((solver.hypergradient() - exact).abs() < 4 * error).all()


def test_noise_is_normal_with_the_scale_of_the_space_times_spread():
    problem = quadratic(space={"hyper": {"scale": 0.5}})
    solver = strategies(problem, pairs=20_000, spread=0.4)
    z = solver.method.noise() / 0.2
    assert (z.mean(0).abs() < 4 / len(z) ** 0.5).all()
    torch.testing.assert_close(
        z.T @ z / len(z), torch.eye(2).double(), rtol=0, atol=4 * (2 / len(z)) ** 0.5
    )
    torch.testing.assert_close(
        (z**4).mean(0), torch.full((2,), 3.0).double(), rtol=0, atol=4 * (96 / len(z)) ** 0.5
    )
    torch.testing.assert_close(solver.scales()["hyper"], torch.full((2,), 0.2).double())


@pytest.mark.parametrize(
    ("mode", "seen"),
    [("persistent", [1, 2, 3, 4]), ("horizon", [1, 2, 1, 2]), ("truncated", [1] * 4)],
)
def test_what_each_round_sees_of_the_past(mode, seen):
    """Persistent particles see all unrolls since they left the central weights; truncated ones one.

    Over the rounds, the persistent estimates add up to the hypergradient of the summed losses of
    one long training. The others do not.
    """
    problem, rounds = quadratic(hypers=1), 4
    horizon = 2 * K if mode == "horizon" else 1000
    solver = strategies(problem, pairs=2**rounds, persistent=mode != "truncated", horizon=horizon)
    signs(solver, rounds)
    estimates, predicted, unrolled = [], [], []
    for t in range(rounds):
        solver.inner_phase(K, warmup=False)
        w, u = solver.core.weights.detached()["w"].clone(), solver.core.search.u0
        estimates.append(solver.hypergradient())
        predicted.append(hypergradient(problem, w, u, seen[t] * K))
        unrolled.append(hypergradient(problem, w, u, (t + 1) * K))
        solver.outer_phase()
    torch.testing.assert_close(
        torch.stack(estimates), torch.stack(predicted), rtol=1e-9, atol=1e-11
    )
    bias = float((sum(estimates) - sum(unrolled)).norm() / sum(unrolled).norm())
    assert bias < 1e-9 if mode == "persistent" else bias > 0.1


def test_persistent_pairs_sampled():
    """With normal perturbations PES is within 4 standard errors, and truncated ES is 6 away."""
    problem, rounds, sums = quadratic(weights=2, hypers=1), 3, {}
    for persistent in (True, False):
        solver = quickly(
            strategies(problem, pairs=150, inner_steps=2, persistent=persistent, horizon=1000)
        )
        draws, exact = [], 0.0
        for t in range(rounds):
            solver.inner_phase(2, warmup=False)
            batch = solver.core.data.valid.peek()
            exact = exact + hypergradient(
                problem, solver.core.weights.detached()["w"], solver.core.search.u0, 2 * (t + 1)
            )
            losses = torch.stack(
                [
                    solver.method.judge(u, p, batch)
                    for u, p in zip(solver.method.places, solver.method.particles, strict=True)
                ]
            )
            up, down = losses.chunk(2)
            draws.append(solver.method.total[:, 0] * (up - down) / (2 * solver.method.sigma**2))
            torch.testing.assert_close(draws[-1].mean(), solver.hypergradient(batch)[0])
            solver.outer_phase()
        total = sum(draws)
        sums[persistent] = (total.mean() - exact[0]) / (total.std() / len(total) ** 0.5)
    assert abs(sums[True]) < 4
    assert abs(sums[False]) > 6


def test_the_hypergradient_of_a_fresh_solver_unrolls_from_where_it_stands():
    problem = quadratic()
    solver = strategies(problem, pairs=4)
    signs(solver, 1)
    w = problem.init(torch.Generator().manual_seed(1))[0]["w"]
    for _ in range(K):
        w = w - LR * (problem.A @ w + problem.d)
    before = {
        "w": solver.core.weights.detached()["w"].clone(),
        "u": solver.core.search.u.detach().clone(),
    }
    found = solver.hypergradient()  # the particles train; the central weights do not
    at_start = problem.M @ (w - problem.w_bar)
    torch.testing.assert_close(found, response(problem, K).T @ at_start, rtol=1e-10, atol=1e-12)
    assert torch.equal(solver.core.weights.detached()["w"], before["w"])
    assert torch.equal(solver.core.search.u, before["u"])


# --- common random numbers ---


def test_particles_at_the_same_place_have_the_same_loss_bit_for_bit():
    """With masks of dropout in the network, and a σ below the rounding error of u."""
    solver = strategies(digits(hidden=[16]), spread=1e-9, inner_optimizer=sgd(0.1, momentum=0.9))
    for _ in range(3):
        solver.inner_phase(K, warmup=False)
        batch = solver.core.data.valid.peek()
        losses = {
            float(solver.method.judge(u, p, batch))
            for u, p in zip(solver.method.places, solver.method.particles, strict=True)
        }
        assert len(losses) == 1
        solver.outer_phase()
    other = strategies(digits(hidden=[16]), spread=1e-9, inner_optimizer=sgd(0.1, momentum=0.9))
    other.core.generator.manual_seed(5)
    for _ in range(3):
        other.step()
    assert (
        float(other.method.judge(other.core.search.u0, other.method.particles[0], batch))
        not in losses
    )  # the masks do matter


def test_the_central_weights_train_as_fixed_does_with_the_masks_of_their_particles():
    problem = normed(dropout=0.4)
    options = {"inner_steps": K, "inner_optimizer": sgd(0.1, momentum=0.9), "clip_norm": 1.0}
    solver, fixed = strategies(problem, spread=1e-15, **options), ready(problem, Fixed(**options))
    for _ in range(2):
        solver.method.noise()
        fixed.core.generator.set_state(solver.core.generator.get_state())
        solver.method.noise = lambda: solver.method.total.new_zeros(solver.method.total.shape)
        solver.step()
        fixed.step()
        for name, w in fixed.core.weights.detached().items():
            assert torch.equal(solver.core.weights.detached()[name], w)
            torch.testing.assert_close(
                solver.method.particles[0].params[name], w, rtol=1e-12, atol=1e-14
            )
        assert all(torch.equal(solver.core.carry[name], t) for name, t in fixed.core.carry.items())
        del solver.method.noise


def test_every_use_of_an_example_is_counted():
    solver = strategies(Ridge.synthetic(features=4, batch_size=8), pairs=2)
    solver.step(warmup=True)
    assert (solver.core.data.train.examples, solver.core.data.valid.examples) == (K * 8, 0)
    solver.step()
    assert (solver.core.data.train.examples, solver.core.data.valid.examples) == (
        K * 8 + 5 * K * 8,
        5 * 8,
    )
    solver.step(limit=1)
    assert (solver.core.data.train.examples, solver.core.data.valid.examples) == (
        K * 8 + 5 * K * 8 + 5 * 8,
        2 * 5 * 8,
    )
    assert (solver.inner_count, solver.outer_count) == (2 * K + 1, 2)


# --- what it can tune ---


class Whole(Problem):
    """L_T = ½ (w − n)² with a whole number n, L_V = ½ (w − 7)²: n* = 7."""

    def __init__(self, init):
        self.space = Space(n=Integer(low=0, high=10, init=init))

    def init(self, generator):
        return {"w": torch.zeros(()).double()}, {}

    def data(self, device, generator):
        return Data(FullBatch((torch.zeros(1),)), FullBatch((torch.zeros(1),)))

    def predict(self, hypers, params, carry, batch, *, train, generator):
        return params["w"], carry

    def inner_objective(self, hypers, params, prediction, batch):
        return 0.5 * (prediction - hypers["n"]).square().mean()

    def outer_objective(self, hypers, params, prediction, batch):
        return 0.5 * (prediction - 7.0).square()


@pytest.mark.parametrize("init", [2.0, 9.5])
def test_tunes_a_rounded_hyperparameter(init):
    """The rate of rounding up is tuned.

    With σ = 1 in place of 0.3 the loss would be smoothed over [5, 9], and the end be near 7.6.
    """
    solver = strategies(
        Whole(init), outer_optimizer=partial(torch.optim.Adam, lr=0.1), pairs=1, horizon=4 * K
    )
    for _ in range(80):
        solver.step()
    assert abs(float(10 * torch.sigmoid(solver.core.search.u0)) - 7) < 0.3
    assert solver.solution().hypers["n"] == 7


def test_tunes_dropout_away_where_it_harms():
    """From rates of 0.7, under which a small network learns nearly nothing."""
    high = {name: {"init": 0.7} for name in ("input_dropout", "dropout1")}
    optimizer = partial(torch.optim.RMSprop, lr=0.1)
    solver = strategies(
        digits(hidden=[16], space=high),
        inner_optimizer=sgd(0.05, momentum=0.9),
        outer_optimizer=optimizer,
        inner_steps=5,
    )
    for _ in range(15):
        solver.step()
    hypers = solver.solution().hypers
    assert hypers["input_dropout"] < 0.6
    assert hypers["dropout1"] < 0.6


def tuned_rate(**rate):
    """Return a quadratic with a tuned learning rate: the larger it is, the faster L_V falls."""
    problem = quadratic(
        space={"hyper": {"frozen": True}, "rate": {"optimizer": "lr", "init": 0.003} | rate}
    )
    problem.w_bar = -torch.linalg.solve(problem.A, problem.d)
    return problem


def test_tunes_a_learning_rate():
    problem, outer = tuned_rate(), partial(torch.optim.RMSprop, lr=0.1)
    solver = strategies(problem, outer_optimizer=outer, inner_steps=5, inner_optimizer=sgd(1.0))
    fixed = ready(problem, Fixed(inner_steps=5, inner_optimizer=sgd(1.0)))
    for _ in range(30):
        solver.step()
        fixed.step()
    assert solver.solution().hypers["rate"] > 0.03
    batch = solver.core.data.valid.peek()
    ours, theirs = (problem.outer_loss(*s.solution(), batch)[0] for s in (solver, fixed))
    assert ours < 0.5 * theirs


def test_tunes_momentum_beside_it():
    problem = tuned_rate(frozen=True)
    problem.space = problem.space.override({"momentum": {"optimizer": "momentum", "init": 0.3}})
    optimizer = partial(torch.optim.RMSprop, lr=0.1)
    solver = strategies(
        problem, outer_optimizer=optimizer, inner_steps=5, inner_optimizer=sgd(1.0, momentum=0.5)
    )
    for _ in range(30):
        solver.step()
    assert solver.solution().hypers["momentum"] > 0.6


def test_an_optimizer_without_a_differentiable_form_is_refused():
    with pytest.raises(Refused, match=r"Rprop has no differentiable form"):
        strategies(quadratic(), inner_optimizer=partial(torch.optim.Rprop, lr=0.1))


@pytest.mark.parametrize("make", [every_domain, Recurrent, normed], ids=lambda make: make.__name__)
def test_any_problem_runs(make):
    solver = strategies(make(), outer_optimizer=partial(torch.optim.RMSprop, lr=0.03))
    before = solver.core.search.u.detach().clone()
    for _ in range(3):
        metrics = solver.step()
    assert all(bool(torch.isfinite(value)) for value in metrics.values())
    assert {
        "inner_loss",
        "outer_loss",
        "hypergradient_norm",
        "hypergradient_snr",
        "particle_spread",
        "lost_pairs",
    } == set(metrics)
    assert bool((solver.core.search.u != before).any())


# --- convergence ---


def regret(problem, hypers):
    """L_V(λ, w*(λ)) − L_V(λ*, w*(λ*))."""
    batch = problem.data(CPU, torch.Generator()).valid.peek()

    def loss(hypers):
        best = {name: w.double() for name, w in problem.best_response(hypers).items()}
        return problem.outer_loss(hypers, best, {}, batch)[0]

    return float(loss(hypers) - loss(problem.optimum()))


@pytest.mark.parametrize(
    ("init", "persistent"), [(-7.0, True), (0.0, True), (2.0, True), (-7.0, False)]
)
@pytest.mark.parametrize("kind", ["quadratic", "ridge"])
def test_converges_to_the_optimum(kind, init, persistent):
    """120 rounds of (2 + 1) × 5 training batches leave less than an eighth of the initial regret.

    The rest is the noise of a single pair (persistent) or the bias (truncated).
    """
    if kind == "quadratic":
        problem = quadratic(hypers=1, space={"hyper": {"init": init}})
        solver = quickly(strategies(problem, persistent=persistent, **CONVERGING))
    else:
        problem = Ridge.synthetic(dtype=torch.float64, space={"log_decay": {"init": init}})
        solver = strategies(problem, persistent=persistent, **CONVERGING)
    before = regret(problem, solver.solution().hypers)
    for _ in range(120):
        solver.step()
    after = regret(problem, solver.solution().hypers)
    assert after < 0.125 * before


CONVERGING = {
    "pairs": 1,
    "inner_steps": 5,
    "inner_optimizer": sgd(0.1, momentum=0.9),
    "outer_optimizer": partial(torch.optim.Adam, lr=0.15),
    "horizon": 25,
}


# --- lost pairs ---


class FarMethod(EvolutionMethod):
    """Two pairs with fixed perturbations of the learning rate.

    A rate near 0.1 trains w. A rate of 30, in the second pair, makes w infinite in a long unroll.
    """

    def noise(self):
        return torch.tensor([[0.1], [32.0]]).double()[: len(self.total)]


class Far(EvolutionStrategies):
    """Evolution strategies with the perturbations of `FarMethod`."""

    def start(self, core):
        return FarMethod(self, core)


def test_a_pair_that_diverges_is_left_out_and_reported(tmp_path):
    problem = tuned_rate(init=0.1)
    options = {"inner_steps": 120, "inner_optimizer": sgd(LR), "outer_optimizer": sgd(0.01)}
    solver = ready(problem, Far(**options))
    metrics = solver.step()
    assert metrics["lost_pairs"] == 0.5
    assert all(bool(torch.isfinite(value)) for value in metrics.values())
    assert bool(torch.isfinite(solver.core.search.u).all())
    assert solver.services.bad_step() is None
    assert not solver.warnings({"lost_pairs": 0.0})
    runner = Runner(
        examples=600, warmup_epochs=0, evaluate_every=120, progress="none", picture=False
    )
    with pytest.warns(
        SolverWarning, match="50% of the pairs of particles had a loss that is not finite"
    ):
        summary = runner.run(problem, Far(**options), directory=tmp_path / "run")
    assert not summary["diverged"]


def test_losses_far_apart_give_a_warning():
    solver = strategies(quadratic())
    assert not solver.warnings({"particle_spread": 0.5, "outer_loss": 1.0, "lost_pairs": 0.0})
    (sentence,) = solver.warnings(
        {"particle_spread": 500.0, "outer_loss": 1.0, "lost_pairs": 0.0}
    ).values()
    assert "vary by 500, and that of the central weights is 1" in sentence


def test_where_every_pair_is_lost_nothing_moves():
    problem = tuned_rate(init=0.1)
    solver = strategies(problem, outer_optimizer=sgd(0.1))
    solver.method.judge = lambda u, point, batch: problem.w_bar.new_tensor(
        math.nan if u is not solver.core.search.u0 else 1.0
    )
    before = solver.core.search.u.detach().clone()
    metrics = solver.step()
    assert metrics["lost_pairs"] == 1
    assert torch.equal(solver.core.search.u, before)


# --- the rest of a solver's duties ---


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("rate", [False, True])
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(persistent, rate):
    problem = normed(dropout=0.3)
    if rate:
        problem.space = problem.space.override({"rate": {"optimizer": "lr", "init": 0.05}})
    options = {
        "inner_optimizer": partial(torch.optim.Adam, lr=0.05) if rate else sgd(0.05, momentum=0.9),
        "outer_optimizer": partial(torch.optim.RMSprop, lr=0.03),
        "inner_scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
        "clip_norm": 1.0,
        "persistent": persistent,
        "horizon": 3 * K,
    }

    def rounds(solver, n):
        for _ in range(n):
            solver.step()
            solver.epoch_ended(1.0)

    solver = strategies(problem, **options)
    rounds(solver, 2)
    file = io.BytesIO()
    torch.save(
        (
            solver.state_dict(),
            solver.core.data.train.state_dict(),
            solver.core.data.valid.state_dict(),
        ),
        file,
    )
    rounds(solver, 3)  # over the horizon

    resumed = strategies(problem, seed=2, **options)
    file.seek(0)
    state, train, valid = torch.load(file, weights_only=True)
    resumed.load_state_dict(state)
    resumed.core.data.train.load_state_dict(train)
    resumed.core.data.valid.load_state_dict(valid)
    rounds(resumed, 3)
    ours, theirs = (tree_leaves((s.state_dict(), s.solution())) for s in (resumed, solver))
    assert len(ours) == len(theirs) > 10
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize(
    "make", [lambda: digits(hidden=[16]), tuned_rate, lambda: normed(dropout=0.3), every_domain]
)
def test_no_step_waits_for_the_device(make, persistent):
    solver = strategies(make(), persistent=persistent, horizon=2 * K, clip_norm=1.0)
    solver.step(limit=1)
    with no_waiting():
        solver.step(warmup=True)
        for _ in range(3):
            solver.step()
        solver.hypergradient()


@pytest.mark.parametrize(
    "wrong", [{"pairs": 0}, {"horizon": 0}, {"spread": 0.0}, {"spread": -1.0}, {"inner_steps": 0}]
)
def test_settings_out_of_range_are_errors(wrong):
    with pytest.raises(BilevelError, match=next(iter(wrong))):
        EvolutionStrategies(**wrong)


def test_a_run_counts_the_particles_in_its_budget_of_examples(tmp_path):
    problem = Ridge.synthetic(dtype=torch.float64, space={"log_decay": {"init": 2.0}})
    runner = Runner(
        examples=50_000, warmup_epochs=0, evaluate_every=50, progress="none", picture=False
    )
    summary = runner.run(problem, EvolutionStrategies(**CONVERGING), directory=tmp_path / "run")
    assert summary["stopped"] == "examples"
    a_round = (
        60 * (5 + 1) * (2 + 1)
    )  # training and validation batches, of the particles and of the centre
    assert 50_000 <= summary["examples"] < 50_000 + a_round
    assert summary["steps"] == 5 * -(-50_000 // a_round)  # rounded up
    initial, final = (float(summary[key]["log_decay"]) for key in ("initial", "hypers"))
    assert regret(problem, {"log_decay": torch.tensor(final)}) < 0.5 * regret(
        problem, {"log_decay": torch.tensor(initial)}
    )
