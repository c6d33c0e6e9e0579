"""SOBA and F2SA as benchmark_bilevel writes them, with gradients by hand.

Nothing here is shared with our solvers. Source: `solvers/soba.py` and `solvers/f2sa.py`.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.outside.quadratic_terms import SIZE, START, Terms

BATCH, STEP = 64, 0.1
"""Examples in a batch, and the step sizes' numerator: the defaults of the benchmark."""


def batches(data: Terms, generator: torch.Generator) -> Iterator[Terms]:
    """Yield batches of 64 terms in a new random order in each epoch."""
    while True:
        for rows in torch.randperm(len(data.a), generator=generator).split(BATCH):
            yield Terms(*(x[rows] for x in data))


def gradients(t: Terms, w: Tensor, λ: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients in w and λ of the mean of some terms."""
    n = len(t.a)
    g_w = (t.a.T @ (t.a @ w) + t.q.T @ (t.p @ λ)) / n + t.r.mean(0)
    g_λ = (t.b.T @ (t.b @ λ) + t.p.T @ (t.q @ w)) / n + t.s.mean(0)
    return g_w, g_λ


def start(
    data: tuple[Terms, Terms], seed: int
) -> tuple[Tensor, Tensor, Iterator[Any], Iterator[Any]]:
    """Return w, λ and the batches of both objectives."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.zeros(SIZE, dtype=torch.float64)
    return w, torch.full_like(w, START), *(batches(part, generator) for part in data)


def their_soba(data: tuple[Terms, Terms], seed: int, rounds: int) -> Tensor:
    """Return λ of SOBA as the benchmark writes it: w, q and λ move with steps 0.1/√t."""
    w, λ, inner, outer = start(data, seed)
    q = torch.zeros_like(w)
    for t in range(1, rounds + 1):
        step = STEP / math.sqrt(t)
        i, o = next(inner), next(outer)
        g_w, (o_w, o_λ) = gradients(i, w, λ)[0], gradients(o, w, λ)
        Hq, cross = i.a.T @ (i.a @ q) / BATCH, i.p.T @ (i.q @ q) / BATCH
        w, q, λ = w - step * g_w, q - step * (Hq + o_w), λ - step * (cross + o_λ)
    return λ


def their_penalty(data: tuple[Terms, Terms], seed: int, rounds: int) -> Tensor:
    """Return λ of F2SA as the benchmark writes it: y moves by 0.1/t^(5/7) (∇L_V + σ∇L_T)."""
    z, λ, inner, outer = start(data, seed)
    y, σ = z, 1.0
    for t in range(1, rounds + 1):
        for _ in range(10):
            both_y = σ * gradients(next(inner), y, λ)[0] + gradients(next(outer), y, λ)[0]
            y = y - STEP / t ** (5 / 7) * both_y
            z = z - STEP / t ** (4 / 7) * gradients(next(inner), z, λ)[0]
        gap = gradients(next(inner), y, λ)[1] - gradients(next(inner), z, λ)[1]
        λ = λ - STEP / t ** (4 / 7) * (gradients(next(outer), y, λ)[1] + σ * gap)
        σ += 0.1 / t ** (1 / 7)
    return λ
