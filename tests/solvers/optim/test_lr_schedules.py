"""Test the learning-rate schedules that PyTorch lacks."""

import math

import pytest
import torch

from bilevel import BilevelError
from bilevel.solvers import ConstantThenCosine


def optimizer(lr=0.4):
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)


def rates(schedule, epochs):
    group, found = schedule.optimizer.param_groups[0], []
    for _ in range(epochs):
        found.append(group["lr"])
        schedule.optimizer.step()
        schedule.step()
    return found


def test_the_rate_is_constant_and_then_half_a_cosine():
    found = rates(ConstantThenCosine(optimizer(), total=60, hold=0.7), 64)
    assert found[:43] == [0.4] * 43
    for epoch in range(43, 60):
        expected = 0.2 * (1 + math.cos(math.pi * (epoch - 42) / 18))
        assert found[epoch] == pytest.approx(expected)
    assert found[51] == pytest.approx(0.2)
    assert found[60:] == [0.0] * 4


def test_it_continues_from_its_state():
    whole = rates(ConstantThenCosine(optimizer(), total=6, hold=1 / 3), 7)
    first, second = (ConstantThenCosine(optimizer(), total=6, hold=1 / 3) for _ in range(2))
    rates(first, 4)
    second.load_state_dict(first.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert rates(second, 3) == whole[4:]


@pytest.mark.parametrize(
    ("hold", "total", "words"),
    [
        (-1, 4, "hold=-1"),
        (1, 4, "hold=1 must be"),
        (0.5, 0, "total=0"),
        (0.5, math.inf, "total=inf"),
    ],
)
def test_wrong_numbers_are_one_sentence(hold, total, words):
    with pytest.raises(BilevelError, match=words):
        ConstantThenCosine(optimizer(), total=total, hold=hold)
