"""What a solver needs of a problem, and the sentence with which it refuses a hyperparameter that lacks it."""

from collections.abc import Collection
from enum import Enum

from bilevel.errors import Refused
from bilevel.space import Space


class Need(Enum):
    """Something that a solver relies on; a problem declares the first, the others are seen when it is run."""

    INNER_DERIVATIVE = "∂L_T/∂λ"
    """L_T has a derivative in every tuned λ: none of them is sampled or rounded (`Domain.differentiable`)."""
    SECOND_DERIVATIVES = "second derivatives of L_T"
    """∇_w L_T can be differentiated again."""
    CONVEXITY = "L_T convex near its minimum"
    """The Hessian (or Gauss–Newton matrix) of L_T in w is positive definite where the solver looks."""
    STATIONARITY = "∇_w L_T near zero"
    """w is near its minimum when λ is moved."""


def check_space(
    solver: str, space: Space, needs: Collection[Need], *, tunes_optimizer: bool
) -> None:
    """Refuse a space with nothing to tune, or with a hyperparameter that lacks what the solver needs.

    Args:
        solver: its name, for the sentence.
        space: of the problem.
        needs: of the solver.
        tunes_optimizer: whether it can tune the inner optimizer's own settings.

    Raises:
        Refused: naming the hyperparameter, the reason and the alternatives.
    """
    if space.numel == 0:
        raise Refused(
            "every hyperparameter is frozen, so there is nothing to tune; unfreeze one, or use solver=fixed"
        )
    for name in space.tuned:
        domain = space[name]
        if domain.optimizer is not None and not tunes_optimizer:
            raise Refused(
                f"{solver} cannot tune `{name}`: it sets the inner optimizer's {domain.optimizer}, which acts on the way to w* "
                "and not on L_T; tune it with an unrolled, evolution-strategy or black-box solver, or freeze it "
                f"(problem.space.{name}.frozen=true)"
            )
        if Need.INNER_DERIVATIVE in needs and not domain.differentiable:
            raise Refused(
                f"{solver} needs {Need.INNER_DERIVATIVE.value}, but `{name}` is sampled or rounded and has none; tune it with "
                "a self-tuning, evolution-strategy or black-box solver, relax it where the problem can "
                f"(problem.dropout=gaussian, say), or freeze it (problem.space.{name}.frozen=true)"
            )
