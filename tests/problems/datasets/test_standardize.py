"""Tests of standardization with a mean and a standard deviation per channel."""

import torch

from bilevel import problems
from bilevel.problems import MLP, Classification, HyperCleaning, LossWeights
from bilevel.problems.datasets import labelled_images
from bilevel.problems.datasets.standardize import Standardize
from tests.support.image_data import pixels, random_images


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
