"""The famous names: each a preset of one class."""

from typing import Any

from solvers.self_tuning import SelfTuning


def delta_stn(**options: Any) -> SelfTuning:
    """Δ-STN (Bae & Grosse, 2020): centered response, regularized training of w₀, linearized prediction."""
    return SelfTuning(**{"centered": True, "regularized_w0": True, "linearize": True} | options)


def centered_stn(**options: Any) -> SelfTuning:
    """Centered STN (Bae & Grosse, 2020): Δ-STN with Θ fitted through the network itself."""
    return SelfTuning(**{"centered": True, "regularized_w0": True, "linearize": False} | options)


def stn(**options: Any) -> SelfTuning:
    """STN (MacKay et al., 2019): the response at λ itself, everything fitted together."""
    return SelfTuning(**{"centered": False, "regularized_w0": False, "linearize": False} | options)
