"""Run every case in one process and in two, for tests/bilevel/parallel/test_two_processes.py.

Call `python -m tests.support.parallel_cases OUT RANK STORE` from the root of the repository.
Each rank writes its results to OUT; a case that raises is a sentence in its place.
"""

import signal
import sys
import traceback
import warnings
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from bilevel import (
    BilevelError,
    ModuleProblem,
    Positive,
    Runner,
    Space,
    Weighted,
    evaluate,
    squared_norm,
)
from bilevel.parallel.process_group import ProcessGroup
from bilevel.parallel.sharded_problem import ShardedProblem
from bilevel.parallel.shards import Shard
from bilevel.problems import MLP, Classification, Language, LossWeights, Quadratic, Ridge
from bilevel.problems.datasets.labelled_images import Images
from bilevel.problems.few_shot.recipes import sinusoid
from bilevel.problems.language_modeling.corpus import Corpus
from bilevel.run.distributed import shard
from bilevel.solvers import (
    SAMA,
    Fixed,
    GaussNewton,
    Implicit,
    SelfTuning,
    Unrolled,
    delta_stn,
    implicit_cg,
)
from tests.support.device_waits import no_waiting
from tests.support.solver_cases import FLAGS, at
from tests.support.solver_list import SOLVERS, suited

CPU = torch.device("cpu")
ROUNDS = 3
BATCH = 9
"""Shares of five and four."""


def images(shape=(1, 2, 3), examples=27):
    generator = torch.Generator().manual_seed(0)
    splits = [
        (torch.randn(examples, *shape, generator=generator).double(), torch.arange(examples) % 3)
        for _ in range(3)
    ]
    return Images(*splits, mean=0.0, std=1.0)


def mlp(dropout="gaussian"):
    """Return a problem with weight decay and dropout, whose rates may differ between examples."""
    space = {"weight_decay": {"init": 0.1}}
    network = partial(_doubled, partial(MLP, (6, 8, 7, 3)))
    return Classification(
        network, images(), sites=3, dropout=dropout, batch_size=BATCH, space=space
    )


def _doubled(make):
    return make().double()


class Decayed(ModuleProblem):
    """Cross-entropy with one weight decay for all examples of a batch, or one for each."""

    def __init__(self, module, shape=(4,), *, per_example=False):
        data = images(shape)
        space = Space(decay=Positive(init=0.1, per_example=per_example))
        super().__init__(module.double(), space, *data[:2], batch_size=BATCH)

    def inner_objective(self, hypers, params, prediction, batch):
        return (
            F.cross_entropy(prediction, batch[1])
            + 0.5 * (hypers["decay"] * squared_norm(params)).mean()
        )

    def outer_objective(self, hypers, params, prediction, batch):
        return F.cross_entropy(prediction, batch[1])


class Weighing(Decayed):
    """Its metrics have weights: of a shard, of each example, and of a class that may be absent."""

    def metrics(self, hypers, params, prediction, batch):
        weights = 1.0 + batch[1]
        losses = F.cross_entropy(prediction, batch[1], reduction="none")
        rare = batch[1] == 2
        return {
            "loss": Weighted((weights * losses).sum() / weights.sum(), weights.sum()),
            "items": Weighted(losses, weights),
            "rare": Weighted(losses[rare].mean(), rare.sum()),
        } | ({"rare_items": losses[rare].tolist()} if rare.any() else {"rare_items": None})


def weighing():
    """Return a problem whose metrics have weights."""
    torch.manual_seed(0)
    return Weighing(nn.Linear(4, 3))


def convolutional(per_example=False):
    """Return convolutions with batch norm, dropped channels, and PyTorch's own dropout."""
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout2d(0.3)
    head = nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 3)
    return Decayed(nn.Sequential(*layers, *head), (2, 4, 4), per_example=per_example)


def language():
    """Recurrent state from batch to batch, DropConnect, words dropped everywhere."""
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(11, (n,), generator=generator) for n in (203, 160, 60)]
    corpus = Corpus(*tokens, vocabulary=tuple(map(str, range(11))))
    sizes = {
        "embedding": 7,
        "hidden": 7,
        "layers": 2,
        "batch_size": 5,
        "bptt": 6,
        "evaluation_batch_size": 3,
    }
    return Language(corpus, **sizes, dropout="gaussian", dtype=torch.float64)


# --- one case, alone or together ---


def trained(problem, solver, ranks=None, *, dry_run=True):
    """Return λ, w, carry, metrics, generator, evaluation and hypergradient after some rounds."""
    data = problem.data(CPU, torch.Generator().manual_seed(1))
    if ranks is not None:
        problem = shard(problem, data, CPU, ranks) if dry_run else ShardedProblem(problem, ranks)
    solver.setup(problem, data, CPU, torch.Generator().manual_seed(2))
    for _ in range(ROUNDS):
        metrics = solver.step()
    solution = solver.solution()
    found = {
        f"{kind}.{name}": t for kind, held in solution._asdict().items() for name, t in held.items()
    }
    found |= {f"metrics.{name}": t for name, t in metrics.items()} | {
        "generator": at(solver).generator.get_state()
    }
    found |= {
        f"valid.{name}": torch.tensor(value, dtype=torch.float64)
        for name, value in evaluate(problem, solution, data.valid).items()
    }
    gradient = solver.hypergradient()
    found |= {} if gradient is None else {"hypergradient": gradient}
    return {name: t.detach().clone() for name, t in found.items()}


def both(make_problem, make_solver, ranks):
    """Return the results of one process (on rank 0) and of two."""
    alone = trained(make_problem(), make_solver()) if ranks.rank == 0 else {}
    return alone, trained(make_problem(), make_solver(), ranks)


def unweighted(ranks):
    """Train the wrong way: the losses of five and of four examples get equal weight."""
    right, Shard.weight = Shard.weight, property(lambda shard: 0.5)
    try:
        return trained(mlp(), Fixed(), ranks, dry_run=False)
    finally:
        Shard.weight = right


def local_solves(ranks):
    """Return the right hypergradient, and the mean of those that each rank solves on its shard."""
    outcomes = []
    for whole in (True, False):
        problem, solver = mlp(), implicit_cg(curvature=GaussNewton(damping=0.01))
        data = problem.data(CPU, torch.Generator().manual_seed(1))
        solver.setup(ShardedProblem(problem, ranks), data, CPU, torch.Generator().manual_seed(2))
        solver.step()
        if not whole:
            sum_over_ranks, ranks.sum = ranks.sum, lambda tensor: None
        gradient = solver.hypergradient()
        if not whole:
            ranks.sum = sum_over_ranks
            ranks.sum(gradient)  # each shard's loss is weighted already: the mean over ranks
        outcomes.append(gradient.detach())
    return tuple(outcomes)


def collectives(make_problem, make_solver, ranks):
    """Return the number of elements of each all-reduce in the second round."""
    sizes, plain = [], dist.all_reduce

    def counted(tensor, *args, **options):
        sizes.append(tensor.numel())
        return plain(tensor, *args, **options)

    problem, solver = make_problem(), make_solver()
    data = problem.data(CPU, torch.Generator().manual_seed(1))
    solver.setup(ShardedProblem(problem, ranks), data, CPU, torch.Generator().manual_seed(2))
    solver.step()
    dist.all_reduce = counted
    try:
        solver.step()
    finally:
        dist.all_reduce = plain
    return sizes


def waiting(make_problem, make_solver, ranks):
    """Run a round in which the host must not wait for the device."""
    problem, solver = make_problem(), make_solver()
    data = problem.data(CPU, torch.Generator().manual_seed(1))
    solver.setup(shard(problem, data, CPU, ranks), data, CPU, torch.Generator().manual_seed(2))
    solver.step()
    with no_waiting():
        solver.step()


def refused(make_problem, ranks):
    """Shard a problem, which must raise."""
    problem = make_problem()
    shard(problem, problem.data(CPU, torch.Generator().manual_seed(1)), CPU, ranks)


def parted(ranks):
    """Let the ranks differ in one hyperparameter; the same NaN is not a difference."""
    same = {"params": {"w": torch.tensor([1.0, float("nan")])}}
    ranks.check(same, 3)
    ranks.check(same | {"hypers": {"decay": torch.tensor(0.1) + 1e-8 * ranks.rank}}, 3)


def failing(ranks):
    """Fail on the first rank, and so on all."""

    def fails():
        raise BilevelError(f"rank {ranks.rank} cannot write")

    ranks.on_first(fails)


class Summed(Decayed):
    """L_T is a sum over examples."""

    def inner_objective(self, hypers, params, prediction, batch):
        return F.cross_entropy(prediction, batch[1], reduction="sum") + hypers[
            "decay"
        ] * squared_norm(params)


class Padded(Decayed):
    """A mean over the labelled examples; one example of the batch has no label."""

    def inner_objective(self, hypers, params, prediction, batch):
        labels = torch.where(batch[0][:, 0] > 1.3, -100, batch[1])
        return (
            F.cross_entropy(prediction, labels)
            + 0.5 * (hypers["decay"] * squared_norm(params)).mean()
        )


class Mixed(Decayed):
    """Every example is predicted from the mean of the batch."""

    def inputs(self, hypers, batch, *, train, generator):
        return (batch[0] - batch[0].mean(0) if train else batch[0],), {}


class Averaging(nn.Module):
    """Keeps a running mean of its inputs."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x):
        if self.training:
            self.seen = 0.9 * self.seen + 0.1 * x.mean(0)
        return self.linear(x)


class DropConnect(Decayed):
    """Masks weights that have as many rows as a rank has examples."""

    def predict(self, hypers, params, carry, batch, *, train, generator):
        if train:
            mask = torch.rand(params["weight"].shape, generator=generator) > 0.5
            params = params | {"weight": params["weight"] * mask}
        return super().predict(hypers, params, carry, batch, train=train, generator=generator)


class Elsewhere(Decayed):
    """Has different data on each rank."""

    def __init__(self, rank):
        super().__init__(nn.Linear(4, 3))
        self._splits = ((self._splits[0][0] + rank, self._splits[0][1]), *self._splits[1:])


def exact_run(directory):
    """Run CG on a problem that knows its exact hypergradient."""
    runner = Runner(epochs=3, warmup_epochs=1, progress="none", picture=False, device="cpu")
    runner.run(
        Ridge.synthetic(features=4, batch_size=7),
        implicit_cg(stationarity=10.0),
        directory=directory,
        seed=1,
    )


def runs(ranks, out):
    """Run a whole run, and one that a signal on the other rank stops and that is resumed."""
    exact_run(out / "ridge")
    runner = partial(
        Runner, warmup_epochs=0.5, evaluate_every=0.5, progress="none", picture=False, device="cpu"
    )

    whole = runner(epochs=8).run(
        mlp("bernoulli"), delta_stn(), directory=out / f"whole{ranks.rank or ''}", seed=3
    )
    step, stopped = SelfTuning.step, []

    def interrupted(solver, **options):
        if solver.inner_count > 5 and ranks.rank == 1 and not stopped:
            stopped.append(signal.raise_signal(signal.SIGINT))
        return step(solver, **options)

    with mock.patch.object(SelfTuning, "step", interrupted):
        first = runner(epochs=8).run(
            mlp("bernoulli"), delta_stn(), directory=out / "stopped", seed=3
        )
    second = runner(epochs=8).run(
        mlp("bernoulli"), delta_stn(), directory=out / "stopped", seed=3, resume=True
    )
    return [
        {key: summary[key] for key in ("stopped", "steps", "best", "signal")}
        for summary in (whole, first, second)
    ]


def refits(ranks, out):
    """Refit a run, once undisturbed and once with a signal on the other rank in the refit."""
    settings = {"warmup_epochs": 0.5, "progress": "none", "picture": False, "device": "cpu"}
    runner = Runner(epochs=6, refit="end", **settings)

    def run(name, **options):
        return runner.run(mlp(), delta_stn(), directory=out / name, seed=3, **options)

    whole, step, stopped = run(f"refitted{ranks.rank or ''}"), Fixed.step, []

    def interrupted(solver, **options):
        if solver.inner_count > 3 and ranks.rank == 1 and not stopped:
            stopped.append(signal.raise_signal(signal.SIGINT))
        return step(solver, **options)

    with mock.patch.object(Fixed, "step", interrupted):
        first = run("refit-stopped")
    second = run("refit-stopped", resume=True)
    return [
        {key: summary[key] for key in ("stopped", "steps", "best", "signal", "refit")}
        for summary in (whole, first, second)
    ]


CASES = {
    f"mlp, {name}": partial(both, lambda name=name: suited(name, mlp()), make)
    for name, make in SOLVERS.items()
}
CASES |= {
    f"batch norm, {name}": partial(
        both, lambda name=name: suited(name, convolutional()), SOLVERS[name]
    )
    for name in (
        "delta_stn",
        "stn",
        "unrolled",
        "unrolled_forward",
        "implicit_cg",
        "soba",
        "sama",
        "es, truncated",
        "pbt",
    )
}
CASES |= {
    f"per example, {flags}": partial(
        both, partial(mlp, "bernoulli"), partial(SelfTuning, **FLAGS[flags])
    )
    for flags in FLAGS
}
CASES |= {
    "per example with batch norm": partial(
        both, partial(convolutional, per_example=True), delta_stn
    ),
    "recurrent state": partial(both, language, delta_stn),
    "recurrent state, unrolled": partial(both, language, partial(Unrolled, inner_steps=2)),
    "metrics of rare classes": partial(
        both, partial(LossWeights.digits, hidden=[5], batch_size=7), SAMA
    ),
    "metrics with weights": partial(both, weighing, Fixed),
    "gauss-newton": partial(both, mlp, partial(Implicit, curvature=GaussNewton(damping=0.1))),
    "closed form": partial(both, partial(Quadratic.random, weights=4, hypers=2), delta_stn),
    "ridge": partial(both, partial(Ridge.synthetic, features=4, batch_size=7), implicit_cg),
    "unweighted": unweighted,
    "local solves": local_solves,
    "collectives of training": partial(collectives, mlp, Fixed),
    "collectives of delta_stn": partial(
        collectives, partial(mlp, "bernoulli"), partial(delta_stn, inner_steps=1)
    ),
    "collectives of batch norm": partial(collectives, convolutional, Fixed),
    "a sum": partial(refused, partial(Summed, nn.Linear(4, 3))),
    "padding": partial(refused, partial(Padded, nn.Linear(4, 3))),
    "a mean over the batch": partial(refused, partial(Mixed, nn.Linear(4, 3))),
    "a mean that is kept": partial(refused, lambda: Decayed(Averaging())),
    "other batches": lambda ranks: refused(partial(Elsewhere, ranks.rank), ranks),
    "weights of each task": partial(refused, partial(sinusoid, hidden=[4], tasks=6, unseen=4)),
    "a mask of weights": partial(refused, partial(DropConnect, nn.Linear(4, 5))),
    "no waiting": partial(waiting, partial(mlp, "bernoulli"), delta_stn),
    "no waiting in batch norm": partial(waiting, convolutional, implicit_cg),
    "parted": parted,
    "failing": failing,
}


def main(out, rank, store):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    out = Path(out)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    ranks, outcomes = ProcessGroup(CPU), {}
    whole_runs = {"runs": partial(runs, out=out), "refits": partial(refits, out=out)}
    for name, case in (CASES | whole_runs).items():
        try:
            outcomes[name] = case(ranks=ranks)
        except BilevelError as error:
            outcomes[name] = str(error)
        except Exception:  # the traceback is what the test then shows
            outcomes[name] = traceback.format_exc()
    torch.save(outcomes, out / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
