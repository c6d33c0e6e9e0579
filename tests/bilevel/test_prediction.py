"""A prediction is a tree of tensors, with any container that can be opened, or it is refused."""

import dataclasses
from collections import OrderedDict, UserDict, namedtuple
from enum import Enum
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from bilevel import (
    BilevelError,
    ModuleProblem,
    Positive,
    Refused,
    Runner,
    Space,
    check_problem,
    squared_norm,
)
from bilevel.solvers import (
    CG,
    SAMA,
    Fixed,
    GaussNewton,
    Implicit,
    PopulationBased,
    Unrolled,
    delta_stn,
    random_search,
)
from tests.support.solver_cases import ready, sgd

X = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = (X[:, 0] > 0).long()


@dataclasses.dataclass
class Output:
    aux: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Frozen:
    aux: torch.Tensor
    name: str = "heads"


@dataclasses.dataclass
class Derived:
    """A dataclass with a tensor that follows from its field and is no field."""

    aux: torch.Tensor

    def __post_init__(self):
        self.probabilities = self.aux.softmax(-1)


class Named(OrderedDict):
    pass


class Slotted:
    __slots__ = ("aux",)

    def __init__(self, aux):
        self.aux = aux


class Mode(Enum):
    ON = 1


class ModelOutput(OrderedDict):
    """A container that registers itself, as that of transformers does."""


pytree.register_pytree_node(
    ModelOutput,
    lambda output: (list(output.values()), list(output)),
    lambda values, names: ModelOutput(zip(names, values, strict=True)),
)
Pair = namedtuple("Pair", "aux rest")

OPAQUE = {
    "Derived": Derived,
    "SimpleNamespace": lambda t: SimpleNamespace(aux=t),
    "Slotted": Slotted,
    "Normal": lambda t: torch.distributions.Normal(t, 1.0),
    "function": lambda t: lambda: t,
    "ndarray": lambda t: t.detach().numpy(),
}
TREES = {
    "tensor": (lambda t: t, lambda out: out),
    "dataclass": (Output, lambda out: out.aux),
    "frozen dataclass": (Frozen, lambda out: out.aux),
    "nested": (lambda t: [Output(Named(aux=t))], lambda out: out[0].aux["aux"]),
    "OrderedDict subclass": (lambda t: Named(aux=t), lambda out: out["aux"]),
    "UserDict": (lambda t: UserDict(aux=t), lambda out: out["aux"]),
    "constants": (lambda t: (t, None, 3, "a", Mode.ON, t.shape, t.dtype), lambda out: out[0]),
    "OrderedDict": (lambda t: OrderedDict(aux=t), lambda out: out["aux"]),
    "namedtuple": (lambda t: Pair(t, 1.0), lambda out: out.aux),
    "ModelOutput": (lambda t: ModelOutput(aux=t), lambda out: out["aux"]),
    "vars": (lambda t: vars(SimpleNamespace(aux=t)), lambda out: out["aux"]),
}


class TwoHeads(nn.Module):
    def __init__(self, wrap, *, alone):
        super().__init__()
        torch.manual_seed(1)
        self.wrap, self.alone = wrap, alone
        self.body, self.logits, self.aux = nn.Linear(5, 4), nn.Linear(4, 2), nn.Linear(4, 5)
        self.double()

    def forward(self, x):
        h = torch.tanh(self.body(x))
        aux = self.wrap(torch.cat([self.aux(h), self.logits(h)], 1))
        return aux if self.alone else (self.logits(h), aux)


class Both(ModuleProblem):
    def __init__(self, wrap, find=lambda aux: aux.aux, *, alone=False):
        self.find, self.alone = find, alone
        space = Space(decay=Positive(init=0.1, per_example=False))
        super().__init__(lambda: TwoHeads(wrap, alone=alone), space, (X, Y), (X, Y))

    def outer_objective(self, hypers, params, prediction, batch):
        aux = self.find(prediction if self.alone else prediction[1])
        logits = aux[:, 5:] if self.alone else prediction[0]
        return F.cross_entropy(logits, batch[1]) + F.mse_loss(aux[:, :5], batch[0])

    def inner_objective(self, hypers, params, prediction, batch):
        penalty = 0.5 * (hypers["decay"] * squared_norm(params)).mean()
        return self.outer_objective(hypers, params, prediction, batch) + penalty


def gauss_newton():
    exact = CG(iterations=300, tolerance=1e-12)
    return Implicit(
        linear_solve=exact, curvature=GaussNewton(damping=0.1), inner_optimizer=sgd(0.1)
    )


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside a tensor"])
@pytest.mark.parametrize("name", OPAQUE)
def test_a_container_without_visible_tensors_is_refused_by_its_type(name, alone):
    problem = Both(OPAQUE[name], alone=alone)
    for solver in (
        gauss_newton(),
        delta_stn(),
        Unrolled(),
        SAMA(),
        Fixed(),
        random_search(),
        PopulationBased(),
    ):
        with pytest.raises(Refused, match=f"the prediction holds a {name}, .*return one of these"):
            ready(problem, solver)
    report = check_problem(problem, {"fixed": Fixed()})
    assert not report.ok
    assert [f"holds a {name}," in finding.text for finding in report.findings] == [True]
    assert "does not depend on w" not in str(report)


def test_a_run_says_it_too_and_not_that_the_prediction_ignores_w(tmp_path):
    with pytest.raises(BilevelError, match=r"the prediction holds a Slotted"):
        Runner(epochs=1, progress="none").run(
            Both(Slotted, alone=True), delta_stn(), directory=tmp_path
        )


def test_a_container_in_evaluation_mode_alone_is_refused():
    class Switching(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y if self.training else Slotted(y)

    class Plain(Both):
        def __init__(self):
            space = Space(decay=Positive(init=0.1))
            ModuleProblem.__init__(self, Switching(5, 2).double(), space, (X, Y), (X, Y))

    with pytest.raises(Refused, match="a Slotted"):
        ready(Plain(), Fixed())


@pytest.mark.parametrize("name", TREES)
def test_containers_that_pytorch_knows_have_the_hypergradient_of_a_tensor(name):
    expected = ready(Both(lambda t: t, lambda aux: aux), gauss_newton()).hypergradient()
    for alone in (False, True):
        ready(Both(*TREES[name], alone=alone), delta_stn()).step()
    ours = ready(Both(*TREES[name]), gauss_newton()).hypergradient()
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=0)


class Force(nn.Linear):
    def forward(self, x):
        x = x.detach().clone().requires_grad_()
        return torch.autograd.grad(torch.tanh(super().forward(x)).sum(), x, create_graph=True)[0]


class Guarded(Force):
    def forward(self, x):
        with torch.enable_grad():
            return super().forward(x)


class Matched(ModuleProblem):
    def inner_objective(self, hypers, params, prediction, batch):
        return (prediction - batch[0]).square().mean() + (
            hypers["decay"] * squared_norm(params)
        ).mean()

    def outer_objective(self, hypers, params, prediction, batch):
        return (prediction - batch[0]).square().mean()


def test_a_derivative_that_fails_without_gradients_is_refused_and_the_remedy_runs(tmp_path):
    space = Space(decay=Positive(init=0.1))
    problem = Matched(Force(5, 3).double(), space, (X,), (X,))
    for solver in (Fixed(), delta_stn(), Unrolled()):
        with pytest.raises(Refused, match=r"with torch.enable_grad\(\):"):
            ready(problem, solver)
    assert "enable_grad" in str(check_problem(problem, {}))
    problem = Matched(Guarded(5, 3).double(), space, (X,), (X,))
    Runner(epochs=2, progress="none", picture=False).run(problem, delta_stn(), directory=tmp_path)
