"""Bilevel optimization in PyTorch: the core on which problems and solvers build."""

from typing import TYPE_CHECKING

from bilevel import jaxtyping_import as jaxtyping_import  # first, since the others need it
from bilevel import studies
from bilevel.checkpoint.checkpoints import CheckpointWarning, best_solution
from bilevel.checks.check_problem import Report, check_problem
from bilevel.classifier import Classifier
from bilevel.cross_entropy import cross_entropy
from bilevel.data.loader_stream import LoaderStream
from bilevel.data.stream import Stream
from bilevel.data.tensor_stream import Data, FullBatch, TensorStream, stream, streams
from bilevel.domains import Domain, Integer, Interval, Positive, Real, Simplex
from bilevel.dropout.tuned import TunedDropout, tuned_dropout
from bilevel.errors import BilevelError, DataWarning, Refused, SolverWarning, SpeedWarning
from bilevel.metrics import Weighted
from bilevel.module_problem import ModuleProblem
from bilevel.params import (
    Batch,
    Carry,
    Hypers,
    Metrics,
    Params,
    Prediction,
    along_examples,
    squared_norm,
)
from bilevel.problem import Problem
from bilevel.requirements import Need, Trait
from bilevel.run.evaluation import evaluate
from bilevel.run.result import Result
from bilevel.run.runner import Runner
from bilevel.services import Services
from bilevel.solver import Solution, Solver, Stepwise
from bilevel.space import Space
from bilevel.symlinks import explain_broken_links
from bilevel.tuner.attach import attach
from bilevel.tuner.tuner import Tuner

__all__ = [
    "Batch",
    "BilevelError",
    "Carry",
    "CheckpointWarning",
    "Classifier",
    "Data",
    "DataWarning",
    "Domain",
    "FullBatch",
    "Hypers",
    "Integer",
    "Interval",
    "LoaderStream",
    "Metrics",
    "ModuleProblem",
    "Need",
    "Params",
    "Positive",
    "Prediction",
    "Problem",
    "Real",
    "Refused",
    "Report",
    "Result",
    "Runner",
    "Services",
    "Simplex",
    "Solution",
    "Solver",
    "SolverWarning",
    "Space",
    "SpeedWarning",
    "Stepwise",
    "Stream",
    "TensorStream",
    "Trait",
    "TunedDropout",
    "Tuner",
    "Weighted",
    "along_examples",
    "attach",
    "best_solution",
    "check_problem",
    "cross_entropy",
    "evaluate",
    "squared_norm",
    "stream",
    "streams",
    "studies",
    "tuned_dropout",
]

explain_broken_links()

if TYPE_CHECKING:
    from bilevel.estimators.self_tuning import SelfTuningClassifier as SelfTuningClassifier
    from bilevel.estimators.self_tuning import SelfTuningRegressor as SelfTuningRegressor
else:

    def __getattr__(name: str) -> object:
        """Return an estimator; scikit-learn is imported with the first one."""
        if name in ("SelfTuningClassifier", "SelfTuningRegressor"):
            from bilevel.estimators import self_tuning

            return getattr(self_tuning, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
