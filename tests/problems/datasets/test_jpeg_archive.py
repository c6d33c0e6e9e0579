"""Tests of archives of JPEG files against Pillow, and of bad archives."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bilevel.problems.datasets import jpeg_archive, labelled_images, standard_images
from bilevel.problems.datasets.standardize import Standardize
from tests.support.image_data import pixels, refused

DATA = Path(
    os.environ.get("BILEVEL_TEST_DATA", Path(__file__).parents[3] / ".." / "shared" / "data")
)


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
