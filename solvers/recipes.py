"""The famous names: each a preset of one class."""

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
    """Δ-STN (Bae & Grosse, 2020): centered response, regularized training of w₀, linearized prediction."""
    return SelfTuning(**{"centered": True, "regularized_w0": True, "linearize": True} | options)


def centered_stn(**options: Any) -> SelfTuning:
    """Centered STN (Bae & Grosse, 2020): Δ-STN with Θ fitted through the network itself."""
    return SelfTuning(**{"centered": True, "regularized_w0": True, "linearize": False} | options)


def stn(**options: Any) -> SelfTuning:
    """STN (MacKay et al., 2019): the response at λ itself, everything fitted together."""
    return SelfTuning(**{"centered": False, "regularized_w0": False, "linearize": False} | options)


def implicit_cg(**options: Any) -> Implicit:
    """Implicit differentiation by conjugate gradients (HOAG; Pedregosa, 2016) on the Gauss–Newton matrix.

    Of a network the Hessian is hardly ever positive definite, and CG would stop at the first direction that shows it. One
    batch's Gauss–Newton matrix is singular, and ∇_w L_V not in its range: undamped, CG's x would grow without bound.
    """
    return Implicit(**{"linear_solve": CG(), "curvature": GaussNewton(damping=0.1)} | options)


def implicit_neumann(**options: Any) -> Implicit:
    """Implicit differentiation by a Neumann series (Lorraine et al., 2020)."""
    return Implicit(**{"linear_solve": Neumann()} | options)


def implicit_nystrom(**options: Any) -> Implicit:
    """Implicit differentiation by a Nyström approximation (Hataya & Yamada, 2023)."""
    return Implicit(**{"linear_solve": Nystrom()} | options)


def implicit_identity(**options: Any) -> Implicit:
    """T1–T2 (Luketina et al., 2016): the identity for the curvature, where theirs is divided by the inner learning rate."""
    return Implicit(**{"linear_solve": Identity()} | options)


def unrolled_forward(**options: Any) -> Unrolled:
    """Unrolled differentiation in forward mode (Franceschi et al., 2017)."""
    return Unrolled(**{"mode": Forward()} | options)
