"""Bilevel optimization in PyTorch: the core that problems and solvers meet in."""

from bilevel.check import Report, check_problem
from bilevel.checkpoint import CheckpointWarning
from bilevel.data import Data, FullBatch, TensorStream, stream, streams
from bilevel.domains import Domain, Integer, Interval, Positive, Real, Simplex
from bilevel.errors import BilevelError, Refused, SpeedWarning
from bilevel.evaluation import evaluate
from bilevel.loader_stream import LoaderStream
from bilevel.loop import SolverWarning
from bilevel.module_problem import ModuleProblem
from bilevel.needs import Need
from bilevel.params import Batch, Carry, Hypers, Metrics, Params, Prediction, along_examples, squared_norm
from bilevel.problem import Problem
from bilevel.runner import Runner
from bilevel.solver import Solution, Solver
from bilevel.space import Space
from bilevel.split import Stream

__all__ = [
    "Batch",
    "BilevelError",
    "Carry",
    "CheckpointWarning",
    "Data",
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
    "Runner",
    "Simplex",
    "Solution",
    "Solver",
    "SolverWarning",
    "Space",
    "SpeedWarning",
    "Stream",
    "TensorStream",
    "along_examples",
    "check_problem",
    "evaluate",
    "squared_norm",
    "stream",
    "streams",
]
