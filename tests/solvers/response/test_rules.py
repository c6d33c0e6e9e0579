"""Response rules of every layer against dense weights: value, tangent and gradient."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

import bilevel
from bilevel import solvers, squared_norm
from bilevel.solvers.autodiff.decompositions import DOUBLE_BACKWARD, FORWARD_MODE, Decomposed
from bilevel.solvers.response.per_example_weight import ResponseWeight

B, H = 3, 2


class Tied(nn.Module):
    """An embedding that shares its table with the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)

    def forward(self, x):
        return F.linear(torch.tanh(self.table(x)), self.table.weight)


class ByHand(nn.Module):
    """Products, gains and shifts written out, with a vector and a scalar weight."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.vector = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
        self.gain, self.shift = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(()))

    def forward(self, x):
        return (
            torch.tanh(x @ self.matrix.T) * self.gain + self.shift
        ) @ self.vector + x @ self.vector


class Recurrent(nn.Module):
    def __init__(self, make=nn.LSTM, **options) -> None:
        super().__init__()
        self.layers = make(4, 3, batch_first=True, **options)

    def forward(self, x):
        y, last = self.layers(x)
        last = last if isinstance(last, tuple) else (last,)
        return torch.cat(
            [part.flatten(1) for part in (y, *(s.transpose(0, 1) for s in last))], dim=1
        )


class DropConnect(nn.Module):
    """Layers with masked weights; all examples share one mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Recurrent(nn.GRU)
        self.head = nn.Parameter(torch.randn(2, 18))
        self.masks = [torch.rand(9, 3) < 0.6, torch.rand(2, 18) < 0.6]

    def forward(self, x):
        recurrent, head = (mask.double() / 0.6 for mask in self.masks)
        layer = self.layer.layers
        y = functional_call(layer, {"weight_hh_l0": layer.weight_hh_l0 * recurrent}, (x,))[0]
        return F.linear(torch.cat([y.flatten(1), y[:, -1]], dim=1), head * self.head)


class Attention(nn.Module):
    """Self-attention, or attention to another sequence with masks, extra keys and its weights."""

    def __init__(self, *, cross=False, batch_first=True) -> None:
        super().__init__()
        more = {"kdim": 3, "vdim": 5, "add_bias_kv": True, "add_zero_attn": True} if cross else {}
        self.heads = nn.MultiheadAttention(4, 2, batch_first=batch_first, **more)
        self.cross, self.batch_first = cross, batch_first
        self.other = [torch.randn(B, 5, n, dtype=torch.float64) for n in (3, 5)]
        self.hidden = torch.arange(5) >= torch.tensor([5, 4, 2])[:, None]
        self.mask = torch.ones(6, 5, dtype=torch.bool).tril(-2)

    def forward(self, x):
        if not self.cross:
            y = x if self.batch_first else x.transpose(0, 1)
            y = self.heads(y, y, y, need_weights=False)[0]
            return y if self.batch_first else y.transpose(0, 1)
        y, weights = self.heads(
            *(x, *self.other), key_padding_mask=self.hidden, attn_mask=self.mask
        )
        return torch.cat([y, weights], dim=-1)


class Vision(nn.Module):
    """A class token, positions that are sliced, and a layer scale in a view."""

    axes = {"token": 2, "positions": 2}

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.positions = nn.Parameter(torch.randn(1, 9, 4))
        self.scale, self.more = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x):
        more = self.more.repeat(1, 2, 1).repeat(len(x), 1, 1)
        x = torch.cat([self.token.expand(len(x), -1, -1), x, more], dim=1)
        x = x * self.scale.repeat(len(x), x.shape[1], 1)
        x = x + self.positions[:, : x.shape[1]]
        return torch.tanh(x).mT * self.scale.reshape(1, -1, 1)


class Positions(nn.Module):
    """Tables of positions that are looked up without an example axis, and GPT-2's linear layer."""

    axes = {"table.weight": 1, "relative.weight": 1}

    def __init__(self, ids=lambda: torch.arange(7)) -> None:
        super().__init__()
        self.table, self.relative = nn.Embedding(8, 4), nn.Embedding(13, 2)
        self.matrix, self.shift = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
        self.ids = ids

    def forward(self, x):
        at = torch.arange(7)
        x = x + self.table(self.ids())
        bias = self.relative(at[:, None] - at + 6).permute(2, 0, 1).unsqueeze(0)
        x = torch.addmm(self.shift, torch.tanh(x).view(-1, 4), self.matrix).view(x.shape)
        heads = x.unflatten(2, (2, 2)).transpose(1, 2)
        scores = heads @ heads.mT
        scores += bias + torch.ones(7, 7).tril()
        return scores.softmax(-1) @ heads


class Windows(nn.Module):
    """Windows of an image as further examples: norms, layers and attention with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(4), nn.Linear(4, 12)
        self.conv, self.groups = nn.Conv1d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.bias = nn.Parameter(torch.randn(7, 2))
        self.read, self.gain = nn.Embedding(4, 4), nn.Parameter(torch.randn(4))

    axes = {"read.weight": 1}

    def forward(self, x):  # [B, 8, 4] as two windows of four tokens
        x = self.norm(x.reshape(len(x) * 2, 4, 4)) * self.gain
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        at = torch.arange(4)
        bias = self.bias[(at[:, None] - at + 3).view(-1)].view(4, 4, -1)
        bias = bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = self.groups(self.conv(torch.tanh(x.transpose(1, 2).flatten(2)).mT))
        return F.linear(torch.tanh(x), self.read.weight).reshape(len(x) // 2, -1)


class SharedInput(nn.Module):
    """Layers that act on one row, which all examples share."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
        self.row = torch.randn(1, 4, dtype=torch.float64)

    def forward(self, x):
        return torch.tanh(x) * self.layers(self.row)


def normed(norm: nn.Module, *head: nn.Module) -> nn.Module:
    return nn.Sequential(*head, norm, nn.Tanh())


LAYERS = {
    "linear": (nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), (B, 4)),
    "linear over time": (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2, bias=False)),
        (B, 6, 4),
    ),
    "conv1d": (
        nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv1d(4, 2, 3, stride=2)),
        (B, 2, 7),
    ),
    "conv2d": (
        nn.Sequential(nn.Conv2d(2, 4, 3, padding="same"), nn.Tanh(), nn.Conv2d(4, 2, 3, groups=2)),
        (B, 2, 6, 5),
    ),
    "conv3d": (
        nn.Sequential(nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Conv3d(2, 2, 2, dilation=2)),
        (B, 1, 5, 5, 5),
    ),
    # without a layer below, whose examples its statistics would couple
    "batch norm": (normed(nn.BatchNorm2d(2)), (B, 2, 4, 4)),
    "batch norm 1d": (normed(nn.BatchNorm1d(4)), (B, 4)),
    "layer norm": (normed(nn.LayerNorm(5), nn.Linear(4, 5)), (B, 6, 4)),
    "RMS norm": (normed(nn.RMSNorm(5), nn.Linear(4, 5)), (B, 6, 4)),
    "RMS norm 2": (normed(nn.RMSNorm([6, 4])), (B, 6, 4)),
    "layer norm 2": (normed(nn.LayerNorm([6, 4])), (B, 6, 4)),
    "group norm": (normed(nn.GroupNorm(2, 4), nn.Conv2d(2, 4, 2)), (B, 2, 4, 4)),
    "lstm": (Recurrent(num_layers=2), (B, 5, 4)),
    "lstm bidirectional": (Recurrent(bidirectional=True, bias=False), (B, 5, 4)),
    "gru": (Recurrent(nn.GRU, num_layers=2), (B, 5, 4)),
    "gru bidirectional": (Recurrent(nn.GRU, bidirectional=True, bias=False), (B, 5, 4)),
    "masked weights": (DropConnect(), (B, 5, 4)),
    "embedding": (nn.Sequential(nn.Embedding(5, 4), nn.Tanh(), nn.Linear(4, 2)), "tokens"),
    "tied decoder": (Tied(), "tokens"),
    "by hand": (ByHand(), (B, 4)),
    "attention": (Attention(), (B, 6, 4)),
    "attention with time first": (Attention(batch_first=False), (B, 6, 4)),
    "attention to others": (Attention(cross=True), (B, 6, 4)),
    "encoder layer": (nn.TransformerEncoderLayer(4, 2, 5, 0.0, batch_first=True), (B, 6, 4)),
    "tokens and positions": (Vision(), (B, 6, 4)),
    "positions by number": (Positions(), (B, 7, 4)),
    "positions in a row": (Positions(lambda: torch.arange(7)[None]), (B, 7, 4)),
    "windows": (Windows(), (B, 8, 4)),
    "a shared input": (SharedInput(), (B, 4)),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    """Return a call of a module, with base and response weights, scales and axes; float64."""
    torch.manual_seed(0)
    module, shape = LAYERS[request.param]
    module = module.double()
    x = torch.randint(5, (B, 6)) if shape == "tokens" else torch.randn(shape, dtype=torch.float64)
    base = {k: torch.randn_like(p) for k, p in module.named_parameters()}
    response = {k: torch.randn_like(p) for k, p in module.named_parameters()}
    axes = {k: 1 if k in ("0.weight", "table.weight") and shape == "tokens" else 0 for k in base}
    axes |= getattr(module, "axes", {})
    scales = {
        k: torch.randn(B, p.shape[axes[k]] if p.ndim else 1, dtype=torch.float64)
        for k, p in base.items()
    }
    buffers = {k: b.clone() for k, b in module.named_buffers()}

    def call(params):
        return functional_call(module, (params, {k: b.clone() for k, b in buffers.items()}), (x,))

    return call, base, response, scales, axes


def as_factor(scale, p, axis):
    """Return the scale of one example as a factor of the weight."""
    shape = [1] * p.ndim
    if p.ndim:
        shape[axis] = -1
    return scale.reshape(shape)


def dense(base, response, scales, axes, b):
    """Return the weights W₀ + diag(s_b) W₁ of one example."""
    return {k: base[k] + as_factor(scales[k][b], base[k], axes[k]) * response[k] for k in base}


def change(response, scales, axes, b):
    return {k: as_factor(scales[k][b], response[k], axes[k]) * response[k] for k in response}


def per_example(base, response, scales, axes, *, tangent=False):
    return {
        k: ResponseWeight.of(base[k], response[k], scales[k], axes[k], tangent=tangent, label=k)
        for k in base
    }


def gradients(y, tensors):
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return torch.autograd.grad((weight * y.square()).sum(), tensors, allow_unused=True)


def assert_close(ours, oracle):
    """Compare up to rounding in float64."""
    torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-12 * max(1, size(oracle)))


def size(tensor):
    return 0 if tensor is None else float(tensor.detach().abs().max())


def require_grad(*groups):
    leaves = [t.requires_grad_() for group in groups for t in group.values()]
    return leaves


def test_exact_rule_equals_dense_weights_per_example(layer):
    call, base, response, scales, axes = layer
    leaves = require_grad(base, response, scales)
    ours = call(per_example(base, response, scales, axes))
    oracle = torch.stack([call(dense(base, response, scales, axes, b))[b] for b in range(B)])
    assert_close(ours, oracle)
    for mine, theirs in zip(gradients(ours, leaves), gradients(oracle, leaves), strict=True):
        assert_close(mine, theirs)


def linearized(call, params):
    with forward_ad.dual_level(), Decomposed(FORWARD_MODE):
        return tuple(forward_ad.unpack_dual(call(params)))


def test_tangent_rule_equals_forward_mode_of_dense_weights(layer):
    call, base, response, scales, axes = layer
    leaves = require_grad(response, scales)
    value, dot = linearized(call, per_example(base, response, scales, axes, tangent=True))
    pairs = []
    for b in range(B):
        with forward_ad.dual_level(), Decomposed(FORWARD_MODE):
            step = change(response, scales, axes, b)
            y = forward_ad.unpack_dual(
                call({k: forward_ad.make_dual(base[k], step[k]) for k in base})
            )
            pairs.append((y.primal[b], y.tangent[b]))
    assert_close(value, torch.stack([v for v, _ in pairs]))
    assert_close(dot, torch.stack([d for _, d in pairs]))
    for mine, theirs in zip(
        gradients(dot, leaves), gradients(torch.stack([d for _, d in pairs]), leaves), strict=True
    ):
        assert_close(mine, theirs)


def test_tangent_rule_equals_central_differences(layer):
    call, base, response, scales, axes = layer
    _, dot = linearized(call, per_example(base, response, scales, axes, tangent=True))
    h = 1e-5
    ahead, behind = ({k: s * sign * h for k, s in scales.items()} for sign in (1, -1))
    differences = (
        call(per_example(base, response, ahead, axes))
        - call(per_example(base, response, behind, axes))
    ) / (2 * h)
    torch.testing.assert_close(dot, differences, atol=1e-7, rtol=1e-6)


def test_primal_of_a_linearization_carries_no_graph(layer):
    call, base, response, scales, axes = layer
    require_grad(response, scales)
    value, dot = linearized(call, per_example(base, response, scales, axes, tangent=True))
    assert not value.requires_grad
    assert dot.requires_grad


def test_exact_rule_has_second_derivatives(layer):
    call, base, response, scales, axes = layer
    leaves = require_grad(scales)

    def curvature(y):
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True, allow_unused=True)
        return torch.autograd.grad(
            sum(g.square().sum() for g in first if g is not None), leaves, allow_unused=True
        )

    with Decomposed(DOUBLE_BACKWARD):  # PyTorch raises for a fused training batch norm
        ours = curvature(call(per_example(base, response, scales, axes)))
        oracle = curvature(
            torch.stack([call(dense(base, response, scales, axes, b))[b] for b in range(B)])
        )
    for mine, theirs in zip(ours, oracle, strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("weighted", [False, True])
def test_squared_norm_per_example(layer, weighted):
    _, base, response, scales, axes = layer
    leaves = require_grad(base, response, scales)
    weights = (
        torch.rand(sum(p.numel() for p in base.values())).to(next(iter(base.values())))
        if weighted
        else None
    )
    ours = squared_norm(per_example(base, response, scales, axes), weights)
    oracle = torch.stack(
        [squared_norm(dense(base, response, scales, axes, b), weights) for b in range(B)]
    )
    assert_close(ours, oracle)
    for mine, theirs in zip(gradients(ours, leaves), gradients(oracle, leaves), strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("decomposed", [False, True])
def test_batch_norm_shares_the_statistics_of_all_examples(decomposed):
    torch.manual_seed(0)
    x, gain, shift = torch.randn(B, 4), torch.randn(B, 4), torch.randn(B, 4)
    ones, zeros = torch.ones(4), torch.zeros(4)
    running = torch.zeros(4), torch.ones(4)
    params = ResponseWeight.of(ones, ones, gain - 1), ResponseWeight.of(zeros, ones, shift)
    with Decomposed(DOUBLE_BACKWARD if decomposed else {}):
        ours = F.batch_norm(x, *running, *params, training=True)
    plain = torch.zeros(4), torch.ones(4)
    torch.testing.assert_close(ours, F.batch_norm(x, *plain, training=True) * gain + shift)
    # the running statistics are written as by the fused kernel
    torch.testing.assert_close(running, plain)


def weight(axis=0):
    return ResponseWeight.of(
        torch.randn(4, 4), torch.randn(4, 4), torch.randn(B, 4), axis, label="head.weight"
    )


@pytest.mark.parametrize(
    "function",
    [
        torch.exp,
        lambda w: w.pow(2),
        lambda w: w + 1.0,
        lambda w: w * w,
        lambda w: w @ torch.randn(4, 4),
        lambda w: F.linear(w, torch.randn(4, 4)),
        lambda w: F.linear(w, weight()),
        lambda w: F.linear(torch.randn(B, 4), w.reshape(2, 8)),
        lambda w: w.reshape(2, 8) @ torch.randn(8, 4),
        lambda w: w.add_(1.0),
        lambda w: w.unsqueeze(0).add_(torch.randn(4)),
        lambda w: w.view(16).exp(),
        lambda w: F.scaled_dot_product_attention(w[None], w[None], w[None]),
    ],
)
def test_a_function_without_a_rule_is_an_error_that_names_the_weight(function):
    with pytest.raises(bilevel.BilevelError, match=r"head\.weight"):
        function(weight())


def test_missing_rule_names_the_function():
    with pytest.raises(solvers.MissingRule, match="`exp`"):
        torch.exp(weight())


@pytest.mark.parametrize("shape", [(B * 2 + 1, 4), (2, 4), (0, 4)])
def test_an_input_without_the_example_axis_first_is_an_error(shape):
    with pytest.raises(bilevel.BilevelError, match="example"):
        F.linear(torch.randn(shape), weight())


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU])
def test_a_recurrent_layer_with_time_first_or_packed_is_an_error(make):
    layer = make(4, 3)
    params = {
        k: ResponseWeight.of(p.detach(), p.detach(), torch.ones(B, p.shape[0]), label=k)
        for k, p in layer.named_parameters()
    }
    x = torch.randn(5, B, 4)
    with pytest.raises(bilevel.BilevelError, match="batch_first"):
        functional_call(layer, params, (x,))
    with pytest.raises(bilevel.BilevelError, match="packed"):
        functional_call(layer, params, (nn.utils.rnn.pack_padded_sequence(x, torch.full((B,), 5)),))
