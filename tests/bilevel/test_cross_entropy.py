import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bilevel
from bilevel import BilevelError, Interval, ModuleProblem, Positive, Space, cross_entropy
from bilevel.solvers import Fixed, delta_stn, implicit_cg

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(7, 4, generator=GENERATOR, dtype=torch.float64)
LABELS = torch.tensor([0, 1, 1, 3, 2, 0, 3])
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("kind", ["labels", "ignored", "items", "probabilities"])
def test_numbers_give_the_loss_of_pytorch(smoothing, weights, kind):
    logits, labels = LOGITS, LABELS
    if kind == "ignored":
        labels = labels.masked_fill(labels == 1, -100)
    elif kind == "items":
        logits = torch.stack([LOGITS, LOGITS.flip(0)], -1)
        labels = torch.stack([LABELS, LABELS.roll(1).masked_fill(LABELS == 1, -100)], -1)
    elif kind == "probabilities":
        labels = LOGITS.flip(0).softmax(-1)
    theirs = F.cross_entropy(logits, labels, weight=weights, label_smoothing=smoothing)
    same(cross_entropy(logits, labels, label_smoothing=smoothing, class_weights=weights), theirs)
    each = None if weights is None else weights.expand(7, 4)
    equal = torch.full((7,), smoothing, dtype=torch.float64)
    same(cross_entropy(logits, labels, label_smoothing=equal, class_weights=each), theirs)


def test_a_value_of_an_example_is_that_of_a_batch_in_which_all_have_it():
    ε = torch.rand(7, generator=GENERATOR, dtype=torch.float64)
    c = torch.rand(7, 4, generator=GENERATOR, dtype=torch.float64)
    total = 0.0
    for b in range(7):
        terms = F.cross_entropy(LOGITS, LABELS, c[b], label_smoothing=float(ε[b]), reduction="none")
        total += terms[b] / c[b][LABELS].sum()
    same(cross_entropy(LOGITS, LABELS, label_smoothing=ε, class_weights=c), total)


def test_the_derivatives_are_exact_and_the_loss_is_convex_in_the_logits():
    def loss(logits, ε, c):
        return cross_entropy(logits, LABELS, label_smoothing=ε, class_weights=c)

    ε = torch.rand(7, generator=GENERATOR, dtype=torch.float64)
    arguments = [t.clone().requires_grad_() for t in (LOGITS, ε, WEIGHTS)]
    assert torch.autograd.gradcheck(loss, arguments)
    assert torch.autograd.gradgradcheck(loss, arguments)
    hessian = torch.autograd.functional.hessian(lambda x: loss(x, ε, WEIGHTS), LOGITS)
    assert torch.linalg.eigvalsh(hessian.reshape(28, 28)).min() > -1e-12


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"label_smoothing": torch.zeros(3)},
            r"label_smoothing has the shape \[3\].*\[\] or \[7\]",
        ),
        ({"class_weights": torch.ones(3)}, r"class_weights has the shape \[3\].*\[4\] or \[7, 4\]"),
    ],
)
def test_other_shapes_are_refused(given, sentence):
    with pytest.raises(BilevelError, match=sentence):
        cross_entropy(LOGITS, LABELS, **given)


# --- in a problem ---

X = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(30) % 3
SMOOTHING = Space(smoothing=Interval(low=0.0, high=0.9, init=0.1))
BALANCE = Space(weights=Positive(init=1.0, shape=(3,), per_example=False))


class Labelled(ModuleProblem):
    """A classifier with the loss under test."""

    loss = staticmethod(
        lambda hypers, logits, labels: cross_entropy(
            logits,
            labels,
            label_smoothing=hypers.get("smoothing", 0.0),
            class_weights=hypers.get("weights"),
        )
    )

    def inner_objective(self, hypers, params, prediction, batch):
        return self.loss(hypers, prediction, batch[1])

    def outer_objective(self, hypers, params, prediction, batch):
        return F.cross_entropy(prediction, batch[1])


class Theirs(Labelled):
    loss = staticmethod(
        lambda hypers, logits, labels: F.cross_entropy(
            logits,
            labels,
            weight=hypers.get("weights"),
            label_smoothing=hypers.get("smoothing", 0.0),
        )
    )


def problem(space, kind=Labelled):
    return kind(nn.Linear(4, 3), space, (X, Y), (X, Y), batch_size=10)


@pytest.mark.parametrize("space", [SMOOTHING, BALANCE])
def test_gradient_based_solvers_tune_it(space):
    report = bilevel.check_problem(problem(space), {"Δ": delta_stn(), "cg": implicit_cg()})
    assert report.ok, report
    assert report.tuned_by == ["Δ", "cg"]


def test_class_weights_per_example_are_found():
    space = Space(weights=Positive(init=1.0, shape=(3,)))
    report = bilevel.check_problem(problem(space), {"Δ": delta_stn()})
    assert "declare per_example=False" in report.refused_by["Δ"]


@pytest.mark.parametrize("space", [SMOOTHING, BALANCE])
def test_the_loss_of_pytorch_names_ours(space):
    theirs = problem(space, Theirs)
    report = bilevel.check_problem(theirs, {"cg": implicit_cg(), "fix": Fixed()})
    assert report.tuned_by == ["fix"]
    for text in [*report.refused_by.values(), *(f.text for f in report.findings)]:
        assert "; use bilevel.cross_entropy, whose" in text
    data = theirs.data(torch.device("cpu"), torch.Generator())
    with pytest.raises(bilevel.Refused, match=r"; use bilevel.cross_entropy, whose"):
        implicit_cg().setup(theirs, data, torch.device("cpu"), torch.Generator())
