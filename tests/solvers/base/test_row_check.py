"""Per-example weights are checked row by row: derivatives of a network, wrong rules, mixed rows."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp

from bilevel import ModuleProblem, Positive, Refused, Space, squared_norm
from bilevel.solvers import SelfTuning
from bilevel.solvers.response.per_example_weight import RULES
from tests.support.solver_cases import FLAGS, ready, sgd

B = 6
X = torch.randn(B, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def backward(net, x, order=1):
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        y = net(x)
        for _ in range(order):
            (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return y


def in_place(net, x):
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        net(x).sum().backward(inputs=[x], create_graph=True)
    return x.grad


DERIVATIVES = {
    "second order": lambda net, x: backward(net, x, order=2),
    "backward()": in_place,
    "torch.func.grad": lambda net, x: grad(lambda z: net(z).sum())(x),
    "torch.func.jacrev": lambda net, x: jacrev(lambda z: net(z).sum(0))(x)[0],
    "torch.func.jvp": lambda net, x: jvp(net, (x,), (torch.ones_like(x),))[1],
}


class Differentiated(nn.Module):
    """Returns an energy and a function of its derivatives."""

    def __init__(self, derivative):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1))
        self.derivative = derivative
        self.double()

    def forward(self, x):
        return self.net(x), self.derivative(self.net, x)


def of_weights(net, x):
    """The derivative of a sum over examples in the weights, for every example."""

    def total(params):
        return functional_call(net, params, (x,)).square().sum()

    return grad(total)(dict(net.named_parameters()))["0.weight"].square().sum().expand(len(x), 1)


class Matched(ModuleProblem):
    def __init__(self, module, *, per_example=True, x=X):
        super().__init__(
            module, Space(decay=Positive(init=0.1, per_example=per_example)), (x,), (x,)
        )

    def outer_objective(self, hypers, params, prediction, batch):
        leaves = prediction if isinstance(prediction, tuple) else (prediction,)
        return sum(leaf.square().mean() for leaf in leaves)

    def inner_objective(self, hypers, params, prediction, batch):
        penalty = (hypers["decay"] * squared_norm(params)).mean()
        return self.outer_objective(hypers, params, prediction, batch) + penalty


def change_error(problem, flags):
    """Return the relative error of the change of every leaf by Θε, against central differences."""
    solver = ready(problem, SelfTuning(**flags, inner_optimizer=sgd(0.1)), away=0.3)
    core, method = solver.core, solver.method
    w0, hypers = core.weights.detached(), problem.space.constrain(problem.space.init())
    draws = torch.Generator().manual_seed(3)
    varies = method.varies_per_example
    offset = torch.randn((B, 1) if varies else (1,), generator=draws, dtype=torch.float64)

    def plain(at, step):
        moved = method.response.weights(method.theta.detached(), w0, at, tangent=False)
        w = {name: w0[name] + step * (moved[name] - w0[name]) for name in w0}
        return core.predict(hypers, core.carry, (X,), w)[0]

    if flags["linearize"]:
        ours, _ = method.linearized(hypers, w0, offset, core.carry, (X,))
    else:
        params = method.response.weights(method.theta.detached(), w0, offset, tangent=False)
        ours, _ = core.predict(hypers, core.carry, (X,), params)
    worst = 0.0
    for b in range(B) if varies else [slice(None)]:
        at, e = (offset[b] if varies else offset), 1e-5
        start = plain(at, 0)
        truth = (
            [(up - down) / (2 * e) for up, down in zip(plain(at, e), plain(at, -e), strict=True)]
            if flags["linearize"]
            else [end - y0 for end, y0 in zip(plain(at, 1), start, strict=True)]
        )
        for leaf, y0, change in zip(ours, start, truth, strict=True):
            error = (leaf[b] - y0[b] - change[b]).abs().max() / change[b].abs().max()
            worst = max(worst, float(error.detach()))
    return worst


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
@pytest.mark.parametrize("per_example", [True, False], ids=["per example", "per batch"])
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
def test_a_network_that_differentiates_itself_responds_exactly(derivative, flags, per_example):
    problem = Matched(Differentiated(derivative), per_example=per_example)
    assert change_error(problem, flags) < 1e-7


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_a_derivative_in_the_weights_is_refused_and_the_remedy_is_exact(flags):
    with pytest.raises(Refused, match="set per_example=False on every hyperparameter"):
        ready(Matched(Differentiated(of_weights)), SelfTuning(**flags))
    problem = Matched(Differentiated(of_weights), per_example=False)
    assert change_error(problem, flags) < 1e-7


class Norm(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.first, self.between, self.last = nn.Linear(3, 4), between, nn.Linear(4, 2)
        self.double()

    def forward(self, x):
        return self.last(self.between(self.first(x)))


@pytest.mark.parametrize("only", ["training", "evaluation"])
def test_a_wrong_rule_is_found_in_either_mode(monkeypatch, only):
    right = RULES[F.linear]

    def shifted(input, weight, bias=None):
        """The rule with the scales of the neighbouring example."""
        off = torch.is_grad_enabled() or weight.tangent
        if off == (only == "training"):
            weight = weight.with_parts(weight.base, weight.response, weight.scale.roll(1, 0))
        return right(input, weight, bias)

    monkeypatch.setitem(RULES, F.linear, shifted)
    if only == "evaluation":
        monkeypatch.setattr(nn.Module, "train", lambda self, mode=True: self)
    with pytest.raises(Refused, match=f"in {only} mode a row differs"):
        ready(Matched(Norm(nn.Tanh())))


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Steps(nn.Module):
    """An LSTM of two layers with dropout; each example is a sequence of three numbers."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(1, 4, 2, batch_first=True, dropout=0.5)
        self.double()

    def forward(self, x):
        return self.rnn(x[..., None])[0][:, -1]


class Single(nn.Module):
    """A network that computes in float32 whatever its weights are."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return torch.eye(2).matmul(self.linear(x).T).T


RIGHT = {
    "batch norm": lambda: Norm(nn.BatchNorm1d(4)),
    "batch norm without statistics": lambda: Norm(nn.BatchNorm1d(4, track_running_stats=False)),
    "dropout": lambda: Norm(nn.Dropout(0.5)),
    "a statistic of the batch, written out": lambda: Norm(Centred()),
    "dropout in an LSTM": Steps,
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("make", RIGHT.values(), ids=RIGHT)
def test_networks_that_draw_or_normalize_pass(make, flags):
    ready(Matched(make()), SelfTuning(**flags)).step()


def test_a_network_of_one_type_is_checked_in_that_type(monkeypatch):
    ready(Matched(Single, x=X.float())).step()
    right = RULES[F.linear]

    def shifted(input, weight, bias=None):
        weight = weight.with_parts(weight.base, weight.response, weight.scale.roll(1, 0))
        return right(input, weight, bias)

    monkeypatch.setitem(RULES, F.linear, shifted)
    with pytest.raises(Refused, match="a row differs"):
        ready(Matched(Single, x=X.float()))
