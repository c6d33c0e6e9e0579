"""Tests of distilled data against ridge regression in closed form, and of retraining."""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bilevel import BilevelError, Real, Refused, SolverWarning, Space, check_problem, solvers
from bilevel.problems.dataset_distillation.initial_images import initial_images
from bilevel.problems.dataset_distillation.problem import Distillation
from bilevel.problems.dataset_distillation.recipes import distillation
from bilevel.problems.datasets.labelled_images import Images
from bilevel.problems.networks.mlp import MLP
from bilevel.solvers.base.dry_run import check_response
from bilevel.solvers.response.jacobian import Structured
from tests.support.solver_cases import ready, sgd

CPU, F64 = torch.device("cpu"), torch.float64
DECAY = 0.3


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def images():
    """Return two-by-two images of three classes, in float64."""
    draws = generator(3)

    def split(n):
        labels = torch.arange(n) % 3
        return torch.randn(n, 1, 2, 2, generator=draws, dtype=F64) + labels[
            :, None, None, None
        ], labels

    return Images(split(30), split(18), split(18), mean=0.5, std=2.0)


def ridge(images, **options):
    options = {
        "loss": "squared",
        "weight_decay": DECAY,
        "per_class": 2,
        "batch_size": None,
    } | options
    return Distillation(lambda: MLP([4, 3]).double(), images, **options)


def with_ones(x):
    return torch.cat([x.flatten(1), x.new_ones(len(x), 1)], 1)


def best_response(problem, hypers):
    """Return (X̃ᵀX̃/n + γ I)⁻¹ X̃ᵀỸ/n with a column of ones."""
    X, Y = with_ones(hypers["images"]), hypers.get("labels", F.one_hot(problem.labels, 3).double())
    n = len(X)
    W = torch.linalg.solve(
        X.T @ X / n + hypers["weight_decay"] * torch.eye(5, dtype=F64), X.T @ Y / n
    )
    return {"layers.0.weight": W[:4].T, "layers.0.bias": W[4]}


def truth(problem, images, u):
    """Return dL_V(w*(λ(u)))/du by autograd through the closed form."""
    u = u.clone().requires_grad_()
    w = best_response(problem, problem.space.constrain(u))
    real = with_ones((images.train[0] - images.mean) / images.std)
    W = torch.cat([w["layers.0.weight"].T, w["layers.0.bias"][None]])
    loss = 0.5 * (real @ W - F.one_hot(images.train[1], 3)).square().sum(1).mean()
    return torch.autograd.grad(loss, u)[0]


def at_best_response(solver):
    best = best_response(
        solver.core.problem, solver.core.problem.space.constrain(solver.core.search.u0)
    )
    with torch.no_grad():
        for name, leaf in solver.core.weights.tensors.items():
            leaf.copy_(best[name])
    return solver


VARIANTS = {
    "images": {},
    "labels too": {"soft_labels": True},
    "decay too": {"space": {"weight_decay": {"frozen": False}}},
}
all_variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


@all_variants
def test_the_closed_form_is_where_training_ends(images, options):
    problem = ridge(images, **options)
    hypers = problem.space.constrain(problem.space.init(F64))
    ours = problem.retrained(hypers, generator(1), steps=500, lr=0.1).params
    for name, w in best_response(problem, hypers).items():
        torch.testing.assert_close(ours[name], w, rtol=0, atol=1e-9)


@all_variants
def test_implicit_hypergradient_is_exact_at_the_best_response(images, options):
    solve = solvers.CG(iterations=20, tolerance=1e-14)
    solver = at_best_response(ready(ridge(images, **options), solvers.Implicit(linear_solve=solve)))
    expected = truth(solver.core.problem, images, solver.core.search.u0)
    torch.testing.assert_close(solver.hypergradient(), expected, rtol=1e-10, atol=1e-13)
    # two iterations do not solve a system of five eigenvalues, and the law must see it
    rough = at_best_response(
        ready(ridge(images, **options), solvers.Implicit(linear_solve=solvers.CG(iterations=2)))
    )
    assert (rough.hypergradient() - expected).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize("K", [5, 40])
def test_unrolling_misses_what_the_steps_have_not_contracted(images, K):
    """From w*(λ), the K-step hypergradient lacks (I − ηH)^K of the response.

    The relative error is at most (1 − ηγ)^K.
    """
    η = 0.2
    problem = ridge(images)
    solver = at_best_response(
        ready(problem, solvers.Unrolled(inner_steps=K, inner_optimizer=sgd(η)))
    )
    expected = truth(problem, images, solver.core.search.u0)
    X = with_ones(problem.space.constrain(solver.core.search.u0)["images"])
    eigenvalues = torch.linalg.eigvalsh(X.T @ X / len(X)) + DECAY
    error = ((solver.hypergradient() - expected).norm() / expected.norm()).item()
    assert 0.02 * (1 - η * eigenvalues.max().item()) ** K < error
    assert error < 5 * (1 - η * eigenvalues.min().item()) ** K


@pytest.mark.parametrize("name", ["SAMA", "SOBA", "Penalty", "implicit_identity"])
def test_cheaper_directions_descend(images, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolverWarning)
        solver = at_best_response(ready(ridge(images), getattr(solvers, name)()))
        for _ in range(30):  # the adjoint of SOBA and the penalized weights begin at nothing
            solver.inner_phase(1, warmup=True) if not isinstance(
                solver, solvers.SOBA
            ) else solver.step(warmup=True)
        expected = truth(solver.core.problem, images, solver.core.search.u0)
        assert torch.cosine_similarity(solver.hypergradient(), expected, dim=0) > 0.5


def test_what_is_distilled_is_learned_by_a_fresh_network(images):
    problem = ridge(images, per_class=1, start="noise")
    outer = partial(torch.optim.Adam, lr=0.1)
    solver = ready(
        problem, solvers.Implicit(linear_solve=solvers.CG(iterations=5), outer_optimizer=outer)
    )
    losses = []
    for _ in range(2):
        hypers = solver.solution().hypers
        fresh = problem.retrained(hypers, generator(9), steps=300, lr=0.1)
        losses.append(problem.outer_loss(*fresh, solver.core.data.valid.peek())[0])
        for _ in range(60):
            solver.step()
    assert losses[1] < 0.7 * losses[0]


# --- data ---


def test_training_sees_learned_images_alone_and_counts_them(images):
    problem = ridge(images)
    data = problem.data(CPU, generator())
    batch = data.train.next()
    assert set(batch) == {"index", "label"}
    assert (data.train.examples, data.train.size) == (6, 6)
    hypers = problem.space.constrain(problem.space.init(F64))
    moved = {**hypers, "images": hypers["images"] + 1}
    params, carry = problem.init(generator())
    assert (
        problem.inner_loss(hypers, params, carry, batch, None)[0]
        != problem.inner_loss(moved, params, carry, batch, None)[0]
    )
    real = data.valid.next()
    assert torch.equal(
        problem.outer_loss(hypers, params, carry, real)[0],
        problem.outer_loss(moved, params, carry, real)[0],
    )


def test_l_v_is_descended_on_training_images_and_evaluated_on_validation_images(images):
    data = ridge(images).data(CPU, generator())
    assert torch.equal(data.valid.next()["image"], images.train[0])
    assert torch.equal(torch.cat([batch["image"] for batch in data.valid.once()]), images.valid[0])
    assert torch.equal(torch.cat([batch["image"] for batch in data.test.once()]), images.test[0])


def test_pixels_are_in_stored_units(images):
    problem = ridge(images, start="real", per_class=10)
    hypers = problem.space.constrain(problem.space.init(F64))
    ours, stored = (
        sorted(map(tuple, x.flatten(1).round(decimals=9).tolist()))
        for x in (problem.pixels(hypers), images.train[0])
    )
    assert ours == stored


def test_starts(images):
    for label in range(3):
        own = images.train[0][images.train[1] == label]
        mean = initial_images(images, 1, "mean", generator())[label]
        torch.testing.assert_close(mean, (own.mean(0) - images.mean) / images.std)
        real = (
            initial_images(images, 2, "real", generator())[2 * label : 2 * label + 2] * images.std
            + images.mean
        )
        assert all(((own - x).abs().amax((1, 2, 3)) < 1e-12).any() for x in real)
    assert not torch.equal(
        initial_images(images, 1, "real", generator(0)),
        initial_images(images, 1, "real", generator(1)),
    )
    assert initial_images(images, 4, "noise", generator()).shape == (12, 1, 2, 2)


def test_labels_begin_at_their_class_and_are_distributions(images):
    problem = ridge(images, soft_labels=True)
    labels = problem.space.constrain(problem.space.init(F64))["labels"]
    torch.testing.assert_close(labels.sum(1), torch.ones(6, dtype=F64))
    torch.testing.assert_close(
        labels[torch.arange(6), problem.labels], torch.full((6,), 0.9, dtype=F64)
    )


# --- solvers and errors ---


def test_a_clean_problem_that_gradient_based_solvers_tune():
    known = {
        "implicit_cg": solvers.implicit_cg(),
        "implicit_neumann": solvers.implicit_neumann(),
        "implicit_nystrom": solvers.implicit_nystrom(),
        "implicit_identity": solvers.implicit_identity(),
        "unrolled": solvers.Unrolled(),
        "sama": solvers.SAMA(),
        "soba": solvers.SOBA(),
        "penalty": solvers.Penalty(),
        "delta_stn": solvers.delta_stn(),
    }
    for options in ({}, {"hidden": [8], "soft_labels": True, "loss": "squared"}):
        report = check_problem(distillation(**options), known)
        assert (report.findings, report.refused_by) == ([], {})


def test_self_tuning_is_refused_where_its_response_would_not_fit(images):
    """Θ has a column for every pixel; solvers that are linear in λ accept the problem."""
    wide = Distillation(lambda: MLP([4, 1000, 3]), images, per_class=10)
    wide.space = Space(images=Real(init=0.0, shape=(600_000, 1, 2, 2), per_example=False))
    with pytest.raises(
        Refused, match=r"2,400,000 hyperparameters \(most of them `images`\) would need .* GiB"
    ):
        check_response(wide, Structured(), CPU)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"start": "reel"}, r"start='reel' is unknown \(did you mean `real`\?\)"),
        ({"loss": "hinge"}, "loss='hinge' is unknown; choose cross_entropy or squared"),
        ({"per_class": 0}, "per_class=0 must be a whole number of at least 1"),
        ({"per_class": 11}, "per_class=11 exceeds the 10 images of class 0"),
        ({"start": "mean", "per_class": 11}, "per_class=11 exceeds the 10 images"),
    ],
)
def test_bad_arguments_are_one_sentence(images, options, sentence):
    with pytest.raises(BilevelError, match=sentence):
        ridge(images, **options)
    with pytest.raises(BilevelError, match="dataset='mnits'"):
        distillation("mnits")
