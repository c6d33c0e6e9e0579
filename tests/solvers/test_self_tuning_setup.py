"""Set-up of self-tuning solvers: refusals, and the recorded calls of a network."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import bilevel.solvers.base.dry_run
from bilevel import ModuleProblem, Positive, Real, Refused, Space, squared_norm
from bilevel.solvers import Dense, SelfTuning, Structured, delta_stn, stn
from tests.support.solver_cases import ready

B = 6


class Decayed(ModuleProblem):
    """Cross-entropy plus weight decay, and whatever penalty a test adds to either objective."""

    def __init__(self, module, *, inner=None, outer=None, x=None, **space):
        space = space or {"decay": Positive(init=0.1)}
        split = torch.randn(B, 4) if x is None else x, torch.arange(B) % 3
        self.inner, self.outer = inner or (lambda params: 0.0), outer or (lambda params: 0.0)
        super().__init__(module, Space(**space), split, split)

    def inner_objective(self, hypers, params, prediction, batch):
        decay = hypers.get("decay", torch.zeros(()))
        return (
            F.cross_entropy(prediction, batch[1])
            + (decay * squared_norm(params)).mean()
            + self.inner(params)
        )

    def outer_objective(self, hypers, params, prediction, batch):
        return F.cross_entropy(prediction, batch[1]) + self.outer(params)


class Apply(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f, self.linear = f, nn.Linear(4, 3)

    def forward(self, x):
        return self.f(self.linear(x), self)


def refusal(problem, solver=None):
    with pytest.raises(Refused) as info:
        ready(problem, solver)
    return str(info.value)


def absolute(params):
    return params["weight"].abs().sum()


@pytest.mark.parametrize(
    "problem",
    [
        lambda: Decayed(nn.Sequential(nn.Linear(4, 3), nn.PReLU())),
        lambda: Decayed(nn.Linear(4, 3), inner=absolute),
        lambda: Decayed(nn.Linear(4, 3), outer=absolute),
        lambda: Decayed(Apply(lambda y, m: y if m.training else y * m.linear.weight.sum())),
    ],
    ids=[
        "in the network",
        "in the inner objective",
        "in the outer objective",
        "in evaluation mode alone",
    ],
)
@pytest.mark.parametrize("recipe", [delta_stn, stn])
def test_a_function_without_a_rule_is_refused_by_name_wherever_it_stands(problem, recipe):
    message = refusal(problem(), recipe())
    assert "no response rule for" in message
    assert "weight`" in message
    assert "set solver.per_example=false" in message


def test_per_batch_needs_no_rule():
    ready(
        Decayed(
            nn.Linear(4, 3),
            inner=absolute,
            outer=absolute,
            decay=Positive(init=0.1, per_example=False),
        )
    ).step()
    ready(
        Decayed(nn.Linear(4, 3), inner=absolute, outer=absolute), delta_stn(response=Dense())
    ).step()


def test_an_operation_without_forward_derivative_is_refused_by_name_and_runs_unlinearized():
    def network():
        return Apply(lambda y, m: torch.cdist(y, y)[:, :3])

    message = refusal(Decayed(network()))
    assert "linearize=true needs derivatives" in message
    assert "_cdist_forward" in message
    ready(Decayed(network()), delta_stn(linearize=False)).step()


def test_an_operation_whose_forward_derivative_has_no_backward_is_refused_at_setup(monkeypatch):
    """`glu_jvp` has no derivative: its decomposition runs, and without it set-up refuses."""
    network = nn.Sequential(nn.Linear(4, 6), nn.GLU())
    ready(Decayed(network)).step()
    monkeypatch.delitem(
        bilevel.solvers.autodiff.decompositions.FORWARD_MODE, torch.nn.functional.glu
    )
    assert "glu" in refusal(Decayed(network))


def test_nothing_to_tune_is_refused():
    message = refusal(Decayed(nn.Linear(4, 3), decay=Positive(init=0.1, frozen=True)))
    assert "every hyperparameter is frozen" in message
    assert "solver=fixed" in message


def test_a_response_that_would_not_fit_is_refused_with_the_hyperparameter_to_blame(monkeypatch):
    monkeypatch.setattr(bilevel.solvers.base.dry_run, "MOST_RESPONSE_BYTES", 10_000)
    space = {
        "decay": Positive(init=0.1),
        "per_weight": Real(init=0.0, shape=(1000,), per_example=False),
    }
    message = refusal(Decayed(nn.Linear(4, 3), **space))
    assert "1,001 hyperparameters" in message
    assert "`per_weight`" in message
    ready(Decayed(nn.Linear(4, 3)))


def test_size_counts_the_numbers_that_hold_theta():
    params = {"weight": torch.zeros(3, 4), "bias": torch.zeros(3), "gain": torch.zeros(())}
    for response in (Structured(), Dense()):
        tensors = response.init(params, 5, {}, torch.Generator())
        assert response.size(params, 5) == sum(t.numel() for t in tensors.values())


def test_setup_leaves_the_streams_and_the_generator_reproducible():
    """The trial pass of set-up counts no example, and two set-ups from one seed begin alike."""
    problem = Decayed(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.2)))
    first, second = ready(problem), ready(problem)
    assert first.core.data.train.examples == 0
    assert first.services.bad_step() is None
    first.step()
    second.step()
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.core.weights.leaves, second.core.weights.leaves, strict=True)
    )


class Tokens(nn.Module):
    """An embedding whose table is the decoder's too."""

    def __init__(self):
        super().__init__()
        self.table, self.decoder = nn.Embedding(7, 3), nn.Linear(3, 3, bias=False)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        return self.head(F.linear(self.table(x).mean(1), self.table.weight))


@pytest.mark.parametrize("recipe", [delta_stn, stn])
def test_an_embedding_responds_by_columns(recipe):
    solver = ready(Decayed(Tokens(), x=torch.randint(7, (B, 5))), recipe())
    weights = solver.method.respond(torch.ones(B, 1))
    assert weights["table.weight"].axis == 1
    assert weights["table.weight"].scale.shape == (B, 3)
    assert weights["head.weight"].axis == 0
    solver.step()


def test_one_response_object_serves_two_solvers():
    """`Structured()` is a setting, so one solver's network must not reach another solver."""
    shared = Structured()
    first = ready(Decayed(nn.Linear(4, 3)), SelfTuning(response=shared))
    ready(
        Decayed(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))),
        SelfTuning(response=shared),
    )
    first.step()


def test_two_solvers_that_loaded_one_state_go_their_own_ways():
    """A state passed in memory is copied: a step of one solver leaves the other's momentum."""
    problem = Decayed(nn.Linear(4, 3))
    source, first, second = (ready(problem) for _ in range(3))
    source.step()
    state = source.state_dict()
    for solver in (first, second):
        solver.load_state_dict(state)
    generator = first.core.generator.get_state()
    first.step()
    second.core.generator.set_state(generator)
    second.step()
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.core.weights.leaves, second.core.weights.leaves, strict=True)
    )
