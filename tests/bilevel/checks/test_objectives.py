"""Objectives that are no loss: one sentence, the same in `check_problem` and at every set-up."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F

from bilevel import (
    BilevelError,
    ModuleProblem,
    Need,
    Positive,
    Runner,
    Space,
    check_problem,
    solvers,
    squared_norm,
)
from bilevel.checks.check_problem import ProblemWarning, check_setup
from tests.support.solver_list import SOLVERS

CPU = torch.device("cpu")
X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)).double()
Y = (X[:, 0] > 0).long()


class Decayed(ModuleProblem):
    """Cross-entropy; `change(loss, prediction, batch)` replaces the value of one objective."""

    def __init__(self, name=None, change=None, *, valid=None, module=None, batch_size=8):
        self.name, self.change = name, change
        space = Space(decay=Positive(init=0.1))
        network = module or torch.nn.Linear(4, 2).double()
        valid = valid or (X[16:], Y[16:])
        super().__init__(network, space, (X[:16], Y[:16]), valid, batch_size=batch_size)

    def inner_objective(self, hypers, params, prediction, batch):
        penalty = (hypers["decay"] * squared_norm(params)).mean()
        return self.changed(
            "inner", F.cross_entropy(prediction, batch[1]) + penalty, prediction, batch
        )

    def outer_objective(self, hypers, params, prediction, batch):
        return self.changed("outer", F.cross_entropy(prediction, batch[1]), prediction, batch)

    def changed(self, name, loss, prediction, batch):
        return self.change(loss, prediction, batch) if name == self.name else loss


def set_up(problem, solver):
    data = problem.data(CPU, torch.Generator().manual_seed(0))
    solver.setup(problem, data, CPU, torch.Generator().manual_seed(0))
    return solver


def wrong(prediction, batch):
    return prediction.argmax(1) != batch[1]


def without_graph(loss, prediction, batch):
    with torch.no_grad():
        return F.cross_entropy(prediction, batch[1])


NO_NUMBERS = {
    "per example": (
        lambda loss, p, b: F.cross_entropy(p, b[1], reduction="none"),
        r"is of shape \[8\]; return .* averaged over examples \(\.mean\(\)\)",
    ),
    "one entry": (lambda loss, p, b: loss.reshape(1), r"is of shape \[1\]; .*\(\.mean\(\)\)"),
    "a matrix": (lambda loss, p, b: p.square(), r"is of shape \[8, 2\]; .*\(\.mean\(\)\)"),
    "errors per example": (
        lambda loss, p, b: wrong(p, b),
        r"is of shape \[8\]; .*\(\.float\(\)\.mean\(\)\)",
    ),
    "a count": (lambda loss, p, b: wrong(p, b).sum(), "is torch.int64, which has no gradient"),
    "a truth value": (lambda loss, p, b: wrong(p, b).any(), "is torch.bool, which has no gradient"),
    "complex": (
        lambda loss, p, b: torch.complex(loss, loss),
        "is torch.complex128, .* real tensor",
    ),
    "float16": (
        lambda loss, p, b: (1e6 * loss).half(),
        r"overflows float16, .* compute it in float32 \(prediction\.float\(\)\)",
    ),
    "a number of Python": (lambda loss, p, b: float(loss.detach()), r"returns a float; .*item\(\)"),
    "a number of NumPy": (
        lambda loss, p, b: loss.detach().numpy()[()],
        "returns a float64; return",
    ),
    "nothing": (lambda loss, p, b: None, "returns None; return the loss alone"),
    "a pair": (lambda loss, p, b: (loss, {}), "returns a tuple; return the loss alone"),
    "a dictionary": (lambda loss, p, b: {"loss": loss}, "returns a dict; return the loss alone"),
}
INFINITE = {
    "a square in float16": lambda loss, p, b: (1e4 * p).half().square().mean().double(),
    "log of zero": lambda loss, p, b: torch.log(0 * loss),
    "0/0": lambda loss, p, b: loss * 0 / 0,
}
CONSTANTS = {
    "detached": lambda loss, p, b: loss.detach(),
    "a new tensor": lambda loss, p, b: torch.tensor(float(loss.detach())),
    "under no_grad": without_graph,
    "of the labels": lambda loss, p, b: b[1].double().mean(),
}


def assert_refused_everywhere(problem, words, by=SOLVERS):
    report = check_problem(problem, {"it": solvers.delta_stn(), "that": solvers.implicit_cg()})
    errors = [finding.text for finding in report.findings if finding.level == "error"]
    [error] = [text for text in errors if re.search(words, text)]
    assert str(report).count(error) == 1
    assert set(report.refused_by) == {"it", "that"}
    assert "solvers that can tune it:" not in str(report)
    assert "RuntimeError" not in str(report)
    assert "TypeError" not in str(report)
    for make in by.values():
        with pytest.raises(BilevelError, match=words):
            set_up(problem, make())


@pytest.mark.parametrize("name", ["inner", "outer"])
@pytest.mark.parametrize(("change", "words"), NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_an_objective_that_is_no_finite_number_is_refused(name, change, words):
    assert_refused_everywhere(Decayed(name, change), f"`{name}_objective` {words}")


@pytest.mark.parametrize("name", ["inner", "outer"])
@pytest.mark.parametrize("change", INFINITE.values(), ids=INFINITE)
def test_solvers_that_follow_a_gradient_refuse_a_start_that_is_not_finite(name, change):
    problem, words = Decayed(name, change), f"`{name}_objective` is not finite at the initial .*0.1"
    follow = {n: m for n, m in SOLVERS.items() if Need.OUTER_DERIVATIVE in m().needs}
    assert_refused_everywhere(problem, words, follow)
    set_up(problem, solvers.random_search()).step()  # its first trial fails, and it continues


@pytest.mark.parametrize("change", CONSTANTS.values(), ids=CONSTANTS)
def test_an_inner_objective_without_w_is_refused(change):
    assert_refused_everywhere(
        Decayed("inner", change), "`inner_objective` does not depend on w, so nothing can be"
    )


def test_an_inner_objective_through_numpy_is_refused():
    through = lambda loss, p, b: torch.as_tensor(p.numpy()).square().mean()  # noqa: E731
    assert_refused_everywhere(
        Decayed("inner", through), r"`inner_objective` cannot be differentiated in w \(.*numpy"
    )


REMEDIES = {
    ".mean()": lambda loss, p, b: F.cross_entropy(p, b[1], reduction="none").mean(),
    ".mean() of one entry": lambda loss, p, b: loss.reshape(1).mean(),
    ".real": lambda loss, p, b: torch.complex(loss, loss).real,
    ".abs()": lambda loss, p, b: torch.complex(loss, loss).abs(),
    "in float32": lambda loss, p, b: 1e6 * loss.half().float(),
}


@pytest.mark.parametrize("change", REMEDIES.values(), ids=REMEDIES)
@pytest.mark.parametrize("name", ["inner", "outer"])
def test_the_remedies_are_accepted(name, change):
    problem = Decayed(name, change)
    assert check_problem(problem, {"it": solvers.delta_stn()}).refused_by == {}
    set_up(problem, solvers.implicit_cg()).step()


def test_the_remedy_of_a_count_serves_a_search():
    problem = Decayed("outer", lambda loss, p, b: wrong(p, b).float().mean())
    set_up(problem, solvers.random_search()).step()


@pytest.mark.parametrize("name", ["inner", "outer"])
@pytest.mark.parametrize("batch_size", [3, 4, 8])
def test_a_sum_over_examples_is_an_error_of_the_check_and_a_warning_of_a_run(
    name, batch_size, tmp_path
):
    total = lambda loss, p, b: F.cross_entropy(p, b[1], reduction="sum")  # noqa: E731
    words = f"`{name}_objective` adds up over examples and grows with the batch; average it"
    problem = Decayed(name, total, batch_size=batch_size)
    assert words in str(check_problem(problem, solvers={}))
    runner = Runner(epochs=1, warmup_epochs=0, progress="none", picture=False)
    with pytest.warns(ProblemWarning) as warned:
        runner.run(problem, solvers.Fixed(), directory=tmp_path)
    assert any(words in str(warning.message) for warning in warned)


@pytest.mark.parametrize("batch_size", [3, 4, 8])
def test_a_mean_over_examples_is_not_warned_of(batch_size):
    problem = Decayed(batch_size=batch_size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_setup(problem, problem.data(CPU, torch.Generator()), CPU)
    assert not check_problem(problem, solvers={}).findings


def test_an_inner_objective_without_a_slope_is_an_error_of_the_check():
    flat = lambda loss, p, b: p.round().square().mean()  # noqa: E731
    report = check_problem(Decayed("inner", flat), solvers={})
    assert "the gradient of `inner_objective` is zero in every weight" in str(report)
    assert not report.ok


def test_forward_mode_takes_an_inner_objective_without_hyperparameters():
    problem = Decayed("inner", lambda loss, p, b: F.cross_entropy(p, b[1]))
    solver = set_up(problem, solvers.unrolled_forward(inner_steps=2))
    assert torch.equal(solver.hypergradient(), torch.zeros(1).double())
