"""Tests of image files: reading from disk or memory, color modes and damaged files."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from bilevel import solvers
from bilevel.data.loader_stream import LoaderStream
from bilevel.problems import MLP, Classification
from bilevel.problems.datasets import image_files, image_loaders
from bilevel.problems.datasets.image_files import ImageFileDataset, ImageFiles, UnreadableImage
from bilevel.problems.datasets.image_folder import load_image_folder
from bilevel.problems.datasets.labelled_images import Images
from bilevel.run.evaluation import evaluate
from bilevel.solver import Solution
from tests.support.image_data import generator, pixels, refused
from tests.support.solver_cases import ready

CPU = torch.device("cpu")


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
