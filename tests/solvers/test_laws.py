"""The laws of all solvers: a new solver adds a line to the list and inherits every law."""

import copy
import gc
import json
import shutil
import warnings
from functools import partial

import pytest
import torch
import torch.nn as nn

from bilevel import Need, Positive, Refused, Runner, SolverWarning, check_problem
from bilevel.loggers.logger import Logger
from bilevel.problems import Quadratic, Ridge, digits
from bilevel.requirements import Trait
from bilevel.solvers import Dense, Fixed
from bilevel.solvers.base.descent import Descent
from tests.support.device_waits import no_waiting
from tests.support.solver_cases import Decayed, at, normed, ready
from tests.support.solver_list import (
    BLACK_BOX,
    DIRECT_ONLY,
    SELF_TUNING,
    SMALL,
    SOLVERS,
    TUNE_OPTIMIZERS,
    WITHOUT_DERIVATIVE,
    leaves_equal,
    suited,
)

all_solvers = pytest.mark.parametrize("name", SOLVERS)
gradient_based = pytest.mark.parametrize(
    "name", [name for name in SOLVERS if name not in BLACK_BOX | {"fixed"}]
)


@pytest.fixture(autouse=True)
def _without_solver_warnings():
    """Ignore the warnings of solvers after a few steps of a tiny problem."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolverWarning)
        yield


# --- what each can tune ---


@all_solvers
def test_what_is_sampled_is_tuned_or_refused_by_name(name):
    problem = digits(hidden=[8])
    if name in WITHOUT_DERIVATIVE - DIRECT_ONLY:
        ready(problem, SOLVERS[name]())
        return
    with pytest.raises(Refused) as refused:
        ready(problem, SOLVERS[name]())
    ways = (
        ["follows ∂L_V/∂λ alone", "freeze it"]
        if name in DIRECT_ONLY
        else ["needs ∂L_T/∂λ", "dropout=gaussian"]
    )
    for part in ("`input_dropout`", "self-tuning", *ways):
        assert part in str(refused.value)


@pytest.mark.parametrize("name", sorted(DIRECT_ONLY))
def test_without_a_direct_term_there_is_nothing_to_follow(name):
    """A problem with λ in L_T alone is refused, and the same problem with λ in L_V is not."""
    for make in (SMALL, lambda: Decayed(nn.Linear(4, 3), decay=Positive(init=0.1))):
        with pytest.raises(Refused, match=r"has none \(L_V does not depend on it directly\)"):
            ready(make(), SOLVERS[name]())
        ready(suited(name, make()), SOLVERS[name]()).step()


@all_solvers
def test_a_learning_rate_is_tuned_or_refused_by_name(name):
    problem = Quadratic.random(space={"rate": {"optimizer": "lr", "init": 0.05}})
    if name in TUNE_OPTIMIZERS:
        ready(problem, SOLVERS[name]()).step()
        return
    with pytest.raises(Refused, match="cannot tune `rate`: it sets the inner optimizer's lr"):
        ready(problem, SOLVERS[name]())


@all_solvers
def test_declarations_are_what_the_refusals_follow(name):
    solver = SOLVERS[name]()
    assert (Need.INNER_DERIVATIVE in solver.needs) == (name not in WITHOUT_DERIVATIVE)
    assert (Trait.TUNES_OPTIMIZER in solver.traits) == (name in TUNE_OPTIMIZERS - {"fixed"})
    assert (Trait.TUNES_NOTHING in solver.traits) == (name == "fixed")


def test_check_problem_asks_every_solver():
    report = check_problem(digits(hidden=[8]), {name: make() for name, make in SOLVERS.items()})
    assert set(report.tuned_by) == WITHOUT_DERIVATIVE - DIRECT_ONLY
    report = check_problem(SMALL(), {name: make() for name, make in SOLVERS.items()})
    assert report.tuned_by == [name for name in SOLVERS if name not in DIRECT_ONLY]


class Once(torch.autograd.Function):
    """The identity, as an operation that can be differentiated once alone."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient * 1.0


class DifferentiableOnce(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return Once.apply(torch.tanh(self.linear(x)))


@gradient_based
def test_a_network_that_can_be_differentiated_once_is_refused_where_twice_is_needed(name):
    """PyTorch would leave the second derivative out, in silence."""
    problem = suited(
        name, Decayed(DifferentiableOnce(), decay=Positive(init=0.1, per_example=False))
    )
    solver = SOLVERS[name]()
    if Need.SECOND_DERIVATIVES not in solver.needs:
        if name != "delta_stn":  # whose forward mode the function lacks
            ready(problem, solver).step()
        return
    with pytest.raises(Refused, match="needs second derivatives of L_T, which PyTorch lacks"):
        ready(problem, solver)


# --- state ---


class Killed(Logger):
    """Copy the run's directory as a kill leaves it: the last line is later than the checkpoint."""

    def __init__(self, copy_to):
        self.copy_to, self.records = copy_to, 0

    def start(self, run, state):
        self.directory = run.directory

    def log(self, record):
        self.records += 1
        if self.records == 4:
            shutil.copytree(self.directory, self.copy_to)


@all_solvers
def test_a_run_that_was_killed_goes_on_to_the_same_bits(name, tmp_path):
    def run(directory, *loggers, resume=False):
        runner = Runner(
            epochs=5, warmup_epochs=0.5, evaluate_every=0.5, progress="none", picture=False
        )
        problem = suited(name, SMALL(batch_size=256))
        runner.run(
            problem, SOLVERS[name](), directory=directory, seed=3, loggers=loggers, resume=resume
        )
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        state = torch.load(directory / "checkpoint.pt", weights_only=True)["state"]
        return (
            [drop_costs(json.loads(line)) for line in lines],
            state["solver"],
            state["train"],
            state["valid"],
        )

    whole = run(tmp_path / "whole", Killed(tmp_path / "killed"))
    assert len((tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()) == 4
    resumed = run(tmp_path / "killed", resume=True)
    assert whole[0] == resumed[0]
    assert len(whole[0]) > 4
    assert leaves_equal(whole[1:], resumed[1:])


def drop_costs(record):
    return {
        key: value
        for key, value in record.items()
        if not key.startswith(("seconds", "peak_memory_bytes"))
    }


@all_solvers
def test_the_state_goes_from_one_solver_to_another(name):
    problem = suited(name, SMALL(batch_size=256))
    first, second = (ready(problem, SOLVERS[name](), seed=seed) for seed in (1, 2))
    for _ in range(3):
        first.step()

    def parts(solver):
        return solver, at(solver).data.train, at(solver).data.valid

    state = copy.deepcopy([part.state_dict() for part in parts(first)])
    for solver in (second, first):
        for part, held in zip(parts(solver), copy.deepcopy(state), strict=True):
            part.load_state_dict(held)
        if solver is second:
            assert leaves_equal(solver.state_dict(), state[0])
    for solver in (first, second):
        for _ in range(3):
            solver.step()
    assert leaves_equal(first.state_dict(), second.state_dict())


@gradient_based
def test_nothing_is_kept_from_round_to_round(name):
    """The number of live tensors stays: no graph of an earlier outer step remains."""
    solver = ready(Quadratic.random(weights=3, hypers=2), SOLVERS[name]())
    counts = []
    for rounds in (30, 90):
        for _ in range(rounds):
            solver.step()
        solver.services.bad_step()  # tests the losses that wait, as every evaluation does
        gc.collect()
        counts.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    assert counts[1] <= counts[0]


@all_solvers
def test_the_users_module_is_left_as_it_was(name):
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    before, modes = copy.deepcopy(module.state_dict()), [m.training for m in module.modules()]
    solver = ready(
        suited(name, Decayed(module, decay=Positive(init=0.1, per_example=False))), SOLVERS[name]()
    )
    for _ in range(3):
        solver.step()
    assert leaves_equal(module.state_dict(), before)
    assert [m.training for m in module.modules()] == modes
    assert all(p.grad is None for p in module.parameters())


# --- the contract with the runner ---


@all_solvers
def test_a_round_respects_its_limit_and_warm_up_moves_no_lambda(name):
    solver = ready(suited(name, SMALL(batch_size=256)), SOLVERS[name]())
    before = {key: value.clone() for key, value in solver.solution().hypers.items()}
    for limit in (1, 2, None):
        taken = solver.inner_count
        solver.step(warmup=True, limit=limit)
        assert 1 <= solver.inner_count - taken <= (limit or 100)
    if name not in BLACK_BOX:
        assert solver.outer_count == 0
        assert leaves_equal(solver.solution().hypers, before)
    if isinstance(solver, Descent):
        solver.step()
        assert solver.outer_count == 1
        assert not leaves_equal(solver.solution().hypers, before)


@all_solvers
def test_metrics_are_scalars_without_a_graph(name):
    solver = ready(suited(name, SMALL(batch_size=256)), SOLVERS[name]())
    for _ in range(4):
        for value in solver.step().values():
            assert value.ndim == 0
            assert not value.requires_grad
            assert value.is_floating_point()


@gradient_based
def test_every_solver_trains_on_the_same_batches_in_the_same_order(name):
    seen = []

    def recorded(solver):
        draw = solver.core.data.train.next

        def drawn():
            seen.append(draw()[0].sum())
            return torch.utils._pytree.tree_map(lambda x: x, solver.core.data.train.peek())

        return drawn

    solver = ready(suited(name, SMALL(batch_size=64)), SOLVERS[name]())
    plain = ready(SMALL(batch_size=64), Fixed())
    own = [plain.core.data.train.next()[0].sum() for _ in range(12)]
    solver.core.data.train.next = recorded(solver)
    while len(seen) < 12:
        solver.step()
    assert torch.equal(torch.stack(seen[:12]), torch.stack(own))


@pytest.mark.parametrize(
    "make_problem",
    [
        SMALL,
        partial(digits, hidden=[8], dropout="concrete", weight_decay="per_weight"),
        partial(Ridge.synthetic, per_feature=True, features=4),
        partial(normed, per_example=False),
        partial(Quadratic.random, space={"rate": {"optimizer": "lr", "init": 0.05}}),
    ],
    ids=["digits", "per weight", "ridge", "batch norm", "learning rate"],
)
@gradient_based
def test_no_step_waits_for_the_device(name, make_problem):
    if name == "unrolled_forward" and make_problem.keywords.get("weight_decay") == "per_weight":
        pytest.skip("forward mode is for few hyperparameters")
    options = (
        {"response": Dense()}
        if name in SELF_TUNING and make_problem.func is Ridge.synthetic
        else {}
    )
    try:
        solver = ready(suited(name, make_problem()), SOLVERS[name](clip_norm=1.0, **options))
    except Refused:
        pytest.skip("refused, which other laws look at")
    solver.step(limit=1)
    solver.step()
    with no_waiting():
        solver.step(warmup=True)
        solver.step()
        solver.step(limit=1)


def test_the_list_is_complete():
    """Every solver that is installed is a line of this list."""
    from importlib.metadata import entry_points

    assert {entry.name for entry in entry_points(group="bilevel.solvers")} <= SOLVERS.keys()
