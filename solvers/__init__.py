"""Solvers: each approximates the best response ŵ(λ) in its own way."""

if __name__ != "bilevel.solvers":
    raise ImportError("`solvers` is the source folder of bilevel.solvers; import it by that name")

from bilevel.solvers.autodiff.pullback import Pullback
from bilevel.solvers.black_box.population import PopulationBased
from bilevel.solvers.black_box.samplers import GP, TPE, Hyperband, Median, RandomSearch
from bilevel.solvers.black_box.search import Search, gp, random_search, tpe
from bilevel.solvers.evolution import EvolutionStrategies
from bilevel.solvers.first_order import FirstOrder
from bilevel.solvers.fixed import Fixed
from bilevel.solvers.hyper_schedules import Constant, Gaussian, HyperSchedule, Replayed, Sinusoidal
from bilevel.solvers.implicit import Implicit
from bilevel.solvers.linear_solve.base import Guess, Identity, LinearSolve, Solved
from bilevel.solvers.linear_solve.conjugate_gradients import CG
from bilevel.solvers.linear_solve.curvature import Curvature, GaussNewton, Hessian
from bilevel.solvers.linear_solve.neumann import FixedPoint, Neumann
from bilevel.solvers.linear_solve.nystrom import Nystrom
from bilevel.solvers.optim.lr_schedules import ConstantThenCosine, NonMonotone
from bilevel.solvers.optim.outer_rmsprop import OuterRMSprop
from bilevel.solvers.penalty import Penalty
from bilevel.solvers.recipes import (
    centered_stn,
    delta_stn,
    implicit_cg,
    implicit_identity,
    implicit_neumann,
    implicit_nystrom,
    stn,
    unrolled_forward,
)
from bilevel.solvers.response import attention_rules as _attention_rules  # noqa: F401  (registers)
from bilevel.solvers.response import dense_weight as _dense_weight  # noqa: F401  (registers)
from bilevel.solvers.response import norm_rules as _norm_rules  # noqa: F401  (registers)
from bilevel.solvers.response import recurrent_rules as _recurrent_rules  # noqa: F401  (registers)
from bilevel.solvers.response import rules as _rules  # noqa: F401  (registers)
from bilevel.solvers.response.jacobian import Dense, Response, Structured
from bilevel.solvers.response.per_example_weight import MissingRule, ResponseWeight, rule
from bilevel.solvers.sama import SAMA
from bilevel.solvers.self_tuning import SelfTuning
from bilevel.solvers.soba import SOBA
from bilevel.solvers.unroll.forward import Forward
from bilevel.solvers.unroll.reverse import Reverse
from bilevel.solvers.unrolled import Unrolled

__all__ = [
    "CG",
    "GP",
    "SAMA",
    "SOBA",
    "TPE",
    "Constant",
    "ConstantThenCosine",
    "Curvature",
    "Dense",
    "EvolutionStrategies",
    "FirstOrder",
    "Fixed",
    "FixedPoint",
    "Forward",
    "GaussNewton",
    "Gaussian",
    "Guess",
    "Hessian",
    "HyperSchedule",
    "Hyperband",
    "Identity",
    "Implicit",
    "LinearSolve",
    "Median",
    "MissingRule",
    "Neumann",
    "NonMonotone",
    "Nystrom",
    "OuterRMSprop",
    "Penalty",
    "PopulationBased",
    "Pullback",
    "RandomSearch",
    "Replayed",
    "Response",
    "ResponseWeight",
    "Reverse",
    "Search",
    "SelfTuning",
    "Sinusoidal",
    "Solved",
    "Structured",
    "Unrolled",
    "centered_stn",
    "delta_stn",
    "gp",
    "implicit_cg",
    "implicit_identity",
    "implicit_neumann",
    "implicit_nystrom",
    "random_search",
    "rule",
    "stn",
    "tpe",
    "unrolled_forward",
]
