"""Recipes: the well-known names, each a preset of one class."""

from typing import Any

from bilevel.solvers.implicit import Implicit
from bilevel.solvers.linear_solve.base import Identity
from bilevel.solvers.linear_solve.conjugate_gradients import CG
from bilevel.solvers.linear_solve.curvature import GaussNewton
from bilevel.solvers.linear_solve.neumann import Neumann
from bilevel.solvers.linear_solve.nystrom import Nystrom
from bilevel.solvers.self_tuning import SelfTuning
from bilevel.solvers.unroll.forward import Forward
from bilevel.solvers.unrolled import Unrolled


def delta_stn(**options: Any) -> SelfTuning:
    """Return Δ-STN (Bae & Grosse, 2020): centered, w₀ trained apart, linearized prediction."""
    return SelfTuning(**{"centered": True, "regularized_w0": True, "linearize": True} | options)


def centered_stn(**options: Any) -> SelfTuning:
    """Return centered STN (Bae & Grosse, 2020): Δ-STN with Θ fitted through the network itself."""
    return SelfTuning(**{"centered": True, "regularized_w0": True, "linearize": False} | options)


def stn(**options: Any) -> SelfTuning:
    """Return STN (MacKay et al., 2019): the response at λ itself, w₀ and Θ fitted jointly."""
    return SelfTuning(**{"centered": False, "regularized_w0": False, "linearize": False} | options)


def implicit_cg(**options: Any) -> Implicit:
    """Return implicit differentiation by conjugate gradients on the Gauss–Newton matrix.

    The method is HOAG (Pedregosa, 2016). The Hessian of a network is rarely positive definite, and
    CG would stop at the first direction that shows it. The Gauss–Newton matrix of one batch is
    singular, and ∇_w L_V is not in its range. Without damping x would grow without bound.
    """
    return Implicit(**{"linear_solve": CG(), "curvature": GaussNewton(damping=0.1)} | options)


def implicit_neumann(**options: Any) -> Implicit:
    """Return implicit differentiation by a Neumann series (Lorraine et al., 2020)."""
    return Implicit(**{"linear_solve": Neumann()} | options)


def implicit_nystrom(**options: Any) -> Implicit:
    """Return implicit differentiation by a Nyström approximation (Hataya & Yamada, 2023)."""
    return Implicit(**{"linear_solve": Nystrom()} | options)


def implicit_identity(**options: Any) -> Implicit:
    """Return T1–T2 (Luketina et al., 2016), with the identity for the curvature.

    The paper divides the identity by the inner learning rate.
    """
    return Implicit(**{"linear_solve": Identity()} | options)


def unrolled_forward(**options: Any) -> Unrolled:
    """Return unrolled differentiation in forward mode (Franceschi et al., 2017)."""
    return Unrolled(**{"mode": Forward()} | options)
