"""The response of any layer has a right gradient or is refused at set-up."""

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from bilevel import BilevelError, Refused
from bilevel.checks.check_problem import check_setup
from bilevel.solvers import SelfTuning
from tests.support.solver_cases import CPU, B, Dropped, Last, drawn, ready


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.heads(x, x, x, need_weights=False)[0]


class Checkpointed(nn.Module):
    """A layer that recomputes its activations in the backward pass."""

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


ALL = {(step, draw) for step in ("separate", "joint") for draw in ("per example", "per batch")}
PER_BATCH, JOINT = (
    {("separate", "per batch"), ("joint", "per batch")},
    {("joint", "per example"), ("joint", "per batch")},
)

LAYERS = {
    "batch norm": (*image(nn.BatchNorm2d(4), nn.Tanh()), ALL),
    "group norm": (*image(nn.GroupNorm(2, 4), nn.Tanh()), ALL),
    "instance norm": (*image(nn.InstanceNorm2d(4), nn.Tanh()), ALL),
    "instance norm affine": (*image(nn.InstanceNorm2d(4, affine=True), nn.Tanh()), ALL),
    "layer norm": (*flat(nn.LayerNorm(6), nn.Tanh()), ALL),
    "rms norm": (*flat(nn.RMSNorm(6), nn.Tanh()), ALL),
    "pooling": (*image(nn.Tanh(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)), ALL),
    "transposed convolution": (*image(nn.Tanh(), nn.ConvTranspose2d(4, 1, 3)), PER_BATCH),
    "softmax": (*flat(nn.Softmax(-1)), ALL),
    "log softmax": (*flat(nn.LogSoftmax(-1)), ALL),
    "log sum exp": (
        *flat(
            Apply(
                lambda x: torch.stack([x[:, :3].logsumexp(1), x[:, 3:].logsumexp(1), x.sum(1)], 1)
            )
        ),
        ALL,
    ),
    "glu": (*flat(nn.GLU()), ALL),
    "prelu": (*flat(nn.PReLU()), PER_BATCH),
    "gelu": (*flat(nn.GELU()), ALL),
    "distances": (*flat(Apply(lambda x: torch.cdist(x, x + 1))), JOINT),
    "attention": (lambda: nn.Sequential(nn.Linear(4, 4), Attention()), (B, 5, 4), ALL),
    "transformer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)),
        (B, 5, 4),
        ALL,
    ),
    "lstm": (Last, (B, 5, 4), ALL),
    "checkpoint": (*flat(Checkpointed()), set()),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh()),
        (B, 4),
        {("joint", "per batch"), ("separate", "per batch")},
    ),
}
"""A network, its input shape, and the cases that are not refused, for each layer."""


@pytest.mark.parametrize("draw", ["per example", "per batch"])
@pytest.mark.parametrize("step", ["separate", "joint"])
@pytest.mark.parametrize("layer", LAYERS)
def test_any_layer_is_differentiated_rightly_or_refused_at_setup(layer, step, draw):
    """Compare the gradient with a central difference along a random direction."""
    make, shape, runs = LAYERS[layer]
    problem, options = (
        Dropped(make(), shape, per_example=draw == "per example"),
        SelfTuning(regularized_w0=step == "separate"),
    )
    if (step, draw) not in runs:
        with pytest.raises(Refused):
            ready(problem, options)
        return
    solver = ready(problem, options, away=0.4)
    batch, h = solver.core.data.train.peek(), 1e-5
    leaves = solver.method.theta.leaves + (solver.core.weights.leaves if step == "joint" else [])
    gradients = torch.autograd.grad(drawn(solver, batch), leaves, allow_unused=True)
    directions = [torch.randn_like(leaf) for leaf in leaves]

    def along(t):
        with torch.no_grad():
            for leaf, d in zip(leaves, directions, strict=True):
                leaf.add_(t * d)
        return drawn(solver, batch).item()

    difference = (along(h) - along(-2 * h)) / (2 * h)
    analytic = sum(
        (g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None
    )
    assert analytic.item() == pytest.approx(difference, rel=1e-5, abs=1e-7)


def test_a_checkpointed_module_fails_loudly_and_is_refused():
    """The recomputation would use the weights of the module, and not those of the call."""
    problem = Dropped(Checkpointed().double(), (B, 6))
    w = {name: (p + 0.3).requires_grad_() for name, p in problem.init(torch.Generator())[0].items()}
    hypers, batch = (
        {"rate": torch.zeros(()), "decay": torch.zeros(())},
        (torch.randn(B, 6).double(), torch.arange(B) % 3),
    )
    loss, _ = problem.inner_loss(hypers, w, {}, batch, torch.Generator())
    with pytest.raises(RuntimeError):
        torch.autograd.grad(loss, list(w.values()))
    with pytest.raises(BilevelError, match=r"torch\.utils\.checkpoint"):
        check_setup(problem, problem.data(CPU, torch.Generator()), CPU)
    with pytest.raises(Refused, match=r"torch\.utils\.checkpoint"):
        ready(problem)
