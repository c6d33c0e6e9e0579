"""Tests of augmentation against torchvision, of its derivatives, and of draws and errors."""

import math
from functools import partial

import pytest
import torch
import torchvision.transforms.functional as TF
from torchvision.transforms import InterpolationMode

import bilevel
from bilevel import BilevelError, Need, Refused, Space, solvers
from bilevel.problems import MLP, Classification
from bilevel.problems.classification import image_transforms
from bilevel.problems.classification.augmentation import (
    OPERATIONS,
    STRENGTHS,
    Augmentation,
    strengths,
)
from bilevel.problems.classification.recipes import augmented_images
from bilevel.problems.datasets import labelled_images
from bilevel.problems.datasets.labelled_images import Images
from bilevel.problems.networks.simple_cnn import SimpleCNN
from bilevel.requirements import check_space
from tests.support.device_waits import no_waiting
from tests.support.solver_cases import all_solvers, ready

CPU, F64 = torch.device("cpu"), torch.float64
COLOURS = {
    "brightness": (image_transforms.brightness, TF.adjust_brightness, (0.0, 2.0)),
    "contrast": (image_transforms.contrast, TF.adjust_contrast, (0.0, 2.0)),
    "saturation": (image_transforms.saturation, TF.adjust_saturation, (0.0, 2.0)),
    "hue": (image_transforms.hue, TF.adjust_hue, (-0.5, 0.5)),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def uniform(*shape, low=0.0, high=1.0, seed=0, dtype=F64):
    return low + (high - low) * torch.rand(shape, generator=generator(seed), dtype=dtype)


def pictures(channels=3, height=9, width=12, n=12, white=255):
    """Return random images of bytes."""
    draws = generator(3)

    def split(n):
        x = torch.randint(
            0, white + 1, (n, channels, height, width), generator=draws, dtype=torch.uint8
        )
        return x, torch.arange(n) % 4

    return Images(split(n), split(8), split(8), mean=100.0, std=50.0)


def all_of(images, **changes):
    return Space(**strengths(images, list(OPERATIONS))).override(changes)


def small(images=None, operations=("affine", "colour"), **options):
    images = pictures() if images is None else images
    network = partial(MLP, [math.prod(images.train[0].shape[1:]), 6, 4])
    return Classification(network, images, sites=2, augment=operations, batch_size=4, **options)


@pytest.fixture
def double():
    """Use float64 for weights, inputs and draws."""
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


# --- the operations, image by image ---


@pytest.mark.parametrize("size", [(28, 28), (9, 14)])
@pytest.mark.parametrize("channels", [1, 3])
def test_affine_is_torchvisions_image_by_image(channels, size):
    n, (height, width) = 40, size
    x = uniform(n, channels, *size)
    degrees, shear = uniform(n, low=-180, high=180, seed=1), uniform(n, low=-60, high=60, seed=2)
    shift, scale = uniform(n, 2, low=-0.5, high=0.5, seed=3), uniform(n, low=0.5, high=1.5, seed=4)
    ours = image_transforms.affine(x, degrees, shift, scale, shear)
    for i in range(n):
        moved = [shift[i, 0].item() * width, shift[i, 1].item() * height]
        parameters = degrees[i].item(), moved, scale[i].item(), [shear[i].item(), 0.0]
        torch.testing.assert_close(
            ours[i], TF.affine(x[i], *parameters, InterpolationMode.BILINEAR), rtol=0, atol=1e-11
        )


def test_affine_turns_clockwise_and_moves_right_and_down():
    zero, one, still = torch.zeros(()), torch.ones(()), torch.zeros(1, 2)
    x = torch.arange(9.0).view(1, 1, 3, 3)
    torch.testing.assert_close(
        image_transforms.affine(x, torch.tensor(90.0), still, one, zero),
        x.rot90(-1, (2, 3)),
        rtol=0,
        atol=1e-5,
    )
    moved = image_transforms.affine(x, zero, torch.tensor([[1 / 3, 0.0]]), one, zero)
    torch.testing.assert_close(
        moved[0, 0], torch.tensor([[0.0, 0, 1], [0, 3, 4], [0, 6, 7]]), rtol=0, atol=1e-5
    )
    moved = image_transforms.affine(x, zero, torch.tensor([[0.0, 1 / 3]]), one, zero)
    torch.testing.assert_close(
        moved[0, 0], torch.tensor([[0.0, 0, 0], [0, 1, 2], [3, 4, 5]]), rtol=0, atol=1e-5
    )
    assert not torch.allclose(
        image_transforms.affine(x, torch.tensor(90.0), still, one, zero), x.rot90(1, (2, 3))
    )


@pytest.mark.parametrize("name", COLOURS)
def test_colours_are_torchvisions_image_by_image(name):
    ours, theirs, (low, high) = COLOURS[name]
    x, factors = (
        uniform(30, 3, 7, 6, dtype=torch.float32),
        uniform(30, low=low, high=high, seed=1, dtype=torch.float32),
    )
    x[:10] = (4 * x[:10]).round() / 4  # greys, ties between channels, black and white
    together = ours(x, factors)
    for image, factor, got in zip(x, factors, together, strict=True):
        torch.testing.assert_close(got, theirs(image, factor.item()), rtol=0, atol=2e-6)
    torch.testing.assert_close(ours(x, factors[3])[3], together[3], rtol=0, atol=1e-7)
    neutral = torch.tensor(0.0 if name == "hue" else 1.0)
    torch.testing.assert_close(ours(x, neutral), x, rtol=0, atol=1e-6)
    if name in ("brightness", "contrast"):
        grey = x[:, :1]
        for image, factor, got in zip(grey, factors, ours(grey, factors), strict=True):
            torch.testing.assert_close(got, theirs(image, factor.item()), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", COLOURS)
def test_colours_do_not_depend_on_the_scale_of_the_pixels(name):
    ours, _, (low, high) = COLOURS[name]
    x, factors = uniform(8, 3, 4, 4), uniform(8, low=low, high=high, seed=1)
    options = {} if name == "hue" else {"white": 255.0}
    torch.testing.assert_close(ours(255 * x, factors, **options), 255 * ours(x, factors))


def test_cutout_by_a_loop_over_pixels():
    n, most, height, width = 50, 5, 8, 11
    x, centres = uniform(n, 2, height, width), uniform(n, most, 2, seed=1)
    holes, length = (
        torch.randint(0, most + 1, (n,), generator=generator(2)),
        torch.randint(0, 9, (n,), generator=generator(3)),
    )
    ours = image_transforms.cutout(x, holes.float(), length.float(), centres, 7.0)
    for i in range(n):
        wanted, side = x[i].clone(), int(length[i])
        for y, z in centres[i, : int(holes[i])].tolist():
            top, left = int(y * height) - side // 2, int(z * width) - side // 2
            wanted[:, max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = 7.0
        assert torch.equal(ours[i], wanted)
    holes, length = torch.tensor([3.0]), torch.tensor([4.0])
    alone = image_transforms.cutout(x[5:6], holes, length, centres[5:6])
    assert torch.equal(image_transforms.cutout(x, holes[0], length[0], centres)[5:6], alone)


def test_flip_mirrors_the_chosen():
    x = uniform(3, 1, 2, 4)
    out = image_transforms.flip(x, torch.tensor([True, False, True]))
    assert torch.equal(out, torch.stack([x[0].flip(-1), x[1], x[2].flip(-1)]))


# --- derivatives ---


@pytest.mark.parametrize("per_example", [False, True])
def test_derivatives_of_the_operations_by_differences(per_example):
    x, shape = uniform(2, 3, 3, 4, low=0.2, high=0.8), (2,) if per_example else ()
    check = partial(torch.autograd.gradcheck, atol=1e-6)
    ranges = [(-40, 40), (0.6, 1.4), (-40, 40)]
    parameters = [
        uniform(*shape, low=low, high=high, seed=seed).requires_grad_()
        for seed, (low, high) in enumerate(ranges)
    ]
    shift = uniform(2, 2, low=-0.3, high=0.3, seed=9).requires_grad_()
    assert check(
        lambda d, s, c, h: image_transforms.affine(x, d, s, c, h),
        (parameters[0], shift, *parameters[1:]),
    )
    for ours, _, (low, high) in COLOURS.values():
        factor = uniform(*shape, low=low / 2, high=high / 2, seed=4).requires_grad_()
        assert check(lambda factor, ours=ours: ours(x, factor), (factor,))
        assert check(
            lambda x, ours=ours, factor=factor: ours(x, factor.detach()),
            (x.clone().requires_grad_(),),
        )


def test_hue_of_grey_has_finite_derivatives():
    x = torch.full((2, 3, 2, 2), 0.5, requires_grad=True)
    turns = torch.tensor(0.2, requires_grad=True)
    torch.testing.assert_close(image_transforms.hue(x, turns), x)
    gradients = torch.autograd.grad(image_transforms.hue(x, turns).sum(), (x, turns))
    assert all(bool(torch.isfinite(g).all()) for g in gradients)


@pytest.mark.parametrize("per_example", [False, True])
def test_derivative_of_the_inner_loss_by_central_differences(per_example, double):
    """All strengths have derivatives, because they scale draws that do not depend on them."""
    problem = small(dropout="gaussian")
    params, carry = problem.init(generator())
    batch = problem.data(CPU, generator()).train.next()
    u = problem.space.init()
    u = u + 0.5 * uniform(4, len(u)) if per_example else u

    def loss(u):
        return problem.inner_loss(problem.space.constrain(u), params, carry, batch, generator(3))[0]

    (ours,) = torch.autograd.grad(loss(u.requires_grad_()), u)
    moves = 1e-6 * torch.eye(u.numel()).reshape(-1, *u.shape)
    differences = torch.stack(
        [(loss(u + move) - loss(u - move)).detach() / 2e-6 for move in moves]
    ).reshape(u.shape)
    torch.testing.assert_close(ours, differences, rtol=1e-5, atol=1e-9)
    assert ours.abs().min() > 0


def test_an_implicit_hypergradient_goes_through_the_augmentation(double):
    """With H⁻¹ = I it is −(∂∇_w L_T/∂u)ᵀ ∇_w L_V.

    The derivative is taken by differences of plain gradients.
    """
    problem = small(dropout="gaussian")
    solver = ready(problem, solvers.implicit_identity())
    train, valid = solver.core.data.train.peek(), solver.core.data.valid.peek()
    weights = solver.core.weights.leaves

    def gradient(u):
        hypers = problem.space.constrain(u)
        loss, _ = problem.inner_loss(
            hypers,
            solver.core.weights.tensors,
            solver.core.carry,
            train,
            solver.core.generator.manual_seed(7),
        )
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, weights)])

    u = solver.core.search.u.detach()
    outer, _ = problem.outer_loss(
        problem.space.constrain(u), solver.core.weights.tensors, solver.core.carry, valid
    )
    towards = torch.cat([g.reshape(-1) for g in torch.autograd.grad(outer, weights)])
    differences = [
        (gradient(u + move) - gradient(u - move)) / 2e-6 for move in 1e-6 * torch.eye(len(u))
    ]
    wanted = torch.stack([-(column @ towards) for column in differences])
    solver.core.generator.manual_seed(7)
    torch.testing.assert_close(solver.hypergradient(valid), wanted, rtol=1e-5, atol=1e-10)


# --- what is drawn ---


def recorded(monkeypatch, images, hypers, n, seed=0, **changes):
    """Return the arguments of the operations on n images at strengths `hypers`."""
    calls = {}
    for name in ("affine", "brightness", "contrast", "saturation", "hue", "cutout"):
        monkeypatch.setattr(
            image_transforms, name, lambda x, *args, name=name: (calls.update({name: args}), x)[1]
        )
    x = images.train[0][:1].expand(n, -1, -1, -1)
    Augmentation(all_of(images, **changes), images)(hypers, x, generator(seed))
    degrees, shift, scale, shear = calls["affine"]
    drawn = {
        "degrees": degrees,
        "scale": scale - 1,
        "shear": shear,
        "hue": calls["hue"][0],
        "x": shift[:, 0],
        "y": shift[:, 1],
    }
    drawn |= {name: calls[name][0] - 1 for name in ("brightness", "contrast", "saturation")}
    return drawn, calls["cutout"]


def test_draws_are_uniform_on_plus_and_minus_the_strength(monkeypatch):
    images, n = pictures(), 20_000
    hypers = {name: torch.tensor(0.3 * most) for name, (most, _, _) in STRENGTHS.items()}
    hypers |= {"cutout_holes": torch.tensor(2.0), "cutout_length": torch.tensor(3.0)}
    drawn, (holes, length, centres, fill) = recorded(monkeypatch, images, hypers, n)
    for name, values in drawn.items():
        strength = hypers["translate" if name in "xy" else name].item()
        assert values.shape == (n,)
        assert values.abs().max() <= strength * (1 + 1e-5)
        assert abs(values.mean()) < 5 * strength / math.sqrt(3 * n)
        assert values.var().item() == pytest.approx(strength**2 / 3, rel=0.05)
    correlations = torch.corrcoef(torch.stack(list(drawn.values()))) - torch.eye(len(drawn))
    assert correlations.abs().max() < 5 / math.sqrt(n)
    assert (holes, length, fill) == (hypers["cutout_holes"], hypers["cutout_length"], images.mean)
    assert (centres.shape, round(centres.mean().item(), 2)) == ((n, 5, 2), 0.5)


def test_one_strength_for_all_is_the_same_strength_for_each():
    images = pictures(n=6)
    space = all_of(images)
    apply, x = Augmentation(space, images, flip=True), images.train[0]
    once = {name: torch.tensor(0.4 * domain.high) for name, domain in space.items()}
    once |= {name: once[name].round() for name in OPERATIONS["cutout"]}
    wanted = apply(once, x, generator())
    assert torch.equal(
        apply({name: t.expand(6) for name, t in once.items()}, x, generator()), wanted
    )
    for name in space:
        each = {key: t.expand(6).clone() for key, t in once.items()}
        each[name][2] = 1.0 if name in OPERATIONS["cutout"] else 0.1 * space[name].high
        changed = (apply(each, x, generator()) != wanted).flatten(1).any(1)
        assert changed.tolist() == [i == 2 for i in range(6)], name


@pytest.mark.parametrize("white", [255, 16])
def test_no_strength_changes_nothing_and_pixels_stay_in_range(white):
    images = pictures(white=white)
    space, x = all_of(images), images.train[0]
    none = {name: torch.tensor(0.0) for name in space}
    out = Augmentation(space, images)(none, x, generator())
    torch.testing.assert_close(out, x.float(), rtol=0, atol=1e-5 * 255)
    strong = {name: torch.tensor(0.9 * domain.high) for name, domain in space.items()} | {
        "cutout_holes": torch.tensor(0.0)
    }
    out = Augmentation(space, images)(strong, x, generator())
    assert out.min() >= 0
    assert out.max() <= white
    assert (out - x).abs().max() > 0.5 * white


def test_half_of_the_images_are_flipped():
    images = pictures()
    x = images.train[0][:1].expand(1000, -1, -1, -1)
    out = Augmentation(Space(), images, flip=True)({}, x, generator())
    flipped = (out == x.float().flip(-1)).flatten(1).all(1)
    assert bool((flipped | (out == x).flatten(1).all(1)).all())
    assert abs(flipped.float().mean() - 0.5) < 5 * 0.5 / math.sqrt(1000)


def test_holes_do_not_collapse_at_a_whole_number():
    """One hole stays one hole, and slightly less than one does too.

    Floor() would give none. The mean over perturbed draws is the value.
    """
    space = Space(cutout_holes=all_of(pictures())["cutout_holes"])
    u, draws = space.init(F64), generator()
    for start in (u, torch.nextafter(u, u - 1), u - 1e-6):
        assert [space.constrain(start, draws)["cutout_holes"].item() for _ in range(50)] == [
            1.0
        ] * 50
    perturbed = u + torch.randn(100_000, 1, generator=draws, dtype=F64)
    value, holes = (
        5 * torch.sigmoid(perturbed[:, 0]),
        space.constrain(perturbed, draws)["cutout_holes"],
    )
    assert abs(holes.mean() - value.mean()) < 5 / math.sqrt(100_000)
    none, expected = (holes == 0).double().mean(), (1 - value).clamp_min(0).mean()
    assert abs(none - expected) < 5 / math.sqrt(100_000)
    assert none < 0.3 < (value.floor() == 0).double().mean()
    assert holes.max() == 5  # floor() never comes to it


# --- the problem ---


def test_the_strengths_are_the_papers_where_the_images_are_its():
    space = all_of(pictures(height=32, width=32))
    assert {name: (d.low, d.high, d.init) for name, d in space.items()} == {
        **dict.fromkeys(("degrees", "shear"), (0.0, 45.0, 5.0)),
        **dict.fromkeys(("translate", "scale", "hue"), (0.0, 0.5, 0.05)),
        **dict.fromkeys(("brightness", "contrast", "saturation"), (0.0, 1.0, 0.05)),
        "cutout_holes": (0, 5, 1.0),
        "cutout_length": (2, 24, 4.0),
    }
    assert {d.scale for d in space.values()} == {1.0}
    smaller = all_of(pictures(1, 28, 28))
    assert (smaller["cutout_length"].low, smaller["cutout_length"].high) == (2, 24)
    assert not {"saturation", "hue"} & smaller.keys()
    assert all_of(pictures(1, 8, 8))["cutout_length"].high == 7
    assert [name for name, d in space.items() if not d.differentiable] == list(OPERATIONS["cutout"])


def test_augmentation_acts_in_training_alone_and_is_drawn_anew_in_every_pass():
    problem = small(
        dropout="bernoulli",
        space={name: {"init": 0.0, "frozen": True} for name in ("input_dropout", "dropout1")},
    )
    params, carry = problem.init(generator())
    batch = problem.data(CPU, generator()).train.next()
    hypers, draws = problem.space.constrain(problem.space.init()), generator()
    first, second = (
        problem.predict(hypers, params, carry, batch, train=True, generator=draws)[0]
        for _ in range(2)
    )
    assert not torch.allclose(first, second)
    clean = problem.predict(hypers, params, carry, batch, train=False, generator=None)[0]
    plain = small(operations=()).predict(hypers, params, carry, batch, train=False, generator=None)[
        0
    ]
    assert torch.equal(clean, plain)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_convolutional_problem_is_clean(channels):
    problem = augmented_images(
        pictures(channels, 8, 8), channels=[2, 3], hidden=5, flip=True, batch_size=4
    )
    able = {"delta_stn": solvers.delta_stn(), "stn": solvers.stn()}
    report = bilevel.check_problem(problem, solvers=able | {"implicit": solvers.implicit_cg()})
    assert report.findings == []
    assert report.tuned_by == list(able)
    assert "`input_dropout` is sampled" in report.refused_by["implicit"]


@all_solvers
def test_no_step_waits_for_the_device(make):
    problem = augmented_images(
        pictures(3, 8, 8), channels=[2, 3], hidden=5, batch_size=4, flip=True
    )
    solver = ready(problem, make(inner_steps=1))
    solver.step(limit=1)
    with no_waiting():
        solver.step()


def test_a_step_moves_the_strengths_and_a_second_one_from_the_same_state_alike():
    problem = augmented_images(pictures(1, 8, 8), channels=[2, 3], hidden=5, batch_size=4)
    ran = []
    for _ in range(2):
        solver = ready(problem, solvers.delta_stn(inner_steps=1))
        start = solver.core.search.u.clone()
        for _ in range(2):
            solver.step()
        ran.append(solver.core.search.u.detach())
    assert torch.equal(*ran)
    assert bool((ran[0] != start).all())


def test_networks_follow_the_images():
    assert SimpleCNN().hidden.weight.shape == (1568, 1568)  # as in the paper's code
    network = SimpleCNN(2, 3, None, (3, 9, 14), 4)
    assert network(torch.zeros(2, 3, 9, 14)).shape == (2, 4)
    rates = torch.tensor([0.0, 1 - 1e-6, 0.0, 0.0])
    zeroed = []

    def drop(site, x):
        zeroed.append(tuple(x.shape))
        return x * (rates[site] < 0.5)

    network(torch.zeros(2, 3, 9, 14), drop)
    assert zeroed == [
        (2, 3, 9, 14),
        (2, 2, 1, 1),
        (2, 3, 1, 1),
        (2, 18),
    ]  # whole channels after convolutions


def test_fewer_images_are_the_first_ones():
    images = pictures()
    few = labelled_images.first_examples(images, 3, 2)
    assert torch.equal(few.train[0], images.train[0][:3])
    assert (len(few.valid[1]), len(few.test[1])) == (2, 8)
    with pytest.raises(
        BilevelError, match="train_size=13 must be between 1 and 12; choose at most 12"
    ):
        labelled_images.first_examples(images, 13)


# --- refusals ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scale": {"high": 1.5}},
            r"space\.scale goes from 0 to 1.5 and must stay between 0 and 0.9 for images of 9 × 12",
        ),
        ({"degrees": {"low": -45.0}}, r"space\.degrees goes from -45 to 45"),
        ({"hue": {"high": 0.6}}, r"space\.hue goes from 0 to 0.6"),
        (
            {"cutout_length": {"high": 10}},
            r"space\.cutout_length goes from 0 to 10 and must stay between 0 and 9 for",
        ),
        ({"cutout_holes": {"high": 101}}, r"space\.cutout_holes goes from 0 to 101"),
        ({"degrees": {"init": 50.0}}, r"`degrees`: init=50.0 lies outside \(0, 45\)"),
        ({"saturation": {"low": 0.0, "init": 0.0}}, r"`saturation`: init=0.0 lies on the edge"),
    ],
)
def test_strengths_that_mean_nothing(change, message):
    with pytest.raises(BilevelError, match=message):
        small(operations=["affine", "colour", "cutout"], space=change)


def test_images_that_an_operation_cannot_work_on():
    with pytest.raises(
        BilevelError, match="would cover most of 3 × 3 pixels; remove cutout from augment"
    ):
        small(pictures(1, 3, 3), ["cutout"])
    with pytest.raises(
        BilevelError,
        match="needs images of 1 or 3 channels, and these have 2; remove colour from augment",
    ):
        small(pictures(2), ["colour"])
    with pytest.raises(
        BilevelError,
        match=r"augment='colours' is unknown \(did you mean `colour`\?\); choose affine, colour or",
    ):
        small(operations=["colours"])
    with pytest.raises(
        BilevelError,
        match=r"augment='affine' must be a list of operations; choose from augment=\[affine,",
    ):
        small(operations="affine")
    for ours in (image_transforms.hue, image_transforms.saturation):
        with pytest.raises(
            BilevelError, match="needs images with red, green and blue, and these have 1 channel"
        ):
            ours(torch.zeros(2, 1, 3, 3), torch.tensor(0.1))
    with pytest.raises(BilevelError, match="hyperparameter `hue` is unknown"):
        small(pictures(1), ["colour"], space={"hue": {"init": 0.1}})


def test_cutout_is_refused_by_solvers_that_need_a_derivative_and_the_rest_is_not():
    with pytest.raises(Refused, match="`cutout_holes` is sampled or rounded and has none"):
        check_space("Implicit", all_of(pictures()), {Need.INNER_DERIVATIVE}, ())
    check_space(
        "Implicit",
        Space(**strengths(pictures(), ["affine", "colour"])),
        {Need.INNER_DERIVATIVE},
        (),
    )
    frozen = all_of(
        pictures(), cutout_holes={"frozen": True}, cutout_length={"frozen": True, "init": 3}
    )
    check_space("Implicit", frozen, {Need.INNER_DERIVATIVE}, ())
