"""Ridge regression on scikit-learn's diabetes data: a documented constant, fits and λ*."""

import math

import numpy as np
import torch
from torch import Tensor

from benchmarks.outside.objectives import ready, sgd
from benchmarks.outside.rows import Options, Row, compared, version
from bilevel.problems import Ridge
from bilevel.solvers import CG, Implicit

ALPHAS, SCORE = (1e-3, 1e-2, 1e-1, 1.0), 0.5166
"""The example in the documentation of `RidgeCV`: its α, and the printed R² of the chosen one."""


def log_decay(alpha: float, examples: int) -> dict[str, Tensor]:
    """Return our λ for scikit-learn's ‖Xw − y‖² + α ‖w‖²: e^λ = α/n."""
    return {"log_decay": torch.tensor(math.log(alpha / examples), dtype=torch.float64)}


def centred(X: Tensor, y: Tensor) -> tuple[Ridge, Tensor, Tensor]:
    """Return the ridge problem of centred data, and the means: a free intercept does the same."""
    split = (X - X.mean(0), y - y.mean())
    return Ridge(split, split), X.mean(0), y.mean()


def predicted(X: Tensor, y: Tensor, alpha: float, at: Tensor) -> Tensor:
    """Return the predictions at `at` of ridge regression with an intercept."""
    problem, x_mean, y_mean = centred(X, y)
    return y_mean + (at - x_mean) @ problem.minimizer(log_decay(alpha, len(X)))


def best_score() -> float:
    """Return R² on all data for the α of the least leave-one-out error."""
    from sklearn.datasets import load_diabetes

    X, y = (torch.from_numpy(a).double() for a in load_diabetes(return_X_y=True))

    def left_out(alpha: float) -> float:
        rest = ~torch.eye(len(X), dtype=torch.bool)
        return sum(
            float((predicted(X[keep], y[keep], alpha, X[i]) - y[i]).square())
            for i, keep in enumerate(rest)
        )

    alpha = min(ALPHAS, key=left_out)
    residual = (predicted(X, y, alpha, X) - y).square().sum()
    return float(1 - residual / (y - y.mean()).square().sum())


class Fits:
    """scikit-learn's ridge regression on the splits of `Ridge.diabetes`."""

    def __init__(self) -> None:
        problem = Ridge.diabetes(dtype=torch.float64)
        (self.X, self.y), (self.X_v, self.y_v) = (
            tuple(t.numpy() for t in split) for split in problem._splits[:2]
        )

    def weights(self, λ: float) -> np.ndarray:
        """Return w at our λ."""
        from sklearn.linear_model import Ridge as Theirs

        alpha = len(self.X) * math.exp(λ)
        return Theirs(alpha=alpha, fit_intercept=False, tol=1e-14).fit(self.X, self.y).coef_

    def loss(self, λ: float) -> float:
        """Return L_V at w*(λ)."""
        return float(0.5 * np.mean((self.X_v @ self.weights(λ) - self.y_v) ** 2))

    def slope(self, λ: float, h: float = 1e-3) -> float:
        """Return dL_V/dλ by differences of fourth order."""
        near, far = (self.loss(λ + k * h) - self.loss(λ - k * h) for k in (1, 2))
        return (8 * near - far) / (12 * h)

    def best(self) -> float:
        """Return λ* by scalar minimization."""
        from scipy.optimize import minimize_scalar

        found = minimize_scalar(self.loss, bracket=(-3.0, 0.0), options={"xtol": 1e-10})
        return float(found.x)


def run(options: Options) -> list[Row]:
    """Return the rows."""
    fits, problem = Fits(), Ridge.diabetes(dtype=torch.float64)
    who = f"scikit-learn {version('scikit-learn')}"
    optimum = float(problem.optimum()["log_decay"])
    at = {"log_decay": torch.zeros((), dtype=torch.float64)}
    solver = Implicit(
        linear_solve=CG(iterations=20, tolerance=1e-14),
        inner_optimizer=sgd(0.2),
    )
    ready(problem, solver).inner_phase(300)
    tuned = Implicit(
        inner_steps=20,
        linear_solve=CG(iterations=20),
        inner_optimizer=sgd(0.2),
        outer_optimizer=sgd(50.0),
    )
    ready(problem, tuned)
    for _ in range(50 if options.quick else 500):
        tuned.step()
    return [
        compared(
            "R² of `RidgeCV`'s example, as documented", SCORE, best_score(), 5e-5, relative=False
        ),
        compared(
            f"w*(0) in closed form: {who}",
            torch.from_numpy(fits.weights(0.0)),
            problem.minimizer(at),
            1e-10,
        ),
        compared(
            f"dL_V/dλ at λ = 0 by CG: differences of {who}",
            fits.slope(0.0),
            solver.hypergradient(),
            1e-8,
        ),
        compared(
            f"λ* in closed form: minimization over {who}",
            fits.best(),
            optimum,
            1e-6,
            relative=False,
        ),
        compared(
            f"λ after the rounds of `Implicit` with CG: minimization over {who}",
            fits.best(),
            tuned.core.search.u.detach(),
            1e-3,
            relative=False,
        ),
    ]
