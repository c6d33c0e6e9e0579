"""List problems and self-tuning solvers for the laws, and helpers of the tests of solvers."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from bilevel import (
    Integer,
    Interval,
    ModuleProblem,
    Positive,
    Problem,
    Real,
    Simplex,
    Space,
    squared_norm,
    streams,
)
from bilevel.problems import (
    MLP,
    Classification,
    InputDropout,
    LinearNetwork,
    LossWeights,
    Quadratic,
    Ridge,
    augmented_images,
    digits,
)
from bilevel.problems.datasets import standard_images
from bilevel.problems.datasets.labelled_images import Images
from bilevel.solvers import Dense, Fixed, SelfTuning

CPU, B = torch.device("cpu"), 6

# --- solvers ---

NAMES = ("centered", "regularized_w0", "linearize")
FLAGS = {
    "-".join(name for name, yes in zip(NAMES, on, strict=True) if yes) or "none": dict(
        zip(NAMES, on, strict=True)
    )
    for on in itertools.product([True, False], repeat=3)
    if on[0] or not on[2]
}
RECIPES = {
    "delta_stn": FLAGS["centered-regularized_w0-linearize"],
    "centered_stn": FLAGS["centered-regularized_w0"],
    "stn": FLAGS["none"],
}
SOLVERS = {name: partial(SelfTuning, **flags) for name, flags in FLAGS.items()} | {
    "dense response": partial(SelfTuning, response=Dense()),
    "fixed": Fixed,
}

all_flags = pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
all_solvers = pytest.mark.parametrize("make", SOLVERS.values(), ids=SOLVERS)


def sgd(lr, **options):
    return partial(torch.optim.SGD, lr=lr, **options)


def ready(problem, solver=None, *, away=0.0, seed=1, device=CPU):
    """Return `solver` (default Δ-STN), set up on `problem`.

    `away` moves w₀ and Θ, because some gradients vanish at Θ = 0.
    """
    solver = SelfTuning() if solver is None else solver
    generator = torch.Generator(device).manual_seed(seed)
    solver.setup(
        problem, problem.data(device, torch.Generator().manual_seed(seed)), device, generator
    )
    if away:
        draws = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            theta = solver.method.theta.leaves if isinstance(solver, SelfTuning) else []
            for leaf in solver.core.weights.leaves + theta:
                leaf.add_(
                    away * torch.randn(leaf.shape, generator=draws, dtype=leaf.dtype).to(device)
                )
    return solver


def drawn(solver, batch):
    """Return the solver's own loss for Θ, with draws that can be repeated."""
    core = solver.core
    core.generator.manual_seed(7)
    base = core.weights.detached() if solver.regularized_w0 else core.weights.tensors
    return solver.method.perturbed_loss(base, core.carry, batch)[0]


def set_to(tensors, value):
    with torch.no_grad():
        tensors.copy_(value.reshape(tensors.shape))


def nodes(h, order=8):
    """Return Gauss–Hermite points z and weights of N(0, I_h).

    They are exact for polynomials of degree below 2·order in each coordinate.
    """
    z, weight = np.polynomial.hermite_e.hermegauss(order)
    points = torch.tensor(list(itertools.product(z, repeat=h)))
    return points, torch.tensor(
        list(itertools.product(weight / math.sqrt(2 * math.pi), repeat=h))
    ).prod(1)


def expected_loss(solver, base=None, order=8):
    """Return E_ε of the solver's own perturbed loss on its training batch, by quadrature."""
    core, total = solver.core, 0.0
    base, batch = core.weights.tensors if base is None else base, core.data.train.peek()
    for z, weight in zip(*nodes(core.search.u.numel(), order), strict=True):
        core.search.perturbation = lambda *_, z=z: core.search.sigma.detach() * z
        total = total + weight * solver.method.perturbed_loss(base, core.carry, batch)[0]
    return total


# --- problems ---


def classifier(sizes=(6, 8, 7, 3), batch_size=8, **space):
    """An MLP with a dropout rate per layer and weight decay, on random data in float64."""
    generator = torch.Generator().manual_seed(0)
    splits = [
        (torch.randn(24, sizes[0], generator=generator).double(), torch.arange(24) % sizes[-1])
        for _ in range(3)
    ]
    images = Images(*splits, mean=0.0, std=1.0)
    strong = {"weight_decay": {"init": 0.1}} | space
    return Classification(
        lambda: MLP(sizes).double(),
        images,
        sites=len(sizes) - 1,
        batch_size=batch_size,
        space=strong,
    )


class Decayed(ModuleProblem):
    """Cross-entropy plus weight decay, in float64, on random inputs of `shape`."""

    def __init__(self, module, shape=(24, 4), *, batch_size=8, **space):
        generator = torch.Generator().manual_seed(0)
        splits = [
            (torch.randn(shape, generator=generator).double(), torch.arange(shape[0]) % 3)
            for _ in range(2)
        ]
        space = space or {"decay": Positive(init=0.1)}
        super().__init__(module.double(), Space(**space), *splits, batch_size=batch_size)

    def inner_objective(self, hypers, params, prediction, batch):
        penalty = (hypers["decay"] * squared_norm(params)).mean()
        return F.cross_entropy(prediction.flatten(1), batch[1]) + 0.5 * penalty

    def outer_objective(self, hypers, params, prediction, batch):
        return F.cross_entropy(prediction.flatten(1), batch[1])


class Dropped(Decayed):
    """The input is dropped out at a tuned rate besides; the hyperparameter `idle` does nothing."""

    def __init__(self, module, shape, *, per_example=True):
        space = {
            "rate": Interval(low=0.0, high=0.9, init=0.3, per_example=per_example),
            "decay": Positive(init=0.2, per_example=per_example),
            "idle": Real(init=0.0, per_example=per_example),
        }
        super().__init__(module, shape, batch_size=None, **space)

    def inputs(self, hypers, batch, *, train, generator):
        x = batch[0]
        if not train:
            return (x,), {}
        rate = hypers["rate"].reshape(-1, *[1] * (x.ndim - 1))
        return (
            x * (torch.rand(x.shape, generator=generator, device=x.device) > rate) / (1 - rate),
        ), {}


def normed(dropout=0.0, per_example=True):
    """Return a network with batch norm and dropout, whose weight decay is tuned."""
    module = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 3)
    )
    return Decayed(module, decay=Positive(init=0.1, per_example=per_example))


def convolutional():
    layers = (
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    return Dropped(nn.Sequential(*layers), (24, 1, 4, 4))


class Last(nn.Module):
    """An LSTM with a linear layer on its last output."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def every_domain():
    """Return a problem with a hyperparameter of each domain; only `decay` has an effect."""
    return Decayed(
        nn.Linear(4, 3),
        decay=Positive(init=0.1),
        rate=Interval(low=0.0, high=1.0, init=0.3),
        shift=Real(init=0.0, shape=(2,)),
        holes=Integer(low=0, high=5, init=2.0),
        mixture=Simplex(init=1 / 3, shape=(3,)),
        constant=Positive(init=1.0, frozen=True),
    )


class Recurrent(Problem):
    """h ← tanh(x Wᵀ + h Rᵀ): its state is carried from batch to batch."""

    def __init__(self):
        self.space = Space(decay=Real(init=0.1))

    def init(self, generator):
        params = {
            name: 0.5 * torch.randn(3, n, generator=generator).double()
            for name, n in (("W", 4), ("R", 3))
        }
        return params, {"h": torch.zeros(6, 3).double()}

    def data(self, device, generator):
        draws = torch.Generator().manual_seed(0)
        splits = [
            (torch.randn(6, 4, generator=draws).double(), torch.arange(6) % 3) for _ in range(2)
        ]
        return streams(*splits, batch_size=None, device=device, generator=generator)

    def predict(self, hypers, params, carry, batch, *, train, generator):
        h = torch.tanh(F.linear(batch[0], params["W"]) + F.linear(carry["h"], params["R"]))
        return h, {"h": h}

    def fresh_carry(self, carry, batch):
        return {"h": carry["h"].new_zeros(len(batch[0]), 3)}

    def inner_objective(self, hypers, params, prediction, batch):
        return (
            F.cross_entropy(prediction, batch[1])
            + 0.5 * (hypers["decay"] * squared_norm(params)).mean()
        )

    outer_objective = inner_objective


PROBLEMS = {
    "digits": partial(digits, hidden=[16]),
    "quadratic": partial(Quadratic.random, weights=4, hypers=2),
    "ridge": partial(Ridge.synthetic, features=4, batch_size=8),
    "ridge per feature": partial(Ridge.synthetic, features=4, per_feature=True),
    "linear network": partial(LinearNetwork.synthetic, features=4, hidden=[3]),
    "input dropout": partial(InputDropout.synthetic, features=4, batch_size=8),
    "loss weights": partial(LossWeights.digits, hidden=[8]),
    "augmented images": partial(
        augmented_images,
        standard_images.load_digits(),
        channels=[2, 3],
        hidden=5,
        train_size=24,
        batch_size=8,
    ),
    "dropout and batch norm": partial(normed, dropout=0.3),
    "convolutions with batch norm": convolutional,
    "lstm per example": lambda: Dropped(Last(), (24, 3, 4)),
    "lstm per batch": lambda: Dropped(Last(), (24, 3, 4), per_example=False),
    "carried state": Recurrent,
    "every domain": every_domain,
}
all_problems = pytest.mark.parametrize("make_problem", PROBLEMS.values(), ids=PROBLEMS)


def at(solver):
    """Return the holder of `problem`, `data`, `device` and `generator`: the core, if any."""
    return getattr(solver, "core", solver)


def groups(solver):
    """Return what the inner steps of a solver train, by name."""
    return {"weights": solver.core.weights} if isinstance(solver, Fixed) else solver.optimized()
