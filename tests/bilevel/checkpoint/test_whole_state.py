"""A checkpoint holds everything: loading restores every attribute of the solver and its streams."""

import copy
import types
from functools import partial

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from bilevel.problems import digits
from bilevel.timers import Timers
from tests.soak import kills
from tests.support.solver_cases import at, ready
from tests.support.solver_list import SMALL, SOLVERS, suited

OURS = ("bilevel", "solvers", "problems")
LEFT_OUT = (
    Timers,
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    partial,
    type,
    torch.nn.Module,
)
"""What holds no state of a run: the clock of the phases, code, and the user's module."""
NO_STATE = (
    ".first_bad_step",  # nothing is saved once there was one
    "._untested",  # losses that the evaluation before every checkpoint tests
    "._first_untested",
    ".core.weight_decay",  # what a method learns of the optimizer when it first needs it
    ".recent",  # the batches of the round before: the next round gathers its own
    ".report",  # the metrics of the last outer step, which has told them
    ".calls",  # what set-up has learned of the problem's functions
    ".data.2",  # of the test split nothing is drawn
)


def walk(value, path="", above=()):
    """Path and comparable value of everything that can be reached from `value`."""
    if path.endswith(NO_STATE):
        return
    if isinstance(value, (int, float, str, bytes, bool, type(None), torch.dtype, torch.device)):
        yield path, value
        return
    if isinstance(value, LEFT_OUT) or id(value) in above:
        return
    above = (*above, id(value))
    if isinstance(value, torch.Tensor) and value.is_meta:  # a placeholder of the user's module
        yield path, (str(value.dtype), tuple(value.shape))
    elif isinstance(value, torch.Tensor):
        yield (
            path,
            (
                str(value.dtype),
                tuple(value.shape),
                value.detach().clone().numpy().tobytes(),
                value.requires_grad,
            ),
        )
    elif isinstance(value, torch.Generator):
        yield f"{path}.state", value.get_state().numpy().tobytes()
        yield (
            f"{path}.seed",
            value.initial_seed(),
        )  # what is drawn on the CPU for other devices follows from it
    elif isinstance(value, (Optimizer, LRScheduler, ReduceLROnPlateau)):
        yield from walk(value.state_dict(), path, above)
    elif isinstance(value, dict):
        yield f"{path}.keys", sorted(map(str, value))
        for key, entry in value.items():
            yield from walk(entry, f"{path}.{key}", above)
    elif isinstance(value, (list, tuple, set)):
        yield f"{path}.length", len(value)
        for index, entry in enumerate(value):
            yield from walk(entry, f"{path}.{index}", above)
    elif any(kind.__module__.split(".")[0] in OURS for kind in type(value).__mro__):
        declared = {
            name for kind in type(value).__mro__ for name in vars(kind).get("__annotations__", ())
        }
        own = vars(value).keys() if hasattr(value, "__dict__") else set()
        for name in sorted(own | {name for name in declared if hasattr(value, name)}):
            yield from walk(getattr(value, name), f"{path}.{name}", above)


def differing(one, other):
    """Where two solvers, with their streams, are not in the same state."""
    ours, theirs = (dict(walk(solver)) for solver in (one, other))
    assert len(ours) > 20
    missing = ours.keys() ^ theirs.keys()
    return sorted(
        missing
        | {path for path in ours.keys() & theirs.keys() if repr(ours[path]) != repr(theirs[path])}
    )


def settled(name, seed):
    problem = suited(name, SMALL(batch_size=256))
    return ready(problem, SOLVERS[name](), seed=seed)


def handed_over(first, second):
    """The state of `first` loaded into `second`, as the loop does it."""
    state = copy.deepcopy(
        (first.state_dict(), at(first).data.train.state_dict(), at(first).data.valid.state_dict())
    )
    for part, held in zip(
        (second, at(second).data.train, at(second).data.valid), state, strict=True
    ):
        part.load_state_dict(held)


@pytest.mark.parametrize("rounds", [0, 4])
@pytest.mark.parametrize("name", SOLVERS)
def test_every_attribute_is_what_it_was(name, rounds):
    first, second = settled(name, 1), settled(name, 2)
    for _ in range(rounds):
        first.step()
    first.epoch_ended(1.0)
    assert differing(first, second)  # another seed
    handed_over(first, second)
    assert differing(first, second) == []


class Forgetful(SOLVERS["fixed"]):
    """Draws from a generator of its own, which no checkpoint knows."""

    def setup(self, *arguments):
        super().setup(*arguments)
        self.own = torch.Generator().manual_seed(7)

    def step(self, **limits):
        torch.rand(3, generator=self.own)
        return super().step(**limits)


def test_a_forgotten_generator_is_found():
    first, second = (ready(digits(hidden=[4]), Forgetful(), seed=seed) for seed in (1, 2))
    first.step()
    handed_over(first, second)
    assert differing(first, second) == [".own.state"]


def test_the_matrix_has_every_solver():
    assert kills.SOLVERS.keys() >= SOLVERS.keys()
    cases = list(kills.cases(0))
    assert {(case.solver, case.fault) for case in cases} == {
        (s, f) for s in kills.SOLVERS for f in kills.FAULTS
    }
    assert sum(case.strikes for case in cases if case.fault == "kill") >= 40
