"""Does tuning matter? Two comparisons on the digits problem, their protocol fixed in docs/experiments/digits.md.

python -m benchmarks.digits bad-start
python -m benchmarks.digits random-grid
"""

import argparse
import json
import math
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import problems
import solvers
from bilevel import Runner

EPOCHS, WARMUP = 100, 5
DROPOUTS = ("input_dropout", "dropout1", "dropout2")
BAD_START = dict.fromkeys(DROPOUTS, 0.5) | {"weight_decay": 0.1}
SGD = partial(torch.optim.SGD, lr=0.03, momentum=0.9)
SOLVERS = {
    "fixed": partial(solvers.Fixed, inner_optimizer=SGD),
    "delta_stn": partial(solvers.delta_stn, inner_optimizer=SGD, entropy_weight=0.03),
}


def train(job: tuple[str, int, dict[str, float]]) -> dict[str, Any]:
    """The summary of one run: solver, seed, initial hyperparameters."""
    name, seed, start = job
    torch.set_num_threads(1)
    problem = problems.digits(space={hyper: {"init": value} for hyper, value in start.items()})
    with tempfile.TemporaryDirectory() as directory:
        runner = Runner(epochs=EPOCHS, warmup_epochs=WARMUP, progress="none", picture=False, checkpoint_every=10**6)
        return runner.run(problem, SOLVERS[name](), directory=Path(directory) / "run", seed=seed, names=("digits", name))


def draw(generator: torch.Generator) -> dict[str, float]:
    """One point of the random grid: dropout rates uniform on (0, 0.95), weight decay log-uniform on (1e-6, 1e-1)."""
    rates = (0.95 * torch.rand(3, generator=generator, dtype=torch.float64)).clamp(min=1e-3).tolist()
    decay = 10 ** (-6 + 5 * torch.rand((), generator=generator, dtype=torch.float64).item())
    return dict(zip(DROPOUTS, rates, strict=True)) | {"weight_decay": decay}


def mean_std(values: list[float], form: str = ".4f") -> str:
    """Mean ± standard deviation over seeds."""
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}}"


def paired_t(differences: list[float]) -> float:
    """The t statistic of paired differences, with n − 1 degrees of freedom."""
    return statistics.mean(differences) / (statistics.stdev(differences) / math.sqrt(len(differences)))


def bad_start(pool: ProcessPoolExecutor, seeds: list[int]) -> dict[str, Any]:
    """Δ-STN and fixed training from the same bad start, paired over seeds."""
    jobs = [(name, seed, BAD_START) for seed in seeds for name in SOLVERS]
    runs = list(pool.map(train, jobs, chunksize=1))
    best = {name: [run["best"] for run in runs if run["solver"] == name] for name in SOLVERS}
    for name, outcomes in best.items():
        print(f"{name:10s} valid loss {mean_std([o['valid_loss'] for o in outcomes])}   ", end="")
        print(f"test accuracy {mean_std([100 * o['test_accuracy'] for o in outcomes], '.2f')} %")
    differences = [d["valid_loss"] - f["valid_loss"] for d, f in zip(best["delta_stn"], best["fixed"], strict=True)]
    print(f"paired difference in valid loss {mean_std(differences)}, t = {paired_t(differences):.1f}, n = {len(seeds)}")
    return {"runs": runs, "differences": differences}


def random_grid(pool: ProcessPoolExecutor, seeds: list[int], points: int = 30) -> dict[str, Any]:
    """Δ-STN from the bad start against the best of `points` fixed runs at random hyperparameters, seed by seed."""
    rows = []
    print("seed   Δ-STN    best of grid   ratio   cost in fixed runs (seconds)   (examples)   test accuracy Δ-STN / grid")
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        jobs = [("delta_stn", seed, BAD_START)] + [("fixed", seed, draw(generator)) for _ in range(points)]
        ours, *grid = pool.map(train, jobs, chunksize=1)
        best = min(grid, key=lambda run: run["best"]["valid_loss"])
        row = {
            "seed": seed,
            "delta_stn": ours["best"],
            "grid": best["best"],
            "ratio": ours["best"]["valid_loss"] / best["best"]["valid_loss"],
            "cost_seconds": ours["seconds"] / statistics.mean(run["seconds"] for run in grid),
            "cost_examples": ours["examples"] / statistics.mean(run["examples"] for run in grid),
        }
        rows.append(row)
        print(
            f"{seed:4d}   {row['delta_stn']['valid_loss']:.4f}   {row['grid']['valid_loss']:.4f}   {row['ratio']:12.3f}   "
            f"{row['cost_seconds']:28.2f}   {row['cost_examples']:10.2f}   "
            f"{100 * row['delta_stn']['test_accuracy']:.2f} / {100 * row['grid']['test_accuracy']:.2f} %",
            flush=True,
        )
    for key in ("ratio", "cost_seconds", "cost_examples"):
        print(f"{key} {mean_std([row[key] for row in rows], '.3f')}, n = {len(rows)}")
    return {"rows": rows}


def main() -> None:
    """Run one comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", choices=["bad-start", "random-grid"])
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    options = parser.parse_args()
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        if options.comparison == "bad-start":
            result = bad_start(pool, options.seeds or list(range(10)))
        else:
            result = random_grid(pool, options.seeds or list(range(5)))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
