"""Tests of data hyper-cleaning: label noise, its loss, measures of detection, and solvers."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.functional import hessian, jacobian

import bilevel
from bilevel import BilevelError, Refused, Runner
from bilevel.problems import MLP
from bilevel.problems.datasets import standard_images
from bilevel.problems.datasets.label_noise import corrupt
from bilevel.problems.datasets.labelled_images import Images
from bilevel.problems.hyper_cleaning import HyperCleaning, detection
from bilevel.solvers import (
    CG,
    SAMA,
    SOBA,
    Dense,
    Fixed,
    Hessian,
    Penalty,
    SelfTuning,
    Unrolled,
    implicit_cg,
    implicit_identity,
)
from tests.support.device_waits import no_waiting
from tests.support.solver_cases import ready, sgd

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(n=60, classes=3, spread=0.3, **options):
    """Return points around the corners of a triangle, where wrong labels are obvious."""

    def split(seed):
        labels = torch.arange(n) % classes
        noise = spread * torch.randn(n, classes, generator=generator(seed), dtype=torch.float64)
        return F.one_hot(labels, classes).double() + noise, labels

    images = Images(split(0), split(1), split(2), mean=0.0, std=1.0)
    return HyperCleaning(lambda: MLP([classes, classes]).double(), images, **options)


# --- corruption ---


@pytest.mark.parametrize("noise", ["uniform", "pairwise"])
@pytest.mark.parametrize("rate", [0.0, 0.31, 0.9])
def test_exactly_the_wanted_part_is_wrong(noise, rate):
    labels = torch.arange(1000) % 10
    given, wrong = corrupt(labels, rate, noise, generator())
    assert int(wrong.sum()) == round(1000 * rate)
    assert torch.equal(given != labels, wrong)
    assert 0 <= int(given.min()) <= int(given.max()) <= 9
    if noise == "pairwise":
        assert torch.equal(given[wrong], (labels[wrong] + 1) % 10)


def test_uniform_noise_is_spread_evenly():
    labels = torch.arange(40_000) % 4
    given, wrong = corrupt(labels, 0.5, "uniform", generator())
    shift = ((given - labels) % 4)[wrong].bincount(minlength=4) / wrong.sum()
    torch.testing.assert_close(shift, torch.tensor([0, 1 / 3, 1 / 3, 1 / 3]), atol=0.01, rtol=0)


def test_noise_follows_from_its_seed_alone():
    one, same, other = (HyperCleaning.digits(noise_seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.corrupted, same.corrupted)
    assert not torch.equal(one.corrupted, other.corrupted)
    clean = standard_images.load_digits().train[1]
    given = one.data(CPU, generator()).train.peek()[1]
    assert torch.equal(given != clean, one.corrupted)
    assert torch.equal(
        one.data(CPU, generator()).valid.peek()[1], standard_images.load_digits().valid[1]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 1.0}, r"rate=1\.0 must be at least 0 and below 1"),
        ({"rate": -0.1}, r"rate=-0\.1 must be at least 0"),
        ({"noise": "uniforn"}, r"noise='uniforn' is unknown \(did you mean `uniform`"),
        ({"train_size": 0}, "train_size=0 must be between 1 and 60"),
        ({"valid_size": 61}, "valid_size=61 must be between 1 and 60"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(BilevelError, match=message):
        blobs(**options)
    with pytest.raises(BilevelError, match="of one class"):
        corrupt(torch.zeros(5, dtype=torch.long), 0.5, "uniform", generator())


# --- the loss ---


def test_every_example_of_a_shuffled_batch_meets_its_own_weight():
    problem = blobs(batch_size=8)
    x, given, index = batch = problem.data(CPU, generator(3)).train.next()
    everything = blobs().data(CPU, generator()).train.peek()
    assert torch.equal(everything[0][index], x)
    assert torch.equal(everything[1][index], given)
    params, carry = problem.init(generator())
    weight = torch.rand(60, generator=generator(1), dtype=torch.float64).requires_grad_()
    loss, _ = problem.inner_loss(
        {"example_weight": weight, "weight_decay": torch.tensor(0.2)}, params, carry, batch, None
    )
    logits = F.linear(x, params["layers.0.weight"], params["layers.0.bias"])
    each = torch.stack([F.cross_entropy(logits[[i]], given[[i]]) for i in range(8)])
    norm = sum(p.square().sum() for p in params.values())
    torch.testing.assert_close(
        loss, sum(weight[index[i]] * each[i] for i in range(8)) / 8 + 0.1 * norm
    )
    (gradient,) = torch.autograd.grad(loss, weight)
    expected = torch.zeros(60, dtype=torch.float64)
    expected[index] = each / 8
    torch.testing.assert_close(gradient, expected)


def test_the_oracle_trains_on_the_right_labels_alone():
    problem = blobs(oracle=True)
    hypers = problem.space.constrain(problem.space.init())
    batch, (params, carry) = problem.data(CPU, generator()).train.peek(), problem.init(generator())
    kept = tuple(leaf[~problem.corrupted] for leaf in batch)
    loss, _ = problem.inner_loss(
        hypers | {"weight_decay": torch.tensor(0.0)}, params, carry, batch, None
    )
    prediction, _ = problem.predict(hypers, params, carry, kept, train=True, generator=None)
    torch.testing.assert_close(loss * 60, F.cross_entropy(prediction, kept[1], reduction="sum"))
    assert problem.exact(hypers)["f1"] == 1
    with pytest.raises(Refused, match="every hyperparameter is frozen"):
        ready(problem, implicit_cg())


# --- detection ---


def test_detection_agrees_with_an_independent_computation():
    metrics = pytest.importorskip("sklearn.metrics")
    draws = generator(2)
    for ties in (False, True):
        truth = torch.rand(200, generator=draws) < 0.3
        score = torch.randn(200, generator=draws) + truth
        score = score.round() if ties else score
        ours, found = detection(score, truth, score > 0.5), (score > 0.5).numpy()
        wanted = {
            "precision": metrics.precision_score(truth, found),
            "recall": metrics.recall_score(truth, found),
            "f1": metrics.f1_score(truth, found),
            "roc_auc": metrics.roc_auc_score(truth, score),
            "average_precision": metrics.average_precision_score(truth, score),
        }
        assert {name: float(value) for name, value in ours.items()} == pytest.approx(
            wanted, abs=1e-6
        )


def test_detection_at_its_extremes():
    truth = torch.tensor([True, True, False, False, False])
    level = detection(torch.zeros(5), truth, torch.zeros(5, dtype=torch.bool))
    result = {"precision": 0, "recall": 0, "f1": 0, "roc_auc": 0.5, "average_precision": 0.4}
    assert {name: float(value) for name, value in level.items()} == pytest.approx(result)
    perfect, inverted = (
        detection(truth.float(), truth, truth),
        detection(-truth.float(), truth, ~truth),
    )
    assert all(float(value) == 1 for value in perfect.values())
    assert [float(inverted[name]) for name in ("precision", "recall", "f1", "roc_auc")] == [
        0,
        0,
        0,
        0,
    ]


def test_a_low_weight_means_wrong():
    problem = blobs(rate=0.25)
    weight = torch.where(problem.corrupted, 0.1, 0.9)
    assert all(float(value) == 1 for value in problem.exact({"example_weight": weight}).values())
    assert float(problem.exact({"example_weight": 1 - weight})["roc_auc"]) == 0
    assert blobs(rate=0.0).exact({"example_weight": weight}) == {}
    assert (
        blobs(rate=0.999).exact({"example_weight": weight}) == {}
    )  # rounded to all labels, so no label is right


# --- solvers ---

FINDERS = {
    "implicit_cg": implicit_cg,
    "implicit_identity": implicit_identity,
    "soba": SOBA,
    "sama": SAMA,
    "penalty": Penalty,
    "unrolled": partial(Unrolled, inner_steps=5),
}
RATES = {
    "inner_optimizer": sgd(0.5, momentum=0.9),
    "outer_optimizer": partial(torch.optim.RMSprop, lr=0.1),
}


def found(problem, solver, rounds=30):
    ready(problem, solver)
    solver.step(warmup=True)
    for _ in range(rounds):
        solver.step()
    return {name: float(value) for name, value in problem.exact(solver.solution().hypers).items()}


@pytest.mark.parametrize(
    ("name", "batch_size"), [*((name, None) for name in FINDERS), ("implicit_cg", 20), ("sama", 20)]
)
def test_gradient_based_solvers_find_wrong_labels(name, batch_size):
    problem = blobs(rate=0.3, batch_size=batch_size, space={"weight_decay": {"init": 1e-2}})
    result = found(problem, FINDERS[name](**RATES))
    assert result["roc_auc"] > 0.9
    assert result["f1"] > 0.75


def test_fixed_weights_find_nothing():
    result = found(blobs(rate=0.3), Fixed(inner_optimizer=RATES["inner_optimizer"]))
    assert result["roc_auc"] == 0.5
    assert result["f1"] == 0


def test_hypergradient_of_a_converged_model_is_the_implicit_one():
    """It is dL_V/dλ_i = −vᵀ H⁻¹ ∇ℓ_i/n, at w* to machine precision."""
    problem = blobs(n=15, rate=0.2, space={"weight_decay": {"init": 0.3}})
    data = problem.data(CPU, generator())
    hypers = problem.space.constrain(problem.space.init(torch.float64))

    def unflat(w):
        return {"layers.0.weight": w[:9].reshape(3, 3), "layers.0.bias": w[9:]}

    def inner(weight, w):
        return problem.inner_loss(
            hypers | {"example_weight": weight}, unflat(w), {}, data.train.peek(), None
        )[0]

    w, weight = torch.zeros(12, dtype=torch.float64), hypers["example_weight"]
    for _ in range(20):
        (_, _), (mixed, H) = hessian(inner, (weight, w))
        w = w - torch.linalg.solve(H, jacobian(lambda w: inner(weight, w), w))
    v = jacobian(lambda w: problem.outer_loss(hypers, unflat(w), {}, data.valid.peek())[0], w)
    expected = -torch.linalg.solve(H, v) @ mixed / 4  # dλ/du = λ(1 − λ) = ¼ at the start
    solver = ready(
        problem, implicit_cg(linear_solve=CG(iterations=60, tolerance=1e-12), curvature=Hessian())
    )
    with torch.no_grad():
        for leaf, value in zip(solver.core.weights.leaves, unflat(w).values(), strict=True):
            leaf.copy_(value)
    solver.step(limit=0, warmup=True)
    torch.testing.assert_close(
        solver.hypergradient(data.valid.peek()), expected, rtol=1e-6, atol=1e-10
    )


@pytest.mark.parametrize(
    ("response", "numbers", "each"), [(None, "22,210", 34), (Dense(), "700,700", 1078)]
)
def test_self_tuning_solvers_take_it_and_warn_about_a_thousand_weights(response, numbers, each):
    small, large = blobs(), HyperCleaning.digits()
    assert (
        bilevel.check_problem(small, solvers={"it": SelfTuning(response=response)}).refused_by == {}
    )
    solver = ready(small, SelfTuning(response=response))
    assert solver.warnings(solver.step()) == {}
    warning = ready(large, SelfTuning(response=response)).warnings({})["response"]
    assert (
        "1,078 coordinates (most of them `example_weight`), and the response holds "
        f"{numbers} numbers" in warning
    )
    assert f"{each:,} for each weight" in warning


@pytest.mark.parametrize("batch_size", [None, 20])
def test_no_step_waits_for_the_device(batch_size):
    solver = ready(blobs(batch_size=batch_size), SAMA(inner_steps=2))
    solver.step(limit=1)
    with no_waiting():
        solver.step()


def test_a_run_records_detection_along_the_way(tmp_path):
    problem = blobs(rate=0.3)
    runner = Runner(epochs=30, warmup_epochs=2, evaluate_every=10, progress="none", picture=False)
    summary = runner.run(problem, SAMA(**RATES), directory=tmp_path, seed=0)
    assert {"exact.f1", "exact.roc_auc", "exact.average_precision"} <= set(summary["best"])
    first, *_, last = bilevel.loggers.records.read_metrics(tmp_path / "metrics.jsonl")
    assert first["exact.roc_auc"] == 0.5
    assert last["exact.roc_auc"] > 0.9
