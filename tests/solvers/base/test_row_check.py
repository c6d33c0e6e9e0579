"""Per-example weights are checked row by row: derivatives of a network, wrong rules, mixed rows."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp

from bilevel import BilevelError, ModuleProblem, Positive, Refused, Space, squared_norm
from bilevel.solvers import SelfTuning
from bilevel.solvers.base import row_check
from bilevel.solvers.response.per_example_weight import RULES
from bilevel.solvers.response.row_counts import SHARED
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
    with pytest.raises(Refused, match=r"set solver\.per_example=false"):
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


# --- axes that are folded into that of the examples ---

T = 4
TOKENS = torch.randn(B, T, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Folded(nn.Module):
    """Layers on rows that `fold` takes from x [B, T, 3], and `unfold` puts back into [B, T, 4].

    The last layer follows from outside the fold, and `gate` scales what comes from inside.
    """

    def __init__(self, fold, unfold, *, norm=False, gate=1.0, between=None):
        super().__init__()
        torch.manual_seed(0)
        self.inside = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))
        self.norm = nn.BatchNorm1d(T) if norm else nn.Identity()
        self.gate, self.last = nn.Parameter(torch.tensor([gate] * 4)), nn.Linear(4, 2)
        self.fold, self.unfold, self.between = fold, unfold, between or nn.Identity()
        self.double()

    def forward(self, x):
        y = self.unfold(self.inside(self.fold(self.norm(x))), x)
        return self.last(self.between(x.sum(-1, keepdim=True) + self.gate * y))


class OnlyInTraining(Folded):
    """The rows of an example are apart in training, in a branch that starts at 0."""

    def __init__(self):
        super().__init__(apart, from_apart, gate=0.0)

    def forward(self, x):
        pair = (apart, from_apart) if self.training else (together, from_together)
        self.fold, self.unfold = pair
        return super().forward(x)


def together(x):
    return x.reshape(-1, 3)


def apart(x):
    return x.transpose(0, 1).reshape(-1, 3)


def from_together(y, x):
    return y.reshape(len(x), -1, 4)


def from_apart(y, x):
    return y.reshape(x.shape[1], len(x), 4).transpose(0, 1)


def back_at(chosen):
    """Return `unfold` for the rows that `chosen` marks; all other rows are 0."""
    return lambda y, x: x.new_zeros(*x.shape[:2], 4).index_put(chosen(x).nonzero().unbind(1), y)


def most_wanted(x):
    """Mark the B tokens with the largest first entry, wherever they are in the batch."""
    first = x[..., 0].flatten()
    return (first >= first.topk(len(x)).values[-1]).reshape(x.shape[:2])


def uneven(x):
    """Mark as many tokens as there are examples, none of them in the first example."""
    return torch.arange(x[..., 0].numel()).reshape(x.shape[:2]).ge(T) & (
        torch.arange(x[..., 0].numel()).reshape(x.shape[:2]) < T + len(x)
    )


class TimeFirst(nn.Module):
    """Statistics over all examples couple the rows, and T = B hides that time comes first."""

    def __init__(self):
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(3), nn.Linear(3, 2)
        self.double()

    def forward(self, x):
        y = self.last(self.norm(x.mT).transpose(1, 2).transpose(0, 1)).transpose(0, 1)
        return y - y.mean()


WRONG = {
    "rows of an example apart": lambda: Folded(apart, from_apart),
    "rows apart behind a batch norm": lambda: Folded(apart, from_apart, norm=True),
    "rows apart in a branch that starts at 0": lambda: Folded(apart, from_apart, gate=0.0),
    "rows apart in a branch that starts near 0": lambda: Folded(apart, from_apart, gate=1e-9),
    "rows apart in training, in a branch that starts at 0": OnlyInTraining,
    "rows apart, and a mean over examples": lambda: Folded(apart, from_apart, between=Centred()),
    "rows that the batch chooses": lambda: Folded(
        lambda x: x[most_wanted(x)], back_at(most_wanted)
    ),
    "unevenly many rows": lambda: Folded(lambda x: x[uneven(x)], back_at(uneven)),
}


@pytest.mark.parametrize(
    "flags", [FLAGS[name] for name in ("none", "centered-regularized_w0-linearize")]
)
@pytest.mark.parametrize("make", WRONG.values(), ids=WRONG)
def test_a_fold_with_the_rows_of_an_example_apart_is_refused(make, flags):
    with pytest.raises(BilevelError, match=r"set solver\.per_example=false"):
        ready(Matched(make(), x=TOKENS), SelfTuning(**flags))
    ready(Matched(make(), x=TOKENS), SelfTuning(per_example=False, **flags)).step()


def test_a_branch_behind_a_gate_that_has_hardly_moved_is_checked():
    slow = SelfTuning(inner_optimizer=sgd(1e-12))
    with pytest.raises(Refused, match="in training mode a row differs"):
        ready(Matched(OnlyInTraining(), x=TOKENS), slow)


@pytest.mark.parametrize("norm", [False, True])
def test_a_fold_with_the_rows_of_an_example_together_runs(norm):
    solver = ready(Matched(Folded(together, from_together, norm=norm), x=TOKENS))
    solver.step()
    assert {k for call, k in solver.row_counts.found.items() if "inside" in call.label} == {T}
    assert solver.row_counts.closed


def test_a_second_size_shows_that_time_comes_first_behind_a_batch_norm():
    x = torch.randn(B, B, 3, dtype=torch.float64)
    with pytest.raises(BilevelError, match=r"`last\.weight` is perturbed for 5 examples"):
        ready(Matched(TimeFirst(), x=x))


def test_rows_that_depend_on_the_data_end_the_step():
    """All tokens are kept at set-up; later, half of them are padding."""

    def kept(x):
        return x[..., 0] < 50

    solver = ready(Matched(Folded(lambda x: x[kept(x)], back_at(kept)), x=TOKENS))
    padded = TOKENS.clone()
    padded[:, T // 2 :] = 100.0
    with pytest.raises(BilevelError, match="at set-up it had another number of rows"):
        solver.method.inner_step((padded,))
    solver.method.inner_step((TOKENS[:4],))  # a smaller batch has the same rows for each example


class Numbered(nn.Module):
    """Positions of tokens by their numbers, [T]; the batch has T examples, or a divisor of T."""

    def __init__(self):
        super().__init__()
        self.table, self.last = nn.Embedding(12, 3), nn.Linear(3, 2)
        self.double()

    def forward(self, x):
        return self.last(torch.tanh(x + self.table(torch.arange(x.shape[1]))))


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("tokens", [B, 2 * B, 5])
def test_positions_without_an_example_axis_are_told_from_folded_rows(tokens, flags):
    x = torch.randn(B, tokens, 3, dtype=torch.float64)
    solver = ready(Matched(Numbered(), x=x), SelfTuning(**flags))
    solver.step()
    calls = solver.row_counts.found
    found = {k for call, k in calls.items() if call[1:] == ("table.weight", 0)}
    assert found == {SHARED}
    solver.method.inner_step((x[:3],))


class Totalled(nn.Module):
    """A sum over all examples beside the rows; its rows cannot be compared."""

    def __init__(self, fold, unfold):
        super().__init__()
        self.rows = Folded(fold, unfold)

    def forward(self, x):
        y = self.rows(x)
        return x.sum(-1), y.square().mean()


def test_a_fold_that_no_row_of_the_prediction_shows_is_refused():
    with pytest.raises(Refused, match="a row differs"):
        ready(Matched(Totalled(together, from_together), x=TOKENS))


def test_a_fold_that_cannot_be_checked_is_refused(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(row_check, "wrong_row", broken)
    ready(Matched(Norm(nn.Tanh()))).step()
    with pytest.raises(Refused, match="no such kernel"):
        ready(Matched(Folded(together, from_together), x=TOKENS))
