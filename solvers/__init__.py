"""Solvers: each answers the best response ŵ(λ) its own way."""

import solvers.rules as _rules  # noqa: F401  (registers the response rules)
from solvers.fixed import Fixed
from solvers.recipes import centered_stn, delta_stn, stn
from solvers.responding import MissingRule, Responding, rule
from solvers.response import Dense, Response, Structured
from solvers.self_tuning import SelfTuning

__all__ = [
    "Dense",
    "Fixed",
    "MissingRule",
    "Responding",
    "Response",
    "SelfTuning",
    "Structured",
    "centered_stn",
    "delta_stn",
    "rule",
    "stn",
]
