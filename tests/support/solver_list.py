"""List every solver once, with the small problem on which the laws run them."""

from functools import partial

import torch
from torch.utils._pytree import tree_leaves

from bilevel.problems import digits
from bilevel.solvers import (
    SAMA,
    SOBA,
    EvolutionStrategies,
    FirstOrder,
    Fixed,
    PopulationBased,
    Reverse,
    Unrolled,
    centered_stn,
    delta_stn,
    gp,
    implicit_cg,
    implicit_identity,
    implicit_neumann,
    implicit_nystrom,
    random_search,
    stn,
    tpe,
    unrolled_forward,
)
from bilevel.solvers.penalty import Penalty

SOLVERS = {
    "fixed": Fixed,
    "delta_stn": delta_stn,
    "centered_stn": centered_stn,
    "stn": stn,
    "unrolled": partial(Unrolled, inner_steps=3),
    "unrolled, checkpointed": partial(Unrolled, inner_steps=3, mode=Reverse(checkpoint=True)),
    "unrolled, restarted": partial(Unrolled, inner_steps=3, restart=True),
    "unrolled_forward": partial(unrolled_forward, inner_steps=3),
    "implicit_cg": implicit_cg,
    "implicit_neumann": implicit_neumann,
    "implicit_nystrom": implicit_nystrom,
    "implicit_identity": implicit_identity,
    "soba": SOBA,
    "sama": SAMA,
    "penalty": Penalty,
    "first_order": FirstOrder,
    "es": EvolutionStrategies,
    "es, truncated": partial(EvolutionStrategies, persistent=False),
    "random_search": partial(random_search, trial_epochs=2),
    "tpe": partial(tpe, trial_epochs=2),
    "gp": partial(gp, trial_epochs=2),
    "pbt": partial(PopulationBased, population=4, interval=0.5),
}
BLACK_BOX = {"random_search", "tpe", "gp", "pbt"}
SELF_TUNING = {"delta_stn", "centered_stn", "stn"}
DIRECT_ONLY = {"first_order"}
"""Solvers that follow ∂L_V/∂λ at fixed w. They refuse problems whose L_V does not contain λ."""
WITHOUT_DERIVATIVE = BLACK_BOX | SELF_TUNING | DIRECT_ONLY | {"fixed", "es", "es, truncated"}
TUNE_OPTIMIZERS = (
    BLACK_BOX | {name for name in SOLVERS if name.startswith(("unrolled", "es"))} | {"fixed"}
)
SMALL = partial(digits, hidden=[8], dropout="gaussian")


def suited(name, problem):
    """Return the problem; for solvers of the direct term, add a penalty on λ to L_V."""
    if name in DIRECT_ONLY:
        plain = problem.outer_objective
        problem.outer_objective = lambda hypers, *rest: (
            plain(hypers, *rest) + sum(h.square().mean() for h in hypers.values())
        )
    return problem


def leaves_equal(one, other):
    ours, theirs = tree_leaves(one), tree_leaves(other)
    assert len(ours) == len(theirs)
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(ours, theirs, strict=True)
    )
