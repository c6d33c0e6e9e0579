"""Modules that cannot be used as they are: they run right, or one sentence says what to pass."""

import copy
import io
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from bilevel import BilevelError, ModuleProblem, Positive, Refused, Runner, Space, squared_norm
from bilevel.solvers import (
    SAMA,
    Fixed,
    PopulationBased,
    Unrolled,
    delta_stn,
    implicit_cg,
    random_search,
    stn,
)
from tests.support.solver_cases import ready, sgd

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(weight_norm|torch.jit|quantization|Lazy).*:FutureWarning",
    "ignore:.*(weight_norm|torch.jit|quantization|Lazy|lazy).*:UserWarning",
    "ignore:.*(jit|quantization|torch.ao).*:DeprecationWarning",
)
X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


class Decayed(ModuleProblem):
    def __init__(self, module, *, per_example=False):
        space = Space(decay=Positive(init=0.01, per_example=per_example))
        super().__init__(module, space, (X, Y), (X, Y))

    def inner_objective(self, hypers, params, prediction, batch):
        penalty = 0.5 * (hypers["decay"] * squared_norm(params)).mean()
        return F.cross_entropy(prediction, batch[1]) + penalty

    def outer_objective(self, hypers, params, prediction, batch):
        return F.cross_entropy(prediction, batch[1])


def quiet(make):
    """Return `make()` without the warnings of deprecated functions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def layers(first=None):
    torch.manual_seed(0)
    return nn.Sequential(first or nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


# --- weights that are computed before each call ---


def weight_normed():
    return quiet(lambda: layers(nn.utils.weight_norm(nn.Linear(6, 8))))


def called():
    network = layers(nn.utils.spectral_norm(nn.Linear(6, 8)))
    network(X)
    return network


def pruned():
    network = layers()
    prune.random_unstructured(network[0], "weight", amount=0.3)
    return network


COMPUTED = {
    "weight_norm": weight_normed,
    "spectral_norm, called": called,
    "prune": pruned,
    "prune of a bias": lambda: prune.l1_unstructured(nn.Linear(6, 2), "bias", amount=1),
}


@pytest.mark.parametrize("given", ["function", "instance"])
@pytest.mark.parametrize("make", COMPUTED.values(), ids=COMPUTED)
def test_computed_weights_follow_w_and_leave_the_module_alone(make, given):
    module = make()
    before = copy.deepcopy(module.state_dict())
    problem = Decayed(make if given == "function" else module)
    params, carry = problem.init(torch.Generator())
    params = {name: p + 0.1 for name, p in params.items()}
    ours, _ = problem.predict({}, params, carry, (X, Y), train=False, generator=None)
    module.load_state_dict(params | carry)
    torch.testing.assert_close(ours, module.eval()(X))
    assert set(before) == set(params | carry)
    for solver in (stn(), implicit_cg(), Unrolled(), SAMA(), Fixed(), random_search()):
        ready(problem, solver).step()


@pytest.mark.parametrize("make", [weight_normed, pruned])
def test_computed_weights_respond_linearized(make):
    ready(Decayed(make)).step()


def test_a_spectral_norm_is_refused_linearized_and_the_remedy_runs():
    with pytest.raises(Refused, match="set linearize=false"):
        ready(Decayed(called))
    ready(Decayed(called), delta_stn(linearize=False)).step()


def test_the_network_of_a_weight_norm_equals_the_parametrized_one():
    def parametrized():
        return layers(parametrizations.weight_norm(nn.Linear(6, 8)))

    ours, theirs = (
        ready(Decayed(make), implicit_cg(inner_optimizer=sgd(0.1)))
        for make in (weight_normed, parametrized)
    )
    for solver in (ours, theirs):
        for _ in range(3):
            solver.step()
    torch.testing.assert_close(ours.hypergradient(), theirs.hypergradient())


def test_a_weight_that_is_computed_per_example_is_refused_and_the_remedy_runs():
    with pytest.raises(Refused, match=r"no response rule for .*`0.weight_v`.*per_example=false"):
        ready(Decayed(weight_normed, per_example=True))
    ready(Decayed(weight_normed)).step()


class Stale(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(6, 2)
        self.twice = 2 * self.out.weight

    def forward(self, x):
        return F.linear(x, self.twice, self.out.bias)


class Constant(Stale):
    def __init__(self):
        super().__init__()
        self.twice = torch.ones(2, 6)


def test_a_tensor_computed_at_construction_is_refused_and_a_constant_one_is_kept():
    for module in (Stale, Stale()):
        with pytest.raises(BilevelError, match=r"the attribute `twice` .* was computed from its w"):
            ready(Decayed(module), Fixed())
    problem = Decayed(Constant())
    params, carry = problem.init(torch.Generator())
    prediction, _ = problem.predict({}, params, carry, (X, Y), train=False, generator=None)
    assert torch.equal(prediction, F.linear(X, torch.ones(2, 6), params["out.bias"]))


# --- modules that cannot be copied ---


class Holder(nn.Module):
    """A network that holds something in its inner layer."""

    def __init__(self, held):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.out = nn.Sequential(nn.Linear(6, 4), nn.Tanh()), nn.Linear(4, 2)
        self.body.held = held()

    def forward(self, x):
        return self.out(self.body(x))


HELD = {
    "lock": threading.Lock,
    "generator": lambda: (i for i in range(3)),
    "TextIOWrapper": lambda: io.TextIOWrapper(io.BytesIO()),  # an open file, but none of the disk
    "module": lambda: threading,
}


@pytest.mark.parametrize("kind", HELD)
def test_an_instance_that_cannot_be_copied_is_named_and_a_function_runs(kind):
    held = HELD[kind]
    with pytest.raises(BilevelError, match=rf"`body.held` is a {kind}; pass a function"):
        Decayed(Holder(held))
    problem = Decayed(lambda: Holder(held))
    for solver in (delta_stn(), Unrolled(), Fixed(), random_search(), PopulationBased()):
        ready(problem, solver).step()
    params, carry = problem.init(torch.Generator().manual_seed(0))
    ours, _ = problem.predict({}, params, carry, (X, Y), train=False, generator=None)
    torch.testing.assert_close(ours, Holder(held)(X))


def test_a_function_that_returns_the_same_module_must_return_one_that_can_be_copied():
    one, other = Holder(threading.Lock), Holder(lambda: None)
    with pytest.raises(BilevelError, match="returns the same layers again; create all layers"):
        Decayed(lambda: one)
    assert not any(p.is_meta for p in one.parameters())
    ready(Decayed(lambda: other), Fixed()).step()


# --- modules whose weights do not exist, or cannot be replaced ---


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm = nn.LazyLinear(4), nn.LazyBatchNorm1d()

    def forward(self, x):
        return self.norm(self.body(x))


def shaped():
    network = Lazy()
    network(X)
    return network


def quantized():
    network = layers()
    return nn.Sequential(
        torch.ao.quantization.quantize_dynamic(network[:2], {nn.Linear}), network[2]
    )


def in_place():
    network = layers()
    network[0].compile()
    return network


REFUSED = {
    "lazy": (Lazy, "`body.weight` has no shape yet; call the module once on a batch"),
    "meta": (lambda: layers(nn.Linear(6, 8, device="meta")), "`0.weight` is on the meta device"),
    "data parallel": (lambda: nn.DataParallel(layers()), "itself is a DataParallel; .*`.module`"),
    "data parallel inside": (
        lambda: nn.Sequential(nn.DataParallel(layers())),
        "`0` is a DataParallel; .*`.module`",
    ),
    "scripted": (lambda: torch.jit.script(layers()), "itself is a RecursiveScriptModule; pass"),
    "traced inside": (
        lambda: nn.Sequential(torch.jit.trace(layers(), X)),
        "`0` is a TopLevelTracedModule; pass the module that it was made from",
    ),
    "compiled": (lambda: torch.compile(layers()), "itself is a OptimizedModule; .*`._orig_mod`"),
    "compiled inside": (lambda: nn.Sequential(torch.compile(layers())), "`0` is a OptimizedModule"),
    "compiled in place": (
        in_place,
        r"`0`, a Linear; pass the module before you call `.compile\(\)`",
    ),
    "quantized": (quantized, "`0.0` is a Linear without gradient; pass the float module"),
}


@pytest.mark.parametrize("given", ["function", "instance"])
@pytest.mark.parametrize("kind", REFUSED)
def test_a_module_whose_weights_cannot_be_replaced_is_refused_by_layer(kind, given):
    make, sentence = REFUSED[kind]
    make = (lambda made: lambda: quiet(made))(make)
    with pytest.raises(BilevelError, match=sentence):
        Decayed(make if given == "function" else make())


def filled(layer):
    layer.to_empty(device="cpu").reset_parameters()
    return layer


REMEDIES = {
    "lazy": shaped,
    "meta": lambda: layers(filled(nn.Linear(6, 8, device="meta"))),
    "data parallel": lambda: nn.DataParallel(layers()).module,
    "compiled": lambda: torch.compile(layers())._orig_mod,
}


@pytest.mark.parametrize("make", REMEDIES.values(), ids=REMEDIES)
def test_the_remedies_run(make):
    for module in (make, make()):
        problem = Decayed(module)
        ready(problem, Fixed())
        params, _ = problem.init(torch.Generator())
        assert not any(p.is_meta for p in params.values())
        ready(problem, Unrolled(inner_optimizer=sgd(1e-4)))


# --- types of weights ---


class Complex(nn.Module):
    def __init__(self, *, real):
        super().__init__()
        w = torch.randn(6, 2, dtype=torch.complex64)
        self.w, self.real = nn.Parameter(torch.view_as_real(w) if real else w), real

    def forward(self, x):
        w = torch.view_as_complex(self.w) if self.real else self.w
        return (x.to(w.dtype) @ w).abs()


class Mixed(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](x).double()).float()


def mixed():
    return Mixed(nn.Linear(6, 4), nn.Linear(4, 2).double())


@pytest.mark.parametrize("make", [delta_stn, implicit_cg, Unrolled, SAMA, Fixed, random_search])
def test_complex_weights_are_refused_by_name_and_the_remedy_runs(make):
    with pytest.raises(Refused, match=r"the weight `w` is complex64.*view_as_real"):
        ready(Decayed(lambda: Complex(real=False)), make())
    ready(Decayed(lambda: Complex(real=True)), make()).step()


@pytest.mark.parametrize("make", [delta_stn, implicit_cg, Unrolled, SAMA])
def test_weights_of_several_types_are_refused_by_solvers_that_differentiate(make):
    with pytest.raises(Refused, match=r"`0.weight` in float32 and `1.weight` in float64"):
        ready(Decayed(mixed), make())

    class Plain(Mixed):
        forward = nn.Sequential.forward

    ready(Decayed(lambda: Plain(*mixed()).float()), make()).step()


def test_weights_of_several_types_run_where_w_is_only_trained(tmp_path):
    ready(Decayed(mixed), random_search()).step()
    runner = Runner(epochs=2, progress="none", picture=False)
    runner.run(Decayed(mixed), Fixed(), directory=tmp_path)
