"""TorchOpt's implicit tests on ridge regression (`tests/test_implicit.py`, `test_rr_solve_*`)."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.outside.objectives import Objectives, ready, sgd
from benchmarks.outside.rows import Options, Row, compared, not_run, version
from bilevel import Real, Space
from bilevel.solvers import CG, Implicit, Neumann

BATCHES, ROWS, FEATURES = 4, 1024, 10

TOLERANCE = {torch.float64: 15 * 1e-7, torch.float32: 15 * 1.3e-6}
"""Of their test: 15 times PyTorch's own tolerance for the type."""

EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Of a hypergradient against the closed form."""

STOP = 1e-4
"""Of a hypergradient against a peer, whose CG stops at a relative residual of 1e-5."""


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, list[tuple[Tensor, ...]]]:
    """Return w, λ and the batches (X, y, X_v, y_v) of their seed 42."""
    torch.manual_seed(42)
    w, λ = torch.randn(FEATURES, dtype=dtype), torch.rand(1, dtype=dtype)[0]
    torch.manual_seed(42)
    n = BATCHES * ROWS
    drawn = [torch.randn(n, FEATURES), torch.randn(n), torch.randn(n, FEATURES), torch.randn(n)]
    return w, λ, list(zip(*(t.to(dtype).split(ROWS) for t in drawn), strict=True))


def closed_form(w: Tensor, λ: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
    """Return dL_V(w*(λ))/dλ, [], through the normal equations; w has no part in it.

    L_T = 1/(2n) ‖Xw − y‖² + λ/2 ‖w‖² and L_V = 1/n_v ‖X_v w − y_v‖².
    """
    X, y, X_v, y_v = (t.double() for t in batch)
    λ = λ.detach().double().requires_grad_()
    H = X.T @ X / len(X) + λ * torch.eye(FEATURES, dtype=X.dtype)
    best = torch.linalg.solve(H, X.T @ y / len(X))
    return torch.autograd.grad((X_v @ best - y_v).square().mean(), λ)[0]


def ours(w: Tensor, λ: Tensor, batch: tuple[Tensor, ...], *, neumann: bool = False) -> Tensor:
    """Return the hypergradient of `Implicit`, after gradient descent has trained w."""
    X, y, X_v, y_v = batch
    step = 1 / float(torch.linalg.matrix_norm(X.T @ X / len(X) + λ * torch.eye(FEATURES), 2))
    solve = Neumann(terms=60, step=step) if neumann else CG(iterations=20, tolerance=1e-14)
    made = Objectives(
        Space(l2=Real(init=float(λ), per_example=False)),
        {"w": w},
        lambda hypers, p, b: (
            0.5 * (b[0] @ p["w"] - b[1]).square().mean()
            + 0.5 * hypers["l2"].to(b[0]) * p["w"].square().sum()
        ),
        lambda hypers, p, b: (b[0] @ p["w"] - b[1]).square().mean(),
        (X, y),
        (X_v, y_v),
    )
    solver = Implicit(linear_solve=solve, inner_optimizer=sgd(step))
    ready(made, solver).inner_phase(60)
    return solver.hypergradient()[0]


def torchopt_gradient(w: Tensor, λ: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
    """Return the hypergradient of TorchOpt's `custom_root` with its default solve."""
    import torchopt

    X, y, X_v, y_v = batch

    def objective(w: Tensor, λ: Tensor, data: Any) -> Tensor:
        X, y = data
        return 0.5 * (X @ w - y).square().mean() + 0.5 * λ * w.square().sum()

    @torchopt.diff.implicit.custom_root(torch.func.grad(objective, argnums=0), argnums=1)
    def fit(w: Tensor, λ: Tensor, data: Any) -> Tensor:
        X, y = data
        solve = torchopt.linear_solve.solve_cg(ridge=len(y) * λ.item(), init=w, maxiter=20)
        return solve(matvec=lambda v: X.T @ (X @ v), b=X.T @ y)

    λ = λ.detach().requires_grad_()
    return torch.autograd.grad((X_v @ fit(w, λ, (X, y)) - y_v).square().mean(), λ)[0]


def jaxopt_gradient(w: Tensor, λ: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
    """Return the hypergradient of jaxopt's `custom_root`, the reference of their test."""
    import jax
    import jaxopt

    jax.config.update("jax_enable_x64", w.dtype == torch.float64)
    w, X, y, X_v, y_v = (jax.numpy.asarray(t.numpy()) for t in (w, *batch))

    def objective(w: Any, λ: Any, X: Any, y: Any) -> Any:
        return 0.5 * ((X @ w - y) ** 2).mean() + 0.5 * λ * (w**2).sum()

    @jaxopt.implicit_diff.custom_root(jax.grad(objective))
    def fit(w: Any, λ: Any, X: Any, y: Any) -> Any:
        return jaxopt.linear_solve.solve_cg(
            lambda v: X.T @ (X @ v), X.T @ y, ridge=len(y) * λ, init=w, maxiter=20
        )

    def outer(λ: Any) -> Any:
        return ((X_v @ fit(w, λ, X, y) - y_v) ** 2).mean()

    value = jax.grad(outer)(jax.numpy.asarray(λ.detach().numpy()))
    return torch.tensor(float(value), dtype=torch.float64)


def path(gradient: Any, dtype: torch.dtype, lr: float = 1e-3) -> Tensor:
    """Return the hypergradients of the four batches and the last λ, [5], for steps of SGD."""
    w, λ, batches = problem(dtype)
    found = []
    for batch in batches:
        found.append(gradient(w, λ, batch).to(torch.float64))
        λ = λ - lr * found[-1].to(dtype)
    return torch.stack([*found, λ.double()])


def run(options: Options) -> list[Row]:
    """Return the rows: λ after their four steps, and the four hypergradients."""
    rows = []
    for dtype, tolerance in TOLERANCE.items():
        name = str(dtype).removeprefix("torch.")
        exact, mine = path(closed_form, dtype), path(ours, dtype)
        others = {"closed form": (exact, EXACT[dtype])}
        for package, gradient in (("torchopt", torchopt_gradient), ("jaxopt", jaxopt_gradient)):
            if found := version(package):
                others[f"{package} {found}"] = (path(gradient, dtype), STOP)
            else:
                rows.append(not_run(f"{package}, {name}", f"{package} is not installed"))
        for who, (theirs, close) in others.items():
            rows += [
                compared(f"λ after four steps, {name}: {who}", theirs[4], mine[4], tolerance),
                compared(f"four hypergradients, {name}: {who}", theirs[:4], mine[:4], close),
            ]
    exact, mine = path(closed_form, torch.float64), path(partial(ours, neumann=True), torch.float64)
    what = "four hypergradients by Neumann series, float64: closed form"
    return [*rows, compared(what, exact[:4], mine[:4], EXACT[torch.float64])]
