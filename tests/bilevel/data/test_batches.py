"""Batches of any container are counted, moved and cut alike, or refused in one sentence."""

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, TensorDataset

from bilevel import (
    BilevelError,
    FullBatch,
    LoaderStream,
    ModuleProblem,
    Positive,
    Runner,
    Space,
    TensorStream,
    evaluate,
    solvers,
    squared_norm,
    stream,
)
from bilevel.containers import open_containers
from bilevel.errors import DataWarning
from bilevel.parallel.shards import even_shards
from bilevel.params import count_examples, to_device
from bilevel.solver import Solution
from bilevel.solvers.base.dry_run import without_last


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Encoded(UserDict):
    """Reads entries as attributes and has state of its own, as tokenizers' results do."""

    def __init__(self, data=None, words=()):
        super().__init__(data)
        self.words = words

    def __getattr__(self, name):
        return self.__dict__["data"][name]


class Frozen(Mapping):
    def __init__(self, entries):
        self._entries = dict(entries)

    def __getitem__(self, name):
        return self._entries[name]

    def __iter__(self):
        return iter(self._entries)

    def __len__(self):
        return len(self._entries)


class Shared(Frozen, MutableMapping):
    """A shallow copy shares its entries."""

    def __setitem__(self, name, value):
        self._entries[name] = value

    def __delitem__(self, name):
        del self._entries[name]


class Ordered(OrderedDict):
    pass


class Pair(namedtuple("Pair", "x labels")):
    pass


class Row(list):
    pass


@dataclass(frozen=True)
class Record:
    x: torch.Tensor
    labels: torch.Tensor
    source: str = "here"


@dataclass
class Slotted:
    __slots__ = ("labels", "x")
    x: torch.Tensor
    labels: torch.Tensor


CONTAINERS = {
    "mapping": lambda x, labels: Encoded({"x": x, "labels": labels}, words=("a", "b")),
    "immutable mapping": lambda x, labels: Frozen({"x": x, "labels": labels}),
    "mapping with a shared state": lambda x, labels: Shared({"x": x, "labels": labels}),
    "read-only view": lambda x, labels: MappingProxyType({"x": x, "labels": labels}),
    "ordered": lambda x, labels: Ordered(x=x, labels=labels),
    "default": lambda x, labels: defaultdict(list, {"x": x, "labels": labels}),
    "named": Pair,
    "list": lambda x, labels: Row([x, labels]),
    "dataclass": Record,
    "slots": Slotted,
    "nested": lambda x, labels: {"in": Encoded({"x": x}), "out": Record(labels, labels)},
}


def both(batch):
    """Return the two tensors, read as a user reads them."""
    if isinstance(batch, Encoded | Record | Slotted | Pair):
        return batch.x, batch.labels
    if isinstance(batch, Row):
        return batch[0], batch[1]
    if "in" in batch:
        return batch["in"]["x"], batch["out"].labels
    return batch["x"], batch["labels"]


@pytest.fixture(params=CONTAINERS)
def container(request):
    return CONTAINERS[request.param]


def rows(n):
    return torch.arange(n * 2.0).view(n, 2), torch.arange(n) % 2


def test_a_container_is_counted_moved_and_cut(container):
    x, labels = rows(7)
    batch = container(x, labels)
    open_containers(batch, "it", "convert it")
    assert count_examples(batch) == 7
    moved = to_device(batch, "meta")
    assert type(moved) is type(batch)
    assert {t.device.type for t in both(moved)} == {"meta"}
    assert both(batch)[0] is x  # the batch itself is as it was
    assert [len(t) for t in both(without_last(batch))] == [6, 6]
    parts = [both(shard.of(batch)) for shard in even_shards(7, 2)]
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), x)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), labels)


def test_state_of_a_mapping_is_kept():
    batch = Encoded({"x": torch.ones(2)}, words=("a", "b"))
    open_containers(batch, "it", "convert it")
    assert to_device(batch, "meta").words == ("a", "b")


def test_streams_of_containers(container):
    loader = DataLoader(
        TensorDataset(*rows(21)),
        10,
        collate_fn=lambda items: container(*map(torch.stack, zip(*items, strict=True))),
    )
    for split in (LoaderStream(loader, generator()), stream(loader, None, generator())):
        assert [count_examples(batch) for batch in split.once()] == [10, 10, 1]
        split.next(), split.next(), split.next()
        assert split.examples == split.size == 21
    batches = [container(*rows(4)), container(*rows(3))]
    split = LoaderStream(batches, generator())
    assert [split.next() is not None and split.examples for _ in range(2)] == [4, 7]


def test_a_split_in_memory_may_be_a_container():
    for split in (Encoded({"x": torch.arange(9)}), Slotted(*rows(9)), Pair(*rows(9))):
        made = stream(split, 3, generator())
        assert isinstance(made, TensorStream)
        assert (made.size, count_examples(made.next())) == (9, 3)
        assert type(made.peek()) is type(split)


def test_a_list_of_batches_is_a_loader_and_a_list_of_tensors_a_split():
    for batches in ([rows(4), rows(4)], [list(rows(4)), list(rows(3))], [{"x": rows(4)[0]}]):
        split = stream(batches, None, generator())
        assert isinstance(split, LoaderStream)
        assert count_examples(split.next()) == 4
    assert isinstance(stream(list(rows(4)), 2, generator()), TensorStream)


class Mapped(ModuleProblem):
    def inputs(self, hypers, batch, *, train, generator):
        return (both(batch)[0],), {}

    def inner_objective(self, hypers, params, prediction, batch):
        return (
            self.outer_objective(hypers, params, prediction, batch)
            + 0.5 * (hypers["decay"] * squared_norm(params)).mean()
        )

    def outer_objective(self, hypers, params, prediction, batch):
        return F.cross_entropy(prediction, both(batch)[1])


def test_a_run_on_containers_is_the_run_on_tuples(container, tmp_path):
    x = torch.randn(51, 2, dtype=torch.float64, generator=generator())
    labels = (x[:, 0] > 0).long()

    def problem(make):
        def loader(start, stop):
            return DataLoader(
                TensorDataset(x[start:stop], labels[start:stop]),
                10,
                collate_fn=lambda items: make(*map(torch.stack, zip(*items, strict=True))),
            )

        space = Space(decay=Positive(init=0.01))
        return Mapped(
            lambda: nn.Linear(2, 2, dtype=torch.float64), space, loader(0, 30), loader(30, 51)
        )

    runner = Runner(epochs=2, warmup_epochs=1, progress="none", picture=False)
    made = {
        name: runner.run(problem(make), solvers.delta_stn(), directory=tmp_path / name)
        for name, make in (("container", container), ("tuple", Pair))
    }
    assert made["container"]["hypers"] == made["tuple"]["hypers"]
    assert made["container"]["examples"] == made["tuple"]["examples"]
    mapped = problem(container)
    data = mapped.data(torch.device("cpu"), generator())
    params, carry = mapped.init(generator())
    solution = Solution(mapped.space.constrain(mapped.space.init(torch.float64)), params, carry)
    whole = F.cross_entropy(F.linear(x[30:], params["weight"], params["bias"]), labels[30:])
    assert evaluate(mapped, solution, data.valid)["loss"] == pytest.approx(float(whole), rel=1e-12)


class Custom:
    """The batch of PyTorch's documentation of memory pinning."""

    def __init__(self, x):
        self.inp = x


class Slots:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (Custom(torch.ones(3)), "train batch holds a Custom, whose tensors cannot be reached"),
        ((SimpleNamespace(x=torch.ones(3)), torch.ones(3)), "holds a SimpleNamespace"),
        ({"a": Slots(torch.ones(3))}, "holds a Slots"),
        (None, "train loader returns None as a batch; a batch is a tensor, or a tuple"),
        (pack_sequence([torch.ones(3), torch.ones(2)]), "PackedSequence, in which the examples"),
        ((np.ones(3), np.ones(3)), r"no tensor with an example axis \(ndarray of float64\)"),
        ("text", r"no tensor with an example axis \(str\)"),
        ((torch.ones(()), 3), "no tensor with an example axis"),
        ({}, r"\(it is empty\)"),
        ((torch.ones(9, 2), torch.ones(3)), r"of 9 rows \(field 0\) and of 3 rows \(field 1\)"),
        (torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged), "nested tensor"),
    ],
)
def test_a_batch_whose_examples_cannot_be_counted_is_one_sentence(batch, words):
    with pytest.raises(BilevelError, match=words):
        LoaderStream([batch], generator())


@pytest.mark.parametrize(
    "shared",
    [torch.ones(1), torch.ones(()), torch.ones(1, 3), 0.5, "text", None, torch.Size([4, 5])],
)
def test_what_all_examples_share_may_come_first(shared):
    split = LoaderStream([(shared, *rows(9)), (shared, *rows(1))], generator())
    split.next(), split.next()
    assert split.examples == 10
    assert FullBatch((shared, *rows(9))).size == 9


def test_objects_without_tensors_pass():
    batch = (torch.ones(3), object(), np.arange(3), ["a", "b"], MappingProxyType({"a": 1}))
    assert LoaderStream([batch], generator()).peek()[1] is batch[1]


def test_rows_that_are_not_the_examples_of_the_loader_are_warned_of():
    def time_first(items):
        return torch.stack([x for x, _ in items], 1)

    loader = DataLoader(TensorDataset(torch.ones(12, 7), torch.ones(12)), 4, collate_fn=time_first)
    with pytest.warns(DataWarning, match="4 examples into its first batch, but .* 7 rows"):
        LoaderStream(loader, generator())


jagged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


@pytest.mark.parametrize(
    ("split", "words"),
    [
        (
            torch.eye(4).to_sparse(),
            r"the train split is a tensor of layout sparse_coo.*to_dense",
        ),
        ((torch.ones(4), torch.eye(4).to_sparse()), "layout sparse_coo"),
        (jagged, r"train split is a nested tensor, .* torch.nested.to_padded_tensor"),
        (
            (torch.ones(4), torch.tensor(3.0)),
            r"field 1 of the train split is a tensor of shape \[\], which",
        ),
        ((torch.ones(4), torch.ones(5)), "lengths: field 0 has 4 and field 1 has 5"),
        (({np.ones(3).tobytes()}, torch.ones(3)), r"a tuple that holds set \(field 0\)"),
        ((torch.ones(3), None), r"is a tuple that holds NoneType \(field 1\)"),
    ],
)
def test_a_split_whose_rows_cannot_be_drawn_is_one_sentence(split, words):
    with pytest.raises(BilevelError, match=words):
        stream(split, 2, generator())


def test_the_remedies_for_splits_work():
    padded = torch.nested.to_padded_tensor(jagged, 0.0)
    for split in (padded, torch.eye(4).to_sparse().to_dense()):
        assert len(stream(split, 2, generator()).next()) == 2


@pytest.mark.parametrize(
    "dataset",
    [
        [(torch.ones(2), None), (torch.ones(2), None)],
        [np.array([None, 1]), np.array([None, 2])],
        [torch.ones(2), torch.ones(3)],
        [{"x": torch.ones(2), "to": Custom}, {"x": torch.ones(2), "to": Custom}],
    ],
)
def test_examples_that_make_no_batch_are_one_sentence(dataset):
    with pytest.raises(BilevelError, match=r"valid loader cannot make a batch .*collate_fn"):
        stream(DataLoader(dataset, 2), None, generator(), name="valid")


def test_an_error_of_a_users_dataset_is_raised_as_it_is():
    class Broken(list):
        def __getitem__(self, index):
            raise TypeError("my own")

    with pytest.raises(TypeError, match="my own"):
        stream(DataLoader(Broken([1, 2]), 2), None, generator())
