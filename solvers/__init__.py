"""Solvers: each answers the best response ŵ(λ) its own way."""

import solvers.rules as _rules  # noqa: F401  (registers the response rules)
from solvers.conjugate_gradients import CG
from solvers.curvature import Curvature, GaussNewton, Hessian
from solvers.differentiation import Reverse
from solvers.evolution import EvolutionStrategies
from solvers.first_order import FirstOrder
from solvers.fixed import Fixed
from solvers.given import Constant, Gaussian, Given, Replayed, Sinusoidal
from solvers.implicit import Implicit
from solvers.linear_solve import Guess, Identity, LinearSolve, Solved
from solvers.nystrom import Nystrom
from solvers.penalty import Penalty
from solvers.population import PopulationBased
from solvers.pullback import Pullback
from solvers.recipes import (
    centered_stn,
    delta_stn,
    implicit_cg,
    implicit_identity,
    implicit_neumann,
    implicit_nystrom,
    stn,
    unrolled_forward,
)
from solvers.responding import MissingRule, Responding, rule
from solvers.response import Dense, Response, Structured
from solvers.richardson import FixedPoint, Neumann
from solvers.sama import SAMA
from solvers.samplers import GP, TPE, Hyperband, Median, RandomSearch
from solvers.schedules import NonMonotone
from solvers.search import Search, gp, random_search, tpe
from solvers.self_tuning import SelfTuning
from solvers.soba import SOBA
from solvers.tangents import Forward
from solvers.unrolled import Unrolled

__all__ = [
    "CG",
    "GP",
    "SAMA",
    "SOBA",
    "TPE",
    "Constant",
    "Curvature",
    "Dense",
    "EvolutionStrategies",
    "FirstOrder",
    "Fixed",
    "FixedPoint",
    "Forward",
    "GaussNewton",
    "Gaussian",
    "Given",
    "Guess",
    "Hessian",
    "Hyperband",
    "Identity",
    "Implicit",
    "LinearSolve",
    "Median",
    "MissingRule",
    "Neumann",
    "NonMonotone",
    "Nystrom",
    "Penalty",
    "PopulationBased",
    "Pullback",
    "RandomSearch",
    "Replayed",
    "Responding",
    "Response",
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
