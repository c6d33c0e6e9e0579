"""Data cleaning of benchmark_bilevel: 20,000 MNIST images, of which a part has a random label.

    L_T = mean over training images of sigmoid(u_i) CE(Wx_i, ỹ_i) + 0.2 ‖W‖²
    L_V = mean over 5,000 validation images of CE(Wx, y)

The results of ten runs of SOBA are in `figures/datacleaning.parquet` of the repository's history
(commit b5d88cc, January 2022), with settings that later versions changed.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.outside.objectives import rate, ready, sgd
from benchmarks.outside.rows import Options, Row, compared, sampled
from bilevel.problems import HyperCleaning
from bilevel.problems.datasets import load_mnist
from bilevel.problems.datasets.labelled_images import Images
from bilevel.solvers import SOBA

TRAIN, VALID, CLASSES, RATIO, SPLIT_SEED = 20_000, 5_000, 10, 0.7, 32
DECAY, START = 0.2, 1.0

BATCH, STEP, RATIO_OF_STEPS = 64, 10**-0.5, 10**-3.5
POWERS = (0.4, 0.6)
"""SOBA's step sizes: 0.316/t^0.4 for W and q, and 1000/t^0.6 for u."""

EVERY = 512
"""Rounds between two evaluations of the benchmark."""

PUBLISHED = {1: (0.1890, 0.0073), 5: (0.1559, 0.0044), 10: (0.1479, 0.0028), 20: (0.1422, 0.0027)}
"""Test error of SOBA after so many evaluations: mean and standard deviation of ten runs."""

SEEDS = (1, 2, 3)


def images(root: str, ratio: float = RATIO) -> Images:
    """Return the benchmark's splits: standardized pixels, and partly random training labels."""
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    stored = load_mnist(root, download=False)
    x, y = (torch.cat(pair).numpy() for pair in zip(stored.train, stored.valid, strict=True))
    assert stored.test is not None
    rng = np.random.RandomState(SPLIT_SEED)
    x = x.reshape(len(x), -1)
    x_train, x_valid, y_train, y_valid = train_test_split(
        x, y, test_size=VALID, train_size=TRAIN, random_state=rng
    )
    corrupted = rng.rand(TRAIN) < ratio
    y_train[corrupted] = rng.randint(0, CLASSES, np.sum(corrupted))
    scaler = StandardScaler()
    scaler.fit(x_train)
    test, y_test = stored.test

    def split(x: Any, y: Any) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(scaler.transform(x)).float(), torch.as_tensor(y).long()

    return Images(
        split(x_train, y_train),
        split(x_valid, y_valid),
        split(test.reshape(len(test), -1).numpy(), y_test),
        mean=0.0,
        std=1.0,
        classes=CLASSES,
    )


def problem(data: Images) -> HyperCleaning:
    """Return the problem at u = 1."""
    weight = float(torch.sigmoid(torch.tensor(START, dtype=torch.float64)))
    return HyperCleaning(
        lambda: nn.Linear(data.train[0].shape[1], CLASSES, bias=False),
        data,
        rate=0.0,  # the labels are corrupted already
        batch_size=BATCH,
        space={"example_weight": {"init": weight}, "weight_decay": {"init": 2 * DECAY}},
    )


def error(W: Tensor, split: tuple[Tensor, Tensor]) -> float:
    """Return the fraction of wrong classes."""
    x, y = split
    return float(((x @ W.T).argmax(1) != y).double().mean())


def our_errors(data: Images, seed: int, counts: list[int]) -> list[float]:
    """Return the test error of `SOBA` after so many evaluations."""
    solver = SOBA(
        inner_optimizer=sgd(1),
        outer_optimizer=sgd(1),
    )
    ready(problem(data), solver, seed)
    (W,) = solver.core.weights.leaves
    with torch.no_grad():
        W.zero_()
    found = []
    for t in range(1, EVERY * max(counts) + 1):
        step = STEP / t ** POWERS[0]
        rate(solver.core.weights, step)
        rate(solver.core.search.mean, STEP / RATIO_OF_STEPS / t ** POWERS[1])
        solver.adjoint_lr = step
        solver.step()
        if t % EVERY == 0 and t // EVERY in counts:
            found.append(error(W.detach(), data.test))  # type: ignore[arg-type]
    return found


def their_errors(data: Images, seed: int, counts: list[int]) -> list[float]:
    """Return the test error of SOBA as the benchmark writes it, with gradients by hand."""
    (x, y), (x_v, y_v) = data.train, data.valid
    generator = torch.Generator().manual_seed(seed)
    W = torch.zeros(CLASSES, x.shape[1])
    q, u = torch.zeros_like(W), torch.full((len(x),), START)
    found: list[float] = []
    rows, rows_v = iter(()), iter(())
    for t in range(1, EVERY * max(counts) + 1):
        steps = STEP / t ** POWERS[0], STEP / RATIO_OF_STEPS / t ** POWERS[1]
        if (i := next(rows, None)) is None:
            rows = iter(torch.randperm(len(x), generator=generator).split(BATCH))
            i = next(rows)
        if (j := next(rows_v, None)) is None:
            rows_v = iter(torch.randperm(len(x_v), generator=generator).split(BATCH))
            j = next(rows_v)
        p = F.softmax(x[i] @ W.T, 1)
        weight = torch.sigmoid(u[i])[:, None]
        residual = p - F.one_hot(y[i], CLASSES)
        xq = x[i] @ q.T
        Hxq = p * xq - p * (p * xq).sum(1, keepdim=True)
        n = len(i)
        g_W = (residual * weight).T @ x[i] / n + 2 * DECAY * W
        Hq = (Hxq * weight).T @ x[i] / n + 2 * DECAY * q
        cross = (weight * (1 - weight))[:, 0] * (residual * xq).sum(1) / n
        residual_v = F.softmax(x_v[j] @ W.T, 1) - F.one_hot(y_v[j], CLASSES)
        o_W = residual_v.T @ x_v[j] / len(j)
        W, q = W - steps[0] * g_W, q - steps[0] * (Hq + o_W)
        u[i] = u[i] - steps[1] * cross
        if t % EVERY == 0 and t // EVERY in counts:
            found.append(error(W, data.test))  # type: ignore[arg-type]
    return found


def run(options: Options) -> list[Row]:
    """Return the rows: the error at W = 0, then SOBA against the published runs."""
    data = images(options.root())
    assert data.test is not None
    counts = [1] if options.quick else sorted(PUBLISHED)
    seeds = SEEDS[:1] if options.quick else SEEDS
    ours = torch.tensor([our_errors(data, seed, counts) for seed in seeds]).T.tolist()
    hand = torch.tensor([their_errors(data, seed, counts) for seed in seeds]).T.tolist()
    zero = torch.zeros(CLASSES, data.test[0].shape[1])
    rows = [compared("test error at W = 0", 0.9020, error(zero, data.test), 1e-9, relative=False)]
    for count, mine, by_hand in zip(counts, ours, hand, strict=True):
        mean, deviation = PUBLISHED[count]
        what = f"test error after {EVERY * count} rounds of SOBA"
        text = f"{mean:.4f} ± {deviation:.4f} (n = 10)"
        rows += [
            sampled(f"{what}: published", text, mine, 0.01, mean=mean),
            sampled(f"{what}: written by hand", by_hand, mine, 0.01),
        ]
    return rows
