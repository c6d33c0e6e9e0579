"""Tests of image files: reading from disk or memory, color modes and damaged files."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from bilevel import DataWarning, solvers
from bilevel.data.loader_stream import LoaderStream
from bilevel.problems import MLP, Classification
from bilevel.problems.datasets import image_loaders
from bilevel.problems.datasets.image_files import ImageFileDataset, ImageFiles, UnreadableImage
from bilevel.problems.datasets.image_folder import load_image_folder
from bilevel.problems.datasets.labelled_images import Images
from bilevel.problems.datasets.pillow_images import MODES
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


def read(path, **options):
    """Return the pixels of one file as [height, width, channels]."""
    files = ImageFileDataset([str(path)], torch.zeros(1, dtype=torch.long), **options)
    return files.read(0).permute(1, 2, 0).numpy()


def test_opaque_alpha_is_dropped_and_grey_converted(tmp_path):
    x = pixels(1, 3, 4, 4)[0].permute(1, 2, 0).numpy()
    for kind in ("one", "two"):
        (tmp_path / kind).mkdir()
        for i in range(3):
            Image.fromarray(np.roll(x, i)).convert("RGBA").save(tmp_path / kind / f"{kind}{i}.png")
        Image.fromarray(x).convert("P").save(tmp_path / kind / "palette.png")
    load = partial(load_image_folder, str(tmp_path), test_fraction=0.0)
    with pytest.warns(DataWarning, match="image files occur in more than one split"):
        images = load(valid_fraction=0.25)
    read = {image.numpy().tobytes() for part in images[:2] for image in part[0]}
    assert {np.roll(x, i).transpose(2, 0, 1).tobytes() for i in range(3)} <= read
    for kind in ("one", "two"):
        (tmp_path / kind / "palette.png").unlink()
        for i in range(3):
            Image.fromarray(pixels(1, 4, 4, seed=i + len(kind))[0].numpy()).save(
                tmp_path / kind / f"{kind}{i}.png"
            )
    Image.fromarray(x).convert("L").save(tmp_path / "one" / "grey.png")
    with warnings.catch_warnings(action="ignore", category=DataWarning):
        assert load(channels=1).shape == (1, 4, 4)
        assert load(channels=3).shape == (3, 4, 4)
    assert MODES["L"] == 1


def over(x, alpha, level):
    """Return pixels laid on a background, in exact arithmetic."""
    share = alpha[..., None] / 255
    return x * share + level * (1 - share)


ALPHA = np.array([[0, 255, 128, 3], [255, 0, 64, 200]], np.uint8)


def transparent_files(folder):
    """Yield every kind of file with transparent pixels, its colors and its alpha."""
    x = pixels(1, 3, 2, 4)[0].permute(1, 2, 0).numpy()
    grey = x[..., :1].repeat(3, 2)
    Image.fromarray(np.dstack([x, ALPHA])).save(folder / "rgba.png")
    yield folder / "rgba.png", x, ALPHA
    Image.fromarray(np.dstack([x[..., 0], ALPHA])).save(folder / "la.png")
    yield folder / "la.png", grey, ALPHA
    index = np.arange(8, dtype=np.uint8).reshape(2, 4)
    palette = Image.fromarray(index).convert("P")
    palette.putpalette(x.reshape(-1).tolist())
    palette.save(folder / "palette.png", transparency=ALPHA.tobytes())
    yield folder / "palette.png", x, ALPHA
    key = tuple(int(v) for v in x[0, 0])
    Image.fromarray(x).save(folder / "key.png", transparency=key)
    yield folder / "key.png", x, np.where((x == key).all(-1), 0, 255)
    Image.fromarray(np.dstack([x, ALPHA])).save(folder / "exact.webp", lossless=True, exact=True)
    yield folder / "exact.webp", x, ALPHA


@pytest.mark.parametrize("level", [None, 0, 100, 255])
def test_transparent_pixels_are_laid_on_one_brightness(tmp_path, level):
    for path, x, alpha in transparent_files(tmp_path):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = read(path, background=level, channels=3)
        assert np.abs(found - over(x, alpha, 255 if level is None else level)).max() <= 1
        said = [str(w.message) for w in caught]
        assert len(said) == (level is None), said
        assert level is not None or "transparent pixels, which are laid on white; set" in said[0]


def test_transparency_is_warned_of_once_and_background_is_checked(tmp_path):
    paths = [str(path) for path, *_ in transparent_files(tmp_path)]
    with pytest.warns(DataWarning, match=r"rgba\.png has transparent pixels"):
        files = ImageFileDataset(paths, torch.arange(5), channels=3)
    files.subset([1, 2]).decode()
    files.decode()
    with refused("background=300 must be between 0 and 255; choose 255 for white or 0 for black"):
        ImageFileDataset(paths, torch.arange(5), background=300)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_tag_turns_the_image(tmp_path, suffix, orientation):
    x = np.zeros((16, 24, 3), np.uint8)
    x[:8, :12] = 255  # a bright corner at the top left, seen upright
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # it is turned by 270 degrees when it is shown
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = Image.fromarray(x)
    stored = stored if orientation == 1 else stored.transpose(turns[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"it.{suffix}"
    stored.save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    found = read(path)
    assert found.shape == x.shape
    assert np.abs(found.astype(int) - x).max() <= 2


def test_a_damaged_orientation_tag_is_passed_over(tmp_path):
    x = pixels(1, 3, 4, 6)[0].permute(1, 2, 0).numpy()
    Image.fromarray(x).save(tmp_path / "it.png", exif=b"Exif\0\0II*\0\xff\xff")
    np.testing.assert_array_equal(read(tmp_path / "it.png"), x)
    exif = Image.Exif()
    exif[0x0112] = 77
    Image.fromarray(x).save(tmp_path / "other.png", exif=exif)
    np.testing.assert_array_equal(read(tmp_path / "other.png"), x)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_of_several_frames_the_first_is_read_with_a_warning(tmp_path, suffix):
    frames = [Image.new("L", (5, 4), 60 * i) for i in range(1, 4)]
    lossless = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"it.{suffix}", save_all=True, append_images=frames[1:], **lossless)
    with pytest.warns(DataWarning, match=rf"it\.{suffix} has several frames, of which the first"):
        assert (read(tmp_path / f"it.{suffix}", channels=1) == 60).all()


def test_cmyk_is_converted_with_a_warning(tmp_path):
    colors = {(0, 0, 0, 0): 255, (255, 0, 0, 0): (0, 255, 255), (0, 0, 0, 255): 0}
    for i, (cmyk, rgb) in enumerate(colors.items()):
        for suffix, options in (("jpg", {"quality": 95}), ("tif", {})):
            path = tmp_path / f"{i}.{suffix}"
            Image.new("CMYK", (8, 8), cmyk).save(path, **options)
            with pytest.warns(DataWarning, match="has CMYK colors, which are converted without"):
                assert np.abs(read(path).astype(int) - np.array(rgb)).max() <= 2


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_eight_bits_are_one_sentence(tmp_path, dtype):
    Image.fromarray(np.zeros((4, 4), dtype)).save(tmp_path / "it.tif")
    with refused(r"it\.tif has Pillow's mode \S+, and only modes with one byte per channel"):
        read(tmp_path / "it.tif")
