"""Tests of networks by name: weights, dropout sites, norms, images and responses."""

import sys
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision import models
from torchvision.ops import StochasticDepth

from bilevel import BilevelError, Refused
from bilevel.problems import Classification
from bilevel.problems.datasets.labelled_images import Images
from bilevel.problems.networks.alexnet_vgg16 import VGG16
from bilevel.problems.networks.building_blocks import drop_channels, normalization
from bilevel.problems.networks.dropout import dropout_by_name
from bilevel.problems.networks.library_network import LibraryNetwork, timm_names
from bilevel.problems.networks.registry import OURS, image_network
from bilevel.problems.networks.resnet18 import Block, ResNet18
from bilevel.problems.networks.simple_cnn import SimpleCNN
from bilevel.problems.networks.transformer import Decoder
from bilevel.solvers import SelfTuning, centered_stn, delta_stn
from bilevel.solvers.response import per_example_weight
from tests.support.solver_cases import CPU, B, Dropped, drawn, ready

COLOUR, GREY, SMALL = (3, 32, 32), (1, 28, 28), (3, 8, 8)
NORMED = ("simple_cnn", "alexnet", "vgg16", "resnet18")


def images(shape=COLOUR, n=6):
    """Return the same random images three times."""
    generator = torch.Generator().manual_seed(0)
    split = torch.rand(n, *shape, generator=generator), torch.arange(n) % 10
    return Images(split, split, split, mean=0.5, std=0.3)


def problem(name, shape=COLOUR, *, n=6, per_example=True, **options):
    network = image_network(name, shape, 10, **options)
    made = partial(
        Classification, network.make, images(shape, n), sites=network.sites, batch_size=n
    )
    return (
        made()
        if per_example
        else made(space={name: {"per_example": False} for name in made().space})
    )


def visits(module, x):
    """Return the dropout sites that a forward pass visits, and their activations."""
    seen = []

    def drop(site, x):
        seen.append((site, x))
        return x

    module(x, drop)
    return seen


def convolutions(kernel, channels):
    return sum(a * b * kernel**2 + b for a, b in pairwise(channels))


def linear(*units):
    return sum(a * b + b for a, b in pairwise(units))


# --- the networks of the paper, and ResNet-18 ---


@pytest.mark.parametrize(
    ("name", "shape", "weights", "millions"),
    [
        ("mlp", GREY, linear(784, 1200, 1200, 10), 2.40),
        ("simple_cnn", GREY, convolutions(5, [1, 16, 32]) + linear(1568, 1568, 10), 2.49),
        (
            "alexnet",
            COLOUR,
            convolutions(3, [3, 64, 192, 384, 256, 256]) + linear(1024, 4096, 4096, 10),
            23.27,
        ),
        (
            "vgg16",
            COLOUR,
            convolutions(3, [3, 64, 64, 128, 128, *[256] * 3, *[512] * 6])
            + linear(512, 512, 512, 10),
            15.25,
        ),
        (
            "resnet18",
            COLOUR,
            sum(p.numel() for p in models.resnet18(num_classes=10).parameters())
            - 3 * 64 * (49 - 9),
            11.17,
        ),
    ],
)
def test_weights_are_those_of_the_published_networks(name, shape, weights, millions):
    """ResNet-18 is that of torchvision, except for its stem of 3 × 3 instead of 7 × 7."""
    with torch.device("meta"):
        counted = sum(p.numel() for p in image_network(name, shape, 10).make().parameters())
    assert counted == weights
    assert round(counted / 1e6, 2) == millions


@pytest.mark.parametrize("name", OURS)
def test_each_site_is_visited_once_and_in_order(name):
    network = image_network(name, COLOUR, 10, width=1 / 16)
    x = torch.randn(2, *COLOUR)
    assert [site for site, _ in visits(network.make(), x)] == list(range(network.sites))


@pytest.mark.parametrize(
    ("name", "sites", "whole"),
    [("simple_cnn", 4, 2), ("alexnet", 8, 5), ("vgg16", 16, 13), ("resnet18", 5, 3)],
)
def test_convolutions_are_dropped_by_channel_and_the_rest_by_element(name, sites, whole):
    network = image_network(name, COLOUR, 10, width=1 / 16)
    seen = [tuple(x.shape[2:]) for _, x in visits(network.make(), torch.randn(2, *COLOUR))]
    assert network.sites == sites
    assert seen == [(32, 32), *[(1, 1)] * whole, *[()] * (sites - whole - 1)]


def test_no_dropout_is_the_network_itself():
    """The product with ones is left out, and would change nothing."""
    network, x = image_network("vgg16", COLOUR, 10, width=1 / 16).make(), torch.randn(2, *COLOUR)
    assert torch.equal(network(x), network(x, lambda site, x: x))


@pytest.mark.parametrize("name", NORMED)
@pytest.mark.parametrize("norm", ["none", "batch", "group"])
def test_a_norm_follows_every_convolution_or_none(name, norm):
    module = image_network(name, COLOUR, 10, norm, width=1 / 8).make()
    kinds = {"batch": nn.BatchNorm2d, "group": nn.GroupNorm}
    norms = [m for m in module.modules() if isinstance(m, tuple(kinds.values()))]
    convolved = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    assert len(norms) == (0 if norm == "none" else len(convolved))
    assert all(isinstance(m, kinds[norm]) for m in norms)
    assert all((c.bias is None) == (norm != "none") for c in convolved)


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(512, 32), (64, 32), (32, 16), (24, 12), (8, 4), (2, 1), (1, 1), (7, 1), (33, 11)],
)
def test_groups_hold_two_channels_at_least_and_no_remainder(channels, groups):
    norm = normalization("group", channels)
    assert norm.num_groups == groups
    assert norm(torch.randn(2, channels, 3, 3)).shape == (2, channels, 3, 3)


@pytest.mark.parametrize("width", [1 / 8, 1, 2])
def test_width_scales_channels_and_units(width):
    with torch.device("meta"):
        module = image_network("vgg16", COLOUR, 10, width=width).make()
    assert module.convolutions[-1].weight.shape == (512 * width, 512 * width, 3, 3)
    assert module.linear[0].weight.shape == (512 * width, 512 * width)


@pytest.mark.parametrize("name", [*OURS, "torchvision/resnet18", "squeezenet1_1"])
@pytest.mark.parametrize("shape", [COLOUR, GREY, (3, 64, 48)])
def test_images_of_any_size_and_depth_or_a_sentence(name, shape):
    """VGG16 halves an image five times; networks of torchvision repeat a grey image three times."""
    if name == "vgg16" and shape == GREY:
        with pytest.raises(
            BilevelError, match=r"VGG16 halves an image .* 5 times.*at least 32 × 32 pixels"
        ):
            image_network(name, shape, 10)
        return
    options = {"width": 1 / 16} if name in OURS else {}
    network = image_network(name, shape, 7, **options)
    assert network.make()(torch.zeros(2, *shape)).shape == (2, 7)


def test_a_name_costs_no_random_number_and_no_weights():
    """The exception is a constructor that reads values, as in RegNet."""
    before = torch.get_rng_state()
    image_network("alexnet", COLOUR, 10, width=64)  # 95 billion weights, if they were made
    image_network("regnet_x_400mf", COLOUR, 10)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        (("resnt18", COLOUR, 10), {}, r"network='resnt18' is unknown \(did you mean `resnet18`"),
        (("torchvision/vgg_11", COLOUR, 10), {}, r"did you mean `vgg11`"),
        (
            ("vgg16", COLOUR, 10, "bach"),
            {},
            r"norm='bach' is unknown \(did you mean `batch`\?\); choose none, batch or group",
        ),
        (("mlp", COLOUR, 10, "batch"), {}, r"needs convolutions, and mlp has none"),
        (("vgg11", COLOUR, 10, "batch"), {}, r"does not apply to vgg11 of torchvision"),
        (("vgg16", COLOUR, 10), {"widht": 2}, r"no option `widht` \(did you mean `width`"),
        (("vgg16", COLOUR, 10), {"width": 0}, r"width=0 must be positive"),
        (("mlp", COLOUR, 10), {"hidden": [0]}, r"hidden=\[0\] must be whole numbers of at least 1"),
        (("simple_cnn", (3, 3, 3), 10), {}, r"3 × 3 pixels twice, and nothing is left"),
        (
            ("vit_b_16", COLOUR, 10),
            {},
            r"vit_b_16' cannot be made for images of 3 × 32 × 32.*image_size=32",
        ),
        (
            ("vgg11", COLOUR, 10),
            {"dropuot": 0.1},
            r"vgg11' cannot be made.*dropuot.*options that its constructor accepts",
        ),
        (("squeezenet1_1", (4, 32, 32), 10), {}, r"images of 4 × 32 × 32"),
        (
            ("googlenet", COLOUR, 10),
            {"init_weights": False},
            r"googlenet' returns more than logits.*aux_logits=false",
        ),
    ],
)
def test_what_makes_no_network_is_said_in_a_sentence(arguments, options, sentence):
    with pytest.raises(BilevelError, match=sentence):
        image_network(*arguments, **options)


# --- initial values ---


def best(module, steps):
    """Return the least loss of SGD on images whose mean color gives the class.

    Rate and momentum are the paper's; chance is 1.386.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(16) % 4
    x = (
        0.5 * torch.randn(16, *COLOUR, generator=generator)
        + torch.randn(4, 3, 1, 1, generator=generator)[labels]
    )
    optimizer = torch.optim.SGD(module.parameters(), lr=0.03, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(module(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return min(losses)


def with_pytorchs_values(module):
    for convolution in module.convolutions:
        convolution.reset_parameters()
    return module


def test_vgg16_keeps_the_size_of_its_activations_where_pytorchs_initial_values_let_them_fade():
    """Through ReLU, a k × k convolution multiplies the mean square by k² in σ²/2.

    Ours multiplies by in/out, PyTorch's by 1/6.

    Without biases the network is homogeneous, so pooling and padding have the same effect in both.
    """
    x, channels = torch.randn(16, *COLOUR), [64 // 4]

    def size(module):
        for convolution in module.convolutions:
            nn.init.zeros_(convolution.bias)
        found = []
        module.convolutions[-1].register_forward_hook(
            lambda m, args, out: found.append(out.square().mean())
        )
        module(x)
        return found[0].sqrt().item()

    ours = (2 * 3 / channels[0] * (1 / 2) ** 3) ** 0.5
    pytorchs = (1 / 3 * (1 / 6) ** 12) ** 0.5
    ratio = size(VGG16(width=1 / 4)) / size(with_pytorchs_values(VGG16(width=1 / 4)))
    assert 1 / 2 < ratio / (ours / pytorchs) < 2
    assert ratio > 1e4


def test_the_paper_s_rate_trains_vgg16_without_a_norm_and_not_from_pytorchs_values():
    assert best(VGG16(classes=4, width=1 / 16), 45) < 1.2
    assert best(with_pytorchs_values(VGG16(classes=4, width=1 / 16)), 45) > 1.36


def test_the_paper_s_rate_trains_resnet18_without_a_norm():
    assert best(ResNet18(classes=4, norm="none", width=1 / 16), 20) < 1.15


def test_a_block_without_norm_begins_as_its_shortcut():
    block, x = Block(4, 4, 1, "none"), torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x), F.relu(x))
    nn.init.ones_(block.alpha)
    assert not torch.allclose(block(x), F.relu(x))


# --- dropout of whole channels, per example ---

RATES = torch.tensor([0.0, 0.2, 0.5, 0.8])


@pytest.fixture(scope="module")
def scales():
    """Return the factors of each dropout on 4000 channels, at one rate per example."""

    def at(kind, **options):
        generator, f = torch.Generator().manual_seed(3), dropout_by_name(kind, **options)
        x = torch.ones(4, 4000, 2, 3)
        out = drop_channels(lambda site, x: f(x, RATES, generator), 1, x)
        assert torch.equal(out, out[:, :, :1, :1].expand_as(out))  # a channel as a whole
        return out[:, :, 0, 0].double()

    return at


def sure(p, n=4000):
    """Return four standard deviations of a share."""
    return 4 * (p * (1 - p) / n).sqrt()


def test_bernoulli_drops_each_example_s_share_of_channels(scales):
    m = scales("bernoulli")
    assert ((m == 0).double().mean(1) - RATES).abs().le(sure(RATES)).all()
    kept = [set(row[row > 0].tolist()) for row in m]
    assert [len(values) for values in kept] == [1] * 4
    torch.testing.assert_close(m.amax(1), 1 / (1 - RATES.double()), rtol=1e-6, atol=0)


def test_gaussian_has_the_variance_of_each_example_s_rate(scales):
    m, variance = scales("gaussian"), RATES / (1 - RATES)
    assert (m.mean(1) - 1).abs().le(4 * (variance / 4000).sqrt() + 1e-7).all()
    assert (m.var(1) - variance).abs().le(4 * variance * (2 / 4000) ** 0.5 + 1e-7).all()


def test_concrete_drops_each_example_s_share_to_below_a_half(scales):
    """P(z > ½) = rate at any temperature."""
    m = scales("concrete", temperature=0.3)
    assert ((m * (1 - RATES[:, None]) < 0.5).double().mean(1) - RATES).abs().le(sure(RATES)).all()
    hard = scales("concrete", temperature=1e-3) * (1 - RATES[:, None])
    assert ((hard < 0.01) | (hard > 0.99)).double().mean() > 0.99


@pytest.mark.parametrize("kind", ["gaussian", "concrete"])
def test_relaxed_dropout_of_channels_has_the_derivative_in_the_rate_of_each_example(kind):
    rate, f, h = RATES[1:].double().requires_grad_(), dropout_by_name(kind), 1e-6
    x = torch.randn(3, 5, 2, 2, dtype=torch.float64)
    weights = torch.randn_like(x)

    def sums(rate):
        generator = torch.Generator().manual_seed(0)
        return (weights * drop_channels(lambda site, x: f(x, rate, generator), 1, x)).sum((1, 2, 3))

    (gradient,) = torch.autograd.grad(sums(rate).sum(), rate)
    torch.testing.assert_close(
        gradient,
        (sums(rate.detach() + h) - sums(rate.detach() - h)) / (2 * h),
        rtol=1e-5,
        atol=1e-6,
    )


# --- batch statistics ---


def statistics(carry):
    return {name: t.clone() for name, t in carry.items()}


def test_statistics_are_written_once_a_batch_by_the_pass_that_trains_w0_and_by_no_other():
    """They equal those of one plain pass at λ₀ and w₀ bit for bit, for any response."""
    for away in (0.0, 0.3):
        solver = ready(problem("resnet18", SMALL, width=1 / 16), delta_stn(), away=away)
        batch, before = solver.core.data.train.next(), statistics(solver.core.carry)
        state = solver.core.generator.get_state()
        hypers = solver.core.problem.space.constrain(solver.core.search.u0, solver.core.generator)
        weights = {name: t.detach().clone() for name, t in solver.core.weights.tensors.items()}
        _, expected = solver.core.problem.predict(
            hypers, weights, solver.core.carry, batch, train=True, generator=solver.core.generator
        )
        solver.core.generator.set_state(state)
        solver.method.inner_step(batch)
        after = statistics(solver.core.carry)
        assert all(torch.equal(after[name], expected[name]) for name in after)
        counts = [t for name, t in after.items() if "num_batches_tracked" in name]
        assert len(counts) == 20
        assert all(t == 1 for t in counts)
        assert not any(torch.equal(after[name], before[name]) for name in after)
        solver.method.perturbed_loss(
            solver.core.weights.detached(), solver.method.response_carry, batch
        )
        solver.method.outer_step(solver.core.data.valid.next())
        assert all(torch.equal(solver.core.carry[name], after[name]) for name in after)


# --- torchvision's ---


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small"])
def test_nothing_but_dropout_is_changed_in_a_network_of_torchvision(name):
    ours, x = image_network(name, COLOUR, 10).make(), torch.randn(4, *COLOUR)
    theirs = models.get_model(name, num_classes=10)
    theirs.load_state_dict(ours.network.state_dict())
    for module in theirs.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_sites_of_torchvision_are_the_input_and_its_own_dropouts():
    network = image_network("vgg11", (3, 32, 32), 10)
    with torch.device("meta"):
        seen = visits(network.make(), torch.empty(2, *COLOUR))
    assert network.sites == 3
    assert [(site, tuple(x.shape)) for site, x in seen] == [
        (0, (2, 3, 32, 32)),
        (1, (2, 4096)),
        (2, (2, 4096)),
    ]


def test_a_network_of_torchvision_keeps_no_dropout_between_calls():
    network = LibraryNetwork("torchvision", "squeezenet1_1", 10)
    x = torch.randn(2, *COLOUR)
    clean = network(x)
    with pytest.raises(ZeroDivisionError):
        network(x, lambda site, x: x / 0 if site == 0 else 1 // 0)
    assert torch.equal(network(x), clean)


# --- timm's ---

TIMM_VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_sites_of_timm_are_the_input_and_the_dropouts_that_are_on():
    pytest.importorskip("timm")
    name = "timm/vit_tiny_patch16_224"
    assert image_network(name, SMALL, 3, **TIMM_VIT).sites == 1
    options = TIMM_VIT | {"drop_rate": 0.1, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1}
    network = image_network(name, SMALL, 3, **options)
    seen = visits(network.make(), torch.zeros(2, *SMALL))
    # the projection of attention, both layers of the MLP, and the class token before the logits
    assert [(site, tuple(x.shape)) for site, x in seen] == [
        (0, (2, 3, 8, 8)),
        (2, (2, 5, 8)),
        (3, (2, 5, 32)),
        (4, (2, 5, 8)),
        (1, (2, 8)),
    ]
    assert network.sites == 5


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("timm/vit_tinny_patch16_224", {}, r"is unknown \(did you mean `vit_tiny_patch16_224`"),
        ("timm/resnet18", {"norm": "group"}, r"norm='group' does not apply to resnet18 of timm"),
        ("timm/vit_tiny_patch16_224", {}, r"give options .* or another network"),
    ],
)
def test_a_network_of_timm_that_does_not_fit_is_a_sentence(name, options, sentence):
    pytest.importorskip("timm")
    with pytest.raises(BilevelError, match=sentence):
        image_network(name, SMALL, 3, **options)


def test_without_timm_its_networks_are_refused_in_a_sentence(monkeypatch):
    timm_names.cache_clear()
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BilevelError, match="install it with `pip install timm`"):
        image_network("timm/resnet18", SMALL, 3)


# --- transformers ---


def test_vit_visits_the_input_the_tokens_and_each_branch():
    network = image_network("vit", SMALL, 3, tokens=8, depth=2, heads=2)
    sites = [site for site, _ in visits(network.make(), torch.zeros(2, *SMALL))]
    assert sites == [0, 1, 2, 3, 4, 5]
    assert network.sites == 6


def test_delta_stn_tunes_a_vision_transformer():
    solver = ready(problem("vit", SMALL, n=4, tokens=8, depth=1, heads=2))
    assert all(torch.isfinite(value) for value in solver.step().values())


def test_a_decoder_sees_no_later_token():
    decoder = Decoder(words=7, length=6, width=8, depth=2, heads=2).double()
    tokens = torch.randint(7, (3, 6), generator=torch.Generator().manual_seed(0))
    later = tokens.clone()
    later[:, 4:] = (later[:, 4:] + 1) % 7
    one, other = decoder(tokens), decoder(later)
    torch.testing.assert_close(one[:, :4], other[:, :4], rtol=0, atol=1e-12)
    assert (one[:, 4:] - other[:, 4:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small"])
def test_delta_stn_tunes_networks_of_torchvision(name):
    """They have in-place ReLUs, hard swishes, fire modules, and squeeze and excitation."""
    solver = ready(problem(name, n=4), delta_stn(inner_steps=1))
    metrics = solver.step()
    assert all(torch.isfinite(value) for value in metrics.values())
    assert all(leaf.abs().sum() > 0 for leaf in solver.method.theta.leaves[:1])


def assert_responds(solver):
    """Compare the gradient of the linearized loss in Θ with a central difference."""
    batch, h = solver.core.data.train.peek(), 1e-6
    gradients = torch.autograd.grad(
        drawn(solver, batch), solver.method.theta.leaves, allow_unused=True
    )
    directions = [torch.randn_like(leaf) for leaf in solver.method.theta.leaves]

    def along(t):
        with torch.no_grad():
            for leaf, d in zip(solver.method.theta.leaves, directions, strict=True):
                leaf.add_(t * d)
        return drawn(solver, batch).item()

    difference = (along(h) - along(-2 * h)) / (2 * h)
    analytic = sum(
        (g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None
    )
    assert analytic.item() == pytest.approx(difference, rel=1e-5, abs=1e-7)
    assert abs(difference) > 1e-4


class Residual(nn.Module):
    """Add to x a branch that is dropped at random for an example."""

    def __init__(self, *layers):
        super().__init__()
        self.branch = nn.Sequential(*layers, StochasticDepth(0.4, "row"))

    def forward(self, x):
        x = x + self.branch(x)
        x += 0.5
        return x


LAYERS = {
    "in-place relu": lambda: [nn.ReLU(inplace=True)],
    "in-place relu after batch norm": lambda: [
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 1),
        nn.ReLU(inplace=True),
    ],
    "in-place relu6": lambda: [nn.ReLU6(inplace=True)],
    "in-place silu": lambda: [nn.SiLU(inplace=True)],
    "in-place hard swish": lambda: [nn.Hardswish(inplace=True)],
    "hard sigmoid": lambda: [nn.Hardsigmoid()],
    "squeeze and excitation": lambda: [
        models.mobilenetv3.SElayer(4, 2, scale_activation=nn.Hardsigmoid)
    ],
    "stochastic depth": lambda: [Residual(nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True))],
    "layer norm over channels": lambda: [models.convnext.LayerNorm2d(4), nn.Tanh()],
    "layer scale": lambda: [models.convnext.CNBlock(4, 0.5, 0.3)],
    "group norm": lambda: [normalization("group", 4), nn.Tanh()],
    "block": lambda: [Block(4, 4, 1, "none")],
    "block with batch norm": lambda: [Block(4, 6, 2, "batch"), nn.Conv2d(6, 4, 1)],
}


@pytest.mark.parametrize("draw", ["per example", "per batch"])
@pytest.mark.parametrize("layer", LAYERS)
def test_what_networks_are_made_of_responds_rightly(layer, draw):
    module = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *LAYERS[layer]())
    assert_responds(
        ready(
            Dropped(module, (B, 1, 4, 4), per_example=draw == "per example"), SelfTuning(), away=0.3
        )
    )


WHOLE = [
    ("simple_cnn", "group"),
    ("alexnet", "batch"),
    ("vgg16", "group"),
    ("resnet18", "none"),
    ("resnet18", "batch"),
]


@pytest.mark.parametrize(("name", "norm"), WHOLE)
def test_whole_networks_respond_rightly(name, norm):
    """All hyperparameters are tuned at once, augmentation included."""
    torch.set_default_dtype(torch.float64)
    try:
        network = image_network(name, COLOUR, 10, norm, width=1 / 16)
        made = Classification(
            network.make,
            images(n=3),
            sites=network.sites,
            augment=["affine", "colour"],
            batch_size=3,
        )
        assert_responds(ready(made, SelfTuning(), away=0.1))
    finally:
        torch.set_default_dtype(torch.float32)


# --- a layer without a response rule ---


def with_prelu():
    module = SimpleCNN(4, 6, 8, SMALL)
    module.norms[1] = nn.PReLU(6)
    return module


def test_a_layer_without_a_response_rule_is_named_and_can_be_registered(monkeypatch):
    monkeypatch.setattr(per_example_weight, "RULES", dict(per_example_weight.RULES))
    classified = Classification(with_prelu, images(SMALL), sites=4, batch_size=6)
    with pytest.raises(
        Refused,
        match=r"response rule for `prelu`, which acts on `norms\.1\.weight`; register one",
    ):
        ready(classified)

    @per_example_weight.rule(F.prelu, torch.prelu)
    def prelu(input, weight):
        slope = weight.dense()[:, :, None, None]
        return torch.where(input > 0, input, slope * input)

    metrics = ready(classified).step()
    assert all(torch.isfinite(value) for value in metrics.values())


def test_where_it_is_not_registered_a_perturbation_for_the_batch_serves():
    space = {"input_dropout": {}, **{f"dropout{i}": {} for i in range(1, 4)}, "weight_decay": {}}
    whole = {name: {"per_example": False} for name in space}
    classified = Classification(with_prelu, images(SMALL), sites=4, batch_size=6, space=whole)
    assert all(
        torch.isfinite(value)
        for value in ready(classified, centered_stn(), device=CPU).step().values()
    )
