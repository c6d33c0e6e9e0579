"""The linearized prediction y₀ + J_w f · ΔW(ε) against double backward with dense weights."""

from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from bilevel.solvers import SelfTuning
from bilevel.solvers.autodiff.linearization import forward_mode
from tests.support.solver_cases import B, Dropped, drawn, ready


class Net(nn.Module):
    """Layers that also accept weights [B, *shape], in elementary operations: the oracle."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = (
                self.dense(layer, x)
                if getattr(layer, "weight", x[0]).ndim > self.ndim(layer)
                else layer(x)
            )
        return x

    @staticmethod
    def ndim(layer):
        return {nn.Linear: 2, nn.Conv2d: 4, nn.BatchNorm2d: 1, nn.LayerNorm: 1}.get(type(layer), 99)

    @staticmethod
    def dense(layer, x):
        if isinstance(layer, nn.Linear):
            return torch.einsum("bi,boi->bo", x, layer.weight) + layer.bias
        if isinstance(layer, nn.Conv2d):
            return torch.func.vmap(lambda x, w, b: F.conv2d(x[None], w, b, padding=1)[0])(
                x, layer.weight, layer.bias
            )
        axes = (0, 2, 3) if isinstance(layer, nn.BatchNorm2d) else (1,)
        tail = [1] * (x.ndim - 2)
        variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        weight, bias = (p.reshape(*p.shape, *tail) for p in (layer.weight, layer.bias))
        return (x - mean) / torch.sqrt(variance + layer.eps) * weight + bias


NETWORKS = {
    "mlp with dropout": (
        lambda: Net(
            nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)
        ),
        (B, 4),
    ),
    "conv with batch norm": (
        lambda: Net(
            nn.Conv2d(2, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            nn.Tanh(),
            nn.Conv2d(3, 2, 3, padding=1),
            nn.Flatten(),
            nn.Linear(32, 3),
        ),
        (B, 2, 4, 4),
    ),
    "mlp with layer norm": (
        lambda: Net(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)),
        (B, 4),
    ),
}


def changes(solver, noise):
    """Return ΔW_b = diag(Uε_b) W₁ in full, [B, *shape]."""
    out, start = {}, 0
    for name, w in solver.core.weights.tensors.items():
        rows = solver.method.theta.tensors["rows"][start : start + len(w)]
        out[name] = (noise @ rows.T).reshape(
            -1, len(w), *[1] * (w.ndim - 1)
        ) * solver.method.theta.tensors[f"weights.{name}"]
        start += len(w)
    return out


def oracle(solver, batch):
    """Return the same loss, with ẏ = ∂(vᵀJ_w f)/∂v · ΔW by two backward passes."""
    generator, problem = solver.core.generator.manual_seed(7), solver.core.problem
    noise = solver.core.search.perturbation(B, generator)
    hypers = problem.space.constrain(solver.core.search.u0 + noise, generator)
    base = solver.core.weights.detached() if solver.regularized_w0 else solver.core.weights.tensors
    weights = {name: w.expand(B, *w.shape).clone() for name, w in base.items()}
    weights = {name: w if w.requires_grad else w.requires_grad_() for name, w in weights.items()}
    y, _ = problem.predict(
        hypers, weights, solver.core.carry, batch, train=True, generator=generator
    )
    step, v = changes(solver, noise), torch.zeros_like(y, requires_grad=True)
    pulled = torch.autograd.grad(y, list(weights.values()), v, create_graph=True)
    (dot,) = torch.autograd.grad(pulled, v, [step[name] for name in weights], create_graph=True)
    if solver.regularized_w0:  # w₀ is held
        y, weights = y.detach(), base
    penalty = sum((weights[name] + step[name]).square().flatten(1).sum(1) for name in step)
    return F.cross_entropy(y + dot, batch[1]) + 0.5 * (hypers["decay"] * penalty).mean()


@pytest.mark.parametrize("regularized_w0", [True, False], ids=["separate", "joint"])
@pytest.mark.parametrize("network", NETWORKS)
def test_linearized_gradients_equal_double_backward(network, regularized_w0):
    """Compare the gradient of Θ, and in the joint update that of w₀ through y₀ and ẏ."""
    make, shape = NETWORKS[network]
    solver = ready(Dropped(make(), shape), SelfTuning(regularized_w0=regularized_w0), away=0.4)
    batch = solver.core.data.train.peek()
    leaves = solver.method.theta.leaves + ([] if regularized_w0 else solver.core.weights.leaves)
    ours, theirs = drawn(solver, batch), oracle(solver, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    pairs = zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True)
    for mine, other in pairs:
        assert other.abs().max() > 1e-4
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("network", ["conv with batch norm", "mlp with layer norm"])
def test_forward_mode_would_give_the_joint_update_a_wrong_gradient(network, monkeypatch):
    """The joint update needs double backward; if this fails, PyTorch has corrected its norms."""
    forward = partial(forward_mode, functions=set())
    monkeypatch.setattr("bilevel.solvers.self_tuning.double_backward", forward)
    make, shape = NETWORKS[network]
    solver = ready(Dropped(make(), shape), SelfTuning(regularized_w0=False), away=0.4)
    batch = solver.core.data.train.peek()
    ours, theirs = (
        torch.autograd.grad(f(solver, batch), solver.core.weights.leaves[0])[0]
        for f in (drawn, oracle)
    )
    assert (ours - theirs).norm() > 0.01 * theirs.norm()


def test_the_linearization_differs_from_the_network_itself():
    """The tests above can fail: at this Θ the two predictions differ."""
    make, shape = NETWORKS["mlp with dropout"]
    values = []
    for linearize in (True, False):
        torch.manual_seed(0)
        solver = ready(Dropped(make(), shape), SelfTuning(linearize=linearize), away=0.4)
        values.append(drawn(solver, solver.core.data.train.peek()).item())
    assert abs(values[0] - values[1]) > 0.01
