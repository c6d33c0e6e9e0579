"""Whatever layer a network has: its response is differentiated rightly, or refused at set-up; never silently wrong."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from bilevel import BilevelError, Interval, ModuleProblem, Positive, Refused, Space, squared_norm
from bilevel.check import check_setup
from solvers import SelfTuning

CPU, B = torch.device("cpu"), 6


class Dropped(ModuleProblem):
    """Cross-entropy plus weight decay; the input is dropped out at a tuned rate, drawn per example."""

    def __init__(self, module, shape, *, per_example=True):
        space = Space(
            rate=Interval(low=0.0, high=0.9, init=0.3, per_example=per_example),
            decay=Positive(init=0.2, per_example=per_example),
        )
        split = torch.randn(shape).double(), torch.arange(shape[0]) % 3
        super().__init__(module.double(), space, split, split)

    def inputs(self, hypers, batch, *, train, generator):
        x = batch[0]
        if not train:
            return (x,), {}
        rate = hypers["rate"].reshape(-1, *[1] * (x.ndim - 1))
        return (x * (torch.rand(x.shape, generator=generator) > rate) / (1 - rate),), {}

    def inner_objective(self, hypers, params, prediction, batch):
        return F.cross_entropy(prediction.flatten(1), batch[1]) + 0.5 * (hypers["decay"] * squared_norm(params)).mean()

    def outer_objective(self, hypers, params, prediction, batch):
        return F.cross_entropy(prediction.flatten(1), batch[1])


def ready(problem, **options):
    """A solver set up on `problem`, and w₀ and Θ away from their start."""
    generator = torch.Generator().manual_seed(1)
    solver = SelfTuning(**options)
    solver.setup(problem, problem.data(CPU, generator), CPU, generator)
    with torch.no_grad():
        for t in solver.theta.leaves + solver.weights.leaves:
            t.add_(0.4 * torch.randn(t.shape, generator=generator, dtype=t.dtype))
    return solver, solver.data.train.peek()


def drawn(solver, batch):
    """The solver's own loss for Θ, with draws that can be repeated."""
    solver.generator.manual_seed(7)
    base = solver.weights.detached() if solver.regularized_w0 else solver.weights.tensors
    return solver.perturbed_loss(base, solver.carry, batch)[0]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.heads(x, x, x, need_weights=False)[0]


class Checkpointed(nn.Module):
    """Recomputes its activations in the backward pass."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return checkpoint(lambda x: torch.tanh(self.layer(x)), x, use_reentrant=False)


class Apply(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


def flat(*layers):
    return lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), *layers), (B, 4)


def image(*layers):
    return lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *layers), (B, 1, 4, 4)


LAYERS = {
    "batch norm": image(nn.BatchNorm2d(4), nn.Tanh()),
    "group norm": image(nn.GroupNorm(2, 4), nn.Tanh()),
    "instance norm": image(nn.InstanceNorm2d(4), nn.Tanh()),
    "instance norm affine": image(nn.InstanceNorm2d(4, affine=True), nn.Tanh()),
    "layer norm": flat(nn.LayerNorm(6), nn.Tanh()),
    "rms norm": flat(nn.RMSNorm(6), nn.Tanh()),
    "pooling": image(nn.Tanh(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)),
    "transposed convolution": image(nn.Tanh(), nn.ConvTranspose2d(4, 1, 3)),
    "softmax": flat(nn.Softmax(-1)),
    "log softmax": flat(nn.LogSoftmax(-1)),
    "log sum exp": flat(Apply(lambda x: torch.stack([x[:, :3].logsumexp(1), x[:, 3:].logsumexp(1), x.sum(1)], 1))),
    "glu": flat(nn.GLU()),
    "prelu": flat(nn.PReLU()),
    "gelu": flat(nn.GELU()),
    "distances": flat(Apply(lambda x: torch.cdist(x, x + 1))),
    "attention": (lambda: nn.Sequential(nn.Linear(4, 4), Attention()), (B, 5, 4)),
    "transformer": (lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)), (B, 5, 4)),
    "checkpoint": flat(Checkpointed()),
    "weight norm": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh()), (B, 4)),
}


@pytest.mark.parametrize("per_example", [True, False], ids=["per example", "per batch"])
@pytest.mark.parametrize("regularized_w0", [True, False], ids=["separate", "joint"])
@pytest.mark.parametrize("layer", LAYERS)
def test_any_layer_is_differentiated_rightly_or_refused_at_setup(layer, regularized_w0, per_example):
    """The gradient is the central difference along a random direction: never silently wrong, never an error in mid-run."""
    make, shape = LAYERS[layer]
    try:
        solver, batch = ready(Dropped(make(), shape, per_example=per_example), regularized_w0=regularized_w0)
    except Refused:
        return
    leaves, h = solver.theta.leaves + ([] if regularized_w0 else solver.weights.leaves), 1e-5
    gradients = torch.autograd.grad(drawn(solver, batch), leaves, allow_unused=True)
    directions = [torch.randn_like(leaf) for leaf in leaves]

    def along(t):
        with torch.no_grad():
            for leaf, d in zip(leaves, directions, strict=True):
                leaf.add_(t * d)
        return drawn(solver, batch).item()

    difference = (along(h) - along(-2 * h)) / (2 * h)
    analytic = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None)
    assert analytic.item() == pytest.approx(difference, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("layer", ["batch norm", "group norm", "layer norm", "pooling", "gelu", "softmax"])
def test_a_layer_of_the_list_is_not_refused_by_delta_stn(layer):
    make, shape = LAYERS[layer]
    ready(Dropped(make(), shape))


@pytest.mark.parametrize("layer", ["attention", "transformer", "rms norm", "transposed convolution", "prelu"])
def test_a_layer_without_a_rule_runs_per_batch(layer):
    make, shape = LAYERS[layer]
    ready(Dropped(make(), shape, per_example=False))


def test_a_checkpointed_module_fails_loudly_and_is_refused():
    """What the backward pass recomputes would use the module's own weights, not those of the call: no silent wrong gradient."""
    problem = Dropped(Checkpointed().double(), (B, 6))
    w = {name: (p + 0.3).requires_grad_() for name, p in problem.init(torch.Generator())[0].items()}
    hypers, batch = {"rate": torch.zeros(()), "decay": torch.zeros(())}, (torch.randn(B, 6).double(), torch.arange(B) % 3)
    loss, _ = problem.inner_loss(hypers, w, {}, batch, torch.Generator())
    with pytest.raises(RuntimeError):
        torch.autograd.grad(loss, list(w.values()))
    with pytest.raises(BilevelError, match=r"torch\.utils\.checkpoint"):
        check_setup(problem, problem.data(CPU, torch.Generator()), CPU)
    with pytest.raises(Refused, match=r"torch\.utils\.checkpoint"):
        ready(problem)
