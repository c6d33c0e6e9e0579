"""No step waits for the device; waiting operations are found on the CPU, by their names."""

import pytest
import torch

import bilevel.solvers.base.method
import bilevel.solvers.self_tuning
from bilevel.problem import Problem
from bilevel.problems import digits
from bilevel.solvers import SelfTuning
from tests.support.device_waits import Waited, no_waiting
from tests.support.solver_cases import RECIPES, Decayed, all_problems, all_solvers, ready


@all_solvers
@all_problems
def test_no_step_waits_for_the_device(make_problem, make):
    """The first step may move constants to the device; later ones wait for nothing."""
    solver = ready(make_problem(), make(inner_steps=2, clip_norm=1.0))
    solver.step(limit=1)
    with no_waiting():
        solver.step(warmup=True)
        solver.step()
        solver.step(limit=1)


# --- that it can fail ---


def read(loss):
    return loss.item()


LAPSES = {
    "item": read,
    "branch": lambda loss: 1 if loss > 0 else 0,
    "format": lambda loss: f"{loss:.3f}",
    "list": lambda loss: loss.tolist(),
    "numpy": lambda loss: loss.detach().numpy(),
    "host": lambda loss: loss.cpu(),
    "fresh scalar": lambda loss: loss + torch.tensor(1.0),
    "fresh number": lambda loss: loss + torch.as_tensor(1.0),
    "mask": lambda loss: loss[None][loss[None] > 0],
    "nonzero": lambda loss: torch.nonzero(loss[None]),
    "unique": lambda loss: loss[None].unique(),
    "equal": lambda loss: torch.equal(loss, loss),
}


@pytest.mark.parametrize("lapse", LAPSES.values(), ids=LAPSES)
@pytest.mark.parametrize("where", ["inner_loss", "outer_loss"])
def test_a_lapse_in_a_loss_is_found(where, lapse, monkeypatch):
    solver = ready(digits(hidden=[8]), SelfTuning(inner_steps=1))
    loss_of = getattr(Problem, where)

    def lapsed(self, *args):
        loss, carry = loss_of(self, *args)
        lapse(loss)
        return loss, carry

    monkeypatch.setattr(Problem, where, lapsed)
    with pytest.raises(Waited), no_waiting():
        solver.step()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("module", [bilevel.solvers.self_tuning, bilevel.solvers.base.method])
def test_an_item_in_a_descent_is_found(module, recipe, monkeypatch):
    solver = ready(digits(hidden=[8]), SelfTuning(inner_steps=1, **RECIPES[recipe]))
    descend = module.descend
    monkeypatch.setattr(
        module, "descend", lambda loss, *groups: (read(loss), descend(loss, *groups))[1]
    )
    with pytest.raises(Waited, match="a number is read"), no_waiting():
        solver.step()


def test_the_exception_is_the_seeding_alone():
    """A number that the network reads while its generators are seeded is found all the same."""

    class Reading(torch.nn.Linear):
        def forward(self, x):
            read(x.sum())
            return super().forward(x)

    solver = ready(Decayed(Reading(4, 3)))
    with pytest.raises(Waited), no_waiting():
        solver.step()
