"""Tests of the watch for losses that are not finite."""

import math

import pytest
import torch

from bilevel.services import MOST_UNTESTED, Services


def watched(losses):
    services = Services()
    for count, loss in losses:
        services.watch(torch.tensor(loss), count)
    return services


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [1, 2, MOST_UNTESTED, MOST_UNTESTED + 1, 3 * MOST_UNTESTED])
def test_the_first_bad_step_is_noted_wherever_it_stands(bad, where):
    services = watched(
        (count, bad if count in (where, where + 3) else 1.0)
        for count in range(1, 4 * MOST_UNTESTED)
    )
    assert services.bad_step() == where
    assert services.bad_step() == where  # reading changes nothing
    services.watch(torch.tensor(math.nan), 1000)
    assert services.bad_step() == where


def test_outer_losses_repeat_the_number_of_the_inner_step():
    """After every ten inner steps one outer loss is watched under the last number."""
    rounds = [count for k in range(20) for count in (*range(10 * k + 1, 10 * k + 11), 10 * k + 10)]
    assert watched((count, 1.0) for count in rounds).bad_step() is None
    for place in (10, 21, 120):
        found = watched(
            (count, math.nan if i == place else 1.0) for i, count in enumerate(rounds)
        ).bad_step()
        assert found == rounds[place]


def test_a_loss_per_particle_and_a_step_counted_on_the_device_are_tested_at_once():
    services = Services()
    services.watch(torch.tensor(1.0), 1)
    services.watch(torch.tensor([1.0, math.nan]), 2)
    services.device_count = torch.tensor(7)
    services.watch(torch.tensor(math.inf), 3)
    assert int(services.first_bad_step) == 2
    assert services.bad_step() == 2


def test_no_graph_is_kept():
    w = torch.ones(3, requires_grad=True)
    services, loss = Services(), (w * w).sum()
    services.watch(loss, 1)
    assert not services._untested[0].requires_grad
