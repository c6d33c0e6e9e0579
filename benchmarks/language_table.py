"""The STN paper's Table 1 on the embedded text, its protocol fixed in docs/experiments/language.md.

python -m benchmarks.language_table [--seeds 0 1 2] [--directory runs/table1] [--json FILE]
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import solvers
from benchmarks.digits import mean_std
from bilevel import Runner, Solver
from problems.language import Language
from problems.text import corpus

EPOCHS, WARMUP = 24, 1
TOKENS = 24_000
"""Of the training split: few enough for overfitting within the run."""
START, GRID, GRID_SEED = 0.05, (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), 100
STD, AMPLITUDE = 0.05, 0.1
PERIOD = 3.63
"""Of the sinusoid in epochs: the paper's 1200 steps of 331 an epoch."""
OTHERS = ("input_dropout", "embedding_dropout", "weight_dropout", "ar", "tar")

ADAM = partial(torch.optim.Adam, lr=0.003)
INNER = {"inner_steps": 2, "inner_optimizer": ADAM, "clip_norm": 1.0}
TUNED = {**INNER, "outer_optimizer": partial(torch.optim.Adam, lr=0.03), "tune_scale": False}


def problem(rate: float) -> Language:
    """One LSTM of 128 units with output dropout alone, from `rate`."""
    text = corpus(vocabulary_size=1000)
    off = {name: {"init": 0.0, "frozen": True} for name in OTHERS}
    sizes = {"embedding": 128, "hidden": 128, "layers": 1, "batch_size": 20, "bptt": 20}
    return Language(text._replace(train=text.train[:TOKENS]), space={"output_dropout": {"init": rate}, **off}, **sizes)


def train(solver: Solver, rate: float, seed: int, directory: Path) -> dict[str, Any]:
    """The summary of one run; one that is there already is read."""
    done = directory / "summary.json"
    if done.exists():
        return json.loads(done.read_text())
    runner = Runner(epochs=EPOCHS, warmup_epochs=WARMUP, progress="none", picture=False, checkpoint_every=10**6, threads=1)
    return runner.run(problem(rate), solver, directory=directory, seed=seed, names=("language", directory.parent.name))


def arms(best: float, seed: int, directory: Path) -> dict[str, tuple[float, Callable[[], Solver]]]:
    """Where every row of the table starts and how it trains; rows that follow STN's run come after it."""
    steps = round(PERIOD * problem(START).data(torch.device("cpu"), torch.Generator()).train.steps_per_epoch)

    def fixed(hypers: Callable[[], solvers.Given]) -> Callable[[], Solver]:
        return lambda: solvers.Fixed(hypers=hypers(), **INNER)

    stn = directory / "stn" / f"seed{seed}"
    return {
        "start": (START, fixed(solvers.Constant)),
        "best": (best, fixed(solvers.Constant)),
        "gaussian": (best, fixed(lambda: solvers.Gaussian(STD))),
        "sinusoid": (best, fixed(lambda: solvers.Sinusoidal(AMPLITUDE, steps))),
        "stn": (START, lambda: solvers.stn(**TUNED)),
        "schedule": (START, fixed(lambda: solvers.Replayed(stn))),
        "final": (START, fixed(lambda: solvers.Replayed(stn, final=True))),
        "delta_stn": (START, lambda: solvers.delta_stn(**TUNED)),
    }


def grid(directory: Path) -> dict[float, float]:
    """The lowest validation loss at every rate of the grid, on a seed of its own."""
    losses = {}
    for rate in GRID:
        solver = solvers.Fixed(**INNER)
        losses[rate] = train(solver, rate, GRID_SEED, directory / "grid" / f"rate{rate}")["best"]["valid_loss"]
        print(f"grid, rate {rate}: validation loss {losses[rate]:.4f}", flush=True)
    return losses


def main() -> None:
    """Run the grid and every row, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--directory", type=Path, default=Path("runs/table1"), help="of the runs; those that ended are kept")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    losses = grid(options.directory)
    best = min(losses, key=losses.__getitem__)
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in options.seeds:
        for name, (rate, make) in arms(best, seed, options.directory).items():
            summary = train(make(), rate, seed, options.directory / name / f"seed{seed}")
            runs.setdefault(name, []).append(summary)
            print(line(name, seed, summary), flush=True)
    print(f"best of the grid: {best}; n = {len(options.seeds)}\n{table(runs)}")
    if options.json:
        options.json.write_text(json.dumps({"grid": losses, "best": best, "runs": runs}, indent=1))


def line(name: str, seed: int, summary: dict[str, Any]) -> str:
    """One run."""
    best = summary["best"]
    measured = (
        f"perplexity valid {best['valid_perplexity']:.2f}, test {best['test_perplexity']:.2f} at epoch {best['epoch']:.1f}"
    )
    return f"seed {seed}, {name:9s} {measured}; last rate {summary['hypers']['output_dropout']:.3f}, {summary['seconds']:.0f} s"


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """One row for each arm, mean ± standard deviation over seeds, as Markdown."""
    lines = ["| row | validation | test | rate at the end | best epoch | seconds |", "|---|---|---|---|---|---|"]
    for name, group in runs.items():
        best = [run["best"] for run in group]
        columns = [
            mean_std([b["valid_perplexity"] for b in best], ".2f"),
            mean_std([b["test_perplexity"] for b in best], ".2f"),
            mean_std([run["hypers"]["output_dropout"] for run in group], ".2f"),
            mean_std([b["epoch"] for b in best], ".1f"),
            mean_std([run["seconds"] for run in group], ".0f"),
        ]
        lines.append(f"| {name} | {' | '.join(columns)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
