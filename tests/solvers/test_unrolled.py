"""Unrolled differentiation: closed forms, central differences of torch.optim, equal modes."""

import copy
import gc
import io
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from bilevel import BilevelError, Interval, Positive, Real, Refused, Runner, SolverWarning
from bilevel.domains import optimizer_setting
from bilevel.problems import Quadratic, Ridge
from bilevel.solvers import Fixed
from bilevel.solvers.autodiff.pullback import flat
from bilevel.solvers.optim.settings import apply_settings, optimizer_settings
from bilevel.solvers.unroll.forward import Forward
from bilevel.solvers.unroll.reverse import Reverse
from bilevel.solvers.unrolled import Unrolled
from tests.support.device_waits import no_waiting
from tests.support.solver_cases import CPU, Decayed, normed, ready, set_to, sgd

MODES = {
    "reverse": Reverse(),
    "checkpointed": Reverse(checkpoint=True),
    "forward": Forward(),
}
all_modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)

Adam, AdamW, RMSprop = torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop
OPTIMIZERS = {
    "SGD": (sgd(0.3), {"lr": 0.3}),
    "SGD, momentum": (sgd(0.1, momentum=0.9), {"lr": 0.1, "momentum": 0.9}),
    "SGD, Nesterov, decay": (
        sgd(0.1, momentum=0.5, nesterov=True),
        {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.2},
    ),
    "Adam": (partial(Adam, lr=0.05), {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 0.01}),
    "AdamW": (partial(AdamW, lr=0.05), {"lr": 0.05, "weight_decay": 0.1}),
    "RMSprop": (
        partial(RMSprop, lr=0.02, momentum=0.5),
        {"lr": 0.02, "alpha": 0.9, "eps": 0.01, "momentum": 0.5},
    ),
}
all_optimizers = pytest.mark.parametrize(
    ("optimizer", "settings"), OPTIMIZERS.values(), ids=OPTIMIZERS
)


def network(settings=(), norm=None):
    """Return a nonlinear network with dropout masks, a tuned decay and optimizer settings."""
    torch.manual_seed(0)
    layers = (
        nn.Linear(4, 5),
        *([] if norm is None else [norm]),
        nn.Tanh(),
        nn.Dropout(0.3),
        nn.Linear(5, 3),
    )
    tuned = {
        f"of_{name}": optimizer_setting(name, init=value) for name, value in dict(settings).items()
    }
    return Decayed(nn.Sequential(*layers), decay=Positive(init=0.1), **tuned)


def quadratic(**options):
    return Quadratic.random(
        **{
            "weights": 5,
            "hypers": 2,
            "condition": 5.0,
            "seed": 3,
            "dtype": torch.float64,
            **options,
        }
    )


def at_optimum(solver, problem):
    """Weights where L_T is stationary at the present λ."""
    best = problem.best_response(problem.space.constrain(solver.core.search.u.detach()))
    for name, leaf in solver.core.weights.tensors.items():
        set_to(leaf, best[name])
    return solver


def difference(function, x, h=1e-3):
    """The gradient by differences of fourth order: (8 f₁ − 8 f₋₁ − f₂ + f₋₂)/12h."""
    out = torch.zeros_like(x)
    for i in range(x.numel()):
        e = torch.zeros_like(x)
        e[i] = h
        f1, f2 = (function(x + k * e) - function(x - k * e) for k in (1, 2))
        out[i] = (8 * f1 - f2) / (12 * h)
    return out


def trained_by_torch(make, optimizer, steps, clip_norm=None):
    """Return u ↦ L_V after `steps` steps of torch.optim at λ(u).

    Initial weights, batches and masks are those of `ready`.
    """

    def loss(u):
        problem = make()
        fixed = ready(
            problem, Fixed(inner_steps=steps, inner_optimizer=optimizer, clip_norm=clip_norm)
        )
        hypers = problem.space.constrain(u)
        apply_settings(
            fixed.core.weights.optimizer.param_groups[0], optimizer_settings(problem.space, hypers)
        )
        fixed.rule.u = u
        fixed.step()
        return problem.outer_loss(
            hypers, fixed.core.weights.detached(), fixed.core.carry, fixed.core.data.valid.next()
        )[0]

    return loss


# --- the hypergradient is the derivative of training ---


@pytest.mark.parametrize("clip_norm", [None, 0.3])
@all_optimizers
def test_it_is_the_derivative_of_torch_optims_own_training(optimizer, settings, clip_norm):
    """The derivatives in the decay and in every optimizer setting agree to 1e-8."""
    make, expected = partial(network, settings), None
    for mode in MODES.values():
        solver = ready(
            make(),
            Unrolled(mode=mode, inner_steps=5, inner_optimizer=optimizer, clip_norm=clip_norm),
        )
        if expected is None:
            u = solver.core.search.u.detach().clone()
            expected = difference(trained_by_torch(make, optimizer, 5, clip_norm), u)
            assert (expected.abs() > 1e-7).all()
        torch.testing.assert_close(solver.hypergradient(), expected, rtol=0, atol=1e-8)


def statistics_of_the_batch():
    return nn.BatchNorm1d(5, track_running_stats=False)


@pytest.mark.parametrize(
    "norm", [statistics_of_the_batch, partial(nn.LayerNorm, 5)], ids=["batch norm", "layer norm"]
)
@all_modes
def test_norms_are_differentiated_twice_rightly(mode, norm):
    optimizer, settings = OPTIMIZERS["SGD, momentum"]
    solver = ready(
        network(settings, norm()), Unrolled(mode=mode, inner_steps=5, inner_optimizer=optimizer)
    )
    u = solver.core.search.u.detach().clone()
    expected = difference(trained_by_torch(lambda: network(settings, norm()), optimizer, 5), u)
    torch.testing.assert_close(solver.hypergradient(), expected, rtol=0, atol=1e-8)


CASES = {
    "plain": lambda: None,
    "batch norm": lambda: nn.BatchNorm1d(5),
    "softmax": lambda: nn.Softmax(-1),
}


@pytest.mark.parametrize("norm", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", ["SGD, momentum", "Adam", "RMSprop"])
def test_forward_and_checkpointed_are_reverse(name, norm):
    """Gradients agree up to rounding, and weights, statistics and masks bit for bit."""

    optimizer, settings = OPTIMIZERS[name]

    def run(mode):
        solver = ready(
            network(settings, norm()),
            Unrolled(mode=mode, inner_steps=7, inner_optimizer=optimizer, clip_norm=1.0),
        )
        solver.step(warmup=True)
        solver.step(warmup=True)
        gradient = solver.hypergradient()
        return gradient, [
            *solver.core.weights.leaves,
            *solver.core.carry.values(),
            solver.core.generator.get_state(),
        ]

    reverse, checkpointed, forward = (run(mode) for mode in MODES.values())
    assert reverse[0].norm() > 1e-4
    torch.testing.assert_close(checkpointed[0], reverse[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(forward[0], reverse[0], rtol=0, atol=1e-10)
    assert all(torch.equal(a, b) for a, b in zip(checkpointed[1], reverse[1], strict=True))
    torch.testing.assert_close(forward[1], reverse[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("truncate", [1, 3, 7, 99])
def test_a_truncated_one_is_the_same_with_checkpoints(truncate):
    found = []
    for mode in (Reverse(truncate), Reverse(truncate, checkpoint=True)):
        solver = ready(
            network(), Unrolled(mode=mode, inner_steps=7, inner_optimizer=sgd(0.1, momentum=0.9))
        )
        found.append((solver.hypergradient(), *solver.core.weights.leaves))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-14)
    whole = ready(
        network(), Unrolled(inner_steps=7, inner_optimizer=sgd(0.1, momentum=0.9))
    ).hypergradient()
    assert torch.allclose(found[0][0], whole, rtol=1e-9) == (truncate >= 7)


@all_modes
def test_the_answer_is_differentiable_in_the_offset(mode):
    """Its derivative is −A⁻¹(I − (I − ηA)^K) B; forward mode answers w_K + Zδ in value too."""
    problem, η, K = quadratic(), 0.4, 6
    solver = ready(problem, Unrolled(mode=mode, inner_steps=K, inner_optimizer=sgd(η)))
    solver.inner_phase(K, warmup=False)

    def answer(offset):
        return solver.method.respond(offset)["w"]

    A, B, eye = problem.A, problem.B, torch.eye(5).double()
    Z = -torch.linalg.solve(A, (eye - torch.linalg.matrix_power(eye - η * A, K)) @ B)
    zero, δ = torch.zeros(2).double(), torch.tensor([0.3, -2.0]).double()
    v = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0]).double()
    torch.testing.assert_close(
        torch.autograd.functional.vjp(answer, zero, v)[1], Z.T @ v, rtol=0, atol=1e-13
    )
    torch.testing.assert_close(answer(zero), solver.core.weights.detached()["w"], rtol=0, atol=0)
    if isinstance(mode, Forward):
        torch.testing.assert_close(answer(δ), answer(zero) + Z @ δ, rtol=0, atol=1e-13)


# --- closed forms, and the error of K steps ---


@all_modes
def test_the_error_of_k_steps_at_a_stationary_point_is_the_contraction(mode):
    """The error is Bᵀ A⁻¹ (I − ηA)^K M(w* − w̄), and vanishes as fast as its slowest term."""
    problem, η = quadratic(direct=2.0), 0.5
    A, B, M, eye = problem.A, problem.B, problem.M, torch.eye(5).double()
    errors = {}
    for K in (1, 5, 20, 30):
        solver = at_optimum(
            ready(problem, Unrolled(mode=mode, inner_steps=K, inner_optimizer=sgd(η))), problem
        )
        hypers = problem.space.constrain(solver.core.search.u.detach())
        w = problem.best_response(hypers)["w"]
        predicted = B.T @ torch.linalg.solve(
            A, torch.linalg.matrix_power(eye - η * A, K) @ M @ (w - problem.w_bar)
        )
        error = solver.hypergradient() - problem.hypergradient(hypers)
        torch.testing.assert_close(error, predicted, rtol=1e-9, atol=1e-13)
        errors[K] = error.norm().item()
    slowest = 1 - η * torch.linalg.eigvalsh(A)[0].item()
    assert errors[30] / errors[20] == pytest.approx(slowest**10, rel=0.15)
    assert errors[1] > 0.1


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_error_of_the_last_steps_at_a_stationary_point_is_that_of_so_many_steps(checkpoint):
    problem, η, K = quadratic(direct=1.0), 0.5, 12
    A, B, M, eye = problem.A, problem.B, problem.M, torch.eye(5).double()
    for T in (1, 4, 11):
        mode = Reverse(truncate=T, checkpoint=checkpoint)
        solver = at_optimum(
            ready(problem, Unrolled(mode=mode, inner_steps=K, inner_optimizer=sgd(η))), problem
        )
        hypers = problem.space.constrain(solver.core.search.u.detach())
        w = problem.best_response(hypers)["w"]
        predicted = B.T @ torch.linalg.solve(
            A, torch.linalg.matrix_power(eye - η * A, T) @ M @ (w - problem.w_bar)
        )
        error = solver.hypergradient() - problem.hypergradient(hypers)
        torch.testing.assert_close(error, predicted, rtol=1e-9, atol=1e-13)
        assert error.norm() > 1e-3


RIDGES = {
    "one λ": partial(Ridge.synthetic, features=4, dtype=torch.float64),
    "one per feature": partial(Ridge.synthetic, features=4, per_feature=True, dtype=torch.float64),
}


@pytest.mark.parametrize(
    "optimizer", [sgd(0.5), sgd(0.3, momentum=0.5, nesterov=True)], ids=["SGD", "Nesterov"]
)
@pytest.mark.parametrize("make", RIDGES.values(), ids=RIDGES)
@all_modes
def test_a_long_unroll_is_exact_on_ridge(mode, make, optimizer):
    problem = make()
    solver = ready(problem, Unrolled(mode=mode, inner_steps=80, inner_optimizer=optimizer))
    exact = problem.hypergradient(problem.space.constrain(solver.core.search.u.detach()))
    torch.testing.assert_close(solver.hypergradient(), exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("mode", "init"), [(Reverse(), -3.0), (Reverse(truncate=9), 3.0)])
def test_it_descends_to_the_best_hyperparameters(mode, init):
    problem = quadratic(condition=2.0, space={"hyper": {"init": init}})
    J = problem.best_response_jacobian()
    rate = 1.5 / torch.linalg.eigvalsh(J.T @ problem.M @ J)[-1].item()
    options = {"inner_optimizer": sgd(1.0), "outer_optimizer": sgd(rate)}
    solver = ready(problem, Unrolled(mode=mode, inner_steps=10, **options))
    for _ in range(80):
        metrics = solver.step()
    known = {"inner_loss", "outer_loss", "adjoint_growth"}
    known |= {"hypergradient_norm", "hypergradient_snr"}
    assert metrics.keys() == known
    hyper, best = solver.solution().hypers["hyper"], problem.optimum()["hyper"]
    torch.testing.assert_close(hyper, best, rtol=0, atol=5e-3)


def test_with_restart_every_round_is_k_steps_from_the_initial_weights():
    """With restart, w_K and the hypergradient have their closed forms after several rounds."""
    problem, η, K = quadratic(direct=1.0), 0.3, 4
    A, B, M, eye = problem.A, problem.B, problem.M, torch.eye(5).double()
    power = torch.linalg.matrix_power(eye - η * A, K)
    for restart in (True, False):
        solver = ready(problem, Unrolled(restart=restart, inner_steps=K, inner_optimizer=sgd(η)))
        w0 = solver.core.weights.detached()["w"].clone()
        for _ in range(3):
            solver.step()
        λ = solver.core.search.u.detach()
        w = problem.best_response({"hyper": λ})["w"]
        w = w + power @ (w0 - w)
        Z = -torch.linalg.solve(A, (eye - power) @ B)
        expected = Z.T @ M @ (w - problem.w_bar) + problem.P @ (λ - problem.lambda_bar)
        assert torch.allclose(solver.hypergradient(), expected, rtol=0, atol=1e-12) == restart
        assert torch.allclose(solver.core.weights.detached()["w"], w, rtol=0, atol=1e-12) == restart


def test_a_restart_forgets_the_optimizers_memory_and_the_statistics():
    problem = normed()
    first, later = (
        ready(problem, Unrolled(restart=True, inner_steps=3, inner_optimizer=partial(Adam, lr=0.1)))
        for _ in range(2)
    )
    later.step()
    for solver in (first, later):  # the same batches and λ
        solver.core.data.train.next, solver.core.data.valid.next = (
            solver.core.data.train.peek,
            solver.core.data.valid.peek,
        )
        set_to(solver.core.search.u, torch.zeros(1))
        solver.core.search.recentre()
    torch.testing.assert_close(later.hypergradient(), first.hypergradient(), rtol=0, atol=1e-15)
    torch.testing.assert_close(later.core.carry, first.core.carry)
    assert later.core.weights.optimizer.state[later.core.weights.leaves[0]]["step"] == 3


# --- warm-up, schedules, what is written back ---


@pytest.mark.parametrize(
    "optimizer", [sgd(0.1, momentum=0.9), partial(Adam, lr=0.01)], ids=["SGD", "Adam"]
)
def test_warm_up_is_plain_training(optimizer):
    """Warm-up equals plain training bit for bit; a round then continues from there."""
    options = {"inner_steps": 4, "inner_optimizer": optimizer, "clip_norm": 1.0}
    solver, fixed = ready(network(), Unrolled(**options)), ready(network(), Fixed(**options))
    for _ in range(2):
        ours, theirs = solver.step(warmup=True), fixed.step(warmup=True)
        assert torch.equal(ours["inner_loss"], theirs["inner_loss"])
    assert all(
        torch.equal(a, b)
        for a, b in zip(solver.core.weights.leaves, fixed.core.weights.leaves, strict=True)
    )
    ours, theirs = solver.step(), fixed.step()
    torch.testing.assert_close(ours["inner_loss"], theirs["inner_loss"], rtol=1e-12, atol=0)
    torch.testing.assert_close(
        solver.core.weights.leaves, fixed.core.weights.leaves, rtol=1e-11, atol=1e-13
    )
    states = [s.core.weights.optimizer.state_dict()["state"] for s in (solver, fixed)]
    for index, theirs in states[1].items():
        torch.testing.assert_close(states[0][index], theirs, rtol=1e-11, atol=1e-13)
    assert solver.core.search.u != ready(network(), Unrolled()).core.search.u


def test_plain_steps_follow_the_tuned_settings():
    """Warm-up takes the learning rate and the momentum that outer steps have moved."""
    settings = {"lr": 0.1, "momentum": 0.5}
    optimizer = sgd(9.0, momentum=0.1)
    solver = ready(network(settings), Unrolled(inner_steps=3, inner_optimizer=optimizer))
    solver.step(warmup=True)
    fixed = ready(network(settings), Fixed(inner_steps=3, inner_optimizer=optimizer))
    fixed.step()
    torch.testing.assert_close(
        solver.core.weights.leaves, fixed.core.weights.leaves, rtol=1e-12, atol=1e-14
    )
    for _ in range(3):
        solver.step()
        fixed.core.weights.optimizer.load_state_dict(
            copy.deepcopy(solver.core.weights.optimizer.state_dict())
        )
    for theirs, ours in zip(fixed.core.weights.leaves, solver.core.weights.leaves, strict=True):
        set_to(theirs, ours.detach())
    moved = solver.core.problem.space.constrain(solver.core.search.u.detach())
    assert abs(moved["of_lr"] - 0.1) > 1e-3
    for name in settings:
        fixed.core.weights.optimizer.param_groups[0][name] = moved[f"of_{name}"].item()
    fixed.rule.u, fixed.core.generator, fixed.core.data = (
        solver.core.search.u.detach(),
        torch.Generator(),
        solver.core.data,
    )
    fixed.core.generator.set_state(solver.core.generator.get_state())
    batch = solver.core.data.train.peek()
    solver.core.data.train.next = lambda: batch
    solver.step(warmup=True)
    fixed.step()
    torch.testing.assert_close(
        solver.core.weights.leaves, fixed.core.weights.leaves, rtol=1e-12, atol=1e-14
    )


def test_a_schedule_acts_on_a_tuned_learning_rate():
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.0)
    solver = ready(network({"lr": 0.1}), Unrolled(inner_scheduler=schedule))
    solver.step()
    solver.epoch_ended(None)
    before = [w.detach().clone() for w in solver.core.weights.leaves]
    solver.step()
    assert all(torch.equal(a, b) for a, b in zip(before, solver.core.weights.leaves, strict=True))


@pytest.mark.parametrize(
    ("mode", "restart"),
    [(Reverse(), True), (Reverse(truncate=3, checkpoint=True), False), (Forward(), False)],
)
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(mode, restart):
    def made(seed):
        options = {"inner_steps": 5, "inner_optimizer": partial(Adam, lr=0.02), "clip_norm": 1.0}
        schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
        problem = network({"lr": 0.02, "beta1": 0.9}, nn.BatchNorm1d(5))
        return ready(
            problem,
            Unrolled(mode=mode, restart=restart, inner_scheduler=schedule, **options),
            seed=seed,
        )

    solver, file = made(1), io.BytesIO()
    for _ in range(2):
        solver.step()
        solver.epoch_ended(None)
    torch.save(
        (
            solver.state_dict(),
            solver.core.data.train.state_dict(),
            solver.core.data.valid.state_dict(),
        ),
        file,
    )
    resumed = made(2)
    file.seek(0)
    state, train, valid = torch.load(file, weights_only=True)
    resumed.load_state_dict(state)
    resumed.core.data.train.load_state_dict(train)
    resumed.core.data.valid.load_state_dict(valid)
    for s in (solver, resumed):
        s.step(warmup=True)
        s.step()
    ours, theirs = (tree_leaves((s.state_dict(), s.solution())) for s in (resumed, solver))
    assert len(ours) == len(theirs) > 20
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# --- memory ---


class Saved:
    """Bytes that autograd's graphs hold, now and at most."""

    def __init__(self):
        self.now = self.most = 0

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(
            partial(Held, self), lambda held: held.tensor
        )
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


class Held:
    def __init__(self, saved, tensor):
        self.saved, self.tensor, self.bytes = (
            saved,
            tensor.detach(),
            tensor.nbytes,
        )  # an output would hold its own node
        saved.now += self.bytes
        saved.most = max(saved.most, saved.now)

    def __del__(self):
        self.saved.now -= self.bytes


def most_saved(mode, steps):
    """By a round of `steps` steps, and what is still held after it."""
    solver = ready(
        network(), Unrolled(mode=mode, inner_steps=steps, inner_optimizer=sgd(0.1, momentum=0.9))
    )
    with Saved() as saved:
        solver.step()
        assert saved.now == 0, "a graph outlives its round"
    return saved.most


def test_memory_grows_with_k_with_its_root_and_not_at_all():
    """Four and 64 steps: 16 times as much, 4 times (segments of 2 and of 8 steps), and the same."""
    ratios = {name: most_saved(mode, 64) / most_saved(mode, 4) for name, mode in MODES.items()}
    assert 13 < ratios["reverse"] < 17
    assert 3 < ratios["checkpointed"] < 4.2
    assert ratios["forward"] == pytest.approx(1.0, abs=0.02)
    assert most_saved(Reverse(truncate=4), 64) == pytest.approx(most_saved(Reverse(), 4), rel=0.02)


@pytest.mark.parametrize(
    ("steps", "held"), [(1, 1), (2, 2), (9, 3), (10, 4), (16, 4), (17, 5), (100, 10)]
)
def test_checkpoints_are_about_the_root_of_the_steps(steps, held):
    solver = ready(quadratic(), Unrolled(mode=Reverse(checkpoint=True), inner_steps=steps))
    solver.inner_phase(steps, warmup=False)
    sizes = [len(segment.batches) for segment in solver.method.unroll.segments]
    assert len(sizes) <= held
    assert sum(sizes) == steps
    assert max(sizes) <= math.ceil(math.sqrt(steps))


def live():
    gc.collect()
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


@pytest.mark.parametrize(
    ("mode", "rounds"), [(Reverse(), 200), (Reverse(checkpoint=True), 50), (Forward(), 50)]
)
def test_nothing_of_an_earlier_outer_step_stays_alive(mode, rounds):
    solver = ready(
        quadratic(), Unrolled(mode=mode, inner_steps=1, inner_optimizer=sgd(0.1, momentum=0.5))
    )
    for _ in range(10):
        solver.step()
    before = live()
    for _ in range(rounds):
        solver.step()
    assert live() == before


def test_the_users_module_is_not_touched():
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    solver = ready(Decayed(module), Unrolled(inner_steps=3))
    solver.step(warmup=True)
    solver.step()
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())
    assert all(p.grad is None and p.is_leaf for p in module.parameters())


# --- steps ---


@pytest.mark.parametrize("settings", [{}, {"lr": 0.1, "momentum": 0.9}], ids=["decay", "settings"])
@all_modes
def test_no_step_waits_for_the_device(mode, settings):
    problem = network(settings, nn.BatchNorm1d(5))
    solver = ready(
        problem,
        Unrolled(mode=mode, inner_steps=3, inner_optimizer=sgd(0.1, momentum=0.9), clip_norm=1.0),
    )
    solver.step()
    with no_waiting():
        solver.step(warmup=True)
        solver.step()
        solver.step(limit=1)


@all_modes
def test_the_first_loss_that_is_not_finite_is_noted(mode):
    solver = ready(network(), Unrolled(mode=mode, inner_steps=2))
    good, count = solver.core.data.train.next, iter(range(100))
    solver.core.data.train.next = lambda: (
        good()[0] * (math.nan if next(count) == 2 else 1),
        torch.arange(8) % 3,
    )
    solver.step()
    assert solver.services.bad_step() is None
    solver.step()
    assert solver.services.bad_step() == 3


def test_a_hypergradient_that_is_not_finite_gives_a_warning():
    solver = ready(quadratic(), Unrolled(inner_steps=3))
    assert solver.warnings({"hypergradient_norm": 1.0}) == solver.warnings({}) == {}
    for bad in (math.nan, math.inf):
        assert (
            "through 3 inner steps is not finite"
            in solver.warnings({"hypergradient_norm": bad})["hypergradient"]
        )


# --- what is refused ---


def test_a_sampled_hyperparameter_is_refused_by_name():
    rate = Interval(low=0.0, high=0.9, init=0.3, differentiable=False)
    with pytest.raises(
        Refused, match="Unrolled needs ∂L_T/∂λ, but `rate` is sampled or rounded and has none"
    ):
        ready(Decayed(nn.Linear(4, 3), decay=Positive(init=0.1), rate=rate), Unrolled())


def test_an_optimizer_without_a_differentiable_form_is_refused():
    with pytest.raises(Refused, match="Rprop has no differentiable form"):
        ready(network(), Unrolled(inner_optimizer=partial(torch.optim.Rprop, lr=0.1)))


def test_forward_mode_refuses_columns_that_do_not_fit():
    many = Decayed(
        nn.Linear(4, 3000),
        decay=Positive(init=0.1),
        idle=Real(init=0.0, shape=(100_000,), per_example=False),
    )
    with pytest.raises(Refused, match="100,001 hyperparameters"):
        ready(many, Unrolled(mode=Forward()))


def test_forward_mode_advises_against_many_hyperparameters():
    many = Decayed(
        nn.Linear(4, 3),
        decay=Positive(init=0.1),
        idle=Real(init=0.0, shape=(100,), per_example=False),
    )
    with pytest.warns(
        SolverWarning, match="once for each of the 101 coordinates of λ, .*mode=Reverse"
    ):
        ready(many, Unrolled(mode=Forward()))


def test_a_run_whose_hypergradient_explodes_says_why_it_diverged(tmp_path):
    """The warning comes first, though λ is not finite at the same evaluation."""
    solver = Unrolled(inner_steps=60, inner_optimizer=sgd(1e3))
    with pytest.warns(
        SolverWarning, match="the hypergradient through 60 inner steps is not finite"
    ):
        summary = Runner(epochs=60, warmup_epochs=0, progress="none", picture=False).run(
            quadratic(), solver, directory=tmp_path
        )
    assert "diverged" in str(summary)


@pytest.mark.parametrize("truncate", [0, -1])
def test_no_steps_to_differentiate_are_an_error(truncate):
    with pytest.raises(
        BilevelError, match=f"truncate={truncate} must be a whole number of at least 1"
    ):
        Reverse(truncate=truncate)


def test_a_layer_without_second_derivatives_is_refused():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return 2 * gradient

    class Doubled(nn.Linear):
        def forward(self, x):
            return Once.apply(super().forward(x))

    with pytest.raises(
        Refused, match="Unrolled needs second derivatives of L_T, which PyTorch lacks"
    ):
        ready(Decayed(Doubled(4, 3)), Unrolled())


def test_set_up_moves_nothing():
    """The dry run acts on a copy: batches, masks and weights are as without one."""
    solver, fixed = ready(network(), Unrolled()), ready(network(), Fixed())
    assert torch.equal(flat(solver.core.weights.leaves), flat(fixed.core.weights.leaves))
    assert torch.equal(solver.core.generator.get_state(), fixed.core.generator.get_state())
    assert solver.core.data.train.examples == 0
    assert solver.core.device == CPU
