"""Needs and traits of solvers, and the refusal of a hyperparameter that does not suit them."""

from collections.abc import Collection
from enum import Enum

from bilevel.errors import Refused
from bilevel.space import Space


class Need(Enum):
    """A property of a problem that a solver relies on.

    A problem declares the first one. The others show when it runs.
    """

    INNER_DERIVATIVE = "∂L_T/∂λ"
    """Every tuned λ is `Domain.differentiable` in L_T: none is sampled or rounded."""
    SECOND_DERIVATIVES = "second derivatives of L_T"
    """∇_w L_T can be differentiated again."""
    OUTER_DERIVATIVE = "∂L_V/∂w"
    """`outer_objective` has a gradient, in w or directly in λ."""
    CONVEXITY = "L_T convex near its minimum"
    """The Hessian (or Gauss–Newton matrix) of L_T in w is positive definite at the iterates."""
    STATIONARITY = "∇_w L_T near zero"
    """w is near its minimum when λ moves."""


class Trait(Enum):
    """A fact about a solver that set-up and the runner act on."""

    TUNES_NOTHING = "a baseline, which holds λ"
    """λ does not move, so that no hyperparameter is refused."""
    TUNES_OPTIMIZER = "tunes settings of the inner optimizer"
    """A hyperparameter may be a setting of the inner optimizer (`Domain.optimizer`)."""
    TUNES_DECAY = "tunes the weight decay of the inner optimizer"
    """A hyperparameter may be the optimizer's `weight_decay`, as the penalty that it amounts to."""
    SUBTRACTS = "follows a difference of nearly equal numbers"
    """The hypergradient needs all digits, so that bfloat16 is refused."""
    PER_EXAMPLE = "perturbs λ per example"
    """A leaf of λ can have one value for each example of a batch."""


def check_space(
    solver: str, space: Space, needs: Collection[Need], traits: Collection[Trait]
) -> None:
    """Refuse a space without a tuned hyperparameter, or with one that the solver cannot tune.

    Args:
        solver: its name, for the message.
        space: the hyperparameters of the problem.
        needs: of the solver.
        traits: of the solver; one that tunes nothing refuses nothing.

    Raises:
        Refused: with the hyperparameter, the reason and the alternatives.
    """
    if Trait.TUNES_NOTHING in traits:
        return
    if space.numel == 0:
        raise Refused(
            "every hyperparameter is frozen, so there is nothing to tune; "
            "unfreeze one, or use solver=fixed"
        )
    for name in space.tuned:
        domain = space[name]
        decays = domain.optimizer == "weight_decay"
        able = Trait.TUNES_OPTIMIZER in traits or (decays and Trait.TUNES_DECAY in traits)
        if domain.optimizer is not None and not able:
            why = "is no part of L_T here" if decays else "acts on the way to w* and not on L_T"
            others = "a self-tuning, implicit, unrolled" if decays else "an unrolled"
            raise Refused(
                f"{solver} cannot tune `{name}`: it sets the inner optimizer's {domain.optimizer}, "
                f"which {why}; tune it with {others}, evolution-strategy or black-box solver, or "
                f"freeze it (problem.space.{name}.frozen=true)"
            )
        if Need.INNER_DERIVATIVE in needs and not domain.differentiable:
            raise Refused(
                f"{solver} needs {Need.INNER_DERIVATIVE.value}, but `{name}` is sampled or rounded "
                "and has none; tune it with a self-tuning, evolution-strategy or black-box solver, "
                "relax it where the problem can (for example problem.dropout=gaussian), or freeze "
                f"it (problem.space.{name}.frozen=true)"
            )
