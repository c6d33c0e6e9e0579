"""`check_problem` finds the error of one broken problem per law, and passes sound ones."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F

import bilevel
from bilevel import (
    BilevelError,
    Data,
    FullBatch,
    Interval,
    ModuleProblem,
    Positive,
    Refused,
    Solver,
    Space,
    check_problem,
    squared_norm,
)
from bilevel.checks.check_problem import ProblemWarning, check_setup
from bilevel.problems.closed_form.quadratic import Quadratic

X, Y = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2


class Sound(ModuleProblem):
    """A network with batch norm and a weight decay."""

    def inner_objective(self, hypers, params, prediction, batch):
        return (
            self.outer_objective(hypers, params, prediction, batch)
            + (hypers["decay"] * squared_norm(params)).mean()
        )

    def outer_objective(self, hypers, params, prediction, batch):
        return F.cross_entropy(prediction, batch[1])


class MovesGlobalState(Sound):
    def init(self, generator):
        params, carry = super().init(generator)
        return {name: p + torch.rand(p.shape) for name, p in params.items()}, carry


class Unrepeatable(Sound):
    calls = 0

    def predict(self, *args, **kwargs):
        prediction, carry = super().predict(*args, **kwargs)
        self.calls += 1
        return prediction + self.calls, carry


class DrawsGlobally(Sound):
    def predict(self, hypers, params, carry, batch, *, train, generator):
        prediction, carry = super().predict(
            hypers, params, carry, batch, train=train, generator=generator
        )
        return (F.dropout(prediction, 0.5) if train else prediction), carry


class WritesCarry(Sound):
    def predict(self, hypers, params, carry, batch, *, train, generator):
        carry["1.running_mean"].add_(1)
        return super().predict(hypers, params, carry, batch, train=train, generator=generator)


class DropsCarry(Sound):
    def predict(self, hypers, params, carry, batch, *, train, generator):
        return super().predict(hypers, params, carry, batch, train=train, generator=generator)[
            0
        ], {}


class IgnoresWeights(Sound):
    def predict(self, hypers, params, carry, batch, *, train, generator):
        return torch.zeros(len(batch[0]), 2), carry


class PerExampleLoss(Sound):
    def outer_objective(self, hypers, params, prediction, batch):
        return F.cross_entropy(prediction, batch[1], reduction="none")

    def inner_objective(self, hypers, params, prediction, batch):
        return super().inner_objective(hypers, params, prediction, batch).mean()


class Sums(Sound):
    def outer_objective(self, hypers, params, prediction, batch):
        return F.cross_entropy(prediction, batch[1], reduction="sum")


class Infinite(Sound):
    def outer_objective(self, hypers, params, prediction, batch):
        return super().outer_objective(hypers, params, prediction, batch) / 0


class LeavesAWeight(Sound):
    def predict(self, hypers, params, carry, batch, *, train, generator):
        params = {**params, "2.bias": params["2.bias"].detach()}
        return super().predict(hypers, params, carry, batch, train=train, generator=generator)

    def inner_objective(self, hypers, params, prediction, batch):
        return (
            self.outer_objective(hypers, params, prediction, batch)
            + (hypers["decay"] * squared_norm({"w": params["0.weight"]})).mean()
        )


class ForgetsDecay(Sound):
    def inner_objective(self, hypers, params, prediction, batch):
        return self.outer_objective(hypers, params, prediction, batch)


class CutsDecay(Sound):
    def inner_objective(self, hypers, params, prediction, batch):
        return super().inner_objective(
            {"decay": hypers["decay"].detach()}, params, prediction, batch
        )


class SumsDecay(Sound):
    def inner_objective(self, hypers, params, prediction, batch):
        return self.outer_objective(hypers, params, prediction, batch) + hypers[
            "decay"
        ].sum() * squared_norm(params)


class BranchesOnDecay(Sound):
    def inner_objective(self, hypers, params, prediction, batch):
        return super().inner_objective(hypers, params, prediction, batch) + (
            0 if hypers["decay"] > 0 else 1
        )


class NamesNoLoss(Sound):
    def metrics(self, hypers, params, prediction, batch):
        return {"accuracy": (prediction.argmax(-1) == batch[1]).float()}


class Crashes(Sound):
    def predict(self, *args, **kwargs):
        raise RuntimeError("no such layer")


def make(kind, **space):
    network = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)
    )
    return kind(
        network, Space(**(space or {"decay": Positive(init=0.1)})), train=(X, Y), valid=(X, Y)
    )


@pytest.mark.parametrize(
    "problem", [make(Sound), Quadratic.random(weights=3, hypers=2)], ids=["sound", "quadratic"]
)
def test_sound_problems_pass_and_every_installed_solver_tunes_them(problem):
    report = check_problem(problem)
    assert report.ok
    assert not report.findings
    assert {"delta_stn", "centered_stn", "stn", "fixed"} <= set(report.tuned_by)
    assert "nothing is wrong" in str(report)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (MovesGlobalState, "`init` moves PyTorch's global random state"),
        (Unrepeatable, "returns different results at the same generator state"),
        (DrawsGlobally, "train=True draws from PyTorch's global random state"),
        (WritesCarry, "modifies its carry in place"),
        (DropsCarry, "a carry with other names or shapes"),
        (IgnoresWeights, "the prediction does not depend on w"),
        (PerExampleLoss, r"`outer_objective` is of shape \[8\]"),
        (
            Sums,
            "`inner_objective` adds up over examples(.|\n)*`outer_objective` adds up over examples",
        ),
        (Infinite, "`outer_objective` is not finite .* decay=0.1"),
        (LeavesAWeight, "the weight `2.bias` receives no gradient"),
        (ForgetsDecay, "`decay` changes neither objective"),
        (CutsDecay, "∂L_T/∂decay is absent"),
        (SumsDecay, "`decay` with one value per example makes L_T"),
        (BranchesOnDecay, "`decay` with one value per example raises RuntimeError"),
        (NamesNoLoss, "`metrics` reports accuracy but no `loss`"),
        (Crashes, "raises RuntimeError: no such layer"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_each_law_can_fail(kind, words):
    report = check_problem(make(kind), solvers={})
    assert not report.ok
    assert re.search(words, str(report))


class Contrasts(Sound):
    """Every example against all others of its batch."""

    def outer_objective(self, hypers, params, prediction, batch):
        return F.cross_entropy(prediction @ prediction.T, torch.arange(len(prediction)))


def test_an_objective_in_which_examples_act_on_each_other_is_noted():
    report = check_problem(make(Contrasts), solvers={})
    assert report.ok
    assert "note: `outer_objective` of a batch is not the average of its parts" in str(report)


def test_check_leaves_the_problem_and_the_random_state_as_they_were():
    problem = make(Sound)
    state = torch.get_rng_state()
    params, _ = problem.init(torch.Generator().manual_seed(0))
    check_problem(problem, solvers={})
    again, _ = problem.init(torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(params[name], again[name]) for name in params)


def test_data_that_cannot_be_made_is_a_finding():
    problem = Sound(
        torch.nn.Linear(3, 2), Space(decay=Positive(init=0.1)), train=(X[:0], Y[:0]), valid=(X, Y)
    )
    assert "the train split is empty" in str(check_problem(problem))


class Picky(Solver):
    """Refuses every problem; only `check` is ever called."""

    def check(self, problem, data, device):
        raise Refused("it is not convex")

    setup = step = solution = state_dict = load_state_dict = None  # type: ignore[assignment]


def test_a_refusal_is_reported_and_is_no_error():
    report = check_problem(make(Sound), solvers={"picky": Picky()})
    assert report.ok
    assert report.refused_by == {"picky": "it is not convex"}
    assert "picky refuses it: it is not convex" in str(report)


@pytest.mark.parametrize(
    ("kind", "words"),
    [(IgnoresWeights, "does not depend on w"), (PerExampleLoss, "return a tensor of shape")],
)
def test_a_run_begins_with_the_laws_that_it_would_break_on(kind, words, tmp_path):
    problem, device = make(kind), torch.device("cpu")
    with pytest.raises(BilevelError, match=words):
        check_setup(problem, problem.data(device, torch.Generator()), device)
    runner = bilevel.Runner(epochs=1, progress="none", picture=False)
    with pytest.raises(BilevelError, match=words):
        runner.run(problem, Picky(), directory=tmp_path)


def test_a_sampled_hyperparameter_needs_no_gradient():
    class Sampled(Sound):
        def predict(self, hypers, params, carry, batch, *, train, generator):
            prediction, carry = super().predict(
                hypers, params, carry, batch, train=train, generator=generator
            )
            if train:
                prediction = prediction * (
                    torch.rand(prediction.shape, generator=generator)
                    > hypers["rate"].reshape(-1, 1)
                )
            return prediction, carry

    rate = Interval(low=0.0, high=1.0, init=0.3, differentiable=False)
    assert check_problem(make(Sampled, decay=Positive(init=0.1), rate=rate), solvers={}).ok
    declared = Interval(low=0.0, high=1.0, init=0.3)
    assert "∂L_T/∂rate is absent" in str(
        check_problem(make(Sampled, decay=Positive(init=0.1), rate=declared), solvers={})
    )


class Undisturbed(Solver):
    """Takes what it is given."""

    setup = step = solution = state_dict = load_state_dict = None  # type: ignore[assignment]

    def check(self, problem, data, device):
        self.seen = device


def test_solvers_are_asked_about_the_device_that_they_are_checked_on():
    solver = Undisturbed()
    check_problem(make(Sound), solvers={"it": solver})
    assert solver.seen == torch.device("cpu")


class Double(Sound):
    """Its linear algebra takes no mixture of types."""

    def inputs(self, hypers, batch, *, train, generator):
        return (batch[0].double() @ torch.diag(hypers["decay"].reshape(-1)[:1].expand(3)),), {}

    def inner_objective(self, hypers, params, prediction, batch):
        assert hypers["decay"].dtype == torch.float64
        return super().inner_objective(hypers, params, prediction, batch)


def test_hyperparameters_come_in_the_type_of_the_weights():
    space = Space(
        decay=Positive(init=0.1, per_example=False), other=Positive(init=0.1, frozen=True)
    )
    problem = Double(torch.nn.Linear(3, 2).double(), space, train=(X, Y), valid=(X, Y))
    report = check_problem(problem, solvers={})
    assert report.ok, report


class Idle(Sound):
    """A layer that nothing calls, and which the penalty forgets."""

    def inner_objective(self, hypers, params, prediction, batch):
        used = {name: p for name, p in params.items() if not name.startswith("idle")}
        return super().inner_objective(hypers, used, prediction, batch)


class WithIdle(torch.nn.Linear):
    def __init__(self):
        super().__init__(3, 2)
        self.idle = torch.nn.Linear(5, 5)


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (
            Idle(WithIdle(), Space(decay=Positive(init=0.1)), train=(X, Y), valid=(X, Y)),
            "the weight `idle.bias` receives no",
        ),
        (make(ForgetsDecay), "`decay` changes neither objective"),
        (make(CutsDecay), "∂L_T/∂decay is absent"),
    ],
    ids=["layer", "hyperparameter", "gradient"],
)
def test_a_run_that_may_be_wasted_begins_with_a_warning(problem, words):
    device = torch.device("cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_setup(problem, problem.data(device, torch.Generator()), device)
    assert any(re.search(words, str(warning.message)) for warning in caught)
    assert {warning.category for warning in caught} == {ProblemWarning}


def test_what_is_frozen_by_design_is_not_warned_of():
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    network[0].requires_grad_(False)
    space = Space(decay=Positive(init=0.1), unused=Positive(init=0.1, frozen=True))
    problem, device = Sound(network, space, train=(X, Y), valid=(X, Y)), torch.device("cpu")
    check_setup(
        problem, problem.data(device, torch.Generator()), device
    )  # a warning is an error in this session


class Sideways(torch.nn.Module):
    """Mixes the examples, unnoticed where there are as many as features."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x.transpose(0, 1))


def with_batches_of_three(network, **options):
    return Sound(
        network,
        Space(decay=Positive(init=0.1, **options)),
        train=(X[:3], Y[:3]),
        valid=(X[3:6], Y[3:6]),
    )


def test_an_example_axis_in_another_place_is_found():
    report = check_problem(with_batches_of_three(Sideways()), solvers={})
    assert "reversing the examples of a batch does not reverse the predictions" in str(report)
    assert not report.ok
    assert check_problem(
        with_batches_of_three(Sideways(), per_example=False), solvers={}
    ).ok  # then it may be meant


def test_a_network_that_normalizes_by_its_batch_has_an_example_axis():
    norm = torch.nn.BatchNorm1d(4, track_running_stats=False)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), norm, torch.nn.Linear(4, 2))
    assert not check_problem(with_batches_of_three(network), solvers={}).findings


class Described(Sound):
    """Its batches carry text, and labels that are missing."""

    def data(self, device, generator):
        batch = (
            X,
            Y,
            {"names": ["a", "b"], "weights": torch.where(X[:, 0] > 0, X[:, 0], torch.nan)},
            None,
        )
        return Data(FullBatch(batch), FullBatch(batch))


class Bare(Sound):
    """Has no batch at all."""

    def data(self, device, generator):
        return Data(FullBatch(), FullBatch())

    def inputs(self, hypers, batch, *, train, generator):
        return (X,), {}

    def outer_objective(self, hypers, params, prediction, batch):
        return F.cross_entropy(prediction, Y)


@pytest.mark.parametrize("kind", [Described, Bare])
def test_batches_with_text_or_without_tensors(kind):
    report = check_problem(make(kind), solvers={})
    assert not report.findings, report


def test_a_check_leaves_a_run_of_the_same_problem_its_data():
    problem = Quadratic.random(weights=3, hypers=2)
    running = problem.data(torch.device("meta"), torch.Generator())
    assert {t.device.type for t in running.train.peek().values()} == {"meta"}
    assert check_problem(problem, solvers={}).ok
    assert problem.A.device.type == "cpu"
    assert running.train.next()["A"].device.type == "meta"
    assert running.train.examples == 1
