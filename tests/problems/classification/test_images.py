"""Tests of image data and of the problem on it: splits, loading, tuning and errors."""

import hashlib
import io
import os
import pickle
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from PIL import Image

from bilevel import BilevelError, Space, problems, solvers
from bilevel.checks.check_problem import ProblemWarning
from bilevel.cli import targets
from bilevel.cli.app import add_resolvers, main
from bilevel.data.loader_stream import LoaderStream
from bilevel.problems import MLP, Classification, HyperCleaning, LossWeights
from bilevel.problems.classification import image_transforms
from bilevel.problems.classification.augmentation import OPERATIONS, Augmentation, strengths
from bilevel.problems.datasets import (
    free_memory,
    image_files,
    image_loaders,
    jpeg_archive,
    labelled_images,
    standard_images,
)
from bilevel.problems.datasets.image_files import ImageFileDataset, ImageFiles, UnreadableImage
from bilevel.problems.datasets.image_folder import load_image_folder
from bilevel.problems.datasets.labelled_images import Images
from bilevel.problems.datasets.standardize import Standardize
from bilevel.problems.datasets.validation_split import split_indices
from bilevel.run.evaluation import evaluate
from bilevel.solver import Solution
from tests.support.solver_cases import ready

CPU = torch.device("cpu")
EXPERIMENTS = {"mnist_mlp": 3, "fashion_cnn": 6, "cifar_alexnet": 18, "cifar_vgg16": 26}
DATA = Path(
    os.environ.get("BILEVEL_TEST_DATA", Path(__file__).parents[3] / ".." / "shared" / "data")
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def refused(message):
    return pytest.raises(BilevelError, match=message)


def pixels(n, *shape, seed=0):
    return torch.randint(0, 256, (n, *shape), generator=generator(seed), dtype=torch.uint8)


def random_images(channels=3, side=32, n=12, **more):
    def part(n, seed):
        return pixels(n, channels, side, side, seed=seed), torch.arange(n) % 10

    return Images(
        part(n, 0), part(8, 1), part(8, 2), mean=100.0, std=50.0, white=255.0, classes=10, **more
    )


# --- splits ---


def test_the_papers_split_is_the_tail_in_its_order():
    labels = torch.arange(60_000) % 10
    kept, aside = split_indices(labels, 0.15)
    assert torch.equal(kept, torch.arange(51_000))
    assert torch.equal(aside, torch.arange(51_000, 60_000))
    kept, aside = split_indices(labels[:50_000], 0.2)
    assert (len(kept), len(aside)) == (40_000, 10_000)


@pytest.mark.parametrize("fraction", [0.1, 0.15, 1 / 3, 0.4])
@pytest.mark.parametrize("how", ["random", "stratified"])
def test_seeded_splits_take_every_example_once_in_exact_numbers(how, fraction):
    counts = [3, 50, 101, 2, 7, 837]
    labels = torch.arange(6).repeat_interleave(torch.tensor(counts))
    kept, aside = split_indices(labels, fraction, how, seed=3)
    assert len(aside) == round(fraction * 1000)
    assert sorted([*kept.tolist(), *aside.tolist()]) == list(range(1000))
    again, other = (
        split_indices(labels, fraction, how, seed=3),
        split_indices(labels, fraction, how, seed=6),
    )
    assert torch.equal(again[1], aside)
    assert not torch.equal(other[1], aside)
    if how == "stratified":
        for count, taken in zip(counts, labels[aside].bincount(minlength=6).tolist(), strict=True):
            assert abs(taken - fraction * count) <= 1
            assert taken < count
        first = labels[kept[:200]].bincount(
            minlength=6
        )  # in random order: the first ones are a sample
        assert first[5] < 200
        assert (first > 0).sum() >= 3
    else:
        shares = labels[aside].bincount(minlength=6) / torch.tensor(counts)
        assert shares.max() - shares.min() > 0.015  # what stratified is for


def test_a_class_of_one_image_keeps_it_where_another_has_more():
    labels = torch.tensor([0, 1, 1, 1])
    for seed in range(4):
        assert labels[split_indices(labels, 0.5, "stratified", seed)[1]].tolist() == [1, 1]


def test_a_split_that_cannot_be_made_is_one_sentence():
    sorted_, mixed = torch.arange(4).repeat_interleave(25), torch.arange(100) % 4
    for labels, options, message in (
        (
            mixed,
            {"split": "tial"},
            r"split='tial' is unknown \(did you mean `tail`\?\); choose tail, random or stratified",
        ),
        (mixed, {"fraction": 1.0}, "valid_fraction=1.0 must be between 0 and 1"),
        (mixed, {"fraction": 0.001}, "valid_fraction=0.001 leaves one part of 100 images empty"),
        (
            sorted_,
            {"fraction": 0.3},
            "leaves no training image of class 3 with split=tail; set split=stratified",
        ),
        (
            sorted_,
            {},
            "split=tail sets 20 images aside that are all of class 3, .* set split=stratified",
        ),
        (
            torch.tensor([0, 0, 0, 1]),
            {"split": "stratified", "fraction": 0.75},
            "add images to that class",
        ),
    ):
        with refused(message):
            split_indices(labels, **{"fraction": 0.2, **options})


# --- per channel ---


def test_channels_have_moments_of_their_own():
    x = pixels(50, 3, 4, 5)
    x[:, 2] //= 3
    mean, std = labelled_images.channel_moments(x)
    torch.testing.assert_close(torch.tensor(mean), x.float().mean((0, 2, 3)))
    torch.testing.assert_close(torch.tensor(std), x.float().std((0, 2, 3), correction=0))
    seen = Standardize(mean, std)(x)
    torch.testing.assert_close(seen.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.std((0, 2, 3), correction=0), torch.ones(3))
    torch.testing.assert_close(Standardize(mean, std).inverse(seen), x.float(), atol=1e-3, rtol=0)


def test_every_problem_on_images_takes_moments_per_channel():
    images = random_images(side=4)._replace(mean=(100.0, 50.0, 10.0), std=(1.0, 2.0, 4.0))
    network, wanted = (
        lambda: MLP([48, 10]),
        (images.valid[0] - torch.tensor([100.0, 50.0, 10.0]).view(3, 1, 1)),
    )
    wanted = wanted / torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    for problem in (
        Classification(network, images, sites=1, batch_size=4),
        HyperCleaning(network, images, rate=0.0),
        LossWeights(network, images, ratio=1.0, batch_size=4),
    ):
        (x,), _ = problem.inputs({}, images.valid, train=False, generator=None)
        torch.testing.assert_close(x, wanted)
    torch.testing.assert_close(
        problems.Distillation(network, images).standardize(images.valid[0]), wanted
    )


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


# --- what is tuned ---


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


# --- augmentation: fixed strengths, image by image ---


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


# --- folders, and both ways to load ---


@pytest.fixture
def pngs(tmp_path):
    """Write three classes of 20, 12 and 8 color images of 10 × 10 pixels, without loss."""
    root = tmp_path / "animals"
    for label, (name, count) in enumerate({"ant": 20, "bee": 12, "cat": 8}.items()):
        save(root / name, pixels(count, 3, 10, 10, seed=label))
    return root


def save(place, x, suffix="png"):
    place.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(x):
        Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(place / f"{i:03}.{suffix}")


def test_a_folder_is_split_by_class_and_read_bit_for_bit(pngs):
    images = load_image_folder(str(pngs), valid_fraction=0.25, test_fraction=0.2)
    assert isinstance(images, Images)
    counts = [labels.bincount(minlength=3).tolist() for _, labels in images[:3]]
    assert counts == [[12, 7, 5], [4, 2, 2], [4, 3, 1]] or [sum(c) for c in counts] == [24, 8, 8]
    assert [sum(column) for column in zip(*counts, strict=True)] == [20, 12, 8]
    theirs = torchvision.datasets.ImageFolder(str(pngs))
    known = {
        bytes(np.asarray(image).transpose(2, 0, 1).tobytes()): label for image, label in theirs
    }
    read = [
        (bytes(x.numpy().tobytes()), int(y))
        for part in images[:3]
        for x, y in zip(*part, strict=True)
    ]
    assert dict(read) == known
    assert len(read) == len(known) == 40
    assert images.mean == labelled_images.channel_moments(images.train[0])[0]
    assert (images.classes, images.shape, images.brightest) == (3, (3, 10, 10), 255.0)
    assert not torch.equal(
        load_image_folder(str(pngs), split_seed=1).train[1], load_image_folder(str(pngs)).train[1]
    )


def test_folders_of_their_own_are_taken_as_they_are(pngs, tmp_path):
    parted = tmp_path / "parted"
    for part in ("train", "val", "test"):
        shutil.copytree(pngs, parted / part)
    images = load_image_folder(str(parted))
    assert [len(labels) for _, labels in images[:3]] == [40, 40, 40]
    assert len(set(load_image_folder(str(parted)).train[1][:12].tolist())) == 3  # in random order
    shutil.rmtree(parted / "val")
    shutil.rmtree(parted / "test")
    images = load_image_folder(str(parted), valid_fraction=0.2)
    assert ([len(images.train[1]), len(images.valid[1])], images.test) == ([32, 8], None)
    assert load_image_folder(str(pngs), test_fraction=0.0).test is None


def test_images_are_brought_to_a_size(tmp_path):
    save(tmp_path / "wide", pixels(4, 3, 12, 30))
    save(tmp_path / "tall", pixels(4, 3, 20, 15))
    with refused(r"has \d+ × \d+ pixels of 3 channels, and .* set size=PIXELS"):
        load_image_folder(str(tmp_path))
    images = load_image_folder(str(tmp_path), size=8, test_fraction=0.0, valid_fraction=0.25)
    assert images.shape == (3, 8, 8)
    import torchvision.transforms.functional as TF

    with Image.open(tmp_path / "wide" / "000.png") as image:
        wanted = TF.pil_to_tensor(TF.center_crop(TF.resize(image, 8), 8))
    assert any(torch.equal(x, wanted) for part in images[:2] for x in part[0])


def trained(images, **options):
    """Run Δ-STN for two rounds, and evaluate its weights."""
    make = partial(MLP, [300, 6, 3])
    problem = Classification(
        make,
        images,
        sites=2,
        augment=["affine", "colour"],
        batch_size=6,
        weight_decay=False,
        **options,
    )
    solver = ready(problem, solvers.delta_stn(inner_steps=2))
    for _ in range(2):
        solver.step()
    return problem, solver


@pytest.mark.parametrize("workers", [0, 1])
def test_both_ways_of_loading_evaluate_alike_and_train_to_the_same_kind_of_result(pngs, workers):
    options = {"split_seed": 2, "valid_fraction": 0.25, "test_fraction": 0.2, "workers": workers}
    memory, files = (
        load_image_folder(str(pngs), in_memory=choice, **options) for choice in (True, False)
    )
    assert isinstance(memory, Images)
    assert isinstance(files, ImageFiles)
    assert (memory.mean, memory.std) == (files.mean, files.std)  # so few that all are looked at
    (one, first), (other, second) = trained(memory), trained(files)
    assert isinstance(second.core.data.train, LoaderStream)
    assert (
        (first.core.data.train.size, first.core.data.valid.size)
        == (second.core.data.train.size, second.core.data.valid.size)
        == (24, 8)
    )
    assert second.core.data.train.next()[0].dtype == torch.uint8
    solution = first.solution()
    for name in ("train", "valid", "test"):
        result = [
            evaluate(one, Solution(*solution), getattr(solver.core.data, name))
            for solver in (first, second)
        ]
        assert result[0] == pytest.approx(result[1], rel=1e-6)
    weights = [
        torch.cat([p.detach().flatten() for p in solver.solution().params.values()])
        for solver in (first, second)
    ]
    assert not torch.equal(*weights)  # another order of the same images
    assert torch.corrcoef(torch.stack(weights))[0, 1] > 0.95
    assert second.inner_count == first.inner_count == 4
    assert other.pictures(second.solution().hypers, generator())["augmented"].shape == (
        32,
        3,
        10,
        10,
    )


def test_images_that_do_not_fit_on_the_device_are_moved_batch_by_batch(monkeypatch):
    images = random_images(side=4)
    monkeypatch.setattr(free_memory, "free_bytes", lambda device: 1000)
    tensors = image_loaders.tensors_or_loaders(images[:3], 4, CPU)
    assert tensors[0] is images.train  # on the CPU they are where they are
    elsewhere = torch.device("cuda", 0)
    with pytest.warns(
        ProblemWarning,
        match=r"the images take 1\.5 KiB, .* 1000 bytes .* on cuda:0, .* lower problem\.train_size",
    ):
        train, valid, test = image_loaders.tensors_or_loaders(images[:3], 4, elsewhere)
    stream = LoaderStream(valid, generator())
    torch.testing.assert_close(torch.cat([x for x, _ in stream.once()]), images.valid[0])
    batches = [stream.next() for _ in range(2)]
    assert sorted(map(bytes, torch.cat([x for x, _ in batches]).numpy())) == sorted(
        map(bytes, images.valid[0].numpy())
    )
    assert (len(train), len(test)) == (3, 2)
    monkeypatch.setattr(free_memory, "free_bytes", lambda device: 2**30)
    assert image_loaders.tensors_or_loaders(images[:3], 4, elsewhere)[0] is images.train


def test_folders_are_decoded_where_they_fit(pngs, monkeypatch):
    nbytes = 40 * 300
    monkeypatch.setattr(free_memory, "free_bytes", lambda device: 2 * nbytes)
    assert isinstance(load_image_folder(str(pngs)), Images)
    monkeypatch.setattr(free_memory, "free_bytes", lambda device: 2 * nbytes - 1)
    assert isinstance(load_image_folder(str(pngs)), ImageFiles)
    with refused(
        r"in_memory=true needs 11\.7 KiB for the images of .*animals, .* lower size, or set"
    ):
        load_image_folder(str(pngs), in_memory=True)
    with refused("in_memory='yes' is unknown; choose auto, true or false"):
        load_image_folder(str(pngs), in_memory="yes")


def test_free_memory_of_the_host_is_known_on_linux():
    free = free_memory.free_bytes(CPU)
    assert free is None if not Path("/proc/meminfo").exists() else 2**20 < free < 2**50


def test_a_containers_limit_counts_less_what_it_uses_and_cached_files_as_free(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(free_memory, "CGROUP", tmp_path)
    for name, text in {
        "max": "5000\n",
        "current": "4000\n",
        "stat": "anon 3000\ninactive_file 700\n",
    }.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_memory.free_bytes(CPU) == 1700
    (tmp_path / "memory.max").write_text("max\n")  # no limit
    assert free_memory.free_bytes(CPU) != 1700


def test_a_loader_is_refused_what_it_cannot_do(pngs):
    files = load_image_folder(str(pngs), in_memory=False, workers=0)
    make = partial(MLP, [300, 3])
    with refused("batch_size=null needs all images in memory"):
        Classification(make, files, sites=1, batch_size=None).data(CPU, generator())
    with refused(r"batch_size=27 must be between 1 and 26; .* the train split"):
        Classification(make, files, sites=1, batch_size=27).data(CPU, generator())
    few = labelled_images.first_examples(files, 10, 4)
    assert (len(few.train), len(few.valid)) == (10, 4)
    with refused("train_size=27 must be between 1 and 26"):
        labelled_images.first_examples(files, 27)


# --- bad folders ---


def test_a_bad_folder_is_one_sentence(pngs, tmp_path):
    with refused(r"path='.*nowhere' is not a folder; give a folder with one subfolder per class"):
        load_image_folder(str(tmp_path / "nowhere"))
    with refused(r"ant has no subfolder; put the images of each class into one"):
        load_image_folder(str(pngs / "ant"))
    (pngs / "dog").mkdir()
    with refused(r"dog is a class without an image \(\.bmp, .*add images, or delete the folder"):
        load_image_folder(str(pngs))
    (pngs / "dog").rmdir()
    with refused(r"channels=2 is not possible; choose 1 \(grey\), 3"):
        load_image_folder(str(pngs), channels=2)
    with refused("size=0 must be a whole number of at least 1; choose a number of pixels"):
        load_image_folder(str(pngs), size=0)
    with refused(r"test_fraction=1.0 must be between 0 and 1"):
        load_image_folder(str(pngs), test_fraction=1.0)
    with refused(r"size=1000000 needs 9,313\.2 GiB to read an image"):
        load_image_folder(str(pngs), size=10**6)
    with refused("workers=-1 must be a whole number of at least 0"):
        load_image_folder(str(pngs), workers=-1)
    for part in ("train", "test"):
        shutil.copytree(pngs, tmp_path / "parted" / part)
    shutil.rmtree(tmp_path / "parted" / "test" / "bee")
    with refused(r"train has 3 classes and .*test has 2, and `bee` is only in train; give all"):
        load_image_folder(str(tmp_path / "parted"))


def test_what_stands_beside_the_parts_is_no_class(pngs, tmp_path):
    parted = tmp_path / "parted"
    for part in ("train", "val", "notes"):
        shutil.copytree(pngs, parted / part)
    with refused(
        r"holds train, with one folder per class, and notes, which is not one of val, valid"
    ):
        load_image_folder(str(parted))
    (parted / "notes").rename(parted / "valid")
    with refused(r"holds validation images in val and in valid; keep one"):
        load_image_folder(str(parted))
    shutil.copytree(pngs / "ant", pngs / "train")  # a class that is called so
    assert load_image_folder(str(pngs)).classes == 4


@pytest.mark.parametrize(
    ("link", "target"), [("ant/up", ".."), ("bee/in", "../bee"), ("bee/other", "../bee/more")]
)
def test_a_folder_that_would_be_read_twice_is_one_sentence(pngs, link, target):
    (pngs / "bee" / "more").mkdir()
    (pngs / link).symlink_to(target)
    with refused(r"is the same folder as \S+, so its images would count twice; delete the link"):
        load_image_folder(str(pngs))


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda path: path.write_bytes(path.read_bytes()[:120]),
            r"damaged or not an image \(.+\); repair or delete it",
        ),
        (
            lambda path: path.write_text("no image"),
            r"damaged or not an image \(cannot identify image file it\)",
        ),
        (
            lambda path: Image.open(path).convert("L").save(path),
            r"is grey, and .* is colored; set channels=3 or channels=1",
        ),
        (
            lambda path: Image.open(path).resize((9, 10)).save(path),
            r"10 × 9 pixels of 3 channels, and .* 10 × 10 pixels of 3 ch",
        ),
        (
            lambda path: Image.fromarray(np.zeros((10, 10), np.uint16)).save(path),
            r"mode I;16, and only modes with one byte per channel can be read",
        ),
    ],
)
def test_a_bad_image_is_named(pngs, harm, message, in_memory):
    path = pngs / "ant" / "019.png"
    harm(path)

    def run():
        data = trained(load_image_folder(str(pngs), in_memory=in_memory, workers=0))[1].data
        for part in (data.train, data.valid, data.test):
            list(part.once())

    with refused(message) as caught:
        run()
    assert caught.type is UnreadableImage
    assert "019.png" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_worker_of_a_loader_says_it_in_one_sentence_too(pngs):
    path = pngs / "bee" / "003.png"
    files = ImageFileDataset(
        [str(p) for p in sorted(pngs.glob("bee/*"))], torch.zeros(12, dtype=torch.long), workers=1
    )
    path.write_text("no image")
    with refused(
        r"^/\S+003\.png is damaged or not an image \(cannot identify image file it\); repair or de"
    ):
        list(image_loaders.tensors_or_loaders((files, files, None), 4, CPU)[0])


def test_transparency_is_dropped_and_grey_converted(tmp_path):
    x = pixels(1, 3, 4, 4)[0].permute(1, 2, 0).numpy()
    for kind in ("one", "two"):
        (tmp_path / kind).mkdir()
        for i in range(3):
            Image.fromarray(x).convert("RGBA").save(tmp_path / kind / f"{i}.png")
        Image.fromarray(x).convert("P").save(
            tmp_path / kind / "palette.png", transparency=b"\x00\x10"
        )
    images = load_image_folder(str(tmp_path), test_fraction=0.0, valid_fraction=0.25)
    assert (
        sum(
            bool((image == torch.from_numpy(x).permute(2, 0, 1)).all())
            for part in images[:2]
            for image in part[0]
        )
        >= 6
    )
    assert load_image_folder(str(tmp_path), channels=1, test_fraction=0.0).shape == (1, 4, 4)
    Image.fromarray(x).convert("L").save(tmp_path / "one" / "grey.png")
    assert load_image_folder(str(tmp_path), channels=3, test_fraction=0.0).shape == (3, 4, 4)
    assert image_files.MODES["L"] == 1


# --- archives of JPEG files ---


def jpegs(n, side=32):
    files = []
    for image in pixels(n, 3, side, side):
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG")
        files.append(np.frombuffer(buffer.getvalue(), np.uint8))
    return files


def archived(path, files, **changes):
    offsets = np.cumsum([0, *map(len, files)])
    arrays = {
        "bytes": np.concatenate(files),
        "offsets": offsets,
        "labels": np.arange(len(files), dtype=np.uint8) % 10,
    }
    parts = {
        f"{part}_{name}": array for part in ("train", "test") for name, array in arrays.items()
    } | changes
    np.savez(path, **{name: array for name, array in parts.items() if array is not None})
    return str(path)


def test_an_archive_is_decoded_as_pillow_does(tmp_path):
    files = jpegs(20)
    images = standard_images.load_cifar10(archive=archived(tmp_path / "a.npz", files))
    assert [len(labels) for _, labels in images[:3]] == [16, 4, 20]
    for file, image in zip(files, images.test[0], strict=True):
        assert np.array_equal(
            np.asarray(Image.open(io.BytesIO(file.tobytes()))).transpose(2, 0, 1), image.numpy()
        )
    assert torch.equal(torch.cat([images.train[0], images.valid[0]]), images.test[0])
    assert (images.mean, images.std) == ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
    own = standard_images.load_cifar10(
        archive=str(tmp_path / "a.npz"), normalization="own", split="stratified"
    )
    assert own.mean == labelled_images.channel_moments(own.train[0])[0]
    with refused(
        r"normalization='papers' is unknown \(did you mean `paper`\?\); choose paper or own"
    ):
        standard_images.load_cifar10(archive=str(tmp_path / "a.npz"), normalization="papers")


def test_the_shared_archive_is_cifar10(tmp_path):
    source = DATA / "cifar10_jpeg.npz"
    if not source.exists():
        pytest.skip(
            "no CIFAR-10 archive: set BILEVEL_TEST_DATA to a folder that holds cifar10_jpeg.npz"
        )
    with np.load(source) as archive:
        part = {f"{kind}_labels": archive[f"{kind}_labels"] for kind in ("train", "test")}
        assert [np.bincount(labels).tolist() for labels in part.values()] == [
            [5000] * 10,
            [1000] * 10,
        ]
        cut = {}
        for kind, n in (("train", 500), ("test", 100)):
            offsets = archive[f"{kind}_offsets"][: n + 1]
            cut |= {
                f"{kind}_offsets": offsets,
                f"{kind}_bytes": archive[f"{kind}_bytes"][: offsets[-1]],
            }
            cut[f"{kind}_labels"] = part[f"{kind}_labels"][:n]
    np.savez(tmp_path / "few.npz", **cut)
    images = standard_images.load_cifar10(archive=str(tmp_path / "few.npz"))
    x = Standardize(images.mean, images.std)(images.train[0])
    assert (len(images.train[1]), len(images.valid[1]), len(images.test[1]), images.shape) == (
        400,
        100,
        100,
        (3, 32, 32),
    )
    assert x.mean((0, 2, 3)).abs().max() < 0.1  # the paper's constants are those of the whole set
    assert (x.std((0, 2, 3)) - 1).abs().max() < 0.1


def test_a_bad_archive_is_one_sentence(tmp_path):
    files, path = jpegs(6), tmp_path / "a.npz"
    offsets = np.cumsum([0, *map(len, files)])
    broken = [*files[:4], files[4][:40], files[5]]
    for changes, message in (
        (
            {"test_labels": None},
            "lacks the array test_labels; write test_bytes, test_offsets, test_labels",
        ),
        (
            {"train_offsets": offsets[:-1]},
            "train_offsets do not divide .* bytes into 6 files; give n \\+ 1 rising numbers",
        ),
        ({"train_offsets": offsets + 5}, "train_offsets do not divide"),
        ({"train_offsets": offsets[::-1].copy()}, "train_offsets do not divide"),
        (
            {"train_bytes": np.concatenate([*files[:5], files[5] * 0])},
            "train image 5 is damaged or not a JPEG file .*; copy the archive",
        ),
        (
            {"test_labels": np.arange(5, 11)},
            r"the test images have class 6, and the training images do not",
        ),
    ):
        with refused(message):
            standard_images.load_cifar10(
                archive=archived(path, files, **changes), split="random", valid_fraction=0.2
            )
    with refused("train image 4 is damaged"):
        jpeg_archive.read_archive(archived(path, broken))
    mixed = archived(path, [*files[:5], *jpegs(1, 16)])
    with refused(
        r"train image 5 has shape \[3, 16, 16\], and the first .* \[3, 32, 32\]; bring all"
    ):
        jpeg_archive.read_archive(mixed)
    two = jpegs(2, 16)
    small = {
        "test_bytes": np.concatenate(two),
        "test_offsets": np.cumsum([0, *map(len, two)]),
        "test_labels": np.arange(2),
    }
    with refused(r"training images have shape \[3, 32, 32\], and test .* \[3, 16, 16\]; bring all"):
        standard_images.load_cifar10(archive=archived(path, files, **small))
    path.write_bytes(path.read_bytes()[:-200])
    with refused(r"a\.npz is cut off or not an \.npz archive"):
        jpeg_archive.read_archive(str(path))
    np.save(tmp_path / "b.npy", np.zeros(3))
    with refused(r"b\.npy is cut off or not an \.npz archive"):
        jpeg_archive.read_archive(str(tmp_path / "b.npy"))
    with refused(
        r"archive=.*nowhere\.npz cannot be read: No such file or directory; give the path"
    ):
        jpeg_archive.read_archive(str(tmp_path / "nowhere.npz"))


# --- the published sets ---


def idx(place, name, array):
    place.mkdir(parents=True, exist_ok=True)
    header = b"".join(int(n).to_bytes(4, "big") for n in (0x800 + array.ndim, *array.shape))
    (place / name).write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture(params=["MNIST", "FashionMNIST"])
def small_set(request, tmp_path):
    """Write 40 and 20 images in the files of MNIST.

    Return the function that reads them, and their folder.
    """
    raw = tmp_path / request.param / "raw"
    for part, n in (("train", 40), ("t10k", 20)):
        idx(raw, f"{part}-images-idx3-ubyte", pixels(n, 28, 28, seed=n).numpy())
        idx(raw, f"{part}-labels-idx1-ubyte", np.arange(n) % 10)
    read = (
        standard_images.load_mnist
        if request.param == "MNIST"
        else standard_images.load_fashion_mnist
    )
    return partial(read, str(tmp_path), download=False), raw


def test_sets_in_mnists_files(small_set):
    read, _ = small_set
    images = read()
    assert [len(labels) for _, labels in images[:3]] == [34, 6, 20]
    assert torch.equal(images.test[0][:, 0], pixels(20, 28, 28, seed=20))
    assert torch.equal(
        torch.cat([images.train[0], images.valid[0]])[:, 0], pixels(40, 28, 28, seed=40)
    )
    x = Standardize(images.mean, images.std)(images.train[0])
    expected = (
        (0.1307, 0.3081) if read.func is standard_images.load_mnist else (0.0, 1.0)
    )  # the paper's code: none
    torch.testing.assert_close(
        x, (images.train[0] / 255 - expected[0]) / expected[1], atol=1e-5, rtol=0
    )
    stratified = read(split="stratified", valid_fraction=0.25)
    assert stratified.valid[1].bincount().tolist() == [1] * 10


def test_half_downloaded_sets_in_mnists_files(small_set):
    read, raw = small_set
    path = raw / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    cut = (whole[:-1000], "30,376 bytes, and its header says 31,376")
    for harm, message in (cut, (b"", "no IDX header"), (b"<html>" * 9, "no IDX header")):
        path.write_bytes(harm)
        with refused(
            rf"{path} is cut off or of another kind \({message}.*\); delete it and run once with"
        ):
            read()
    path.unlink()
    with refused(
        r"is not in .*raw and download is off; set data\.root=PATH of a folder that holds"
    ):
        read()
    path.write_bytes(whole)
    idx(raw, "train-labels-idx1-ubyte", np.zeros(39))
    with refused("holds 40 train images and 39 labels, so they belong to two sets"):
        read()


@pytest.mark.parametrize(
    "read",
    [
        standard_images.load_cifar10,
        standard_images.load_cifar100,
        standard_images.load_fashion_mnist,
    ],
)
def test_no_network(read, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    for module in (torchvision.datasets.mnist, torchvision.datasets.cifar):
        monkeypatch.setattr(module, "download_and_extract_archive", unreachable)
    with refused(
        r"could not be downloaded \(.*\); set data\.root=PATH .* and a network"
    ) as message:
        read(str(tmp_path))
    assert "\n" not in str(message.value)
    with refused(r"download is off; set data\.root=PATH of a folder that holds (cifar-10|Fash)"):
        read(str(tmp_path), download=False)


@pytest.mark.parametrize("read", [standard_images.load_cifar10, standard_images.load_cifar100])
def test_half_downloaded_cifar(read, tmp_path, monkeypatch):
    make = (
        torchvision.datasets.CIFAR10
        if read is standard_images.load_cifar10
        else torchvision.datasets.CIFAR100
    )
    place = tmp_path / make.base_folder
    place.mkdir()
    name = make.train_list[-1][0]
    (place / name).write_bytes(b"half of a pickle")
    with refused(rf"{name} has another MD5 than the published file, .* download is off; delete"):
        read(str(tmp_path), download=False)


@pytest.mark.parametrize("read", [standard_images.load_cifar10, standard_images.load_cifar100])
def test_cifars_own_files(read, tmp_path, monkeypatch):
    """Small files with their own checksums replace the published ones."""
    make = (
        torchvision.datasets.CIFAR10
        if read is standard_images.load_cifar10
        else torchvision.datasets.CIFAR100
    )
    place, classes = (
        tmp_path / make.base_folder,
        10 if read is standard_images.load_cifar10 else 100,
    )
    place.mkdir()

    def written(name, content):
        (place / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((place / name).read_bytes()).hexdigest()]

    def part(name, n, seed):
        x, y = pixels(n, 3 * 32 * 32, seed=seed).numpy(), [i % classes for i in range(n)]
        return written(name, {"data": x, "labels" if classes == 10 else "fine_labels": y})

    names = [name for name, _ in make.train_list]
    monkeypatch.setattr(make, "train_list", [part(name, 200, i) for i, name in enumerate(names)])
    monkeypatch.setattr(make, "test_list", [part(make.test_list[0][0], 30, 9)])
    meta = written(make.meta["filename"], {make.meta["key"]: [str(i) for i in range(classes)]})
    monkeypatch.setattr(make, "meta", make.meta | {"md5": meta[1]})
    images = read(str(tmp_path), download=False)
    n = 200 * len(names)
    assert [len(labels) for _, labels in images[:3]] == [0.8 * n, 0.2 * n, 30]
    whole = torch.cat([pixels(200, 3 * 32 * 32, seed=i) for i in range(len(names))]).view(
        -1, 3, 32, 32
    )
    assert torch.equal(torch.cat([images.train[0], images.valid[0]]), whole)
    assert (images.class_count, images.test[1].tolist()) == (
        classes,
        [i % classes for i in range(30)],
    )
    if read is standard_images.load_cifar100:
        assert images.mean == labelled_images.channel_moments(images.train[0])[0]
        theirs = read(str(tmp_path), download=False, normalization="paper")
        assert theirs.mean == (125.3, 123.0, 113.9)


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


def test_the_command_trains_on_a_folder(pngs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "problem=image_folder",
        f"data.root={pngs}",
        "problem.network=mlp",
        "problem.network_options={hidden: [6]}",
    ]
    arguments += [
        "problem.batch_size=4",
        "runner.epochs=1",
        "runner.warmup_epochs=0",
        "runner.progress=none",
        "logger=jsonl",
    ]
    assert main([*arguments, "runner.picture=false", "hydra.run.dir=it"]) == 0
    assert (tmp_path / "it" / "summary.json").exists()
