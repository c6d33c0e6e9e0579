"""higher's gradients of optimizer settings (`override`), on the model of its `test_optim.py`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.outside.objectives import Objectives, ready
from benchmarks.outside.rows import Options, Row, compared, not_run, version
from bilevel import Space
from bilevel.domains import optimizer_setting
from bilevel.solvers import Unrolled

STEPS, EXAMPLES = 3, 10

FINITE = 1e-8
"""Of a finite difference of fourth order in float64."""

PEER = 1e-10
"""Of the same derivative by another program."""

SETTINGS = {"lr": 0.1, "weight_decay": 0.1}

CASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, float], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}, {}),
    "SGD, momentum": (torch.optim.SGD, SETTINGS | {"momentum": 0.1}, {}),
    "SGD, Nesterov": (torch.optim.SGD, SETTINGS | {"momentum": 0.1}, {"nesterov": True}),
    "Adam": (
        torch.optim.Adam,
        SETTINGS | {"beta1": 0.9, "beta2": 0.999, "eps": 1e-3},
        {},
    ),
    "Adam, eps = 1e-15": (torch.optim.Adam, SETTINGS | {"beta1": 0.9}, {"eps": 1e-15}),
    "AdamW": (
        torch.optim.AdamW,
        SETTINGS | {"beta1": 0.9, "beta2": 0.999, "eps": 1e-3},
        {},
    ),
    "RMSprop": (torch.optim.RMSprop, SETTINGS | {"alpha": 0.9, "eps": 1e-3, "momentum": 0.1}, {}),
    "RMSprop, centered": (
        torch.optim.RMSprop,
        SETTINGS | {"alpha": 0.9, "eps": 1e-3, "momentum": 0.1},
        {"centered": True},
    ),
}
"""The optimizer, the tuned settings and its options; 0.1 is higher's value."""

OTHERS = ("Adagrad", "Adadelta", "Adamax", "ASGD", "Rprop")
"""Optimizers that higher differentiates and we refuse."""


def network() -> nn.Module:
    """Return their small model."""
    return nn.Sequential(
        nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 4, bias=False), nn.Sigmoid(), nn.Linear(4, 2)
    ).double()


def data() -> tuple[nn.Module, Tensor]:
    """Return the model and x of three steps and of the outer loss, from seed 0."""
    torch.manual_seed(0)
    return network(), torch.rand((STEPS + 1) * EXAMPLES, 4, dtype=torch.float64)


def optimizer(
    kind: type[torch.optim.Optimizer], settings: dict[str, Any], options: dict[str, Any]
) -> Callable[[Any], torch.optim.Optimizer]:
    """Return the optimizer as a function of the weights, in PyTorch's names."""
    given = dict(settings)
    if "beta1" in given:
        given["betas"] = (given.pop("beta1"), given.pop("beta2", 0.999))
    return partial(kind, **given, **options)


def ours(case: str) -> Tensor:
    """Return the derivative of the outer loss in each setting, by `Unrolled`."""
    kind, settings, options = CASES[case]
    net, x = data()

    def loss(hypers: Any, params: Any, batch: Any) -> Tensor:
        return torch.func.functional_call(net, params, batch).square().mean()

    space = Space(**{name: optimizer_setting(name, init=value) for name, value in settings.items()})
    last = STEPS * EXAMPLES
    problem = Objectives(
        space,
        {name: p.detach() for name, p in net.named_parameters()},
        loss,
        loss,
        (x[:last],),
        (x[last:],),
        batch_size=EXAMPLES,
        in_order=True,
    )
    solver = ready(
        problem, Unrolled(inner_steps=STEPS, inner_optimizer=optimizer(kind, settings, options))
    )
    slopes = torch.autograd.functional.jacobian(
        lambda u: torch.stack([space.constrain(u)[name] for name in space]), solver.core.search.u0
    )
    return solver.hypergradient() / slopes.diagonal()


def trained_loss(case: str, settings: dict[str, float]) -> float:
    """Return the outer loss after three steps of PyTorch's optimizer."""
    kind, _, options = CASES[case]
    net, x = data()
    made = optimizer(kind, settings, options)(net.parameters())
    *steps, last = x.split(EXAMPLES)
    for batch in steps:
        made.zero_grad()
        net(batch).square().mean().backward()
        made.step()
    return net(last).square().mean().item()


def finite_differences(case: str) -> Tensor:
    """Return the same derivatives from four runs of PyTorch's optimizer for each setting.

    (8 (f(+h) − f(−h)) − (f(+2h) − f(−2h))) / 12h, with h = 3e-4 of the setting.
    """
    settings, found = CASES[case][1], []
    for name, value in settings.items():
        h = 3e-4 * (min(value, 1 - value) if name in ("beta1", "beta2", "alpha") else value)
        near, far = (
            trained_loss(case, settings | {name: value + k * h})
            - trained_loss(case, settings | {name: value - k * h})
            for k in (1, 2)
        )
        found.append((8 * near - far) / (12 * h))
    return torch.tensor(found, dtype=torch.float64)


def higher_gradients(case: str) -> Tensor:
    """Return the same derivatives by higher."""
    import higher

    kind, settings, options = CASES[case]
    net, x = data()
    leaves = {
        name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for name, value in settings.items()
    }
    override: dict[str, list[Any]] = {
        name: [leaf] for name, leaf in leaves.items() if name not in ("beta1", "beta2")
    }
    if "beta1" in leaves:
        override["betas"] = [(leaves["beta1"], leaves.get("beta2", 0.999))]
    made = optimizer(kind, settings, options)(net.parameters())
    *steps, last = x.split(EXAMPLES)
    with higher.innerloop_ctx(net, made, override=override) as (copy, stepper):
        for batch in steps:
            stepper.step(copy(batch).square().mean())
        loss = copy(last).square().mean()
        gradients = torch.autograd.grad(
            loss, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
    return torch.stack(gradients)


def run(options: Options) -> list[Row]:
    """Return the rows: finite differences of PyTorch's optimizers, then higher."""
    rows = []
    found = version("higher")
    for case, (_, settings, _) in CASES.items():
        what, mine = f"{case}: d/d({', '.join(settings)})", ours(case)
        rows.append(compared(f"{what}: finite differences", finite_differences(case), mine, FINITE))
        if found is None:
            rows.append(not_run(f"{what}: higher", "higher is not installed"))
            continue
        try:
            theirs = higher_gradients(case)
        except Exception as error:  # a peer that fails is a result
            reason = f"higher {found} raises {type(error).__name__}: {str(error).splitlines()[0]}"
            rows.append(not_run(f"{what}: higher", reason))
            continue
        rows.append(compared(f"{what}: higher {found}", theirs, mine, PEER))
    rows.append(not_run(", ".join(OTHERS), "`Unrolled` refuses these optimizers"))
    return rows
