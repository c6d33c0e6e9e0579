"""Wrong data are one sentence with split, field, shape or type, and remedy; right data pass."""

import json
import random
import re
import warnings

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
    check_problem,
    squared_norm,
)
from bilevel.checks.calls import Calls
from bilevel.checks.check_problem import ProblemWarning
from bilevel.checks.splits import check_splits
from bilevel.data.fields import not_finite, telling_rows
from bilevel.errors import FaultWarning
from bilevel.solvers import Fixed, PopulationBased, delta_stn, gp, random_search, tpe
from tests.soak import data as soak

CPU = torch.device("cpu")
SPACE = Space(decay=Positive(init=0.1))


class Classes(ModuleProblem):
    """A classifier; `loss` takes the prediction and the second field."""

    loss = staticmethod(F.cross_entropy)

    def inner_objective(self, hypers, params, prediction, batch):
        return self.loss(prediction, batch[1]) + (hypers["decay"] * squared_norm(params)).mean()

    def outer_objective(self, hypers, params, prediction, batch):
        return self.loss(prediction, batch[1])


class Squares(Classes):
    loss = staticmethod(F.mse_loss)


class Masked(Classes):
    """A regression in which NaN marks a value that is missing."""

    @staticmethod
    def loss(prediction, y):
        known = ~y.isnan()
        return (prediction - y)[known].square().mean()


def rows(n, width=5):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(n)), torch.arange(n) % 3


def wrapped(kind, splits, network=None, **options):
    return kind(network or nn.Linear(5, 3), SPACE, *splits, batch_size=8, **options)


def checked(problem):
    check_splits(problem, problem.data(CPU, torch.Generator().manual_seed(0)), CPU)


def put(t, at, value):
    t = t.clone()
    t[at] = value
    return t


X, Y = rows(40)
WRONG = {
    "wide": ((torch.cat([X, X], 1), Y), r"field 0: float32 \[.*, 10\] does not .*5 columns"),
    "double": ((X.double(), Y), r"field 0: float64 .* `weight` is float32; .*\.to\(torch"),
    "complex": ((X.to(torch.complex64), Y), "field 0: complex64 .*imaginary part as columns"),
    "int32": ((X, Y.int()), r"field 1: int32 \[\d+\], but classes must be int64; .*\.long\(\)"),
    "column": ((X, Y[:, None]), r"field 1: int64 \[\d+, 1\] does not fit .*reshape\(len\(y\)\)"),
    "class": ((X, put(Y, 33, 3)), r"field 1 holds the class 3, .* has 3 classes \(0 to 2\)"),
    "negative": ((X, put(Y, 33, -1)), "field 1 holds the class -1, "),
    "dict": ({"x": X, "y": Y}, ": a batch is a dict with the keys `x`, `y`, "),
    "bare": (X, ": a batch is one tensor .* is one example; give a tuple"),
    "one field": ((X,), ": a batch is a tuple of 1 field, "),
    "NaN": (
        (put(put(X, (3, 4), torch.nan), (38, 1), torch.nan), Y),
        r"field 0: 2 of 40 rows hold NaN \(columns 1, 4\); remove or impute them",
    ),
}


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize(("wrong", "words"), WRONG.values(), ids=WRONG)
def test_wrong_data_are_one_sentence_before_the_first_step(split, wrong, words, tmp_path):
    splits = {"train": (X, Y), "valid": (X, Y), "test": (X, Y)} | {split: wrong}
    with pytest.raises(BilevelError, match=f"^{split} data.*{words}") as raised:
        Runner(epochs=1, warmup_epochs=0, progress="none").run(
            wrapped(Classes, splits.values()), Fixed(), directory=tmp_path
        )
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "metrics.jsonl").exists()
    report = check_problem(wrapped(Classes, splits.values()), solvers={})
    assert str(raised.value) in [finding.text for finding in report.findings]


def test_right_data_of_every_kind_pass():
    def tokens(n):
        return torch.randint(9, (n, 4)), torch.arange(n) % 3

    embedding = nn.Sequential(nn.Embedding(9, 5), nn.Flatten(), nn.Linear(20, 3))
    checked(wrapped(Classes, [tokens(20)] * 3, embedding))
    double = (X.double(), X.double()[:, :3])
    checked(wrapped(Squares, [double] * 2, nn.Linear(5, 3).double()))
    checked(wrapped(Squares, [(X, X[:, :3])] * 3))
    checked(wrapped(Classes, [(X, put(Y, 3, -100))] * 3))  # the class that is ignored
    checked(wrapped(Classes, [(X, F.one_hot(Y).float())] * 3))  # probabilities
    missing = (X, put(X[:, :3], (5, 1), torch.nan))
    checked(wrapped(Masked, [missing] * 3))
    checked(wrapped(Classes, [DataLoader(TensorDataset(X, Y), 8, shuffle=True)] * 3))


class Column(nn.Linear):
    """A network whose prediction is [n]."""

    def forward(self, x):
        return super().forward(x)[:, 0]


@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss])
@pytest.mark.filterwarnings("ignore:Using a target size")  # of PyTorch; it gives no remedy
def test_a_loss_that_would_pair_every_example_with_every_other_is_named(loss, monkeypatch):
    monkeypatch.setattr(Squares, "loss", staticmethod(loss))
    column, flat = (X, X[:, :1]), (X, X[:, 0])
    words = (
        r"^train data, field 1: float32 \[8.*\] does not fit the prediction float32 \[8.*\] of "
        r"field 0: .* \(ValueError: both would be expanded to \[8, 8\]\); give both one shape"
    )
    for network, wrong, right in ((Column, column, flat), (nn.Linear, flat, column)):
        with pytest.raises(BilevelError, match=words):
            checked(wrapped(Squares, [wrong, wrong], network(5, 1)))
        checked(wrapped(Squares, [right, right], network(5, 1)))
    checked(wrapped(Squares, [column, column]))  # three predictions and one target each


def test_the_check_changes_no_generator_and_no_stream():
    problem = wrapped(Classes, [(X, Y)] * 3, nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3)))
    data = problem.data(CPU, torch.Generator().manual_seed(0))
    before = torch.get_rng_state(), data.train.state_dict(), data.train.examples
    check_splits(problem, data, CPU)
    assert torch.equal(before[0], torch.get_rng_state())
    assert data.train.examples == before[2]
    assert torch.equal(before[1]["generator"], data.train.state_dict()["generator"])


def test_extremes_and_rows_that_are_not_finite_are_tried_wherever_they_lie():
    x, y = put(X, (17, 2), torch.inf), put(put(Y, 21, -5), 29, 9)
    assert telling_rows((x, y)).tolist() == [17, 21, 29]
    assert telling_rows((X, torch.ones(40, 2))).tolist() == []
    assert not_finite([(x,)]) == (
        "field 0: 1 of 40 rows holds infinity (column 2); remove or impute it"
    )


def test_a_difference_between_splits_names_both():
    recurrent = nn.GRU(5, 3, batch_first=True)

    class Last(Classes):
        def predict(self, *args, **kwargs):
            prediction, carry = super().predict(*args, **kwargs)
            return prediction[0][:, -1], carry

    def sequences(width):
        return torch.randn(20, 4, width), torch.arange(20) % 3

    with pytest.raises(BilevelError, match=r"^valid data, field 0: .*, 6\], but that of a tr"):
        checked(wrapped(Last, [sequences(5), sequences(6), sequences(5)], recurrent))


def test_an_error_of_the_users_own_code_keeps_its_traceback(tmp_path):
    class Mistaken(Classes):
        def inner_objective(self, hypers, params, prediction, batch):
            return prediction.no_such_method()

    problem = wrapped(Mistaken, [(X, Y)] * 2)
    checked(problem)
    with pytest.raises(AttributeError, match="no_such_method"):
        Runner(epochs=1, progress="none").run(problem, Fixed(), directory=tmp_path)


def later(x, y):
    """A loader whose second batch is wrong."""
    return [(X[:8], Y[:8]), (x[8:16], y[8:16])]


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_later_batch_of_a_loader_is_named_too(split, tmp_path):
    good = (X, Y)
    runner = Runner(epochs=2, warmup_epochs=0, progress="none", picture=False)

    def run(wrong, directory):
        splits = {"train": good, "valid": good, "test": good} | {split: wrong}
        return runner.run(wrapped(Classes, splits.values()), Fixed(), directory=directory)

    with pytest.raises(BilevelError, match=f"^{split} data, field 1 holds the class 7, but"):
        run(later(X, Y + 5), tmp_path / "class")
    summary = run(later(put(X, (9, 2), torch.nan), Y), tmp_path / "nan")
    assert summary["diverged"]
    words = f"; {split} data, field 0: 1 of 16 rows holds NaN (column 2); remove or impute it"
    assert summary["message"].endswith(words)
    assert "learning rate" not in summary["message"]


def test_a_later_test_batch_costs_its_figures_and_is_named(tmp_path):
    problem = wrapped(Classes, [(X, Y), (X, Y), later(put(X, (9, 2), torch.nan), Y)])
    runner = Runner(epochs=1, warmup_epochs=0, progress="none", picture=False)
    with pytest.warns(FaultWarning, match="the test loss is nan; test data, field 0: 1 of 16 rows"):
        summary = runner.run(problem, Fixed(), directory=tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["stopped"] == summary["stopped"]


def test_large_values_are_named_where_a_run_diverges(tmp_path):
    big = (X * 1e8, X[:, :3])
    runner = Runner(epochs=20, warmup_epochs=0, progress="none", picture=False)
    with pytest.warns(ProblemWarning, match="`decay` changes neither"):  # it is too small to see
        summary = runner.run(wrapped(Squares, [big, big]), Fixed(), directory=tmp_path)
    assert summary["diverged"]
    message = summary["message"]
    assert re.search(r"; train data, field 0 holds values up to .*e\+08; scale it", message)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda y: F.cross_entropy(torch.ones(2, 3, device="meta"), y), "Target 3 is out"),
        (lambda y: F.nll_loss(torch.ones(2, 3, device="meta"), y), "Target 3 is out"),
        (lambda y: F.embedding(y, torch.ones(3, 1, device="meta")), "index out of range"),
        (lambda y: torch.ones(2, 3, device="meta").gather(1, y[:, None]), "index out of bounds"),
    ],
)
def test_a_range_is_compared_before_a_call_that_a_gpu_does_not_survive(call, error, monkeypatch):
    """The device is mocked: the labels say that they lie on a GPU, and the call never happens."""

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")

    y = torch.tensor([0, 3]).as_subclass(Elsewhere)
    with pytest.raises(IndexError, match=error), Calls((y,), {}):
        call(y)


def test_a_slice_of_the_soak_ends_in_results_or_sentences(tmp_path):
    """The whole is `python -m tests.soak data`."""
    chosen = random.Random(7).sample(list(soak.cases()), 45)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ends = {case: soak.outcome(case, tmp_path) for case in chosen}
    assert {case: how for case, how in ends.items() if how not in soak.GOOD} == {}
    assert set(ends.values()) >= {"ran", "refused"}


BLACK_BOX = {
    "random_search": lambda: random_search(trial_epochs=1),
    "late": lambda: random_search(trial_epochs=1, early_stopping=False),
    "tpe": lambda: tpe(trial_epochs=1),
    "gp": lambda: gp(trial_epochs=1),
    "pbt": lambda: PopulationBased(population=2),
}


@pytest.mark.parametrize("solver", BLACK_BOX.values(), ids=BLACK_BOX)
def test_a_search_of_which_every_trial_diverges_has_diverged(solver, tmp_path):
    bad = later(put(X, (9, 2), torch.nan), Y)
    problem = wrapped(Classes, [bad, (X, Y)])
    runner = Runner(epochs=3, warmup_epochs=0, progress="none", picture=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        summary = runner.run(problem, solver(), directory=tmp_path)
    assert (summary["stopped"], summary["diverged"]) == ("diverged", True)
    words = r"diverged: (each of the 3 trials had a loss|a loss became NaN or infinite at step 4)"
    assert re.match(words, summary["message"])
    assert "train data, field 0: 1 of 16 rows holds NaN" in summary["message"]


class FailsAtFirst(Classes):
    """The loss of the first trial alone, at the initial λ, is not finite."""

    def inner_objective(self, hypers, params, prediction, batch):
        loss = super().inner_objective(hypers, params, prediction, batch)
        initial = (hypers["decay"] - SPACE["decay"].init).abs() < 1e-6
        return loss + torch.where(initial, torch.nan, 0.0).mean()


@pytest.mark.parametrize("solver", [BLACK_BOX["random_search"], BLACK_BOX["pbt"]])
def test_a_search_of_which_one_trial_diverges_has_a_result(solver, tmp_path):
    runner = Runner(epochs=4, warmup_epochs=0, progress="none", picture=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        summary = runner.run(wrapped(FailsAtFirst, [(X, Y)] * 2), solver(), directory=tmp_path)
    assert not summary["diverged"]
    assert summary["hypers"]["decay"] != pytest.approx(SPACE["decay"].init)


def test_delta_stn_needs_no_more_than_the_others(tmp_path):
    with pytest.raises(BilevelError, match=r"^valid data, field 0: float64"):
        Runner(epochs=1, warmup_epochs=0, progress="none").run(
            wrapped(Classes, [(X, Y), (X.double(), Y)]), delta_stn(), directory=tmp_path
        )
