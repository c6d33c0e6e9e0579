"""λ of networks in 16 bits is held, moved and differentiated in float32."""

import warnings
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim import SGD, Adam, RMSprop

from bilevel import Interval, ModuleProblem, Positive, Real, Refused, Runner, Space, squared_norm
from bilevel.domains import optimizer_setting
from bilevel.half_weights import HalfWeights, for_weights
from bilevel.solvers import (
    CG,
    SAMA,
    SOBA,
    Dense,
    EvolutionStrategies,
    FirstOrder,
    Fixed,
    Forward,
    Gaussian,
    Hessian,
    Implicit,
    Neumann,
    Penalty,
    PopulationBased,
    Search,
    SelfTuning,
    Unrolled,
    delta_stn,
    implicit_cg,
    implicit_nystrom,
)
from bilevel.solvers.linear_solve.half_products import widened
from tests.support.solver_cases import ready

HALF = [torch.bfloat16, torch.float16]


class Network(ModuleProblem):
    """A tanh network of any type with a decay, input noise and a scale of each input."""

    def __init__(self, kind, *, per_example=True, **space):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(60, 6, generator=generator)
        y = (x[:, 0] + 0.5 * torch.randn(60, generator=generator) > 0).long()
        own = {
            "decay": Positive(init=1e-2, per_example=per_example),
            "noise": Interval(low=0.0, high=1.0, init=0.3, per_example=per_example),
            "scale": Real(init=[1.0] * 6, shape=(6,), per_example=False),
        }
        torch.manual_seed(1)
        module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).to(kind)
        x = x.to(kind)
        split = (x[:30], y[:30]), (x[30:], y[30:])
        super().__init__(module, Space(**own, **space), *split, batch_size=10)

    def inputs(self, hypers, batch, *, train, generator):
        x = batch[0] * hypers["scale"]  # a λ in float32 would make x float32
        if train:
            noise = hypers["noise"]
            noise = noise if noise.ndim == 0 else noise[:, None]
            x = x * (1 + noise * torch.randn(x.shape, generator=generator).to(x.dtype))
        return (x,), {}

    def inner_objective(self, hypers, params, prediction, batch):
        penalty = (hypers["decay"] * squared_norm(params)).mean()
        return F.cross_entropy(prediction, batch[1]) + 0.5 * penalty

    def outer_objective(self, hypers, params, prediction, batch):
        return F.cross_entropy(prediction, batch[1])


def plain(lr):
    return partial(SGD, lr=lr)


SOLVERS = {
    "CG": lambda: implicit_cg(),
    "CG, Hessian": lambda: Implicit(linear_solve=CG(), curvature=Hessian(damping=2.0)),
    "Neumann": lambda: Implicit(linear_solve=Neumann(terms=20), batches=2),
    "Nyström": lambda: implicit_nystrom(),
    "Δ-STN": lambda: delta_stn(),
    "STN": lambda: SelfTuning(centered=False, regularized_w0=False, linearize=False),
    "dense response": lambda: delta_stn(response=Dense()),
    "reverse": lambda: Unrolled(),
    "forward": lambda: Unrolled(mode=Forward()),
    "SOBA": lambda: SOBA(),
    "SAMA": lambda: SAMA(finite_difference=False),
    "first order": lambda: FirstOrder(),
}


def options(name, kind, outer):
    space = {"per_example": name in ("Δ-STN", "STN")}
    if name == "first order":  # it takes a λ with a direct term alone
        made = Network(kind, **space)
        frozen = {"decay": {"frozen": True}, "noise": {"frozen": True}}
        made.space = made.space.override(frozen)
        return made, {"outer_optimizer": outer}
    return Network(kind, **space), {"outer_optimizer": outer}


@pytest.mark.parametrize("kind", HALF, ids=str)
@pytest.mark.parametrize("name", SOLVERS)
def test_hyperparameters_move_as_in_float32(name, kind):
    """The steps are below the rounding of λ in 16 bits, where they would leave it in place."""
    moves = []
    for each in (torch.float32, kind):
        problem, own = options(name, each, plain(1e-3))
        made = SOLVERS[name]()
        made.inner_optimizer, made.outer_optimizer = plain(0.05), own["outer_optimizer"]
        solver = ready(problem, made)
        before = solver.core.search.u0.clone()
        for _ in range(20):
            solver.step()
        assert solver.core.search.u.dtype == solver.core.search.sigma.dtype == torch.float32
        assert solver.hypergradient().dtype == torch.float32
        assert solver.core.weights.leaves[0].dtype == each
        assert all(leaf.dtype == torch.float32 for leaf in solver.solution().hypers.values())
        moves.append(solver.core.search.u0 - before)
    wide, narrow = moves
    rounding = torch.finfo(kind).eps * before.abs()
    assert 0 < wide.abs().max() / 20 < rounding.max()
    assert (wide - narrow).norm() < 0.3 * wide.norm()


class Linear(Network):
    """A linear network whose decay alone is tuned."""

    def __init__(self, kind):
        super().__init__(kind)
        torch.manual_seed(1)
        train, valid, _ = self._splits
        space = Space(decay=Positive(init=1e-2))
        ModuleProblem.__init__(self, nn.Linear(6, 2).to(kind), space, train, valid, batch_size=10)

    def inputs(self, hypers, batch, *, train, generator):
        return (batch[0],), {}


@pytest.mark.parametrize("kind", HALF, ids=str)
@pytest.mark.parametrize("outer", [partial(RMSprop, lr=3e-3), partial(Adam, lr=0.01)])
def test_a_run_in_16_bits_ends_near_the_run_in_float32(kind, outer, tmp_path):
    found = []
    for each in (torch.float32, kind):
        solver = implicit_cg(inner_optimizer=plain(0.05), outer_optimizer=outer)
        runner = Runner(epochs=20, progress="none", picture=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the solve's accuracy
            summary = runner.run(Linear(each), solver, directory=tmp_path / str(each))
        assert summary["message"] is None
        found.append(summary["hypers"]["decay"])
    assert abs(found[0] - 0.01) > 1e-4
    assert found[1] == pytest.approx(found[0], abs=0.25 * abs(found[0] - 0.01))


@pytest.mark.parametrize("kind", HALF, ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-9, 1.0, 1e6])
def test_a_product_neither_overflows_nor_vanishes(kind, size):
    draws = torch.Generator().manual_seed(0)
    A, q = torch.randn(7, 5, generator=draws), size * torch.randn(5, generator=draws)
    both = widened(lambda x: ((A.to(kind) @ x), x), kind)(q)
    torch.testing.assert_close(both[0], A @ q, rtol=0.02, atol=0.02 * size)
    torch.testing.assert_close(both[1], q, rtol=0.005, atol=0.0)
    assert widened(lambda x: x, torch.float32)(q) is q


@pytest.mark.parametrize("kind", HALF, ids=str)
def test_a_solver_that_subtracts_refuses_16_bits(kind):
    for solver in (EvolutionStrategies(), SAMA(), Penalty()):
        with pytest.raises(Refused, match=r"16 bits .*float\(\).*finite_difference=false"):
            ready(Network(kind), solver)
        ready(Network(torch.float32), type(solver)()).step()


@pytest.mark.parametrize("kind", HALF, ids=str)
def test_tuned_settings_of_the_optimizer_work_in_16_bits(kind):
    settings = {
        "rate": optimizer_setting("lr", init=0.05),
        "first": optimizer_setting("beta1", init=0.8),
        "second": optimizer_setting("beta2", init=0.95),
        "eps": optimizer_setting("eps", init=1e-3),
    }
    for mode in (Unrolled().mode, Forward()):
        solver = ready(
            Network(kind, per_example=False, **settings), Unrolled(mode=mode, inner_optimizer=Adam)
        )
        solver.step()
        assert torch.isfinite(solver.core.search.u).all()
        assert {leaf.dtype for leaf in solver.core.weights.leaves} == {kind}


@pytest.mark.parametrize("kind", HALF, ids=str)
def test_trials_and_baselines_run_in_16_bits(kind):
    for solver in (
        Search(trial_epochs=1),
        PopulationBased(population=2),
        Fixed(),
        Fixed(hypers=Gaussian(std={"decay": 0.001})),
    ):
        ready(Network(kind), solver)
        for _ in range(6):
            solver.step()
        assert all(leaf.dtype == torch.float32 for leaf in solver.solution().hypers.values())


@pytest.mark.parametrize("make", [implicit_cg, Unrolled, SOBA, delta_stn])
def test_batch_norm_in_16_bits(make):
    """The statistics of L_V are a function of w and of the input, which λ scales."""
    problem = Network(torch.bfloat16, per_example=False)
    train, valid, _ = problem._splits
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).bfloat16()
    ModuleProblem.__init__(problem, module, problem.space, train, valid, batch_size=10)
    solver = ready(problem, make(inner_optimizer=plain(0.05)))
    before = solver.core.search.u0.clone()
    solver.step()
    assert torch.isfinite(solver.core.search.u0).all()
    assert (solver.core.search.u0 != before).any()


def test_wide_weights_get_no_wrapper():
    for kind in (torch.float32, torch.float64):
        problem = Network(kind)
        assert for_weights(problem, problem.init(torch.Generator())[0]) is problem
    problem = Network(torch.bfloat16)
    wrapped = for_weights(problem, problem.init(torch.Generator())[0])
    assert isinstance(wrapped, HalfWeights)
    assert for_weights(wrapped, problem.init(torch.Generator())[0]) is wrapped
