"""Every example of a loader is drawn, in an order that depends on the epoch, or one warning."""

import itertools
import warnings

import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    get_worker_info,
)

from bilevel import BilevelError, LoaderStream
from bilevel.errors import DataWarning


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Numbers(IterableDataset):
    """The numbers 0 … n − 1, which several workers may share."""

    def __init__(self, n, *, length=None, shared=True):
        self.n, self.length, self.shared = n, length or n, shared

    def __len__(self):
        return self.length

    def __iter__(self):
        worker = get_worker_info() if self.shared else None
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return iter(torch.tensor(float(i)) for i in range(first, self.n, step))


class Sized:
    """An iterable of batches with any length."""

    def __init__(self, batches, length):
        self.batches, self.length = batches, length

    def __len__(self):
        return self.length

    def __iter__(self):
        return iter(self.batches)


def drawn(split, count):
    return [split.next().tolist() for _ in range(count)]


def told(split, count):
    """Return the batches, and our warnings; PyTorch's own about the length is not counted."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batches = drawn(split, count)
    return batches, [str(w.message) for w in caught if w.category is DataWarning]


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
@pytest.mark.parametrize(
    ("n", "batch_size", "workers", "batches"),
    [(30, 10, 2, 4), (14, 5, 2, 4), (9, 3, 2, 4)],
)
def test_workers_that_share_a_dataset_draw_all_of_it(n, batch_size, workers, batches):
    def make():
        return LoaderStream(DataLoader(Numbers(n), batch_size, num_workers=workers), generator())

    split = make()
    assert split.steps_per_epoch < batches
    found, warned = told(split, 2 * batches)
    for one_pass in (found[:batches], found[batches:]):
        assert sorted(itertools.chain(*one_pass)) == list(range(n))
    assert [len(warned), split.examples] == [1, 2 * n]
    assert "more batches than its length" in warned[0]
    assert "before the next pass begins" in warned[0]
    for taken in (1, split.steps_per_epoch, split.steps_per_epoch + 1, batches, batches + 1):
        running, resumed = make(), make()
        told(running, taken)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            resumed.load_state_dict(running.state_dict())
        assert told(resumed, batches)[0] == told(running, batches)[0]


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
def test_workers_that_do_not_share_draw_all_of_it_equally_often():
    loader = DataLoader(Numbers(12, shared=False), 3, num_workers=2)
    found, warned = told(LoaderStream(loader, generator()), 8)
    assert sorted(itertools.chain(*found)) == sorted(2 * list(range(12)))
    assert len(warned) == 1
    assert "give every worker its own examples" in warned[0]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_loaders_with_the_right_length_are_not_warned_of(workers):
    loader = DataLoader(Numbers(12), 3, num_workers=workers)
    found, warned = told(LoaderStream(loader, generator()), 8)
    assert sorted(itertools.chain(*found)) == sorted(2 * list(range(12)))
    assert not warned


class Longer(Sampler):
    """Returns more examples than its length."""

    def __len__(self):
        return 4

    def __iter__(self):
        return iter(range(6))


@pytest.mark.parametrize(
    "loader",
    [
        Sized([torch.ones(2), torch.ones(2), torch.zeros(1)], 2),
        DataLoader(torch.ones(6), 2, sampler=Longer()),
        DataLoader(torch.ones(6), batch_sampler=Sized([[0, 1], [2, 3], [4, 5]], 2)),
    ],
)
def test_batches_beyond_a_length_are_warned_of_once(loader):
    found, warned = told(LoaderStream(loader, generator()), 6)
    assert found == [[1.0, 1.0]] * 6
    assert len(warned) == 1
    assert "the others are never used" in warned[0]


def test_an_endless_loader_begins_anew_at_its_length():
    class Endless(Sized):
        def __iter__(self):
            return (torch.full((2,), float(i)) for i in itertools.count())

    found, warned = told(LoaderStream(Endless([], 3), generator()), 7)
    assert [batch[0] for batch in found] == [0, 1, 2, 0, 1, 2, 0]
    assert len(warned) == 1


def test_a_pass_that_ends_early_is_an_error_in_training_and_a_warning_in_evaluation():
    for loader in (
        Sized([torch.ones(2)], 2),
        DataLoader(Numbers(4, length=8), 4),
        DataLoader(Numbers(30), 10, num_workers=2, drop_last=True),
    ):
        split = LoaderStream(loader, generator(), name="valid")
        with pytest.raises(BilevelError, match=r"valid loader ended after \d batches, but its"):
            drawn(split, 3)
    split = LoaderStream(Sized([torch.ones(2)], 2), generator(), name="valid")
    with pytest.warns(DataWarning, match="evaluation of the valid split saw 1 batches, but .* 2"):
        assert len(list(split.once())) == 1
    list(split.once())  # once in a run


def test_a_generator_that_is_used_up_is_an_error():
    class Used(Sized):
        def __iter__(self):
            return map(torch.clone, self.batches)

    split = LoaderStream(Used(iter([torch.ones(2), torch.ones(2)]), 2), generator())
    with pytest.raises(BilevelError, match="ended after 1 batches, but its length is 2"):
        drawn(split, 2)
    with pytest.raises(BilevelError, match="ended after 0 batches"):
        list(split.once())


def test_a_batch_without_examples_is_an_error():
    split = LoaderStream([torch.ones(2), torch.ones(0)], generator())
    split.next()
    with pytest.raises(BilevelError, match="train loader returns a batch without examples"):
        split.next()


class Told(Sampler):
    """Begins at its epoch."""

    def __init__(self):
        self.epoch = 5  # left over from other work

    def __len__(self):
        return 4

    def __iter__(self):
        return iter([(i + self.epoch) % 4 for i in range(4)])

    def set_epoch(self, epoch):
        self.epoch = epoch


class ToldDataset(Dataset):
    def __init__(self):
        self.epoch = 0

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.tensor(10.0 * self.epoch + index)

    def set_epoch(self, epoch):
        self.epoch = epoch


class ToldLoader(Sized):
    def set_epoch(self, epoch):
        self.batches = [torch.tensor([10.0 * epoch + i, 10.0 * epoch + i]) for i in range(2)]


EPOCHS = {
    "sampler": lambda: DataLoader(torch.arange(4.0), 2, sampler=Told()),
    "dataset": lambda: DataLoader(ToldDataset(), 2),
    "loader": lambda: ToldLoader([torch.zeros(2)], 2),
    "distributed": lambda: DataLoader(
        torch.arange(4.0), 2, sampler=DistributedSampler(range(4), num_replicas=1, rank=0)
    ),
    "batch sampler's sampler": lambda: DataLoader(
        torch.arange(4.0),
        batch_sampler=torch.utils.data.BatchSampler(Told(), 2, drop_last=False),
    ),
    "workers": lambda: DataLoader(
        torch.arange(4.0), 2, sampler=Told(), num_workers=1, persistent_workers=True
    ),
}


@pytest.mark.parametrize("make", EPOCHS.values(), ids=EPOCHS)
def test_every_epoch_has_its_number_and_a_resumed_run_goes_on(make):
    split = LoaderStream(make(), generator())
    evaluated = [x.tolist() for x in split.once()]
    found = drawn(split, 12)
    passes = [found[i : i + 2] for i in range(0, 12, 2)]
    assert any(one != passes[0] for one in passes[1:])
    assert [x.tolist() for x in split.once()] == evaluated
    for taken in range(6):
        running, resumed = (LoaderStream(make(), generator()) for _ in range(2))
        drawn(running, taken)
        list(resumed.once())
        resumed.load_state_dict(running.state_dict())
        list(resumed.once())
        assert drawn(resumed, 4) == found[taken : taken + 4] == drawn(running, 4)


def test_orders_follow_the_epoch_numbers():
    split = LoaderStream(DataLoader(torch.arange(4.0), 2, sampler=Told()), generator())
    assert drawn(split, 6) == [[0, 1], [2, 3], [1, 2], [3, 0], [2, 3], [0, 1]]


def test_a_part_of_a_split_is_warned_of():
    sampler = DistributedSampler(range(8), num_replicas=2, rank=0)
    loader = DataLoader(torch.arange(8.0), 2, sampler=sampler)
    with pytest.warns(DataWarning, match="one of 2 parts of its examples; leave Distributed"):
        LoaderStream(loader, generator())


def test_workers_that_do_not_learn_the_epoch_are_warned_of():
    loader = DataLoader(ToldDataset(), 2, num_workers=1, persistent_workers=True)
    with pytest.warns(DataWarning, match="which set_epoch does not reach.*persistent_workers=F"):
        LoaderStream(loader, generator())
    loader.dataset.number = torch.zeros(()).share_memory_()
    LoaderStream(loader, generator())
