"""The printed report of `check_problem`: each error once, in words, with its place."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bilevel import (
    ModuleProblem,
    Positive,
    Solver,
    Space,
    check_problem,
    cross_entropy,
    squared_norm,
)
from bilevel.checks.hints import refusal
from bilevel.problem_wrapper import ProblemWrapper
from bilevel.run.pooled_data import PooledData
from bilevel.solvers import delta_stn, implicit_cg, random_search, stn

X, Y = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
SOLVERS = {"delta_stn": delta_stn(), "cg": implicit_cg(), "search": random_search()}


class Sound(ModuleProblem):
    """A problem without an error; the cases below override one method."""

    def inner_objective(self, hypers, params, prediction, batch):
        penalty = (hypers["decay"] * squared_norm(params)).mean()
        return F.cross_entropy(prediction, batch[1]) + penalty

    def outer_objective(self, hypers, params, prediction, batch):
        return F.cross_entropy(prediction, batch[1])


class Through(nn.Module):
    """Two layers with a function between them."""

    def __init__(self, function):
        super().__init__()
        self.one, self.two, self.function = nn.Linear(4, 8), nn.Linear(8, 3), function

    def forward(self, x):
        return self.two(self.function(self.one(x)))


class OneWay(torch.autograd.Function):
    """A function with a gradient alone."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (x > 0)


def made(cls=Sound, function=torch.tanh, x=X, y=Y, **methods):
    """Return a problem whose class has other methods."""
    kind = type("Mine", (cls,), methods)
    space = Space(decay=Positive(init=0.1))
    return kind(Through(function), space, train=(x[:20], y[:20]), valid=(x[20:], y[20:]))


def objective(function):
    return lambda self, hypers, params, prediction, batch: function(
        hypers, params, prediction, batch
    )


def broken_metrics(self, hypers, params, prediction, batch):
    return {"loss": F.cross_entropy(prediction, batch[1]), "hits": (prediction > 0).mean()}


def without_carry(self, *args, **kwargs):
    return Sound.predict(self, *args, **kwargs)[0]


def noisy(self, hypers, batch, *, train, generator):
    return (batch[0] + torch.randn(batch[0].shape),), {}


def in_a_list(self, *args, **kwargs):
    prediction, carry = Sound.predict(self, *args, **kwargs)
    return [prediction], carry


def clamping(self, hypers, params, *args, **kwargs):
    with torch.no_grad():
        params["one.weight"].clamp_(-9.0, 9.0)
    return Sound.predict(self, hypers, params, *args, **kwargs)


def moving(self, hypers, params, *args, **kwargs):
    params["one.weight"].data.add_(0.1)
    return Sound.predict(self, hypers, params, *args, **kwargs)


def refusing(h):
    raise ValueError("too dark")


def given(train, valid):
    problem = made()
    problem._splits = (train, valid, None)
    return problem


def no_file(self, device, generator):
    raise FileNotFoundError("no file data.csv")


BROKEN = {
    "an unknown hyperparameter": (
        made(inner_objective=objective(lambda h, w, p, b: p.mean() + h["decai"])),
        "reads the hyperparameter `decai`, which the space does not have (did you mean `decay`?)",
    ),
    "an unknown weight": (
        made(inner_objective=objective(lambda h, w, p, b: p.mean() + w["one.weigth"].sum())),
        "reads the weight `one.weigth`, which the network does not have (did you mean `one.weigh",
    ),
    "labels of another type": (made(y=Y.float()), "train and valid data, field 1: float32 [20]"),
    "too many columns": (made(x=torch.randn(30, 5)), "train and valid data, field 0: float32"),
    "a class out of range": (made(y=Y + 1), "train and valid data, field 1 holds the class 3"),
    "a missing attribute": (
        made(outer_objective=lambda self, h, w, p, b: self.criterion(p, b[1])),
        "AttributeError: 'Mine' object has no attribute 'criterion' (test_report.py, line ",
    ),
    "no carry": (made(predict=without_carry), "return the prediction and the carry"),
    "a loss per example": (
        made(
            inner_objective=objective(lambda h, w, p, b: F.cross_entropy(p, b[1], reduction="none"))
        ),
        "`inner_objective` is of shape [20]",
    ),
    "a tensor as label_smoothing": (
        made(
            inner_objective=objective(
                lambda h, w, p, b: F.cross_entropy(p, b[1], label_smoothing=h["decay"])
            )
        ),
        "use bilevel.cross_entropy, whose label_smoothing",
    ),
    "numpy in the network": (
        made(function=lambda h: torch.from_numpy(np.tanh(h.numpy()))),
        "Can't call numpy() on Tensor that requires grad",
    ),
    "an operation in place": (
        made(function=lambda h: h.sigmoid().mul_(2)),
        "use operations with a derivative (x * 2, not x.mul_(2))",
    ),
    "draws from the global generator": (made(inputs=noisy), "draws from PyTorch's global random"),
    "metrics that are no dict": (
        made(metrics=lambda self, h, w, p, b: F.cross_entropy(p, b[1])),
        "error: Mine.metrics returns a Tensor; return a dict",
    ),
    "a mean of truth values": (made(metrics=broken_metrics), "train and valid data, field 0"),
    "a missing file": (made(data=no_file), "no file data.csv (test_report.py, line "),
    "an empty split": (made(x=X[20:], y=Y[20:]), "error: the valid split is empty"),
    "an unused hyperparameter": (
        made(inner_objective=objective(lambda h, w, p, b: F.cross_entropy(p, b[1]))),
        "changes neither objective",
    ),
    "a view of another length": (
        made(function=lambda h: h.reshape(-1, 16)),
        "train and valid data, field 0: float32 [20, 4], which becomes [10, 16], does not fit",
    ),
    "labels in a column": (
        made(
            inner_objective=objective(lambda h, w, p, b: cross_entropy(p, b[1])),
            y=Y[:, None],
        ),
        "train and valid data, field 1: int64 [20, 1] does not fit a prediction of shape [20, 3]",
    ),
    "a class out of range of our loss": (
        made(inner_objective=objective(lambda h, w, p, b: cross_entropy(p, b[1])), y=Y + 1),
        "train and valid data, field 1 holds the class 3, but the prediction has 3 classes",
    ),
    "batches that are dictionaries": (
        given({"x": X[:20], "y": Y[:20]}, {"x": X[20:], "y": Y[20:]}),
        "train and valid data: a batch is a dict with the keys `x`, `y`, of which `predict` takes",
    ),
    "a prediction that is no tensor": (
        made(predict=in_a_list),
        "the network returns a list of 1 field, where `inner_objective` takes a tensor",
    ),
    "a network that forgets to return": (
        made(predict=lambda self, *args, **_: (None, Sound.init(self, torch.Generator())[1])),
        "the network returns a NoneType, where `inner_objective` takes a tensor",
    ),
    "another argument": (
        made(inputs=lambda self, hypers, batch, **_: (batch, {})),
        "; return the arguments of the module from `inputs`",
    ),
    "a forward with a wrong shape": (
        made(function=lambda h: h + torch.zeros(7)),
        "at non-singleton dimension 1 (test_report.py, line ",
    ),
    "a forward that raises": (
        made(function=refusing),
        "error: a call of the problem raises ValueError: too dark (test_report.py, line ",
    ),
    "a write that leaves the weights alone": (
        made(predict=clamping),
        "error: `predict` modifies its params in place; work on a clone",
    ),
    "weights that move in each call": (
        made(predict=moving),
        "error: `predict` modifies its params in place; work on a clone",
    ),
    "an init without tensors": (
        made(init=lambda self, generator: ({"w": 1.0}, {})),
        "error: `init` returns a tuple of 2 fields; return two dictionaries of tensors",
    ),
    "no data": (
        made(data=lambda self, device, generator: None),
        "error: `data` returns a NoneType; return bilevel.Data",
    ),
    "an assertion": (
        made(inner_objective=objective(lambda h, w, p, b: failing(p))),
        "raises AssertionError: assert 3 == 7 (test_report.py, line ",
    ),
}


def failing(prediction):
    assert prediction.shape[1] == 7


@pytest.mark.parametrize(("problem", "words"), BROKEN.values(), ids=BROKEN)
def test_an_error_is_named_once_and_no_solver_is_listed_beside_it(problem, words):
    report = check_problem(problem, SOLVERS)
    text = str(report)
    assert not report.ok
    assert text.count(words) >= 1, text
    errors = [line for line in text.splitlines() if line.startswith("  error")]
    unlike = {line.replace("train=True", "").replace("train=False", "") for line in errors}
    assert len(unlike) == 1, text
    assert "solvers that can tune it:" not in text
    assert "refuse" not in text
    assert text.splitlines()[0] == "Mine: there are errors"
    assert text.splitlines()[-1].startswith("  correct the errors")
    assert "Traceback" not in text
    assert "BilevelError" not in text
    assert "Hint:" not in text


def test_an_error_that_differs_between_splits_is_named_for_each():
    problem = given((X[:20], Y[:20].float()), (X[20:, :3], Y[20:]))
    errors = [finding.text for finding in check_problem(problem, {}).findings]
    assert [text.partition(",")[0] for text in errors] == ["train data", "valid data"]


def test_a_wrapper_leaves_the_name_of_the_class_that_a_user_wrote():
    class Twice(ProblemWrapper):
        pass

    report = check_problem(PooledData(Twice(made(metrics=lambda *_: 3))), {})
    assert report.problem == "Mine"
    assert "Mine.metrics returns" in str(report)


class Careless(Solver):
    """Calls a function that fails; only `check` is ever called."""

    def check(self, problem, data, device):
        problem.predict(None, None, None, None, train=True, generator=None)

    setup = step = solution = state_dict = load_state_dict = None  # type: ignore[assignment]


def test_a_refusal_is_a_sentence_with_a_place_and_a_remedy():
    def unready(self, hypers, *args, **kwargs):
        if hypers is None:
            raise RuntimeError("expected scalar type Long")
        return Sound.predict(self, hypers, *args, **kwargs)

    report = check_problem(made(predict=unready), {"careless": Careless()})
    assert report.ok
    (reason,) = report.refused_by.values()
    assert reason.startswith("a step of it raises RuntimeError: expected scalar type Long (test_re")
    assert reason.endswith("; change that call, or use another solver")


def test_an_error_of_pytorch_itself_is_no_refusal_as_it_is():
    raw = "has been modified by an inplace operation: [torch.FloatTensor [12]]"
    refused = refusal(RuntimeError(f"one of the variables {raw}. Hint: enable anomaly detection."))
    assert refused == (
        f"a step of it fails (RuntimeError: one of the variables {raw}); write to no tensor in "
        "place (x * 2, not x.mul_(2)), or use another solver"
    )


def test_gradients_of_a_loss_that_is_not_finite_are_not_named_too():
    findings = check_problem(made(function=lambda h: h / 0), {}).findings
    assert [text.split()[0] for _, text, _ in findings] == [
        "`inner_objective`",
        "`outer_objective`",
    ]


def test_a_carry_that_only_one_mode_loses_is_named_with_its_mode():
    def losing(self, *args, train, **kwargs):
        prediction, carry = Sound.predict(self, *args, train=train, **kwargs)
        return prediction, {} if train else carry

    problem = made(function=nn.BatchNorm1d(8), predict=losing)
    texts = [finding.text for finding in check_problem(problem, {}).findings]
    assert texts[0].startswith("`predict` with train=True returns a carry with other names")


def test_a_function_with_a_gradient_alone_is_explained_to_each_solver():
    solvers = {"delta_stn": delta_stn(), "stn": stn(), "cg": implicit_cg()}
    report = check_problem(made(function=OneWay.apply), solvers)
    assert (report.findings, report.tuned_by) == ([], ["stn"])
    assert "linearize=true needs derivatives that PyTorch lacks" in report.refused_by["delta_stn"]
    assert "needs second derivatives of L_T" in report.refused_by["cg"]
