"""Make a toy page: compare Δ-STN's ŵ(λ), ∂ŵ/∂λ and λ with the closed forms."""

from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from benchmarks.experiments.harness import Context, Experiment
from benchmarks.toys import Job, compare, make, ready, response_jacobian, spread, train
from bilevel.comparison.plot_style import COLORS, figure

DATA = {
    "synthetic": "synthetic, condition 10",
    "diabetes": "diabetes",
    "wine": "wine",
    "linnerud": "Linnerud",
}
SHOWN = "wine"
"""The data set whose response curves are drawn."""
ROUNDS, WARMUP = 400, 20
REACH = 2.0
"""Range of the drawn ŵ(λ), in σ to either side of λ₀."""
Run: TypeAlias = dict[str, Any]


def experiment(kind: str, name: str) -> Experiment:
    """Return the experiment that makes the block `name` of docs/problems/NAME.md."""
    return Experiment(page=f"problems/{name}.md", report=partial(report, kind=kind, name=name))


def report(context: Context, *, kind: str, name: str) -> str:
    """Return the table and the picture."""
    seeds, rounds = (range(100, 102), ROUNDS // 4) if context.quick else (range(5), ROUNDS)
    jobs = [
        Job(kind, data, None, "delta_stn", "dense", seed, rounds, WARMUP, 0.03, 0.03)
        for data in DATA
        for seed in seeds
    ]
    runs: dict[str, list[Run]] = {data: [] for data in DATA}
    for job, run in zip(jobs, context.map(follow, jobs), strict=True):
        runs[job.data].append(run)
    draw(runs, context.figures / f"{name}.png", kind)
    lines = [
        "| data | λ\\* | λ | regret | cosine of ∂ŵ/∂λ with ∂w\\*/∂λ | its relative error "
        "| error of ŵ |",
        "|---|---|---|---|---|---|---|",
    ]
    for data, title in DATA.items():
        group = runs[data]
        cells = [
            f"{group[0]['best']:.3f}",
            spread([run["path"][-1] for run in group]),
            spread([run["regret"] for run in group], ".2e"),
            *(
                spread([run["end"][key] for run in group])
                for key in ("response_cosine", "response_error", "weight_error")
            ),
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return (
        f"Δ-STN with a dense response after {5 * rounds} inner steps, "
        f"mean ± standard deviation over {len(seeds)} seeds.\n\n"
        + "\n".join(lines)
        + "\n\n![Δ-STN's response and its Jacobian against the exact ones, and the path of λ]"
        + f"({name}.png)"
    )


def follow(job: Job) -> Run:
    """Return the path of λ, ŵ(λ) at the start and end of tuning, and their errors."""
    problem = make(job)
    solver = ready(job, problem)
    best = problem.space.unconstrain(problem.optimum()).item()
    path, steps, shots = [], [], []
    moments = range(WARMUP, job.rounds + 1, max(1, job.rounds // 80))
    for rounds in train(solver, moments, job.warmup):
        steps.append(5 * rounds)
        path.append(solver.core.search.u0.item())
        if rounds in (moments[0], moments[-1]):
            offsets = (
                REACH
                * solver.core.search.sigma.detach()
                * torch.linspace(-1, 1, 9, dtype=torch.float64)
            )
            with torch.no_grad():
                maps = torch.stack(
                    [problem.linear_map(solver.method.respond(offset[None])) for offset in offsets]
                )
            shots.append(((path[-1] + offsets).tolist(), maps.tolist()))
    hypers = problem.space.constrain(solver.core.search.u0)
    return {
        "best": best,
        "path": path,
        "steps": steps,
        "shots": shots,
        "estimated": response_jacobian(problem, solver)[:, 0].tolist(),
        "exact": problem.best_response_jacobian(hypers)[:, 0].tolist(),
        "regret": problem.exact(hypers)["regret"].item(),
        "end": compare(problem, solver, rounds),
    }


def draw(runs: dict[str, list[Run]], place: Any, kind: str) -> None:
    """Draw responses, Jacobians and paths."""
    with figure(place, 1, 3, size=(3.4, 2.9)) as axes:
        responses(axes[0, 0], runs[SHOWN][0], kind)
        jacobians(axes[0, 1], runs)
        paths(axes[0, 2], runs)


def responses(ax: Any, run: Run, kind: str) -> None:
    """Draw w*(λ) as thin lines and ŵ(λ) at two moments over them."""
    problem = make(Job(kind, SHOWN, None, "delta_stn", "dense", 0, 0, 0, 0.0, 0.0))
    (name,) = problem.penalized
    ends = [at for shot in run["shots"] for at in shot[0]]
    grid = torch.linspace(min(ends) - 0.5, max(ends) + 0.5, 100, dtype=torch.float64)
    exact = torch.stack([problem.minimizer({name: λ}) for λ in grid])
    largest = exact.abs().amax(0).argsort(descending=True)[:5]
    for number, entry in enumerate(exact[:, largest].T):
        ax.plot(grid, entry, color="0.6", linewidth=0.8, label=None if number else "w*(λ)")
    for (λ, maps), color, when in zip(
        run["shots"], (COLORS[4], COLORS[0]), ("tuning begins", "the end"), strict=True
    ):
        curve = Tensor(maps)[:, largest]
        for number, entry in enumerate(curve.T):
            ax.plot(
                λ,
                entry,
                color=color,
                linewidth=2,
                alpha=0.9,
                label=None if number else f"Δ-STN, {when}",
            )
        ax.plot(
            [λ[len(λ) // 2]] * len(largest),
            curve[len(λ) // 2],
            "o",
            color=color,
            markersize=4,
            markeredgecolor="white",
        )
    ax.axvline(run["best"], color="0.3", linestyle=":", linewidth=1, label="λ*")
    ax.set_title(f"best response, {DATA[SHOWN]}, 5 largest weights")
    ax.set_xlabel("λ")
    ax.set_ylabel("weight")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.4 * (high - low))
    ax.legend(ncols=2, loc="upper center")


def jacobians(ax: Any, runs: dict[str, list[Run]]) -> None:
    """Draw every entry of ∂ŵ/∂λ at the end, for every seed."""
    for (data, group), color in zip(runs.items(), COLORS, strict=False):
        exact, estimated = (
            [x for run in group for x in run[key]] for key in ("exact", "estimated")
        )
        ax.plot(exact, estimated, ".", color=color, markersize=5, alpha=0.7, label=DATA[data])
    ax.axline((0, 0), slope=1, color="0.5", linewidth=0.8, zorder=0)
    ax.set_title(f"entries of the Jacobian, {len(group)} seeds")
    ax.set_xlabel("∂w*/∂λ")
    ax.set_ylabel("∂ŵ/∂λ")
    ax.legend()


def paths(ax: Any, runs: dict[str, list[Run]]) -> None:
    """Draw λ − λ*: the mean within the range of the seeds."""
    for (data, group), color in zip(runs.items(), COLORS, strict=False):
        away = Tensor([run["path"] for run in group]) - group[0]["best"]
        ax.plot(group[0]["steps"], away.mean(0), color=color, label=DATA[data])
        ax.fill_between(
            group[0]["steps"], away.amin(0), away.amax(0), color=color, alpha=0.2, linewidth=0
        )
    ax.axhline(0, color="0.5", linewidth=0.8, zorder=0)
    ax.set_title(f"the way to λ*, {len(group)} seeds")
    ax.set_xlabel("inner step")
    ax.set_ylabel("λ − λ*")
