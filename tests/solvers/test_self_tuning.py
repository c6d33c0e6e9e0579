"""Self-tuning steps: the gradients that reach w₀, Θ, u and s, and the moments when these move."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from bilevel import BilevelError, solvers
from bilevel.problems import Quadratic
from bilevel.solvers import Dense, SelfTuning
from bilevel.solvers.optim import optimized
from tests.support.solver_cases import RECIPES, all_flags, all_solvers, classifier, ready, sgd

AWAY = 0.3
"""From Θ = 0 and u = u₀, where some gradients vanish."""


def parts(solver):
    return {
        "w0": solver.core.weights.leaves,
        "theta": solver.method.theta.leaves,
        "u": [solver.core.search.u],
        "s": [solver.core.search.s],
    }


def copies(solver):
    return {part: [t.detach().clone() for t in leaves] for part, leaves in parts(solver).items()}


def moved(before, after):
    """Return the parts of which every tensor changed; no part may change in some tensors only."""
    changed = {
        part: [not torch.equal(a, b) for a, b in zip(before[part], after[part], strict=True)]
        for part in before
    }
    assert all(all(tensors) or not any(tensors) for tensors in changed.values()), changed
    return {part for part, tensors in changed.items() if all(tensors)}


def reached(loss, solver):
    """Return the parts that `loss` depends on; no gradient in them may be zero."""
    found = set()
    for part, leaves in parts(solver).items():
        if not leaves[0].requires_grad:
            continue
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
        if any(g is not None for g in gradients):
            assert all(g is not None and g.abs().max() > 0 for g in gradients), part
            found.add(part)
    return found


@pytest.fixture
def watched(monkeypatch):
    """Record for every descent: (parts that the loss depends on, parts that moved)."""

    def watch(solver):
        rows, descend = [], optimized.descend

        def spy(loss, *groups):
            gradients, before = reached(loss, solver), copies(solver)
            result = descend(loss, *groups)
            rows.append((gradients, moved(before, copies(solver))))
            return result

        monkeypatch.setattr(solvers.self_tuning, "descend", spy)
        monkeypatch.setattr(solvers.base.method, "descend", spy)
        return rows

    return watch


@pytest.mark.parametrize("response", [None, Dense()], ids=["structured", "dense"])
@all_flags
def test_which_gradient_flows_where(flags, response, watched):
    """L_T(λ₀, w₀) moves w₀, L_T(λ₀+ε, w₀ + Θε) moves Θ; L_V − τH moves u and s.

    In a joint step one loss moves w₀ and Θ.
    """
    solver = ready(classifier(), SelfTuning(response=response, inner_steps=1, **flags), away=AWAY)
    rows = watched(solver)
    solver.step()
    inner = [{"w0"}, {"theta"}] if flags["regularized_w0"] else [{"w0", "theta"}]
    assert rows == [(part, part) for part in [*inner, {"u", "s"}]]


def test_scales_stay_without_tune_scale(watched):
    solver = ready(classifier(), SelfTuning(inner_steps=1, tune_scale=False), away=AWAY)
    rows, sigma = watched(solver), solver.core.search.sigma.clone()
    solver.step()
    assert rows[-1] == ({"u"}, {"u"})
    assert torch.equal(solver.core.search.sigma, sigma)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_presets(recipe):
    solver = getattr(solvers, recipe)()
    assert {flag: getattr(solver, flag) for flag in RECIPES[recipe]} == RECIPES[recipe]
    assert getattr(solvers, recipe)(inner_steps=7).inner_steps == 7


@pytest.mark.parametrize("regularized_w0", [True, False])
def test_linearize_without_centered_is_refused_with_its_reason(regularized_w0):
    with pytest.raises(
        BilevelError,
        match=r"linearize=True needs centered=True, .* near w₀ alone; set linearize=false",
    ):
        SelfTuning(centered=False, regularized_w0=regularized_w0, linearize=True)


def test_gradient_through_the_hyperparameter_itself():
    """With Θ = 0 and no perturbation, dL_V/du = ∂L_V/∂λ = P(λ − λ̄)."""
    problem = Quadratic.random(weights=4, hypers=3, direct=2.0, dtype=torch.float64)
    solver = ready(problem, SelfTuning(tune_scale=False, outer_optimizer=sgd(0.1)))
    solver.method.outer_step(solver.core.data.valid.next())
    torch.testing.assert_close(
        solver.core.search.u.detach(), -0.1 * problem.P @ -problem.lambda_bar
    )


# --- controls ---


@all_flags
def test_without_response_or_entropy_no_rate_moves_by_one_bit(flags):
    """With Θ = 0 and τ = 0, L_V does not depend on λ, so u and s stay; with Θ free both move."""

    def after_two_rounds(lr):
        optimizer = sgd(lr)
        solver = ready(
            classifier(), SelfTuning(entropy_weight=0.0, response_optimizer=optimizer, **flags)
        )
        before = copies(solver)
        for _ in range(2):
            solver.step()
        return moved(before, copies(solver))

    assert after_two_rounds(0.0) == {"w0"}
    assert after_two_rounds(0.1) == {"w0", "theta", "u", "s"}


@all_flags
def test_warmup_trains_the_weights_and_leaves_the_search_distribution(flags):
    solver = ready(classifier(), SelfTuning(**flags), away=AWAY)
    before = copies(solver)
    solver.step(warmup=True)
    assert moved(before, copies(solver)) == {"w0", "theta"}
    assert (solver.inner_count, solver.outer_count) == (5, 0)


def test_centre_is_held_through_an_outer_phase_and_moves_at_its_end(monkeypatch):
    solver = ready(classifier(), SelfTuning(outer_steps=3), away=AWAY)
    seen, outer_step = [], solver.method.outer_step

    def spy(batch):
        seen.append((solver.core.search.u0.clone(), solver.core.search.u.detach().clone()))
        return outer_step(batch)

    monkeypatch.setattr(solver.method, "outer_step", spy)
    start = solver.core.search.u.detach().clone()
    solver.step()
    assert all(torch.equal(centre, start) for centre, _ in seen)
    assert len({tuple(u.tolist()) for _, u in seen}) == 3
    assert torch.equal(solver.core.search.u0, solver.core.search.u)
    assert not torch.equal(solver.core.search.u0, start)


def test_second_outer_step_looks_at_the_moved_hyperparameters():
    """The second gradient is taken at the u that the first step left.

    Here ŵ = w₀ + Θ(u − u₀) and L_V = ½|w − w̄|²_M.
    """
    problem = Quadratic.random(weights=4, hypers=2, dtype=torch.float64)
    solver = ready(
        problem,
        SelfTuning(response=Dense(), tune_scale=False, outer_steps=2, outer_optimizer=sgd(0.1)),
        away=AWAY,
    )
    theta, w0, u = (
        solver.method.theta.detached()["w"],
        solver.core.weights.detached()["w"],
        torch.zeros(2, dtype=torch.float64),
    )
    for _ in range(2):
        solver.method.outer_step(solver.core.data.valid.next())
        u = u - 0.1 * theta.T @ problem.M @ (w0 + theta @ u - problem.w_bar)
    torch.testing.assert_close(solver.core.search.u.detach(), u)


def test_response_step_sees_the_weights_that_just_moved(monkeypatch):
    solver = ready(classifier(), away=AWAY)
    before, seen, perturbed_loss = copies(solver)["w0"], [], solver.method.perturbed_loss

    def spy(base, carry, batch):
        seen.extend(t.clone() for t in base.values())
        return perturbed_loss(base, carry, batch)

    monkeypatch.setattr(solver.method, "perturbed_loss", spy)
    solver.method.separate_step(solver.core.data.train.next())
    after = copies(solver)["w0"]
    assert all(torch.equal(a, b) for a, b in zip(seen, after, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(seen, before, strict=True))


@all_flags
def test_clipping_bounds_the_gradient_of_w0_and_of_theta_each(flags):
    """With lr = 1 and a gradient of norm above `clip_norm`, each group moves by `clip_norm`."""
    solver = ready(
        classifier(), SelfTuning(clip_norm=1e-3, inner_optimizer=sgd(1.0), **flags), away=AWAY
    )
    before = copies(solver)
    solver.method.inner_step(solver.core.data.train.next())
    after = copies(solver)
    for part in ("w0", "theta"):
        distance = sum(
            (a - b).square().sum() for a, b in zip(before[part], after[part], strict=True)
        ).sqrt()
        assert distance.item() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_solution_goes_with_the_centre(recipe):
    """Centered: (λ(u₀), w₀); uncentered: (λ(u₀), φ + Θu₀)."""
    problem = Quadratic.random(weights=4, hypers=2, dtype=torch.float64)
    solver = ready(problem, SelfTuning(response=Dense(), **RECIPES[recipe]), away=AWAY)
    solver.core.search.u0.copy_(torch.tensor([0.5, -1.0]))
    hypers, params, _ = solver.solution()
    assert hypers["hyper"].tolist() == [0.5, -1.0]
    w0, theta = solver.core.weights.detached()["w"], solver.method.theta.detached()["w"]
    torch.testing.assert_close(
        params["w"], w0 if RECIPES[recipe]["centered"] else w0 + theta @ solver.core.search.u0
    )


# --- what a round reports ---


@all_solvers
def test_a_round_reports_the_means_over_its_inner_steps(make):
    """The metrics of three inner steps are the means over three rounds of one step."""
    whole, single = (ready(classifier(), make(inner_steps=3), away=AWAY) for _ in range(2))
    metrics = whole.step(warmup=True)
    each = [single.step(warmup=True, limit=1) for _ in range(3)]
    assert "inner_loss" in metrics
    assert len({m["inner_loss"].item() for m in each}) == 3
    torch.testing.assert_close(metrics, {name: sum(m[name] for m in each) / 3 for name in each[0]})
    assert not any(value.requires_grad for value in metrics.values())


@all_flags
def test_a_round_reports_its_outer_phase_besides(flags):
    """The means stand, and the outer loss and entropy are those of the outer step that follows."""
    whole, single = (
        ready(classifier(), SelfTuning(inner_steps=2, **flags), away=AWAY) for _ in range(2)
    )
    metrics, means = whole.step(), single.step(warmup=True)
    torch.testing.assert_close(
        metrics, means | single.method.outer_step(single.core.data.valid.next())
    )
    outer = {"outer_loss", "entropy", "hypergradient_norm", "hypergradient_snr"}
    assert metrics.keys() - means.keys() == outer
    assert all(value.ndim == 0 for value in tree_leaves(metrics))
