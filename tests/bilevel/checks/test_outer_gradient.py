"""An outer objective without a gradient: a sentence of the solvers that follow it, others run."""

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
from tests.support.solver_list import BLACK_BOX, SOLVERS

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)).double()
Y = (X[:, 0] > 0).long()
WITHOUT = BLACK_BOX | {"fixed", "es", "es, truncated"}


class Scored(ModuleProblem):
    """Cross-entropy with a decay inside, a score outside."""

    def __init__(self, score):
        self.score = score
        space = Space(decay=Positive(init=0.1))
        splits = [(X[:16], Y[:16]), (X[16:], Y[16:])]
        super().__init__(torch.nn.Linear(4, 2).double(), space, *splits, batch_size=8)

    def inner_objective(self, hypers, params, prediction, batch):
        penalty = (hypers["decay"] * squared_norm(params)).mean()
        return F.cross_entropy(prediction, batch[1]) + penalty

    def outer_objective(self, hypers, params, prediction, batch):
        return self.score(prediction, batch[1])


def zero_one(prediction, labels):
    """Compute outside of PyTorch, as scikit-learn does."""
    return torch.tensor((prediction.numpy().argmax(1) != labels.numpy()).mean())


SCORES = {
    "error rate": lambda p, y: (p.argmax(1) != y).float().mean(),
    "detached": lambda p, y: F.cross_entropy(p.detach(), y),
    "threshold": lambda p, y: ((p[:, 1] > p[:, 0]) != (y > 0)).double().mean(),
    "through NumPy": zero_one,
    "rounded": lambda p, y: (p.softmax(1)[:, 1].round() - y).square().mean(),
    "sign": lambda p, y: torch.sign((p[:, 0] - p[:, 1]) * (2 * y - 1)).mean(),
}


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_that_follow_the_gradient_refuse_and_the_others_run(score, name, tmp_path):
    solver, problem = SOLVERS[name](), Scored(score)
    runner = Runner(epochs=2, warmup_epochs=0, progress="none", picture=False)
    assert (Need.OUTER_DERIVATIVE in solver.needs) == (name not in WITHOUT)
    if name in WITHOUT:
        assert runner.run(problem, solver, directory=tmp_path)["diverged"] is False
        return
    with pytest.raises(
        BilevelError, match=r"`outer_objective` is (absent|zero) .*random_search.* es,"
    ):
        runner.run(problem, solver, directory=tmp_path)


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_the_check_notes_it_once_and_lists_the_solvers_that_run(score):
    some = {name: SOLVERS[name]() for name in ("delta_stn", "sama", "es", "random_search", "pbt")}
    report = check_problem(Scored(score), some)
    assert report.ok
    assert report.tuned_by == ["es", "random_search", "pbt"]
    assert str(report).count("the gradient of `outer_objective` is") == 1
    assert "delta_stn, sama refuse it for the reason above" in str(report)


def test_a_score_that_contains_a_hyperparameter_has_a_direct_gradient():
    class Priced(Scored):
        def outer_objective(self, hypers, params, prediction, batch):
            return (
                super().outer_objective(hypers, params, prediction, batch) + hypers["decay"].mean()
            )

    problem = Priced(SCORES["error rate"])
    assert check_problem(problem, {"first_order": solvers.FirstOrder()}).refused_by == {}
