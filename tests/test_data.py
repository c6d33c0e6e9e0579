import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from bilevel import BilevelError, FullBatch, LoaderStream, TensorStream, stream, streams


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tensors(n=10):
    return torch.arange(n), torch.arange(n) * 2.0


def loader(n=10, batch_size=4):
    return DataLoader(TensorDataset(*tensors(n)), batch_size, shuffle=True, drop_last=True, generator=generator(7))


MAKE = {
    "tensors": lambda: TensorStream(tensors(), 4, generator()),
    "whole split": lambda: TensorStream(tensors(), None, generator()),
    "loader": lambda: LoaderStream(loader(), generator()),
    "one batch": lambda: FullBatch(tensors()),
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


def test_looking_changes_nothing(make):
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
    with pytest.raises(BilevelError, match="data changed"):
        TensorStream(tensors(9), 4, generator()).load_state_dict(running.state_dict())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: stream(tensors(0), 4, generator(), name="valid"), "valid split is empty"),
        (lambda: stream(tensors(3), 4, generator()), "batch of 4 .* 3 examples"),
        (lambda: stream(tensors(3), 0, generator()), "batch of 0"),
        (lambda: stream((torch.zeros(3), torch.zeros(4)), 2, generator()), "different lengths"),
        (lambda: stream("digits", 4, generator()), "is a str"),
        (lambda: stream(loader(3, 4), None, generator()), "no batch"),
        (lambda: stream((x for x in [1]), None, generator()), "no length"),
        (lambda: streams(tensors(), None, batch_size=4, device="cpu", generator=generator()), "no valid split"),
        (lambda: streams(tensors(), tensors(3), batch_size=4, device="cpu", generator=generator()), "from the valid split"),
    ],
)
def test_refused(make, words):
    with pytest.raises(BilevelError, match=words):
        make()


def test_a_stream_stays_itself():
    split = FullBatch(tensors())
    assert stream(split, None, generator()) is split


def test_validation_batches_leave_the_training_order_alone():
    plain, busy = (streams(tensors(), tensors(), batch_size=4, device="cpu", generator=generator()) for _ in range(2))
    for _ in range(6):
        busy.valid.next()
        torch.testing.assert_close(busy.train.next()[0], plain.train.next()[0])
    assert not torch.equal(plain.train.next()[0], plain.valid.next()[0])


def test_test_split_may_be_smaller_than_a_batch():
    data = streams(tensors(), tensors(), tensors(3), batch_size=4, device="cpu", generator=generator())
    assert [len(x) for x, _ in data.test.once()] == [3]
