"""Norms in forward mode by fused kernels: exact, in any layout, refused where they would err."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn

from bilevel.solvers.autodiff import norm_tangents as fused
from bilevel.solvers.autodiff.decompositions import FUSED_NORMS, Decomposed
from bilevel.solvers.autodiff.linearization import double_backward, forward_mode
from bilevel.solvers.response.per_example_weight import ResponseWeight


def statistics(x):
    """Return new running statistics of 6 channels, in the type of x."""
    return torch.linspace(-1, 1, 6, dtype=x.dtype), torch.linspace(0.5, 2, 6, dtype=x.dtype)


NORMS = {
    "batch": (
        lambda x: fused.batch_norm(x, None, None, None, None, True, 0.1, 1e-5),
        lambda x: F.batch_norm(x, None, None, training=True),
    ),
    "evaluation": (
        lambda x: fused.batch_norm(x, *statistics(x), None, None, False, 0.1, 1e-5),
        lambda x: F.batch_norm(x, *statistics(x), training=False),
    ),
    "layer": (
        lambda x: fused.layer_norm(x, x.shape[2:], None, None, 1e-5),
        lambda x: F.layer_norm(x, x.shape[2:]),
    ),
    "group": (
        lambda x: fused.group_norm(x, 3, None, None, 1e-5),
        lambda x: F.group_norm(x, 3),
    ),
    "instance": (
        lambda x: fused.instance_norm(x, None, None, None, None),
        lambda x: F.instance_norm(x),
    ),
    "instance with statistics": (
        lambda x: fused.instance_norm(x, *statistics(x), None, None),
        lambda x: F.instance_norm(x, *statistics(x)),
    ),
}

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
    "examples inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "a slice": lambda x: torch.cat([x, x], dim=3)[..., ::2],
}


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
def test_tangent_and_gradient_equal_those_of_pytorch(norm, layout):
    ours, theirs = NORMS[norm]
    x = LAYOUTS[layout](randn(8, 6, 5, 4))
    dx, upstream = randn(*x.shape, 1)[..., 0], randn(*x.shape, 1, 1)[..., 0, 0]
    y, dy = torch.func.jvp(theirs, (x,), (dx,))
    leaf = x.clone().requires_grad_()
    (pulled,) = torch.autograd.grad(theirs(leaf), leaf, upstream)  # Jᵀ = J
    with forward_ad.dual_level():
        dot = dx.clone().requires_grad_()
        value, tangent = forward_ad.unpack_dual(ours(forward_ad.make_dual(x, dot)))
        (gradient,) = torch.autograd.grad(tangent, dot, upstream)
    for a, b in ((value, y), (tangent, dy), (gradient, pulled)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(8, 6), (8, 6, 5), (8, 6, 3, 2, 2)])
def test_batch_norm_works_for_any_number_of_axes(shape):
    ours, theirs = NORMS["batch"]
    x, dx = randn(*shape), randn(*shape) + 1
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(ours(forward_ad.make_dual(x, dx))).tangent
    expected = torch.func.jvp(theirs, (x,), (dx,))[1]
    torch.testing.assert_close(tangent, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", [n for n in NORMS if n != "instance with statistics"])
def test_a_gradient_of_the_input_is_refused(norm):
    """The derivative of Jẋ in x is left out, so a graph of x would get a wrong gradient."""
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(randn(8, 6, 5, 4).requires_grad_(), randn(8, 6, 5, 4))
        with pytest.raises(RuntimeError, match="needs no gradient in forward mode"):
            NORMS[norm][0](dual)


@pytest.mark.parametrize("norm", NORMS)
def test_without_a_tangent_the_norm_is_pytorchs(norm):
    ours, theirs = NORMS[norm]
    x = randn(8, 6, 5, 4)
    assert torch.equal(ours(x), theirs(x))


def test_running_statistics_move_as_in_pytorch():
    x = randn(8, 6, 5, 4)
    ours, theirs = statistics(x), statistics(x)
    with forward_ad.dual_level():
        fused.batch_norm(forward_ad.make_dual(x, x), *ours, None, None, True, 0.3, 1e-5)
    F.batch_norm(x, *theirs, training=True, momentum=0.3)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_a_tangent_has_the_type_of_its_input(norm):
    """Direct calls of kernels bypass autocast, which would have converted them."""
    x, dx = randn(8, 6, 5, 4, dtype=torch.float32), randn(8, 6, 5, 4, dtype=torch.float32)
    with forward_ad.dual_level():
        value, tangent = forward_ad.unpack_dual(
            NORMS[norm][0](forward_ad.make_dual(x.bfloat16(), dx.bfloat16()))
        )
    assert value.dtype == tangent.dtype == torch.bfloat16
    exact = torch.func.jvp(NORMS[norm][1], (x,), (dx,))[1]
    torch.testing.assert_close(tangent.float(), exact, rtol=0.05, atol=0.05)


NETWORKS = {
    "batch": lambda: nn.BatchNorm2d(4),
    "batch without statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "batch, not affine": lambda: nn.BatchNorm2d(4, affine=False),
    "group": lambda: nn.GroupNorm(2, 4),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    "layer": lambda: nn.LayerNorm((4, 5, 5)),
}


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_linearized_network_equals_two_backward_passes(name, per_example):
    """The values and the gradient of Θ, with gains and shifts that respond too."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), NETWORKS[name](), nn.Tanh(), nn.Conv2d(4, 2, 5)
    ).double()
    w0 = {n: p.detach() for n, p in network.named_parameters()}
    theta = {n: randn(*p.shape).requires_grad_() for n, p in w0.items()}
    rows = {n: randn(p.shape[0], 3) for n, p in w0.items()}
    x = randn(8, 2, 5, 5)
    offset = randn(8, 3) if per_example else randn(3)

    def weights(offset, *, tangent):
        made = {}
        for n, w in w0.items():
            scale = offset @ rows[n].T
            if per_example:
                made[n] = ResponseWeight.of(w, theta[n], scale, tangent=tangent)
                continue
            change = scale.reshape(-1, *[1] * (w.ndim - 1)) * theta[n]
            made[n] = forward_ad.make_dual(w, change) if tangent else w + change
        return made

    def predict(params):
        return torch.func.functional_call(network, params, (x,)).flatten(1), {}

    ours, _ = forward_mode(predict, weights, offset, set(FUSED_NORMS))
    theirs, _ = double_backward(predict, weights, offset)
    upstream = randn(*ours.shape)
    leaves = list(theta.values())
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    for a, b in zip(
        torch.autograd.grad(ours, leaves, upstream),
        torch.autograd.grad(theirs, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_forward_mode_takes_the_kernels(monkeypatch):
    """Otherwise the tests above would hold with PyTorch's own forward mode too."""
    calls = []
    kernel = fused.apply_symmetric
    monkeypatch.setattr(fused, "apply_symmetric", lambda *a: calls.append(a) or kernel(*a))
    with forward_ad.dual_level(), Decomposed(FUSED_NORMS):
        x = forward_ad.make_dual(randn(8, 6, 5, 4), randn(8, 6, 5, 4))
        for norm in (nn.BatchNorm2d(6), nn.GroupNorm(2, 6), nn.InstanceNorm2d(6)):
            norm.double()(x)
        nn.LayerNorm(4).double()(x)
    assert len(calls) == 4
