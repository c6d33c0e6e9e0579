"""Tests of `ModuleCall` against `torch.func.functional_call`."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from bilevel.module_call import ModuleCall


class Tied(nn.Module):
    """Two layers with one weight, and a buffer under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.ones(3))
        self.again = nn.Module()
        self.again.register_buffer("shift", self.shift)

    def forward(self, x):
        return self.second(self.first(x)) + self.shift + 2 * self.again.shift


class Shared(nn.Module):
    """One submodule under two names."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = self.a

    def forward(self, x, *, scale=1.0):
        return scale * self.b(torch.tanh(self.a(x)))


class Assigning(nn.Module):
    """Assign a new count, and write into the mean."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        self.count = self.count + 1
        self.mean.add_(x.mean(0))
        return x * self.weight + self.mean


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(3, 2, batch_first=True)

    def forward(self, x):
        return self.layer(x[None])[0]


MODULES = {
    "layers": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)),
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
    "tied": Tied,
    "shared": Shared,
    "assigned": Assigning,
    "recurrent": Recurrent,
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
    "frozen": lambda: nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, 2)),
}


def state_of(module, seed=0):
    """Return other weights and buffers, each under one name."""
    draws = torch.Generator().manual_seed(seed)
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {
        name: torch.rand(t.shape, generator=draws) if t.is_floating_point() else t.clone()
        for name, t in named.items()
    }


def kept(module):
    return [id(t) for t in (*module.parameters(), *module.buffers())]


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_a_call_equals_that_of_pytorch(make):
    """Output, gradients and the tensors that the module leaves behind agree bit for bit."""
    module, x = make(), torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    call, own = ModuleCall(module), kept(module)
    found = []
    for run in (
        lambda t: call(t, (x,), {}),
        # on a copy: PyTorch's function leaves its tensors in a submodule that has two names
        lambda t: functional_call(copy.deepcopy(module), t, (x,)),
        lambda t: copy.deepcopy(call)(t, (x,), {}),
    ):
        leaves = {
            name: t.requires_grad_() if name in dict(module.named_parameters()) else t
            for name, t in state_of(module).items()
        }
        tensors = dict(leaves)
        out = run(tensors)
        weights = [t for t in leaves.values() if t.requires_grad]
        gradients = torch.autograd.grad(out.square().sum(), weights, allow_unused=True)
        found.append([out, *gradients, *tensors.values()])
        assert kept(module) == own  # the module has its own tensors again
    for values in zip(*found, strict=True):
        for value in values[1:]:
            assert (value is None) == (values[0] is None)
            assert value is None or torch.equal(value, values[0])


def test_arguments_by_keyword_and_a_single_argument():
    call, x = ModuleCall(Shared()), torch.ones(2, 3)
    state = state_of(call.module)
    assert torch.equal(call(dict(state), (x,), {"scale": 2.0}), 2 * call(dict(state), x, {}))


def test_an_error_in_the_module_gives_its_tensors_back():
    call = ModuleCall(nn.Linear(3, 2))
    own = kept(call.module)
    with pytest.raises(RuntimeError, match="shapes"):
        call(state_of(call.module), (torch.ones(2, 4),), {})
    assert kept(call.module) == own


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_what_pytorch_refuses_is_refused_by_its_own_words():
    x = torch.ones(2, 3)
    scripted = torch.jit.trace(nn.Linear(3, 2), x)
    with pytest.raises(RuntimeError, match="Jitted"):
        ModuleCall(scripted)(state_of(nn.Linear(3, 2)), (x,), {})
    call = ModuleCall(nn.Linear(3, 2))
    with pytest.raises(AttributeError, match="other"):
        call({"other.weight": torch.ones(2, 3)}, (x,), {})
