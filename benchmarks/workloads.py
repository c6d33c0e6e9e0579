"""The two networks and the timed solvers, on random images of MNIST's shape."""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from benchmarks.twin import DoubleBackward
from bilevel import Problem, Solver, solvers
from bilevel.problems.classification.problem import Classification
from bilevel.problems.datasets.labelled_images import Images
from bilevel.problems.networks.mlp import MLP
from bilevel.problems.networks.simple_cnn import SimpleCNN

Timed: TypeAlias = solvers.Fixed | solvers.SelfTuning

BATCH = 128


def _on_random_images(network: Callable[[], nn.Module]) -> Classification:
    """Return a problem with four dropout rates tuned per example and no weight decay.

    The rates start at 0.05, as in the papers.
    """
    generator = torch.Generator().manual_seed(0)

    def split() -> tuple[Tensor, Tensor]:
        pixels = torch.randint(256, (8 * BATCH, 1, 28, 28), generator=generator, dtype=torch.uint8)
        return pixels, torch.randint(10, (8 * BATCH,), generator=generator)

    images = Images(split(), split(), split(), mean=127.5, std=73.9)
    return Classification(network, images, sites=4, weight_decay=False, batch_size=BATCH)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": partial(MLP, [784, 1200, 1200, 1200, 10]),
    "convolutions": SimpleCNN,
    "tiny": partial(SimpleCNN, first=1, second=2, hidden=4),
}

VARIANTS: dict[str, Callable[[], Timed]] = {
    "plain": solvers.Fixed,
    "stn": solvers.stn,
    "centered_stn": solvers.centered_stn,
    "delta_stn": solvers.delta_stn,
    "double_backward": DoubleBackward,
}


def prepared(network: str, variant: str, device: torch.device) -> Timed:
    """Return the solver `variant`, set up to tune the dropout rates of `network`."""
    problem, solver = _on_random_images(NETWORKS[network]), VARIANTS[variant]()
    set_up(solver, problem, device)
    return solver


def set_up(solver: Solver, problem: Problem, device: torch.device) -> torch.Generator:
    """Set the solver up on the problem from fixed seeds; return the generator of the solver."""
    generator = torch.Generator(device).manual_seed(2)
    solver.setup(problem, problem.data(device, torch.Generator().manual_seed(1)), device, generator)
    return generator
