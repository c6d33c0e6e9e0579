"""hypertorch's logistic regression with a penalty for each weight: its notebook's printed numbers.

Source: `examples/logistic_regression.ipynb` of prolearner/hypertorch (Grazzi et al., ICML 2020).
"""

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.outside.objectives import Objectives, ready, sgd
from benchmarks.outside.rows import Options, Row, compared, not_run, version
from bilevel import Real, Space
from bilevel.solvers import CG, FixedPoint, Implicit, Reverse, Unrolled
from bilevel.solvers.linear_solve.base import LinearSolve

EXAMPLES, FEATURES, STEPS, STEP = 1000, 20, 100, 0.1

INNER_LOSSES = {
    0: 0.6931472420692444,
    10: 0.6285591125488281,
    20: 0.6243906021118164,
    30: 0.6241106390953064,
    40: 0.6240913271903992,
    50: 0.6240900754928589,
    99: 0.6240898370742798,
}
"""L_T as printed, by inner step, at λ = 1."""

VALIDATION_LOSSES = {
    0: 0.5743989944458008,
    10: 0.5337678790092468,
    20: 0.3615218698978424,
    30: 0.3225042521953583,
    40: 0.2987646162509918,
    50: 0.2944669723510742,
    60: 0.2905733585357666,
    70: 0.2885856032371521,
    80: 0.2871982753276825,
    90: 0.28584417700767517,
    100: 0.2853544056415558,
    200: 0.2816700041294098,
    300: 0.2813563644886017,
    400: 0.2808988392353058,
    500: 0.2807868719100952,
    600: 0.2806624174118042,
    700: 0.2805112302303314,
    800: 0.28051015734672546,
    900: 0.2805083394050598,
    990: 0.2805064916610718,
}
"""L_V as printed, by outer step."""


def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the training and the validation examples of their seed 1, in float32."""
    from sklearn.model_selection import train_test_split

    np.random.seed(1)  # their split draws from the global generator
    w = np.random.randn(FEATURES)
    x = np.random.randn(EXAMPLES, FEATURES)
    y = (x @ w + 0.1 * np.random.randn(EXAMPLES) > 0).astype(float)
    parts = train_test_split(x, y, test_size=0.5)
    x_train, x_valid, y_train, y_valid = (torch.from_numpy(part).float() for part in parts)
    return (x_train, y_train), (x_valid, y_valid)


def cross_entropy(params: Any, batch: Any) -> Tensor:
    """Return the mean loss of a batch (x, y)."""
    return F.binary_cross_entropy_with_logits(batch[0] @ params["w"], batch[1])


def inner(hypers: Any, params: Any, batch: Any) -> Tensor:
    """Return L_T = cross-entropy + ½ Σ_j λ_j w_j²."""
    return cross_entropy(params, batch) + 0.5 * (hypers["decay"] * params["w"].square()).sum()


def problem(dtype: torch.dtype = torch.float32) -> Objectives:
    """Return the problem at λ = 1 and w = 0."""
    train, valid = (tuple(t.to(dtype) for t in part) for part in data())
    space = Space(decay=Real(init=1.0, shape=(FEATURES,), per_example=False))
    weights = {"w": torch.zeros(FEATURES, dtype=dtype)}
    return Objectives(space, weights, inner, lambda h, p, b: cross_entropy(p, b), train, valid)


class ClampedSGD(torch.optim.SGD):
    """SGD that keeps λ at 1e-8 or above, as the notebook does after each step."""

    def step(self, closure: Any = None) -> Any:
        """Take a step and clamp."""
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.clamp_(min=1e-8)
        return loss


def inner_losses() -> Tensor:
    """Return L_T before each of the 100 inner steps."""
    solver = Implicit(inner_optimizer=sgd(STEP))
    ready(problem(), solver)
    return torch.stack([solver.inner_phase(1)["inner_loss"] for _ in range(STEPS)])


def validation_losses(rounds: int) -> Tensor:
    """Return L_V of each outer step: 100 steps from w = 0, of which the last ten are unrolled."""
    solver = Unrolled(
        mode=Reverse(truncate=10),
        inner_steps=STEPS,
        restart=True,
        inner_optimizer=sgd(STEP),
        outer_optimizer=partial(ClampedSGD, lr=1.0, momentum=0.9),
    )
    ready(problem(), solver)
    return torch.stack([solver.step()["outer_loss"] for _ in range(rounds)])


def unrolled_gradient() -> Tensor:
    """Return the hypergradient through 100 steps at λ = 1, in float64."""
    solver = Unrolled(inner_steps=STEPS, inner_optimizer=sgd(STEP))
    return ready(problem(torch.float64), solver).hypergradient()


def implicit_gradient(solve: LinearSolve) -> Tensor:
    """Return the implicit hypergradient after 100 steps at λ = 1, in float64."""
    solver = Implicit(linear_solve=solve, inner_optimizer=sgd(STEP))
    ready(problem(torch.float64), solver).inner_phase(STEPS)
    return solver.hypergradient()


def their_gradients() -> dict[str, Tensor]:
    """Return hypertorch's hypergradients of the same three kinds, in float64."""
    import hypergrad

    train, valid = (tuple(t.double() for t in part) for part in data())
    hypers = [torch.ones(FEATURES, dtype=torch.float64, requires_grad=True)]

    def outer(params: Any, hypers: Any) -> Tensor:
        return cross_entropy({"w": params[0]}, valid)

    def step(params: Any, hypers: Any) -> list[Tensor]:
        loss = inner({"decay": hypers[0]}, {"w": params[0]}, train)
        return [params[0] - STEP * torch.autograd.grad(loss, params, create_graph=True)[0]]

    history = [[torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True)]]
    for _ in range(STEPS):
        new = step(history[-1], hypers)
        history.append([new[0].detach().requires_grad_()])
    maps = [step] * STEPS
    return {
        "reverse": hypergrad.reverse(history, hypers, maps, outer, set_grad=False)[0],
        "fixed point": hypergrad.fixed_point(
            history[-1], hypers, 100, step, outer, set_grad=False, tol=1e-15
        )[0],
        "CG": hypergrad.CG(history[-1], hypers, 20, step, outer, set_grad=False, tol=1e-15)[0],
    }


def run(options: Options) -> list[Row]:
    """Return the rows: the printed losses, then the package's hypergradients."""
    losses = inner_losses()
    rounds = 51 if options.quick else 991
    valid = validation_losses(rounds)
    kept = {t: v for t, v in VALIDATION_LOSSES.items() if t < rounds}
    early = {t: v for t, v in kept.items() if t <= 100}
    rows = [
        compared(
            f"L_T at {len(INNER_LOSSES)} inner steps (0 … 99)",
            torch.tensor(list(INNER_LOSSES.values())),
            losses[list(INNER_LOSSES)],
            1e-6,
        ),
        compared(
            f"L_V at {len(early)} outer steps (0 … {max(early)})",
            torch.tensor(list(early.values())),
            valid[list(early)],
            1e-4,
        ),
        compared(
            f"L_V at {len(kept)} outer steps (0 … {max(kept)})",
            torch.tensor(list(kept.values())),
            valid[list(kept)],
            1e-4,
        ),
        compared(f"L_V at outer step {max(kept)}", kept[max(kept)], valid[max(kept)], 1e-4),
    ]
    ours = {
        "reverse": unrolled_gradient(),
        "fixed point": implicit_gradient(FixedPoint(iterations=100, step=STEP)),
        "CG": implicit_gradient(CG(iterations=20, tolerance=1e-15)),
    }
    found = version("hypergrad")
    theirs = their_gradients() if found else {}
    for kind, mine in ours.items():
        what = f"hypergradient at λ = 1, {kind}: hypergrad"
        rows.append(
            compared(f"{what} {found}", theirs[kind], mine, 1e-10)
            if found
            else not_run(what, "hypergrad is not installed")
        )
    return rows
