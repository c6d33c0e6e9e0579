"""Tests of classification of images: what is tuned, augmentation per example, and errors."""

import re

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from bilevel import Space, problems, solvers
from bilevel.cli import targets
from bilevel.cli.app import add_resolvers, main
from bilevel.problems import MLP
from bilevel.problems.classification import image_transforms
from bilevel.problems.classification.augmentation import OPERATIONS, Augmentation, strengths
from tests.support.image_data import generator, random_images, refused
from tests.support.solver_cases import ready

CPU = torch.device("cpu")

EXPERIMENTS = {"mnist_mlp": 3, "fashion_cnn": 6, "cifar_alexnet": 18, "cifar_vgg16": 26}


def test_holes_are_filled_with_the_mean_of_each_channel():
    images = random_images()._replace(mean=(10.0, 20.0, 30.0))
    space = augment_space(images)
    hypers = {name: torch.tensor(0.0) for name in space} | {
        "cutout_holes": torch.tensor(5.0),
        "cutout_length": torch.tensor(20.0),
    }
    out = Augmentation(space, images)(hypers, images.train[0], generator())
    changed = (out - images.train[0]).abs().amax(1) > 1e-2
    assert 0.3 < changed.float().mean() < 1
    torch.testing.assert_close(
        out.permute(0, 2, 3, 1)[changed],
        torch.tensor([10.0, 20.0, 30.0]).expand(int(changed.sum()), 3),
    )


def augment_space(images):
    return problems.Classification(
        lambda: MLP([3 * 32 * 32, 10]), images, sites=1, augment=list(OPERATIONS), batch_size=4
    ).space


@pytest.mark.parametrize(
    ("network", "data", "augmented", "count"),
    [
        ("vgg16", (3, 32), list(OPERATIONS), 26),
        ("alexnet", (3, 32), list(OPERATIONS), 18),
        ("simple_cnn", (1, 28), ["cutout"], 6),
        ("mlp", (1, 28), [], 3),
    ],
)
def test_as_much_is_tuned_as_in_the_paper(network, data, augmented, count):
    problem = problems.images(
        random_images(*data),
        network,
        width=1 / 16,
        augment=augmented,
        batch_size=4,
        flip=data[0] == 3,
    )
    assert len(problem.space) == problem.space.numel == count
    names = [
        name for operation in OPERATIONS for name in OPERATIONS[operation] if operation in augmented
    ]
    sites = count - len(names)
    assert list(problem.space) == [
        "input_dropout",
        *(f"dropout{i}" for i in range(1, sites)),
        *names,
    ]
    assert {(d.low, d.high, d.init) for d in list(problem.space.values())[:sites]} == {
        (0.0, 0.95, 0.05)
    }
    if data[0] == 3:
        assert (problem.space["cutout_length"].high, problem.space["hue"].high) == (24, 0.5)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiments_are_the_papers(experiment):
    count = EXPERIMENTS[experiment]
    add_resolvers()
    with initialize_config_module("bilevel.conf", version_base="1.3"):
        full, short = (
            compose("config", overrides=[f"+experiment={experiment}{kind}"])
            for kind in ("", "_short")
        )
        resnet = compose("config", overrides=["+experiment=cifar_resnet18"])
    for config in (full, short, resnet):
        for node in ("problem", "solver", "runner"):
            targets.check(OmegaConf.to_container(config[node], resolve=True), node)
    problem, solver = full.problem, full.solver
    cifar = experiment.startswith("cifar")
    data = problem if experiment == "mnist_mlp" else problem.data
    assert (data.valid_fraction, problem.batch_size) == (0.2 if cifar else 0.15, 128)
    assert (full.runner.epochs, full.runner.get("warmup_epochs", 5)) == (
        500 if count == 3 else 200,
        5,
    )
    assert (solver.inner_optimizer.lr, solver.inner_optimizer.momentum) == (
        0.03 if cifar else 0.01,
        0.9,
    )
    assert solver.response_optimizer == solver.inner_optimizer
    assert (solver.outer_optimizer.lr, solver.scale_optimizer.lr, solver.entropy_weight) == (
        0.01,
        0.01,
        0.001,
    )
    assert (solver.inner_steps, solver.outer_steps) == (5, 1)
    if cifar:
        assert (list(solver.inner_scheduler.milestones), solver.inner_scheduler.gamma) == (
            [60, 120, 180],
            0.2,
        )
        assert (data.normalization, problem.flip, list(problem.augment)) == (
            "paper",
            True,
            list(OPERATIONS),
        )
        assert resnet.solver == solver
        assert (resnet.problem.network, resnet.problem.norm) == ("resnet18", None)
    if experiment != "mnist_mlp":
        node = OmegaConf.to_container(problem, resolve=True)
        given = {name: node[name] for name in ("network", "norm", "augment", "flip")}
        made = problems.images(
            random_images(*((3, 32) if cifar else (1, 28))), width=1 / 16, batch_size=4, **given
        )
        assert len(made.space) == count
    assert short.runner.epochs <= 12


def test_cifar_in_one_line_has_another_network_and_norm():
    with initialize_config_module("bilevel.conf", version_base="1.3"):
        config = compose(
            "config",
            overrides=["problem=cifar10", "problem.network=resnet18", "problem.norm=group"],
        )
    node = OmegaConf.to_container(config.problem, resolve=False)
    made = problems.images(
        random_images(), node["network"], node["norm"], width=1 / 16, batch_size=4
    )
    assert any(isinstance(m, torch.nn.GroupNorm) for m in made._module.modules())
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in made._module.modules())


def test_a_round_of_delta_stn_moves_all_26():
    problem = problems.images(
        random_images(n=16),
        "vgg16",
        width=1 / 32,
        augment=list(OPERATIONS),
        flip=True,
        batch_size=8,
        norm="group",
    )
    solver = ready(problem, solvers.delta_stn(inner_steps=2))
    start = solver.core.search.u.clone()
    for _ in range(2):
        solver.step()
    moved = solver.core.search.u.detach() != start
    assert moved.all(), [
        name for name, m in zip(problem.space, moved.tolist(), strict=True) if not m
    ]


@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 32)])
def test_at_one_strength_per_example_each_image_is_as_by_itself(channels, side):
    """The test records the draws of a batch, and augments each image alone with its own draws."""
    images = random_images(channels, side)
    space = strengths(images, list(OPERATIONS))
    x, n = images.train[0], 12
    hypers = {
        name: 0.2 * domain.high * torch.rand(n, generator=generator(5))
        for name, domain in space.items()
    }
    hypers["cutout_holes"], hypers["cutout_length"] = torch.arange(n) % 4.0, 2.0 + torch.arange(n)
    calls, real = (
        [],
        {
            name: getattr(image_transforms, name)
            for name in ("affine", "brightness", "contrast", "saturation", "hue", "cutout")
        },
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, function in real.items():
            patch.setattr(
                image_transforms,
                name,
                lambda x, *a, f=function, **k: (calls.append((f, a, k)), f(x, *a, **k))[1],
            )
        together = Augmentation(Space(**space), images)(hypers, x, generator())
    for i in range(n):
        one = x[i : i + 1].float()
        for function, arguments, options in calls:
            own = [
                a[i : i + 1] if isinstance(a, torch.Tensor) and a.ndim and len(a) == n else a
                for a in arguments
            ]
            one = function(one, *own, **options)
        torch.testing.assert_close(one[0], together[i], rtol=0, atol=1e-3)


def test_other_bad_input_is_one_sentence(tmp_path, capsys, monkeypatch):
    with refused(
        r"AlexNet halves an image of 8 × 8 pixels 4 times, and nothing is left; give images of"
    ):
        problems.images(random_images(side=8), "alexnet")
    with refused(r"network='vgg61' is unknown \(did you mean .*`vgg16`"):
        problems.images(random_images(), "vgg61")
    with refused(r"data='cifar10' must hold images; give .* data\._target_="):
        problems.images("cifar10")
    with refused("train_size=13 must be between 1 and 12"):
        problems.images(random_images(), train_size=13)
    with refused("batch_size=128 must be between 1 and the 12 examples of the train split"):
        problems.images(random_images()).data(CPU, generator())
    with refused(
        r"space\.hue goes from 0 to 0.7 and must stay between 0 and 0.5 for images of 32 × 32"
    ):
        problems.images(random_images(), augment=["colour"], space={"hue": {"high": 0.7}})
    monkeypatch.chdir(tmp_path)
    assert main(["problem=cifar10", "data.download=false", "logger=jsonl"]) == 1
    shown = capsys.readouterr().err
    assert (
        re.fullmatch(
            r"bilevel: `problem`: .*CIFAR10 is not in data/cifar-10-batches-py and .*\n",
            shown,
        )
        or shown
    )
