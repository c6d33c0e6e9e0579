"""Tests of loaders for images that do not fit in memory."""

from functools import partial

import pytest
import torch

from bilevel.checks.check_problem import ProblemWarning
from bilevel.data.loader_stream import LoaderStream
from bilevel.problems import MLP, Classification
from bilevel.problems.datasets import free_memory, image_loaders, labelled_images
from bilevel.problems.datasets.image_folder import load_image_folder
from tests.support.image_data import generator, random_images, refused

CPU = torch.device("cpu")


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
