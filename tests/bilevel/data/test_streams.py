import itertools

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from bilevel import BilevelError, FullBatch, LoaderStream, TensorStream, stream, streams


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tensors(n=10):
    return torch.arange(n), torch.arange(n) * 2.0


def loader(n=10, batch_size=4, **options):
    options = {"shuffle": True, "drop_last": True, "generator": generator(7)} | options
    return DataLoader(TensorDataset(*tensors(n)), batch_size, **options)


class Noisy(Dataset):
    """Examples with a random transform."""

    def __len__(self):
        return 10

    def __getitem__(self, i):
        return i + torch.rand(()), i


class Streaming(IterableDataset):
    def __len__(self):
        return 10

    def __iter__(self):
        return iter(torch.arange(10.0))


class Long(list):
    """A list whose length is too large."""

    def __len__(self):
        return super().__len__() + 1


class Once(list):
    """An iterable that continues at every `iter`."""

    def __iter__(self):
        self.iterator = getattr(self, "iterator", None) or super().__iter__()
        return self.iterator


def values(batches):
    return [x.tolist() for x, *_ in batches]


def drawn(split, count):
    return values(split.next() for _ in range(count))


MAKE = {
    "tensors": lambda: TensorStream(tensors(), 4, generator()),
    "whole split": lambda: TensorStream(tensors(), None, generator()),
    "loader": lambda: LoaderStream(loader(), generator()),
    "loader without a generator": lambda: LoaderStream(loader(generator=None), generator()),
    "loader with a sampler's generator": lambda: LoaderStream(
        loader(
            shuffle=False, sampler=RandomSampler(range(10), generator=generator(8)), generator=None
        ),
        generator(),
    ),
    "random transform": lambda: LoaderStream(DataLoader(Noisy(), 4, shuffle=True), generator()),
    "persistent workers": lambda: LoaderStream(
        loader(num_workers=1, persistent_workers=True, generator=None), generator()
    ),
    "any iterable": lambda: LoaderStream([tensors(4), tensors(2)], generator()),
    "one batch": lambda: FullBatch(tensors()),
    "of one's own": lambda: stream(TensorStream(tensors(), 4, generator()), None, generator(1)),
}


@pytest.fixture(params=MAKE)
def make(request):
    return MAKE[request.param]


def test_resumed_stream_goes_on_with_the_same_batches(make):
    for taken in range(5):  # positions within, at the end of and after the first epoch
        running, resumed = make(), make()
        for _ in range(taken):
            running.next()
        resumed.load_state_dict(running.state_dict())
        assert resumed.examples == running.examples
        for _ in range(4):
            torch.testing.assert_close(resumed.next()[0], running.next()[0])


def test_peeking_changes_nothing(make):
    looked, other = make(), make()
    for _ in range(3):
        looked.peek()
        list(looked.once())
        torch.testing.assert_close(looked.next()[0], other.next()[0])
    assert looked.examples == other.examples


def test_batches_of_an_epoch_are_distinct_examples_with_their_labels():
    split = TensorStream(tensors(), 4, generator())
    first, second = split.next(), split.next()
    seen = torch.cat([first[0], second[0]])
    assert len(seen.unique()) == 8
    torch.testing.assert_close(first[1], first[0] * 2.0)
    third = split.next()
    assert split.examples == 12
    assert not torch.equal(third[0], first[0])


def test_once_covers_the_split_in_order_to_the_last_example():
    split = TensorStream(tensors(), 4, generator(), evaluation_batch_size=3)
    assert torch.cat([x for x, _ in split.once()]).tolist() == list(range(10))
    assert sum(len(x) for x, _ in split.once(limit=5)) == 5
    assert split.examples == 0


def test_a_whole_split_is_one_batch():
    split = TensorStream(tensors(), None, generator())
    assert split.next()[0].tolist() == list(range(10))
    assert (split.steps_per_epoch, split.examples) == (1, 10)


def test_loader_counts():
    split = LoaderStream(loader(), generator())
    split.next(), split.next(), split.next()
    assert (split.examples, split.steps_per_epoch, split.size) == (12, 2, 10)


def test_checkpoint_of_other_data_is_refused():
    running = TensorStream(tensors(), 4, generator())
    running.next()
    with pytest.raises(BilevelError, match="use the same data"):
        TensorStream(tensors(9), 4, generator()).load_state_dict(running.state_dict())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: stream(tensors(0), 4, generator(), name="valid"), "valid split is empty"),
        (lambda: stream(tensors(3), 4, generator()), "batch_size=4 .* 3 examples"),
        (lambda: stream(tensors(3), 0, generator()), "batch_size=0"),
        (lambda: stream((torch.zeros(3), torch.zeros(4)), 2, generator()), "different lengths"),
        (lambda: stream("digits", 4, generator()), "is a str"),
        (lambda: stream(loader(3, 4), None, generator()), "no batch"),
        (lambda: stream((x for x in [1]), None, generator()), "no length"),
        (lambda: LoaderStream(Once([tensors()]), generator()), "same iterator"),
        (lambda: LoaderStream(Long([]), generator()), "ended after 0 batches"),
        (
            lambda: streams(tensors(), None, batch_size=4, device="cpu", generator=generator()),
            "valid=None",
        ),
        (
            lambda: streams(
                tensors(), tensors(3), batch_size=4, device="cpu", generator=generator()
            ),
            "of the valid split",
        ),
    ],
)
def test_refused(make, words):
    with pytest.raises(BilevelError, match=words):
        make()


def test_a_loader_without_a_generator_follows_from_the_streams():
    before = torch.get_rng_state()
    first, again, other = (
        drawn(LoaderStream(loader(40, generator=None), generator(s)), 20) for s in (0, 0, 1)
    )
    assert first == again != other
    assert first[:10] != first[10:]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loaders_own_generator_is_left_as_it_was():
    own = generator(7)
    drawn(LoaderStream(loader(generator=own), generator()), 3)
    assert torch.equal(own.get_state(), generator(7).get_state())


def test_resume_within_an_epoch_is_exact_with_workers_that_draw():
    running, resumed = (
        LoaderStream(DataLoader(Noisy(), 2, shuffle=True, num_workers=2), generator())
        for _ in range(2)
    )
    drawn(running, 8)
    torch.rand(3)  # the global state has moved on
    resumed.load_state_dict(running.state_dict())
    assert drawn(resumed, 4) == drawn(running, 4)


def test_evaluation_in_the_middle_of_an_epoch_with_persistent_workers():
    split = LoaderStream(loader(8, 2, num_workers=1, persistent_workers=True), generator())
    epoch = drawn(split, 1)
    for _ in range(3):
        assert values(split.once()) == [[0, 1], [2, 3], [4, 5], [6, 7]]
        split.peek()
        epoch += drawn(split, 1)
    assert sorted(itertools.chain(*epoch)) == list(range(8))


@pytest.mark.parametrize(
    ("options", "examples"),
    [
        ({}, range(10)),
        (
            {"shuffle": False, "sampler": SubsetRandomSampler([7, 1, 4, 2])},
            [7, 1, 4, 2],
        ),  # half of a train/valid split
        (
            {
                "shuffle": False,
                "sampler": WeightedRandomSampler([0.0, 1.0, 0.0, 5.0] + [1.0] * 6, 8),
            },
            [1, 3, *range(4, 10)],
        ),
        ({"shuffle": False, "sampler": [5, 3, 3, 5, 8, 0]}, [5, 3, 8, 0]),
        (
            {"batch_size": None, "sampler": BatchSampler(RandomSampler(range(10)), 4, True)},
            range(10),
        ),
    ],
)
def test_once_is_every_example_of_a_loader_in_a_fixed_order(options, examples):
    options = {
        "drop_last": "batch_size" not in options,
        "shuffle": "batch_size" not in options,
    } | options
    split = LoaderStream(loader(generator=None, **options), generator())
    assert list(itertools.chain(*values(split.once()))) == list(examples)
    assert split.size == len(examples)
    for limit in range(1, len(examples) + 1):
        assert list(itertools.chain(*values(split.once(limit)))) == list(examples)[:limit]


def test_once_of_ready_made_batches_ends_with_the_one_that_reaches_the_limit():
    batches = [tensors(4), tensors(3), tensors(2)]
    batched = DataLoader(TensorDataset(*tensors()), batch_sampler=[[3, 1], [0, 2, 4]])
    streaming = DataLoader(Streaming(), 4)
    lengths = [
        [len(x[0]) for x in LoaderStream(s, generator()).once(4)] for s in (batches, batched)
    ]
    assert lengths == [[4], [2, 3]]
    split = LoaderStream(streaming, generator())
    assert [len(x) for x in split.once()] == [4, 4, 2]
    assert [len(x) for x in split.once(5)] == [4, 4]
    assert split.size == 10


def test_a_loader_that_ends_early_is_refused():
    split = LoaderStream(Long([tensors(4)]), generator(), name="valid")
    split.next()
    with pytest.raises(
        BilevelError, match="valid loader ended after 1 batches, but its length is 2"
    ):
        split.next()


def test_checkpoint_of_another_loader_is_refused():
    with pytest.raises(BilevelError, match="use the same data"):
        LoaderStream(loader(9), generator()).load_state_dict(
            LoaderStream(loader(), generator()).state_dict()
        )


def test_leaves_that_are_not_tensors_pass_through():
    named = DataLoader([(torch.tensor(float(i)), f"image {i}") for i in range(4)], 2)
    for split in (
        LoaderStream(named, generator()),
        stream([(torch.zeros(2), ["a", "b"]), {"id": "c"}], None, generator()),
    ):
        assert all(isinstance(leaf, str) for leaf in split.peek()[1])
    split = LoaderStream(named, generator())
    assert [list(names) for _, names in split.once()] == [
        ["image 0", "image 1"],
        ["image 2", "image 3"],
    ]
    assert list(split.next()[1]) == ["image 0", "image 1"]
    assert (split.examples, split.size) == (2, 4)


@pytest.mark.parametrize("pinned", [True, False])
def test_a_pinned_batch_is_not_waited_for(monkeypatch, pinned):
    class Pinned(list):
        pin_memory = pinned

    waits = []
    plain = torch.Tensor.to
    split = LoaderStream(Pinned([tensors(4)]), generator())
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda x, *a, **k: waits.append(k.get("non_blocking", False)) or plain(x, *a, **k),
    )
    split.next()
    assert waits == [pinned, pinned]


def test_a_stream_of_ones_own_starts_anew_in_every_run():
    own = TensorStream(tensors(), 2, generator())
    own.next()  # handed over in the middle of an epoch, with an example counted

    def run():
        data = streams(own, tensors(), batch_size=4, device="cpu", generator=generator())
        return drawn(data.train, 12), data.train.examples

    assert run() == run()


def test_runs_that_share_a_stream_do_not_disturb_each_other():
    own = TensorStream(tensors(), 2, generator())
    alone = drawn(TensorStream(tensors(), 2, generator()), 12)
    first, second = (stream(own, None, generator()) for _ in range(2))
    seen = [(drawn(first, 2), drawn(second, 3)) for _ in range(4)]
    assert list(itertools.chain(*(a for a, _ in seen))) == alone[:8]
    assert list(itertools.chain(*(b for _, b in seen))) == alone
    assert (first.examples, second.examples) == (16, 24)


def test_a_stream_of_ones_own_is_moved_to_the_device():
    split = stream(TensorStream(tensors(), 4, generator()), None, generator(), device="meta")
    assert {
        x.device.type for batch in (split.next(), split.peek(), *split.once()) for x in batch
    } == {"meta"}


def test_validation_batches_leave_the_training_order_alone():
    plain, busy = (
        streams(tensors(), tensors(), batch_size=4, device="cpu", generator=generator())
        for _ in range(2)
    )
    for _ in range(6):
        busy.valid.next()
        torch.testing.assert_close(busy.train.next()[0], plain.train.next()[0])
    assert not torch.equal(plain.train.next()[0], plain.valid.next()[0])


def test_test_split_may_be_smaller_than_a_batch():
    data = streams(
        tensors(), tensors(), tensors(3), batch_size=4, device="cpu", generator=generator()
    )
    assert [len(x) for x, _ in data.test.once()] == [3]
