"""Random images, and files of them, for the tests of image data."""

import pytest
import torch
from PIL import Image

from bilevel import BilevelError
from bilevel.problems.datasets.labelled_images import Images


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


def save(place, x, suffix="png"):
    place.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(x):
        Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(place / f"{i:03}.{suffix}")
