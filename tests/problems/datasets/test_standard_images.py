"""Tests of the published image sets: their files, downloads and checksums."""

import hashlib
import pickle
from functools import partial

import numpy as np
import pytest
import torch
import torchvision

from bilevel.problems.datasets import labelled_images, standard_images
from bilevel.problems.datasets.standardize import Standardize
from tests.support.image_data import pixels, refused


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
