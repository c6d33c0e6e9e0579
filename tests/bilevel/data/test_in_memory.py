"""NumPy arrays and data sets of tensors are splits; they give the batches of their tensors."""

from collections import deque

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset, random_split

from bilevel import (
    BilevelError,
    Classifier,
    Interval,
    Runner,
    Space,
    TensorStream,
    check_problem,
    solvers,
    stream,
)
from bilevel.data.in_memory import in_memory

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(40, 3))
LABELS = (X[:, 0] > 0).astype(np.int32)
PAIR = torch.from_numpy(X).float(), torch.from_numpy(LABELS).long()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(split):
    made = stream(split, 8, generator())
    assert isinstance(made, TensorStream)
    return [made.next() for _ in range(7)]


def same(ours, theirs):
    return all(
        torch.equal(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=1)
    )


@pytest.mark.parametrize(
    "split",
    [
        TensorDataset(*PAIR),
        (X.astype(np.float32), LABELS),
        [X.astype(np.float32), LABELS],
        (PAIR[0], LABELS),
        Subset(TensorDataset(*PAIR), range(40)),
    ],
    ids=["a data set", "a tuple", "a list", "mixed", "a subset"],
)
def test_a_split_in_memory_gives_the_batches_of_its_tensors(split):
    assert same(drawn(split), drawn(PAIR))


def test_a_dictionary_and_a_single_array():
    batches = drawn({"x": X, "y": LABELS})
    assert list(batches[0]) == ["x", "y"]
    assert same([batch.values() for batch in batches], drawn((torch.from_numpy(X), PAIR[1])))
    assert torch.equal(drawn(X)[0], drawn(torch.from_numpy(X))[0])


def test_a_part_of_a_split_of_a_data_set():
    part, _ = random_split(TensorDataset(*PAIR), [30, 10], generator())
    nested = Subset(part, [3, 1])
    assert torch.equal(stream(part, None, generator()).next()[0], PAIR[0][part.indices])
    assert torch.equal(
        stream(nested, None, generator()).next()[1], PAIR[1][part.indices][torch.tensor([3, 1])]
    )


def test_a_data_set_with_examples_of_its_own_is_refused():
    class Flipped(TensorDataset):
        def __getitem__(self, index):
            return tuple(-t for t in super().__getitem__(index))

    for data in (Flipped(*PAIR), Subset(Flipped(*PAIR), [0])):
        with pytest.raises(BilevelError, match=rf"{type(data).__name__}, .* a DataLoader"):
            stream(data, 2, generator())


@pytest.mark.parametrize(
    ("array", "wanted"),
    [
        (np.arange(3, dtype="int8"), torch.int64),
        (np.arange(3, dtype="uint8"), torch.int64),
        (np.arange(3, dtype="uint32"), torch.int64),
        (np.zeros((3, 2, 2), "uint8"), torch.uint8),
        (np.zeros((3, 2), "int16"), torch.int64),
        (np.zeros((3, 2), ">f8"), torch.float64),
        (np.zeros((3, 2), "float32"), torch.float32),
        (np.zeros((3, 2), "float16"), torch.float16),
        (np.zeros((3, 2), np.longdouble), torch.float64),
        (np.zeros(3, bool), torch.bool),
        (np.zeros(3, "complex64"), torch.complex64),
        (np.arange(6.0)[::-2], torch.float64),
    ],
)
def test_types_of_arrays(array, wanted):
    made = in_memory((array,), "train")[0]
    assert made.dtype == wanted
    assert made.tolist() == array.tolist()


def test_an_array_that_cannot_be_written_to_is_copied():
    x = np.ones(3)
    x.flags.writeable = False
    in_memory(x, "train").zero_()
    assert x.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ((X, np.array(["a", "b"])), r"field 1 of the train split is an array of <U1, .*np.unique"),
        ({"x": np.array([None, "a"])}, "field `x` of the train split is an array of object"),
        (np.array(["2020-01-01"], "M8[D]"), "the train split is an array of datetime64"),
        ((X, deque([np.array(["a"])])), "the train split is an array of <U1"),
        ((np.ma.array([1.0, 2.0], mask=[0, 1]),), r"field 0 .* masked array, .*filled"),
    ],
)
def test_an_array_without_numbers_is_one_sentence(split, words):
    with pytest.raises(BilevelError, match=words):
        stream(split, None, generator())


def test_the_remedies_for_arrays_work():
    labels = np.unique(np.array(["b", "a", "b"]), return_inverse=True)[1]
    numbers = np.array(["1", "2.5"], object).astype(float)
    assert in_memory((labels,), "train")[0].tolist() == [1, 0, 1]
    assert in_memory((numbers,), "train")[0].tolist() == [1.0, 2.5]


def classifier(split, dtype=torch.float32):
    space = Space(label_smoothing=Interval(low=0.0, high=0.5, init=0.1))
    module = nn.Linear(3, 2, dtype=dtype)
    nn.init.constant_(module.weight, 0.1)
    nn.init.zeros_(module.bias)
    return Classifier(module, space, split, split, split, batch_size=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float64_arrays_follow_a_network_of_float32(dtype):
    data = classifier((X, LABELS), dtype).data(torch.device("cpu"), generator())
    for split in data:
        assert [t.dtype for t in split.peek()] == [dtype, torch.int64]


def test_float64_tensors_keep_their_type():
    report = check_problem(classifier((torch.from_numpy(X), PAIR[1])))
    assert "float64 [8, 3], but the weight `weight` is float32" in str(report)


def test_a_run_on_arrays_is_the_run_on_their_tensors(tmp_path):
    runner = Runner(epochs=2, warmup_epochs=0.5, progress="none", picture=False)
    results = [
        runner.run(classifier(split), solvers.delta_stn(), directory=tmp_path / str(number))
        for number, split in enumerate([PAIR, (X, LABELS), TensorDataset(*PAIR)])
    ]
    for result in results[1:]:
        for key in ("hypers", "last", "examples"):
            ours, theirs = dict(results[0])[key], dict(result)[key]
            if key == "last":
                ours, theirs = (dict(part, seconds=0) for part in (ours, theirs))
            assert ours == theirs
