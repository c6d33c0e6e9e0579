"""Compare curvatures of the response objective, centered and not.

The formula A ⊗ G_w, the Gauss–Newton matrix and the Hessian.
"""

import itertools
import math
import statistics
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import hessian, jacrev

from benchmarks.experiments.harness import Context, Experiment
from benchmarks.toys import CPU, spread
from bilevel import (
    Batch,
    Hypers,
    ModuleProblem,
    Params,
    Prediction,
    Problem,
    Real,
    Space,
    squared_norm,
)
from bilevel.comparison.plot_style import COLORS, figure
from bilevel.problems.closed_form.ridge import Ridge
from bilevel.solvers import Dense, delta_stn

ORDER = 6
"""Number of Gauss–Hermite points in each λ, for expectations over ε."""
CENTRES = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0)
SCALES = (0.1, 0.3, 1.0)
MOMENTS = (0, 100, 500, 2000)
"""Inner steps after which the curvature of the network is computed."""
RATE = 0.02


class TanhNetwork(ModuleProblem):
    """A tanh network 2-4-1 on 40 noisy points, with a tuned weight decay e^λ for each layer."""

    def __init__(self, seed: int, scale: float) -> None:
        generator = torch.Generator().manual_seed(seed)

        def split() -> tuple[Tensor, Tensor]:
            x = torch.randn(40, 2, generator=generator, dtype=torch.float64)
            noise = 0.3 * torch.randn(40, generator=generator, dtype=torch.float64)
            return x, torch.sin(2 * x[:, 0]) + 0.5 * x[:, 1].square() + noise

        space = Space(log_decay=Real(init=-4.0, shape=(2,), scale=scale, per_example=False))
        super().__init__(
            lambda: nn.Sequential(
                nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)
            ).double(),
            space,
            split(),
            split(),
        )

    def inner_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        first, second = hypers["log_decay"].exp()
        by_layer = [
            squared_norm({name: p for name, p in params.items() if name.startswith(layer)})
            for layer in ("0", "2")
        ]
        return 0.5 * F.mse_loss(prediction, batch[1]) + 0.5 * (
            first * by_layer[0] + second * by_layer[1]
        )

    def outer_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        return 0.5 * F.mse_loss(prediction, batch[1])


class Spectra(NamedTuple):
    """Ascending eigenvalues of the curvature in (Θ, w₀), and the errors of its approximations.

    Attributes:
        true: Eigenvalues of the Hessian.
        gauss_newton: Eigenvalues of the Gauss–Newton matrix, with an exact expectation over ε.
        formula: Eigenvalues of A ⊗ G_w.
        errors: ‖G − H‖/‖H‖ (Frobenius) of the Gauss–Newton matrix and of the formula.
        moment: Condition number of A.
        weights: Condition number of G_w.
    """

    true: list[float]
    gauss_newton: list[float]
    formula: list[float]
    errors: tuple[float, float]
    moment: float
    weights: float


def curvature(
    problem: Problem, theta: Tensor, weights: Tensor, u: Tensor, sigma: Tensor, *, centered: bool
) -> Spectra:
    """Return the spectra at ŵ(ε) = w₀ + Θε; uncentered, φ + Θ(u + ε) with φ = w₀ − Θu.

    Args:
        problem: A problem without randomness, whose training split is one batch.
        theta: Θ, [m, h].
        weights: w₀, [m].
        u: λ₀, [h].
        sigma: The standard deviations of ε, [h].
        centered: Use ŵ(ε) = w₀ + Θε; otherwise the uncentered form.
    """
    data, template = (
        problem.data(CPU, torch.Generator().manual_seed(0)),
        problem.init(torch.Generator().manual_seed(0))[0],
    )
    batch, (m, h) = data.train.peek(), theta.shape

    def named(w: Tensor) -> Params:
        parts = w.split([p.numel() for p in template.values()])
        return {
            name: part.reshape(p.shape)
            for (name, p), part in zip(template.items(), parts, strict=True)
        }

    def predict(w: Tensor, noise: Tensor) -> Any:
        hypers = problem.space.constrain(u + noise)
        return problem.predict(hypers, named(w), {}, batch, train=True, generator=None)[0]

    def objective(w: Tensor, prediction: Any, noise: Tensor) -> Tensor:
        return problem.inner_objective(
            problem.space.constrain(u + noise), named(w), prediction, batch
        )

    def offset(noise: Tensor) -> Tensor:
        return torch.cat([noise if centered else u + noise, noise.new_ones(1)])

    def weights_at(z: Tensor, noise: Tensor) -> Tensor:
        return z.reshape(h + 1, m).T @ offset(noise)

    base = weights if centered else weights - theta @ u
    z = torch.cat([theta.T.reshape(-1), base])
    true, gauss_newton = torch.zeros(2, len(z), len(z), dtype=z.dtype)
    moment = torch.zeros(h + 1, h + 1, dtype=z.dtype)
    for point, probability in nodes(h):
        noise = sigma * point
        moment += probability * torch.outer(offset(noise), offset(noise))
        true += probability * hessian(
            lambda z, e=noise: objective(weights_at(z, e), predict(weights_at(z, e), e), e)
        )(z)
        w = weights_at(z, noise)
        block = torch.outer(offset(noise), offset(noise))
        gauss_newton += probability * torch.kron(
            block, linearized_hessian(predict, objective, w, noise)
        )
    G_w = linearized_hessian(predict, objective, weights, torch.zeros_like(u))
    formula = torch.kron(moment, G_w)
    errors = tuple(float((G - true).norm() / true.norm()) for G in (gauss_newton, formula))
    spectra = (torch.linalg.eigvalsh(matrix).tolist() for matrix in (true, gauss_newton, formula))
    return Spectra(
        *spectra, errors, *(torch.linalg.cond(matrix).item() for matrix in (moment, G_w))
    )  # type: ignore[arg-type]


def linearized_hessian(predict: Any, objective: Any, w: Tensor, noise: Tensor) -> Tensor:
    """Return the Hessian of the objective on the prediction linearized at w: Gauss–Newton in w."""
    value, slope = predict(w, noise), jacrev(lambda w: predict(w, noise))(w)
    return hessian(lambda x: objective(x, value + slope @ (x - w), noise))(
        w
    ).contiguous()  # torch.kron needs it


def nodes(h: int) -> list[tuple[Tensor, float]]:
    """Return points and weights of N(0, I_h), exact up to degree 2 · ORDER − 1 per coordinate."""
    z, weight = np.polynomial.hermite_e.hermegauss(ORDER)
    weight = weight / math.sqrt(2 * math.pi)
    points = itertools.product(zip(z, weight, strict=True), repeat=h)
    return [
        (torch.tensor([x for x, _ in point]), math.prod(p for _, p in point)) for point in points
    ]


# --- ridge ---


def ridge(job: tuple[float, float]) -> dict[str, Any]:
    """Return both curvatures of ridge regression at its best response, at given λ₀ and σ.

    H has fixed eigenvalues and commutes with the penalty, so all draws of the data agree.
    """
    centre, scale = job
    problem = Ridge.synthetic(features=5, dtype="float64")
    hypers = {"log_decay": torch.tensor(centre, dtype=torch.float64)}
    at = (problem.best_response_jacobian(hypers), problem.minimizer(hypers))
    u, sigma = torch.tensor([[centre], [scale]], dtype=torch.float64)
    spectra = {
        centered: curvature(problem, *at, u, sigma, centered=centered) for centered in (True, False)
    }
    return {"centre": centre, "scale": scale, "spectra": spectra}


# --- a network ---


def network(job: tuple[int, float]) -> list[dict[str, Any]]:
    """Return both curvatures along the training of Δ-STN, dense Θ, at fixed λ₀ = (−4, −4)."""
    seed, scale = job
    problem = TanhNetwork(seed, scale)
    solver = delta_stn(
        response=Dense(),
        inner_optimizer=lambda leaves: torch.optim.SGD(leaves, lr=RATE, momentum=0.9),
    )
    solver.setup(
        problem,
        problem.data(CPU, torch.Generator().manual_seed(seed)),
        CPU,
        torch.Generator().manual_seed(seed),
    )
    rows, u, sigma = [], solver.core.search.u0, solver.core.search.sigma.detach()
    for steps in MOMENTS:
        while solver.inner_count < steps:
            solver.step(warmup=True)
        theta = torch.cat([t.detach().reshape(-1, len(u)) for t in solver.method.theta.leaves])
        weights = torch.cat([w.detach().reshape(-1) for w in solver.core.weights.leaves])
        spectra = {
            c: curvature(problem, theta, weights, u, sigma, centered=c) for c in (True, False)
        }
        rows.append({"seed": seed, "scale": scale, "steps": steps, "spectra": spectra})
    return rows


# --- the block ---


def report(context: Context) -> str:
    """Return two tables and a picture."""
    seeds, scales = (range(100, 102), SCALES[1:]) if context.quick else (range(5), SCALES)
    ridges = context.map(ridge, itertools.product(CENTRES, scales))
    networks = [
        row for along in context.map(network, itertools.product(seeds, scales)) for row in along
    ]
    draw(ridges, networks, context)
    return (
        f"### Ridge\n\n{ridge_table(ridges)}\n\n"
        "### The tanh network, along the training of Δ-STN\n\n"
        f"Mean ± standard deviation over {len(seeds)} seeds.\n\n{network_table(networks)}\n\n"
        "![Spectra, condition numbers and errors of the approximations](conditioning.png)"
    )


def ridge_table(ridges: list[dict[str, Any]]) -> str:
    """Return one row for each σ and λ₀."""
    lines = [
        "| σ | λ₀ | cond G_w | cond A, uncentered | product | measured "
        "| cond A, centered | product | measured | error of A ⊗ G_w, uncentered | centered |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for scale, centre in sorted({(row["scale"], row["centre"]) for row in ridges}):
        spectra = next(
            row["spectra"] for row in ridges if (row["scale"], row["centre"]) == (scale, centre)
        )
        numbers = [spectra[True].weights]
        for centered in (False, True):
            s = spectra[centered]
            numbers += [s.moment, s.moment * s.weights, condition(s.true)]
        cells = [f"{number:.3g}" if number < 1000 else f"{number:.0f}" for number in numbers]
        cells += [f"{spectra[centered].errors[1]:.3f}" for centered in (False, True)]
        lines.append(f"| {scale} | {centre:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def network_table(networks: list[dict[str, Any]]) -> str:
    """Return one row for each σ and number of inner steps."""
    lines = [
        "| σ | inner steps | error of G | error of A ⊗ G_w | negative eigenvalues of H | cond G_w "
        "| cond A, uncentered / centered | cond G, uncentered | cond G, centered |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for scale, steps in sorted({(row["scale"], row["steps"]) for row in networks}):
        seeds = [
            row["spectra"] for row in networks if (row["scale"], row["steps"]) == (scale, steps)
        ]
        cells = [spread([s[True].errors[kind] for s in seeds]) for kind in (0, 1)]
        negative = statistics.mean(sum(x < 0 for x in s[True].true) for s in seeds)
        cells += [f"{negative:.1f} of {len(seeds[0][True].true)}"]
        cells += [spread([s[True].weights for s in seeds], ".0f")]
        cells += [f"{seeds[0][False].moment:,.0f} / {seeds[0][True].moment:,.0f}"]
        cells += [
            spread([condition(s[centered].gauss_newton) for s in seeds], ".3g")
            for centered in (False, True)
        ]
        lines.append(f"| {scale} | {steps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def condition(eigenvalues: list[float]) -> float:
    """Return the condition number of a matrix; infinity if it is not positive definite."""
    return eigenvalues[-1] / eigenvalues[0] if eigenvalues[0] > 0 else math.inf


def draw(ridges: list[dict[str, Any]], networks: list[dict[str, Any]], context: Context) -> None:
    """Draw spectra on the left; condition numbers over λ₀ and errors over training on the right."""
    with figure(context.figures / "conditioning.png", 2, 2, size=(3.6, 2.7)) as axes:
        scale, shown = max(row["scale"] for row in ridges), CENTRES[1]
        at = {row["centre"]: row["spectra"] for row in ridges if row["scale"] == scale}
        for centered, color in ((False, COLORS[1]), (True, COLORS[0])):
            label = "centered" if centered else "uncentered"
            spectrum(
                axes[0, 0], at[shown][centered].true, at[shown][centered].formula, color, label
            )
        axes[0, 0].set_title(f"ridge: λ₀ = −{-shown:g}, σ = {scale:g}")
        conditions(axes[0, 1], ridges)
        last = next(
            row for row in networks if row["steps"] == MOMENTS[-1] and row["scale"] == scale
        )
        network_spectrum(axes[1, 0], last["spectra"][True])
        axes[1, 0].set_title(
            f"tanh network: centered, σ = {scale:g}, step {MOMENTS[-1]}, seed {last['seed']}"
        )
        errors(axes[1, 1], networks)


def spectrum(ax: Any, measured: list[float], formula: list[float], color: str, label: str) -> None:
    """Draw measured eigenvalues as dots and those of the formula as a line."""
    ax.plot(
        range(1, len(measured) + 1),
        measured,
        "o",
        color=color,
        markersize=4,
        label=f"{label}, measured",
    )
    ax.plot(
        range(1, len(formula) + 1), formula, color=color, linewidth=1, label=f"{label}, A ⊗ G_w"
    )
    ax.set_yscale("log")
    ax.set_xlabel("index")
    ax.set_ylabel("eigenvalue")
    ax.legend()


def conditions(ax: Any, ridges: list[dict[str, Any]]) -> None:
    """Draw condition numbers of ridge against λ₀: the formula as a line, measurements as dots."""
    scales = sorted({row["scale"] for row in ridges})
    for (centered, color), (scale, dash, mark) in itertools.product(
        ((False, COLORS[1]), (True, COLORS[0])),
        zip(scales, (":", "--", "-"), ("o", "s", "^"), strict=False),
    ):
        of = [row for row in ridges if row["scale"] == scale]
        centres, each = [row["centre"] for row in of], [row["spectra"][centered] for row in of]
        label = f"{'centered' if centered else 'uncentered'}, σ = {scale:g}"
        ax.plot(
            centres,
            [condition(s.formula) for s in each],
            color=color,
            linestyle=dash,
            linewidth=1,
            label=label,
        )
        ax.plot(centres, [condition(s.true) for s in each], mark, color=color, markersize=4)
    ax.set_yscale("log")
    ax.set_title("ridge: condition number")
    ax.set_xlabel("λ₀")
    ax.legend(title="lines: A ⊗ G_w; marks: measured", title_fontsize=7, ncols=2, fontsize=6)


def network_spectrum(ax: Any, spectra: Spectra) -> None:
    """Draw magnitudes of the eigenvalues in ascending order; negative ones are hollow."""
    indices = list(range(1, len(spectra.true) + 1))
    for values, marker, color, label in (
        (spectra.true, "o", "0.3", "Hessian"),
        (spectra.gauss_newton, "s", COLORS[2], "Gauss–Newton"),
        (spectra.formula, "^", COLORS[4], "A ⊗ G_w"),
    ):
        for sign, fill in ((1, color), (-1, "none")):
            kept = [(i, abs(x)) for i, x in zip(indices, values, strict=True) if sign * x > 0]
            name = label if sign > 0 else f"{label}, negative"
            if kept:
                look = {"markersize": 3.5, "markeredgecolor": color, "markerfacecolor": fill}
                ax.plot(*zip(*kept, strict=True), marker, label=name, **look)
    ax.set_yscale("log")
    ax.set_xlabel("index")
    ax.set_ylabel("|eigenvalue|")
    ax.legend()


def errors(ax: Any, networks: list[dict[str, Any]]) -> None:
    """Draw the relative error of both approximations along training."""
    from matplotlib.ticker import LogLocator

    scales = sorted({row["scale"] for row in networks})
    at = [max(steps, 10) for steps in MOMENTS]
    for scale, dash in zip(scales, (":", "--", "-"), strict=False):
        for kind, (label, color) in enumerate((("G", COLORS[2]), ("A ⊗ G_w", COLORS[4]))):
            means = [
                statistics.mean(
                    row["spectra"][True].errors[kind]
                    for row in networks
                    if (row["scale"], row["steps"]) == (scale, steps)
                )
                for steps in MOMENTS
            ]
            ax.plot(
                at, means, marker=".", color=color, linestyle=dash, label=f"{label}, σ = {scale:g}"
            )
    seeds = len({row["seed"] for row in networks})
    ax.set_title(f"tanh network: ‖· − H‖/‖H‖, centered, {seeds} seeds")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** 0.3)  # room for the legend
    ax.set_xticks(at, [str(steps) for steps in MOMENTS])
    ax.minorticks_off()
    ax.set_xlabel("inner step")
    ax.legend(ncols=2, handlelength=3.2)  # long enough for dashes beside the mark


EXPERIMENT = Experiment(page="experiments/conditioning.md", report=report)
