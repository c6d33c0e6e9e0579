"""Tests of the split of training images into training and validation images."""

import pytest
import torch

from bilevel.problems.datasets.validation_split import split_indices
from tests.support.image_data import refused


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
