"""Tests of loss weights on long-tailed data: splits, loss, derivatives and solvers."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.functional import jacobian

import bilevel
from bilevel import BilevelError
from bilevel.problems import MLP
from bilevel.problems.datasets.class_balance import balanced, long_tailed
from bilevel.problems.datasets.labelled_images import Images
from bilevel.problems.loss_weights import LossWeights, at
from bilevel.solvers import SAMA, SOBA, Penalty, Unrolled, delta_stn, implicit_cg, stn
from tests.support.device_waits import no_waiting
from tests.support.solver_cases import ready, sgd

CPU, F64 = torch.device("cpu"), torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small(classes=3, spread=0.6, **options):
    """Return points around the corners of a simplex, in float64.

    40 per class, of which a long tail is kept.
    """

    def split(seed):
        labels = torch.arange(40 * classes) % classes
        noise = spread * torch.randn(len(labels), classes, generator=generator(seed), dtype=F64)
        return F.one_hot(labels, classes).double() + noise, labels

    images = Images(split(0), split(1), split(2), mean=0.0, std=1.0)
    return LossWeights(
        lambda: MLP([classes, classes]).double(),
        images,
        **{"batch_size": None, "ratio": 8.0} | options,
    )


ALL = {"smoothing": "per_class", "logit_offset": True}
KINDS = {
    "default": {},
    "simplex": {"class_weight": "simplex"},
    "a rate per class": ALL,
    "offsets alone": {"class_weight": False, "smoothing": False, "logit_offset": True},
}


# --- data ---


def test_the_tail_is_exponential_and_validation_balanced():
    labels = torch.arange(1000) % 5
    split = torch.arange(1000)[:, None], labels
    x, kept = long_tailed(split, 16.0, generator())
    assert kept.bincount().tolist() == [200, 100, 50, 25, 12]  # 200 · 16^(−c/4), rounded to even
    assert torch.equal(labels[x[:, 0]], kept)
    assert len(x.unique()) == len(x)
    assert not torch.equal(x, long_tailed(split, 16.0, generator(1))[0])
    assert torch.equal(x, long_tailed(split, 16.0, generator())[0])
    assert long_tailed(split, 1.0, generator())[1].bincount().tolist() == [200] * 5
    skewed = split[0][3:], labels[3:]
    assert balanced(skewed, generator())[1].bincount().tolist() == [199] * 5


def test_digits_have_a_tail_and_a_whole_test_split():
    data = LossWeights.digits(ratio=20).data(CPU, generator())
    assert data.train.size == 341
    assert data.valid.tensors[1].bincount().unique().numel() == 1
    assert data.test.size == 360


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.5}, r"ratio=0\.5 must be at least 1"),
        (
            {"ratio": 1000.0},
            r"ratio=1000\.0 leaves the rarest class empty; choose at most 40",
        ),
        (
            {"class_weight": "softmax"},
            "class_weight='softmax' is unknown; choose positive, simplex or false",
        ),
        ({"smoothing": "each"}, "smoothing='each' is unknown; choose true, false or per_class"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(BilevelError, match=message):
        small(**options)


# --- the loss ---


def reference(hypers, logits, y, simplex=False):
    """Return the loss example by example, from probabilities."""
    total, classes = 0.0, logits.shape[1]
    for row, label in zip(logits, y.tolist(), strict=True):
        p = (row + hypers.get("logit_offset", 0.0)).exp()
        p = p / p.sum()
        s = hypers.get("smoothing", torch.tensor(0.0))
        s = s[label] if s.ndim else s
        target = F.one_hot(torch.tensor(label), classes) * (1 - s) + s / classes
        weight = (
            hypers["class_weight"][label] * (classes if simplex else 1)
            if "class_weight" in hypers
            else 1.0
        )
        total = total - weight * (target * p.log()).sum()
    return total / len(y)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_one_written_down(kind):
    problem = small(**KINDS[kind])
    batch, (params, carry) = problem.data(CPU, generator()).train.peek(), problem.init(generator())
    hypers = problem.space.constrain(
        torch.randn(problem.space.numel, generator=generator(1), dtype=F64)
    )
    hypers["weight_decay"] = torch.tensor(0.3, dtype=F64)
    logits, _ = problem.predict(hypers, params, carry, batch, train=True, generator=None)
    norm = sum(p.square().sum() for p in params.values())
    loss, _ = problem.inner_loss(hypers, params, carry, batch, None)
    torch.testing.assert_close(
        loss, reference(hypers, logits, batch[1], kind == "simplex") + 0.15 * norm
    )


def test_neutral_weights_are_plain_cross_entropy():
    problem = small(logit_offset=True)
    batch, (params, carry) = problem.data(CPU, generator()).train.peek(), problem.init(generator())
    neutral = {
        "class_weight": torch.ones(3),
        "smoothing": torch.tensor(0.0),
        "logit_offset": torch.zeros(3),
    }
    neutral["weight_decay"] = torch.tensor(0.0)
    logits, _ = problem.predict(neutral, params, carry, batch, train=True, generator=None)
    torch.testing.assert_close(
        problem.inner_objective(neutral, params, logits, batch), F.cross_entropy(logits, batch[1])
    )
    smooth = F.cross_entropy(
        logits,
        batch[1],
        torch.tensor([1.0, 2.0, 3.0], dtype=F64),
        label_smoothing=0.0,
        reduction="sum",
    )
    weighted = neutral | {"class_weight": torch.tensor([1.0, 2.0, 3.0])}
    torch.testing.assert_close(
        problem.inner_objective(weighted, params, logits, batch), smooth / len(logits)
    )
    smooth = F.cross_entropy(logits, batch[1], label_smoothing=0.2)
    torch.testing.assert_close(
        problem.inner_objective(neutral | {"smoothing": torch.tensor(0.2)}, params, logits, batch),
        smooth,
    )


@pytest.mark.parametrize("kind", ["default", "a rate per class", "offsets alone"])
def test_leaves_may_differ_from_example_to_example(kind):
    problem = small(batch_size=8, **KINDS[kind])
    batch, (params, carry) = problem.data(CPU, generator()).train.next(), problem.init(generator())
    u = torch.randn(8, problem.space.numel, generator=generator(1), dtype=F64)
    together, _ = problem.inner_loss(problem.space.constrain(u), params, carry, batch, None)
    each = [
        problem.inner_loss(
            problem.space.constrain(u[i]),
            params,
            carry,
            tuple(leaf[i : i + 1] for leaf in batch),
            None,
        )[0]
        for i in range(8)
    ]
    torch.testing.assert_close(together, torch.stack(each).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_by_differences(kind):
    problem = small(**KINDS[kind])
    batch, (params, carry) = problem.data(CPU, generator()).train.peek(), problem.init(generator())

    def loss(u):
        return problem.inner_loss(problem.space.constrain(u), params, carry, batch, None)[0]

    u, step = 0.5 * torch.randn(problem.space.numel, generator=generator(2), dtype=F64), 1e-5
    differences = [
        (loss(u + step * e) - loss(u - step * e)) / (2 * step) for e in torch.eye(len(u), dtype=F64)
    ]
    torch.testing.assert_close(jacobian(loss, u), torch.stack(differences), rtol=1e-6, atol=1e-9)


def test_objective_is_convex_in_the_prediction():
    problem = small(**ALL)
    batch, (params, _) = problem.data(CPU, generator()).train.peek(), problem.init(generator())
    hypers = problem.space.constrain(
        torch.randn(problem.space.numel, generator=generator(1), dtype=F64)
    )
    one, other = torch.randn(2, len(batch[1]), 3, generator=generator(2), dtype=F64)
    ends = [problem.inner_objective(hypers, params, y, batch) for y in (one, other)]
    assert problem.inner_objective(hypers, params, (one + other) / 2, batch) < sum(ends) / 2


def test_at_takes_rows_for_all_and_for_each():
    leaf, y = torch.rand(4, 3, generator=generator()), torch.tensor([2, 0, 0, 1])
    assert torch.equal(at(leaf, y), torch.stack([leaf[i, c] for i, c in enumerate(y)]))
    assert torch.equal(at(leaf[0], y), leaf[0][y])


# --- metrics ---


def test_balanced_and_worst_accuracy_are_over_classes(tmp_path):
    problem = small()
    logits = F.one_hot(torch.tensor([0, 0, 0, 1, 0, 2]), 3).double()  # as predicted
    batch = (torch.zeros(6, 3), torch.tensor([0, 0, 0, 0, 1, 2]))
    result = {
        name: float(value.mean()) for name, value in problem.metrics({}, {}, logits, batch).items()
    }
    assert result["accuracy"] == pytest.approx(4 / 6)
    assert [result[f"accuracy_{c}"] for c in range(3)] == [0.75, 0, 1]
    assert problem.derived(result) == pytest.approx(
        {"balanced_accuracy": 1.75 / 3, "worst_accuracy": 0.0}
    )
    missing = problem.metrics({}, {}, logits[:4], tuple(leaf[:4] for leaf in batch))
    assert "accuracy_1" not in missing


def test_evaluation_in_parts_is_evaluation_at_once():
    """The batches of the split have different shares of each class."""
    from bilevel.run.evaluation import evaluate

    problem = small(spread=1.0)
    solver = ready(problem, SAMA())
    at_once = evaluate(problem, solver.solution(), problem.data(CPU, generator()).train)
    stream = small(spread=1.0, batch_size=7).data(CPU, generator()).train
    stream.evaluation_batch_size = 7
    assert evaluate(problem, solver.solution(), stream) == pytest.approx(at_once)
    assert at_once["balanced_accuracy"] != pytest.approx(at_once["accuracy"])


# --- solvers ---

RATES = {
    "inner_optimizer": sgd(0.3, momentum=0.9),
    "outer_optimizer": partial(torch.optim.RMSprop, lr=0.05),
}
TUNERS = {
    "delta_stn": partial(delta_stn, scale_optimizer=RATES["outer_optimizer"]),
    "stn": partial(stn, scale_optimizer=RATES["outer_optimizer"]),
    "implicit_cg": implicit_cg,
    "soba": SOBA,
    "sama": SAMA,
    "penalty": Penalty,
    "unrolled": Unrolled,
}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_wrong_with_it_and_every_gradient_based_solver_tunes_it(kind):
    report = bilevel.check_problem(
        small(**KINDS[kind]), solvers={name: make() for name, make in TUNERS.items()}
    )
    assert report.ok, str(report)
    assert report.refused_by == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [delta_stn, SAMA])
def test_no_step_waits_for_the_device(kind, make):
    solver = ready(small(batch_size=8, **KINDS[kind]), make(inner_steps=2))
    solver.step(limit=1)
    with no_waiting():
        solver.step()


@pytest.mark.parametrize("name", TUNERS)
def test_a_rare_class_comes_to_count_for_more(name):
    """Every solver raises the offset of the common class above that of the rare one."""
    problem = small(
        class_weight=False,
        smoothing=False,
        logit_offset=True,
        ratio=8.0,
        space={"weight_decay": {"init": 1e-2}},
    )
    solver = ready(problem, TUNERS[name](**RATES))
    solver.step(warmup=True)
    for _ in range(25):
        solver.step()
    offset = solver.solution().hypers["logit_offset"]
    assert offset[0] > offset[2] + 0.1
