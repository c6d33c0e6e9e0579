"""A resumed run notices other data, and only those."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bilevel import BilevelError, ModuleProblem, Positive, Runner, Space, squared_norm
from bilevel.checkpoint.checkpoints import CheckpointWarning, load
from bilevel.parallel.process_group import bits
from bilevel.run.fingerprint import check_fingerprint, fingerprint
from bilevel.solvers import Fixed


class Least(ModuleProblem):
    def inner_objective(self, hypers, params, prediction, batch):
        return F.mse_loss(prediction, batch[1]) + (hypers["decay"] * squared_norm(params)).mean()

    def outer_objective(self, hypers, params, prediction, batch):
        return F.mse_loss(prediction, batch[1])


def split(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=generator), torch.randn(n, 1, generator=generator)


TRAIN, VALID = split(200), split(40, 1)


def problem(train=TRAIN, valid=VALID):
    torch.manual_seed(0)
    return Least(nn.Linear(3, 1), Space(decay=Positive(init=0.1)), train, valid, batch_size=20)


def run(directory, made, epochs=1, *, resume=False):
    runner = Runner(epochs=epochs, warmup_epochs=0, progress="none", picture=False)
    return runner.run(made, Fixed(), directory=directory, resume=resume)


def put(t, at, value):
    t = t.clone()
    t[at] = value
    return t


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"train": (TRAIN[0], TRAIN[1].flip(0))}, "train data, field 1 holds other values"),
        ({"train": (TRAIN[0] + 1, TRAIN[1])}, "train data, field 0 holds other values"),
        ({"valid": split(40, 2)}, "valid data, field 0 holds other values"),
        ({"valid": (*VALID, VALID[1])}, "valid data, field 2 is new"),
        ({"train": split(220)}, "has a split of 200 examples, but this one has 220"),
    ],
)
def test_a_run_is_not_resumed_on_other_data(tmp_path, changed, words):
    run(tmp_path, problem())
    with pytest.raises(BilevelError, match=f"{words}.*; .*(start a new run|same data)"):
        run(tmp_path, problem(**changed), 2, resume=True)


def test_a_single_changed_value_is_warned_of_and_the_same_data_are_not(tmp_path):
    run(tmp_path, problem())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path, problem(), 2, resume=True)
    one = (put(TRAIN[0], (78, 1), 0.25), TRAIN[1])
    with pytest.warns(CheckpointWarning, match="train data, field 0 differs in a few values"):
        run(tmp_path, problem(one), 3, resume=True)
    rounded = (TRAIN[0] * (1 + 1e-6), TRAIN[1])
    with pytest.warns(CheckpointWarning, match=r"field 0 differs .* or in rounding; resume"):
        run(tmp_path, problem(rounded), 4, resume=True)


def test_a_checkpoint_without_a_fingerprint_is_resumed(tmp_path):
    now = fingerprint(problem().data(torch.device("cpu"), torch.Generator()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_fingerprint({}, now)
    run(tmp_path, problem())
    assert load(tmp_path)["data"] == now


def test_a_corrected_test_split_is_warned_of():
    def with_test(test):
        made = Least(nn.Linear(3, 1), Space(decay=Positive(init=0.1)), TRAIN, VALID, test)
        return fingerprint(made.data(torch.device("cpu"), torch.Generator().manual_seed(0)))

    with pytest.warns(CheckpointWarning, match="test data, field 0 holds other values"):
        check_fingerprint(with_test(split(30, 3)), with_test(split(30, 4)))


def test_a_loader_is_known_by_the_form_of_its_first_batch(tmp_path):
    def loader(*tensors):
        return DataLoader(TensorDataset(*tensors), 20, shuffle=True)

    first = problem(loader(*TRAIN))
    data = first.data(torch.device("cpu"), torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    kept = fingerprint(data)
    assert torch.equal(before, torch.get_rng_state())
    assert kept["train"]["field 0"] == {"dtype": "float32", "shape": [3]}
    double = problem(loader(TRAIN[0].double(), TRAIN[1]))
    now = fingerprint(double.data(torch.device("cpu"), torch.Generator().manual_seed(0)))
    with pytest.warns(CheckpointWarning, match="field 0 had the dtype float32, not float64"):
        check_fingerprint(kept, now)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32, torch.float64])
def test_the_sum_of_bits_sees_one_entry_in_any_layout(dtype):
    for size in (7, 8, 64):
        t = torch.zeros(size, 3, dtype=dtype)
        assert bits(t) == 0
        assert bits(put(t, (size - 1, 2), 1)) != 0
        assert bits(put(t, (1, 0), 1).t()) != 0
        assert bits(put(t, (size - 1, 2), 1)[1:]) != 0
