"""The means of metrics over a split are those of the whole split, and bad metrics are named."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bilevel import (
    BilevelError,
    ModuleProblem,
    Positive,
    Runner,
    Space,
    Weighted,
    check_problem,
    evaluate,
    solvers,
    squared_norm,
)
from bilevel.checks.check_problem import ProblemWarning, check_setup
from bilevel.metrics import Means, read_metrics
from bilevel.solver import Solution

CPU = torch.device("cpu")
CLASS_WEIGHTS = torch.tensor([1.0, 10.0, 0.5], dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Decayed(ModuleProblem):
    """A loss with weights, whose metrics may be a mean of batches (`weighs` is False)."""

    weighs = True

    def inner_objective(self, hypers, params, prediction, batch):
        penalty = 0.5 * (hypers["decay"] * squared_norm(params)).mean()
        return self.outer_objective(hypers, params, prediction, batch) + penalty

    def outer_objective(self, hypers, params, prediction, batch):
        return self.loss(prediction, batch)[0]

    def metrics(self, hypers, params, prediction, batch):
        loss, weight = self.loss(prediction, batch)
        return {"loss": Weighted(loss, weight) if self.weighs else loss}


class Tokens(Decayed):
    """Padding is ignored."""

    def loss(self, prediction, batch):
        labels = batch[1].flatten()
        return F.cross_entropy(prediction.flatten(0, 1), labels), (labels != -100).sum()


class Imbalanced(Decayed):
    """Classes have weights."""

    def loss(self, prediction, batch):
        loss = F.cross_entropy(prediction, batch[1], weight=CLASS_WEIGHTS)
        return loss, CLASS_WEIGHTS[batch[1]].sum()


class Masked(Decayed):
    """A mask of another kind: the squared error of the entries that were measured."""

    def loss(self, prediction, batch):
        measured = batch[1] == batch[1]
        errors = (prediction - batch[1].nan_to_num(0.0)).square() * measured
        return errors.sum() / measured.sum(), measured.sum()


class PerItem(Imbalanced):
    """One value and one weight per item."""

    def metrics(self, hypers, params, prediction, batch):
        losses = F.cross_entropy(prediction, batch[1], reduction="none")
        return {"loss": Weighted(losses, CLASS_WEIGHTS[batch[1]]) if self.weighs else losses.mean()}


def splits():
    x = torch.randn(60, 4, 6, dtype=torch.float64, generator=generator())
    labels = torch.randint(3, (60, 4), generator=generator(1))
    labels[:30, 1:] = -100  # short sequences come first
    labels[7] = -100  # and one has no token at all
    sorted_labels = torch.cat([torch.zeros(35), torch.ones(20), 2 * torch.ones(5)]).long()
    targets = torch.randn(60, 3, dtype=torch.float64, generator=generator(2))
    targets[:40, 1:] = torch.nan
    return {
        Tokens: (x, labels),
        Imbalanced: (x[:, 0], sorted_labels),
        PerItem: (x[:, 0], sorted_labels),
        Masked: (x[:, 0], targets),
    }


def make(kind, batch_size=16, weighs=True, shuffle=False):
    split = splits()[kind]
    loader = DataLoader(TensorDataset(*split), batch_size, shuffle=shuffle)
    problem = kind(
        nn.Linear(6, 3, dtype=torch.float64), Space(decay=Positive(init=0.01)), loader, loader
    )
    problem.weighs = weighs
    return problem, split


def measured(problem, split):
    """Return the validation loss of an evaluation and that of the whole split at once."""
    params, carry = problem.init(generator())
    hypers = problem.space.constrain(problem.space.init(torch.float64))
    found = evaluate(problem, Solution(hypers, params, carry), problem.data(CPU, generator()).valid)
    prediction = F.linear(split[0], params["weight"], params["bias"])
    return found["loss"], float(problem.loss(prediction, split)[0])


KINDS = [Tokens, Imbalanced, PerItem, Masked]


@pytest.mark.parametrize("batch_size", [1, 7, 16, 60])
@pytest.mark.parametrize("kind", KINDS)
def test_a_weighted_metric_is_that_of_the_whole_split(kind, batch_size):
    found, whole = measured(*make(kind, batch_size))
    assert found == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_means_that_are_not_averages_are_found(kind):
    problem, split = make(kind, weighs=False)
    if kind is not PerItem:  # whose plain metric is another number, and an average
        found, whole = measured(problem, split)
        assert found != pytest.approx(whole, rel=1e-3)
        findings = [f.text for f in check_problem(problem, solvers={}).findings]
        assert any("metric `loss`" in text and "average" in text for text in findings)
    assert not any(
        "metric `loss`" in f.text for f in check_problem(make(kind)[0], solvers={}).findings
    )


def test_a_run_warns_where_the_first_batch_shows_it():
    mixed = torch.randperm(60, generator=generator())
    for weighs in (True, False):
        problem, split = make(Imbalanced, weighs=weighs)
        dataset = TensorDataset(*(t[mixed] for t in split))
        problem._splits = (DataLoader(dataset, 16),) * 2 + (None,)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check_setup(problem, problem.data(CPU, generator()), CPU)
        told = [w for w in caught if "return bilevel.Weighted(value, weight)" in str(w.message)]
        assert len(told) == (not weighs)
        assert all(w.category is ProblemWarning for w in told)


class Measured(Imbalanced):
    """Reports one more metric."""

    extra = staticmethod(lambda prediction, batch: None)

    def metrics(self, hypers, params, prediction, batch):
        losses = F.cross_entropy(prediction, batch[1], reduction="none")
        return {"loss": losses, "extra": self.extra(prediction, batch)}


def reporting(extra):
    split = splits()[Imbalanced]
    problem = Measured(
        nn.Linear(6, 3, dtype=torch.float64),
        Space(decay=Positive(init=0.01)),
        split,
        split,
        batch_size=20,
    )
    problem.extra = extra
    return problem


def hits(prediction, batch):
    return prediction.argmax(1) == batch[1]


NUMBERS = {
    "bools": hits,
    "ints": lambda p, b: hits(p, b).long(),
    "half": lambda p, b: hits(p, b).to(torch.float16),
    "array": lambda p, b: hits(p, b).numpy(),
    "reversed array": lambda p, b: hits(p, b).double().numpy()[::-1],
    "list": lambda p, b: [float(hit) for hit in hits(p, b)],
    "float": lambda p, b: hits(p, b).float().mean().item(),
    "NumPy's float": lambda p, b: np.float64(hits(p, b).double().mean().item()),
    "mean": lambda p, b: hits(p, b).double().mean(),
    "weighted list": lambda p, b: Weighted([float(hit) for hit in hits(p, b)], 2),
    "weighted array": lambda p, b: Weighted(hits(p, b).numpy(), np.full(len(b[1]), 0.3)),
}


@pytest.mark.parametrize("extra", NUMBERS.values(), ids=NUMBERS)
def test_numbers_are_taken(extra):
    problem = reporting(extra)
    params, carry = problem.init(generator())
    x, labels = splits()[Imbalanced]
    hypers = problem.space.constrain(problem.space.init(torch.float64))
    stream = problem.data(CPU, generator()).valid
    found = evaluate(problem, Solution(hypers, params, carry), stream)["extra"]
    whole = (F.linear(x, params["weight"], params["bias"]).argmax(1) == labels).double().mean()
    assert found == pytest.approx(float(whole), rel=1e-6)


@pytest.mark.parametrize(
    ("extra", "value"),
    [
        (lambda p, b: None, None),
        (lambda p, b: hits(p, b)[b[1] == 7], math.nan),
        (lambda p, b: [], math.nan),
        (lambda p, b: np.zeros(0), math.nan),
        (lambda p, b: Weighted(p.new_tensor(torch.nan), 0), math.nan),
        (lambda p, b: hits(p, b)[b[1] == 2] if (b[1] == 2).any() else None, 0.2),
    ],
)
def test_a_metric_without_items_is_left_out_or_nan(extra, value, tmp_path):
    runner = Runner(epochs=1, warmup_epochs=0, progress="none", picture=False)
    summary = runner.run(reporting(extra), solvers.Fixed(), directory=tmp_path, resume=False)
    found = summary["best"].get("valid_extra")
    if value is None:
        assert "valid_extra" not in summary["best"]
    elif math.isnan(value):
        assert found is None or math.isnan(found)
    else:
        assert 0 <= found <= 1


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (lambda p, b: "good", "metric `extra` of Measured is not a number or an array of numbers"),
        (lambda p, b: {"a": 1.0}, "metric `extra` of Measured is not a number"),
        (lambda p, b: np.array([None]), "metric `extra` of Measured is not a number"),
        (lambda p, b: object(), "metric `extra` of Measured is not a number"),
        (lambda p, b: p.sum() * 1j, "metric `extra` of Measured is complex"),
        (lambda p, b: Weighted(None, 1), "the value of the metric `extra` .* is not a number"),
        (lambda p, b: Weighted(1.0, "a"), "the weight of the metric `extra` .* is not a number"),
        (
            lambda p, b: Weighted(p[:, 0], torch.ones(3)),
            r"metric `extra` of Measured has values of shape \[60\] and weights of shape \[3\]",
        ),
    ],
)
def test_a_metric_that_is_no_number_is_named(extra, words, tmp_path):
    runner = Runner(epochs=1, warmup_epochs=0, progress="none", picture=False)
    problem = reporting(extra)
    with pytest.raises(BilevelError, match=words):
        runner.run(problem, solvers.Fixed(), directory=tmp_path)
    assert "metric `extra`" in str(check_problem(problem, solvers={}))


@pytest.mark.parametrize("reported", [torch.ones(3), [("loss", 1.0)], None, 0.5])
def test_metrics_that_are_not_a_mapping_are_refused(reported):
    with pytest.raises(BilevelError, match=r"It\.metrics returns a .*; return a dict of values"):
        read_metrics(reported, "It", CPU)


def test_means_wait_for_the_device_once(monkeypatch):
    waits = []
    plain = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: waits.append(x) or plain(x))
    means = Means("It", CPU)
    for _ in range(3):
        means.add({"loss": torch.ones(4), "other": Weighted(torch.ones(()), torch.ones(()))}, 4)
    assert means.result() == {"loss": 1.0, "other": 1.0}
    assert len(waits) == 1
