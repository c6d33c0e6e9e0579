"""Tests of architecture search: cells, hypergradients, derived cells and the collapse."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bilevel import BilevelError, Refused, check_problem, solvers
from bilevel.cli.app import main
from bilevel.problems import digits
from bilevel.problems.architecture.drawing import draw_cell, draw_search
from bilevel.problems.architecture.genotype import Genotype, derive, random_genotype, read_genotype
from bilevel.problems.architecture.operations import IMAGE, TABLE
from bilevel.problems.architecture.problem import Architecture
from bilevel.problems.architecture.recipes import architecture_images, architecture_tabular
from bilevel.problems.architecture.tabular_data import TABLES, load_table
from bilevel.solvers.first_order import FirstOrder
from tests.support.device_waits import no_waiting
from tests.support.solver_cases import CPU, ready, sgd

F64 = torch.float64
QUIET = (
    "wandb.mode=disabled",
    "runner.progress=none",
    "runner.picture=false",
    "runner.warmup_epochs=0",
    "runner.epochs=1",
)


def tiny(operations=("none", "skip", "tanh"), *, nodes=2, decay=0.3, **options):
    """Return a smooth cell on twenty rows of three features.

    Batches are whole splits, and weight decay is strong.
    """
    draws = torch.Generator().manual_seed(3)
    x = torch.randn(40, 3, generator=draws, dtype=F64)
    y = (x[:, 0] * x[:, 1] > 0).long()
    splits = [(x[:20], y[:20]), (x[20:], y[20:])]
    space = {"weight_decay": {"init": decay}} | options.pop("space", {})
    settings = {
        "inputs": 3,
        "classes": 2,
        "operations": operations,
        "nodes": nodes,
        "cells": 1,
        "width": 3,
        "dtype": F64,
    }
    return Architecture(TABLE, splits, batch_size=None, space=space, **settings | options)


def images(**options):
    return architecture_images(**{"nodes": 2, "cells": 1, "channels": 2, "batch_size": 8} | options)


def rows_of(**options):
    return architecture_tabular(**{"nodes": 2, "width": 4, "batch_size": 16} | options)


def outer(problem, u, params):
    """Return L_V(λ(u), w) on the validation split."""
    batch = problem.data(CPU, torch.Generator()).valid.peek()
    return problem.outer_loss(problem.space.constrain(u), params, {}, batch)[0]


def inner(problem, u, params):
    batch = problem.data(CPU, torch.Generator()).train.peek()
    return problem.inner_loss(problem.space.constrain(u), params, {}, batch, torch.Generator())[0]


def differences(f, u, step=1e-5):
    """Return ∇f by central differences."""
    with torch.no_grad():
        return torch.stack(
            [
                (f(u + step * e) - f(u - step * e)) / (2 * step)
                for e in torch.eye(len(u), dtype=u.dtype)
            ]
        )


def at_weights(solver):
    return {name: p.detach().clone() for name, p in solver.core.weights.tensors.items()}


def some_u(problem, seed=0):
    return 0.5 * torch.randn(
        problem.space.numel, generator=torch.Generator().manual_seed(seed), dtype=F64
    )


def place(solver, u):
    with torch.no_grad():
        solver.core.search.u.copy_(u)
        solver.core.search.u0.copy_(u)


# --- the cell ---


def test_a_cell_is_the_sum_over_its_edges_of_mixed_operations():
    problem = tiny(("none", "skip", "tanh", "relu"))
    params, _ = problem.init(torch.Generator().manual_seed(0))
    u = some_u(problem)
    alpha, x = problem.space.constrain(u), torch.randn(5, 3, dtype=F64)

    def normed(z):
        return (z - z.mean(1, keepdim=True)) / (z.var(1, correction=0, keepdim=True) + 1e-5).sqrt()

    def layer(z, name):
        return z @ params[f"{name}.weight"].T + params.get(
            f"{name}.bias", torch.zeros((), dtype=F64)
        )

    def mixed(z, name):
        at, a = f"cells.0.mixtures.{name}.operations", alpha[name]
        tanh, relu = (layer(z, f"{at}.{place}.0") for place in (1, 2))
        return a[1] * z + a[2] * normed(torch.tanh(tanh)) + a[3] * normed(relu.clamp_min(0))

    first = normed(layer(x, "stem.0"))
    second = mixed(first, "edge_0_1")
    third = mixed(first, "edge_0_2") + mixed(second, "edge_1_2")
    wanted = layer(normed(layer(torch.cat([second, third], 1), "cells.0.join.0")), "head")
    found, _ = problem.predict(alpha, params, {}, (x, None), train=False, generator=None)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "make", [partial(images, cells=2), partial(rows_of, nodes=3)], ids=["images", "table"]
)
def test_the_derived_cell_is_the_search_network_at_a_corner_of_the_simplexes(make):
    """With kept edges at one operation and all others at `none`, the prediction is the same."""
    search = make(dtype="float64")
    cell = random_genotype(4, search.operations, search.nodes, keep=2)
    derived = make(genotype=str(cell), dtype="float64")
    assert derived.cell == cell
    params, _ = search.init(torch.Generator().manual_seed(0))
    alpha = {
        name: torch.zeros(len(search.operations), dtype=F64)
        for name in search.space
        if name.startswith("edge_")
    }
    taken = {f"edge_{e.source}_{e.node}": search.operations.index(e.operation) for e in cell}
    for name, weights in alpha.items():
        weights[taken.get(name, 0)] = 1.0
    own = {}
    for name in derived.init(torch.Generator())[0]:
        parts = name.split(
            "."
        )  # cells.0.mixtures.edge_0_1.operations.0.…, where the search has `none`'s place less
        theirs = (
            name.replace("operations.0", f"operations.{taken[parts[3]] - 1}")
            if "mixtures" in parts
            else name
        )
        own[name] = params[theirs]
    batch = search.data(CPU, torch.Generator()).valid.peek()
    found, _ = derived.predict({}, own, {}, batch, train=False, generator=None)
    wanted, _ = search.predict(alpha, params, {}, batch, train=False, generator=None)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_an_operation_cannot_undo_its_weight_by_its_scale():
    images, rows = torch.randn(2, 4, 6, 6, dtype=F64), torch.randn(2, 4, dtype=F64)
    linear = dict.fromkeys(("conv3x3", "separable", "dilated"), (IMAGE, images))
    linear |= dict.fromkeys(("linear", "relu"), (TABLE, rows))
    for name, (form, x) in linear.items():
        operation = form.operations[name](4).double()
        before = operation(x)
        with torch.no_grad():
            for p in operation.parameters():
                p.mul_(7.0)
        torch.testing.assert_close(operation(x), before, rtol=0.02, atol=0.02)
    for form, x in ((IMAGE, images), (TABLE, rows)):
        for name in set(form.operations) - {"none", "skip"}:
            y = form.operations[name](4).double()(x)
            torch.testing.assert_close(
                y.reshape(2, -1).mean(1), torch.zeros(2, dtype=F64), atol=1e-9, rtol=0
            )
            assert (y.reshape(2, -1).var(1, correction=0) < 1 + 1e-9).all()


# --- the hypergradient ---


@pytest.mark.parametrize("price", [0.0, 0.7])
def test_first_order_is_the_direct_term_alone(price):
    problem, u = tiny(free_price=price), some_u(tiny())
    solver = ready(problem, FirstOrder())
    place(solver, u)
    w = at_weights(solver)
    direct = differences(lambda u: outer(problem, u, w), u)
    assert direct.norm() > 1e-3
    torch.testing.assert_close(solver.hypergradient(), direct, rtol=1e-6, atol=1e-9)


def test_second_order_is_one_step_unrolled():
    """The truth is dL_V(λ, w − η ∇_w L_T(λ, w))/du by differences.

    The direct term is far from it.
    """
    problem, u, rate = tiny(), some_u(tiny()), 0.5
    solver = ready(problem, solvers.Unrolled(inner_steps=1, inner_optimizer=sgd(rate)))
    place(solver, u)
    w = at_weights(solver)

    def stepped(u):
        leaves = {name: p.clone().requires_grad_() for name, p in w.items()}
        with torch.enable_grad():
            gradients = torch.autograd.grad(inner(problem, u, leaves), list(leaves.values()))
        return {name: p - rate * g for (name, p), g in zip(w.items(), gradients, strict=True)}

    wanted = differences(lambda u: outer(problem, u, stepped(u)), u)
    after = stepped(u)
    direct = differences(lambda u: outer(problem, u, after), u)
    torch.testing.assert_close(solver.hypergradient(), wanted, rtol=1e-5, atol=1e-8)
    assert (direct - wanted).norm() > 0.02 * wanted.norm()


def test_a_self_tuning_hypergradient_holds_the_direct_term_beside_the_response():
    """The truth is dL_V(λ(u), w₀ + Θ(u − u₀))/du at u = u₀ by differences.

    Θ = 0 gives the direct term.
    """
    problem, u = tiny(), some_u(tiny())
    for away in (0.0, 0.3):
        solver = ready(
            problem, solvers.delta_stn(response=solvers.Dense(), tune_scale=False), away=away
        )
        place(solver, u)
        w, theta = (
            at_weights(solver),
            {name: t.detach() for name, t in solver.method.theta.tensors.items()},
        )

        def moved(at, w=w, theta=theta):
            return {name: p + theta[name] @ (at - u) for name, p in w.items()}

        wanted = differences(lambda at, moved=moved: outer(problem, at, moved(at)), u)
        direct = differences(lambda at, w=w: outer(problem, at, w), u)
        torch.testing.assert_close(solver.hypergradient(), wanted, rtol=1e-5, atol=1e-8)
        assert direct.norm() > 1e-3
        assert ((wanted - direct).norm() > 0.1 * wanted.norm()) == (away > 0)


def minimized(problem, u, params, steps):
    """Return w*(λ) by Newton's method, with gradient and Hessian.

    The weights stay fixed along symmetries (rotations about 1).
    """
    names, shapes = list(params), [p.shape for p in params.values()]

    def unflat(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        return {
            name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)
        }

    def loss(flat):
        return inner(problem, u, unflat(flat))

    w = torch.cat([p.reshape(-1) for p in params.values()])
    for _ in range(steps):
        H = torch.autograd.functional.hessian(loss, w, vectorize=True)
        gradient = torch.autograd.functional.jacobian(loss, w)
        w = w - torch.linalg.pinv(H, hermitian=True, rtol=1e-9) @ gradient
    return unflat(w), gradient, H


def trained(problem, u):
    """Return weights near the minimum, by L-BFGS."""
    params = {
        name: p.requires_grad_()
        for name, p in problem.init(torch.Generator().manual_seed(0))[0].items()
    }
    optimizer = torch.optim.LBFGS(
        params.values(), max_iter=400, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = inner(problem, u, params)
        loss.backward()
        return loss

    optimizer.step(closure)
    return {name: p.detach() for name, p in params.items()}


def test_the_implicit_hypergradient_is_that_of_the_minimizer():
    """The truth is dL_V(λ, w*(λ))/du with a new w* at every λ.

    H⁻¹ = I and the direct term are far from it.
    """
    problem = tiny(nodes=1, decay=0.1)
    u = some_u(problem, seed=1)
    w, gradient, curvature = minimized(problem, u, trained(problem, u), steps=4)
    assert gradient.norm() < 1e-10
    assert torch.linalg.eigvalsh(curvature).min() > -1e-7
    wanted = differences(lambda at: outer(problem, at, minimized(problem, at, w, steps=2)[0]), u)
    found = {}
    for name, solver in {
        "cg": solvers.Implicit(linear_solve=solvers.CG(iterations=200, tolerance=1e-10)),
        "identity": solvers.implicit_identity(),
        "direct": FirstOrder(),
    }.items():
        ready(problem, solver)
        place(solver, u)
        with torch.no_grad():
            for key, leaf in solver.core.weights.tensors.items():
                leaf.copy_(w[key])
        found[name] = solver.hypergradient()
    assert (found["cg"] - wanted).norm() < 1e-4 * wanted.norm()
    for name in ("identity", "direct"):
        assert (found[name] - wanted).norm() > 0.1 * wanted.norm()


# --- solvers ---

SOLVERS = {
    "first order": FirstOrder,
    "second order": partial(solvers.Unrolled, inner_steps=1),
    "identity": partial(solvers.implicit_identity, inner_steps=1),
    "neumann": partial(
        solvers.implicit_neumann, linear_solve=solvers.Neumann(terms=2), inner_steps=1
    ),
    "delta_stn": partial(solvers.delta_stn, inner_steps=1),
    "stn": partial(solvers.stn, inner_steps=1),
}
DECAY = {"weight_decay": {"frozen": False, "per_example": True, "init": 0.01}}
PROBLEMS = {
    "images": partial(images, nodes=1, free_price=0.5),
    "table": partial(rows_of, free_price=0.5),
    "images, decay per example": partial(images, nodes=1, space=DECAY),
    "table, decay per example": partial(rows_of, space=DECAY),
}


@pytest.mark.parametrize("make", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("make_problem", PROBLEMS.values(), ids=PROBLEMS)
def test_every_solver_moves_alpha_without_waiting(make_problem, make):
    problem = make_problem()
    if make is FirstOrder and not problem.space["weight_decay"].frozen:
        with pytest.raises(
            Refused, match=r"`weight_decay` has none \(L_V does not depend on it directly\)"
        ):
            ready(problem, make())
        return
    solver = ready(problem, make())
    solver.step()
    with no_waiting():
        solver.step()
    hypers = solver.solution().hypers
    for name, leaf in hypers.items():
        assert torch.isfinite(leaf).all()
        if name.startswith("edge_"):
            assert not torch.allclose(leaf, torch.full_like(leaf, 1 / len(leaf)), atol=1e-4)
            torch.testing.assert_close(leaf.sum(), torch.ones(()))


def test_first_order_refuses_what_is_sampled():
    with pytest.raises(
        Refused, match="FirstOrder follows ∂L_V/∂λ alone, and `input_dropout` has none"
    ):
        ready(digits(hidden=[8]), FirstOrder())


def test_first_order_goes_on_from_its_state_bit_for_bit():
    problem = rows_of(free_price=0.3)
    one, other = ready(problem, FirstOrder()), ready(problem, FirstOrder(), seed=2)
    one.step()
    other.core.data.train.load_state_dict(one.core.data.train.state_dict())
    other.core.data.valid.load_state_dict(one.core.data.valid.state_dict())
    other.load_state_dict(one.state_dict())
    for solver in (one, other):
        solver.step()
    for name, p in one.solution().params.items():
        assert torch.equal(p, other.solution().params[name])
    for name, leaf in one.solution().hypers.items():
        assert torch.equal(leaf, other.solution().hypers[name])


@pytest.mark.parametrize("make", [images, rows_of], ids=["images", "table"])
def test_the_problem_keeps_the_laws(make):
    report = check_problem(make(), solvers={})
    assert not [finding for finding in report.findings if finding.level == "error"], str(report)


# --- the derived cell ---


def test_the_strongest_operations_and_edges_are_kept_and_never_none():
    operations = ["none", "skip", "relu"]
    weights = {
        "edge_0_1": [0.98, 0.01, 0.01001],
        "edge_0_2": [0.1, 0.2, 0.7],
        "edge_1_2": [0.1, 0.5, 0.4],
        "edge_0_3": [0.0, 0.6, 0.4],
        "edge_1_3": [0.4, 0.3, 0.3],
        "edge_2_3": [0.3, 0.0, 0.7],
    }
    assert (
        str(derive(weights, operations, 3, keep=2))
        == "0-1:relu 0-2:relu 1-2:skip 0-3:skip 2-3:relu"
    )
    assert str(derive(weights, operations, 3, keep=1)) == "0-1:relu 0-2:relu 2-3:relu"


def test_random_cells_have_the_form_of_derived_ones():
    cells = [random_genotype(seed, list(IMAGE.operations), 4, keep=2) for seed in range(200)]
    for cell in cells:
        assert [sum(e.node == node for e in cell) for node in (1, 2, 3, 4)] == [1, 2, 2, 2]
        assert Genotype.parse(str(cell)) == cell
    seen = [e.operation for cell in cells for e in cell]
    assert set(seen) == set(IMAGE.operations) - {"none"}
    assert all(abs(seen.count(name) / len(seen) - 1 / 6) < 0.03 for name in set(seen))
    assert len(set(cells)) > 190
    assert random_genotype(7, list(IMAGE.operations), 4, 2) == cells[7]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("0-1:conv", "unknown operation `conv`.*conv3x3"),
        ("0-1:none", "unknown operation `none`"),
        ("1-1:skip", "`1-1:skip`, which is not an edge"),
        ("skip", "`skip`, which is not an edge"),
        ("0-1:skip 0-1:conv3x3", "an edge twice"),
        ("0-2:skip", "leaves node 1 without an edge"),
        ("runs/missing", "is not the directory of a run"),
    ],
)
def test_a_genotype_that_cannot_be_had_is_one_sentence(source, message):
    with pytest.raises(BilevelError, match=message):
        read_genotype(source, list(IMAGE.operations), 2, 2)


def test_a_run_that_is_no_search_of_these_cells_is_one_sentence(tmp_path):
    def summary(**fields):
        result = {
            "diverged": False,
            "interrupted": False,
            "hypers": {"edge_0_1": [0.2, 0.8]},
        } | fields
        (tmp_path / "summary.json").write_text(json.dumps(result))

    operations = ["skip", "relu"]
    with pytest.raises(BilevelError, match=r"has no summary\.json of a finished run"):
        read_genotype(str(tmp_path), operations, 1, 2)
    summary()
    assert str(read_genotype(str(tmp_path), operations, 1, 2)) == "0-1:relu"
    for nodes, names in ((2, operations), (1, ["none", *operations])):
        with pytest.raises(BilevelError, match="did not search cells"):
            read_genotype(str(tmp_path), names, nodes, 2)
    summary(diverged=True)
    with pytest.raises(BilevelError, match="a search that diverged"):
        read_genotype(str(tmp_path), operations, 1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operations": ["skip", "conv5x5"]}, "operations='conv5x5' is unknown"),
        ({"operations": ["skip"]}, "leaves no choice, or repeats an operation"),
        ({"operations": ["skip", "skip"]}, "leaves no choice, or repeats an operation"),
        ({"nodes": 0}, "nodes=0 must be a whole number of at least 1"),
        ({"free_price": -1.0}, "free_price=-1.0 must be at least 0"),
        ({"data": "minst"}, "mnist"),
    ],
)
def test_bad_settings_are_one_sentence(options, message):
    with pytest.raises(BilevelError, match=message):
        architecture_images(**options)


# --- the collapse ---


def test_the_share_of_parameter_free_operations_is_measured():
    problem = tiny(("none", "skip", "linear", "relu"), nodes=2)
    even = problem.exact(problem.space.constrain(problem.space.init(F64)))
    torch.testing.assert_close(even["parameter_free"], torch.tensor(1 / 3, dtype=F64))
    torch.testing.assert_close(even["entropy"], torch.tensor(4.0, dtype=F64).log())
    skip, relu = (
        torch.tensor([0.5, 0.4, 0.1, 0.0], dtype=F64),
        torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=F64),
    )
    decided = problem.exact({"edge_0_1": skip, "edge_0_2": relu, "edge_1_2": relu})
    torch.testing.assert_close(decided["parameter_free"], torch.tensor(0.8 / 3, dtype=F64))
    torch.testing.assert_close(decided["derived_parameter_free"], torch.tensor(1 / 3, dtype=F64))
    assert images(genotype="0-1:skip").exact({}) == {}


def test_the_price_is_part_of_the_validation_loss_alone():
    """L_V and its `loss` grow by price · F(α), computed by hand.

    L_T does not, and a derived cell pays nothing.
    """
    operations = ("none", "skip", "tanh", "relu")
    plain, priced = (tiny(operations, free_price=price) for price in (0.0, 0.7))
    u, params = some_u(plain), plain.init(torch.Generator().manual_seed(0))[0]
    hypers, batch = plain.space.constrain(u), plain.data(CPU, torch.Generator()).valid.peek()
    paid = (
        0.7
        * sum(a[1] / (a[1] + a[2] + a[3]) for name, a in hypers.items() if name.startswith("edge_"))
        / 3
    )
    assert paid > 0.1
    torch.testing.assert_close(outer(priced, u, params) - outer(plain, u, params), paid)
    assert torch.equal(inner(priced, u, params), inner(plain, u, params))
    prediction, _ = priced.predict(hypers, params, {}, batch, train=False, generator=None)
    torch.testing.assert_close(
        priced.metrics(hypers, params, prediction, batch)["loss"].mean(), outer(priced, u, params)
    )
    derived = [
        tiny(operations, free_price=price, genotype="0-1:skip 1-2:tanh") for price in (0.0, 9.0)
    ]
    params, at = derived[0].init(torch.Generator())[0], derived[0].space.init(F64)
    assert torch.equal(*(outer(problem, at, params) for problem in derived))


def test_a_price_where_nothing_but_none_is_left_is_finite():
    problem = rows_of(free_price=1.0)
    sure = torch.eye(len(problem.operations))[0]
    hypers = problem.space.constrain(problem.space.init()) | {
        name: sure for name in problem.space if "edge" in name
    }
    params, batch = (
        problem.init(torch.Generator())[0],
        problem.data(CPU, torch.Generator()).valid.peek(),
    )
    assert torch.isfinite(problem.outer_loss(hypers, params, {}, batch)[0])
    assert images(operations=["none", "conv3x3"], free_price=1.0).space.numel == 6


@pytest.mark.parametrize(
    "make",
    [FirstOrder, partial(solvers.delta_stn, inner_steps=1)],
    ids=["first order", "delta_stn"],
)
def test_a_price_turns_a_search_away_from_parameter_free_operations(make):
    """The weight of the pool starts at ½.

    It rises without the price and falls with it, on the same batches.
    """
    shares = {}
    for price in (0.0, 1.0):
        problem = images(
            channels=4, operations=["max_pool", "separable"], free_price=price, batch_size=32
        )
        solver = ready(problem, make(outer_optimizer=partial(torch.optim.RMSprop, lr=0.03)))
        for _ in range(25):
            solver.step()
        shares[price] = float(problem.exact(solver.solution().hypers)["parameter_free"])
    assert shares[0.0] > 0.6
    assert shares[1.0] < 0.1


# --- data ---


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_standardized_by_their_training_split(name):
    rows = load_table(name)
    x, y = rows.train
    assert x.dtype == torch.float32
    assert x.mean(0).abs().max() < 1e-4
    assert (x.std(0)[x.std(0) > 0] - 1).abs().max() < 1e-4
    assert set(torch.cat([part[1] for part in rows[:3]]).tolist()) == set(range(rows.classes))
    sizes = [len(part[1]) for part in rows[:3]]
    assert abs(sizes[0] / sum(sizes) - 0.6) < 0.01
    other = load_table(name, split_seed=1)
    assert not torch.equal(other.train[1], y)


def test_an_unknown_table_is_one_sentence():
    with pytest.raises(BilevelError, match=r"data='wines'.*wine"):
        load_table("wines")


def test_no_linear_function_tells_the_classes_of_interactions():
    """Least squares on the labels is no better than guessing; on the products it is."""
    rows = load_table("interactions")
    (x, y), (x_test, y_test) = rows.train, rows.test

    def accuracy(features):
        w = torch.linalg.lstsq(features(x), 2.0 * y[:, None] - 1).solution
        return float(((features(x_test) @ w)[:, 0] > 0).eq(y_test == 1).float().mean())

    assert abs(accuracy(lambda x: x) - 0.5) < 0.08
    assert accuracy(lambda x: torch.stack([x[:, 0] * x[:, 1], x[:, 2] * x[:, 3]], 1)) > 0.95


# --- from the command line ---


@pytest.mark.usefixtures("elsewhere")
def test_search_draw_and_train_the_derived_cell():
    search = (*QUIET, "problem=architecture_tabular", "problem.nodes=2", "solver.inner_steps=7")
    assert main([*search, "solver=first_order", "hydra.run.dir=found"]) == 0
    summary = json.loads(Path("found/summary.json").read_text())
    assert set(summary["last"]) >= {
        "exact.parameter_free",
        "exact.derived_parameter_free",
        "exact.entropy",
    }
    picture = draw_search("found")
    assert picture.read_bytes().startswith(b"\x89PNG")
    retrain = [*search, "solver=fixed", "problem.genotype=found", "hydra.run.dir=derived"]
    assert main(retrain) == 0
    result = json.loads(Path("derived/summary.json").read_text())
    assert list(result["hypers"]) == ["weight_decay"]
    assert result["last"]["test_accuracy"] > 0.4
    with pytest.raises(BilevelError, match="derived holds no architecture search"):
        draw_search("derived")
    with pytest.raises(BilevelError, match="run=nowhere cannot be read"):
        draw_search("nowhere")


def test_the_picture_of_a_cell_names_every_operation():
    from matplotlib.figure import Figure

    cell = Genotype.parse("0-1:relu 0-2:skip 1-2:tanh 0-3:gate 2-3:linear")
    ax = Figure().subplots()
    draw_cell(ax, cell, list(TABLE.operations))
    assert [text.get_text() for text in ax.texts] == [
        "relu",
        "skip",
        "tanh",
        "gate",
        "linear",
        "in",
        "1",
        "2",
        "3",
    ]
    assert len(ax.patches) == len(cell)


def test_a_linear_head_on_the_pooled_cell_is_all_that_is_left_without_an_operation():
    """The smallest cell with one edge equals F.linear of the mean over pixels."""
    problem = images(genotype="0-1:skip", cells=1, dtype="float64")
    params, _ = problem.init(torch.Generator().manual_seed(0))
    batch = problem.data(CPU, torch.Generator()).valid.peek()
    (x, _), _ = problem.inputs({}, batch, train=False, generator=None)
    x = F.group_norm(F.conv2d(x, params["stem.0.weight"], padding=1), 1)
    x = F.group_norm(F.conv2d(x, params["cells.0.join.0.weight"]), 1)
    wanted = F.linear(x.mean((2, 3)), params["head.weight"], params["head.bias"])
    found, _ = problem.predict({}, params, {}, batch, train=False, generator=None)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
