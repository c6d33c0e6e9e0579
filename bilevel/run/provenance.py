"""The settings that the numbers of a run depend on, as text for its checkpoints."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from bilevel.loggers.space_json import space_to_json
from bilevel.problem import Problem
from bilevel.solver import Solver

FREE = ("hooks",)
"""Names of attributes that change no number."""


def settings_of(problem: Problem, solver: Solver) -> dict[str, str]:
    """Return the settings that change the numbers of a run, by dotted name.

    They are the space, the batch size of the problem, and the settings of the solver. Functions
    and objects count by their names.

    Example:
        >>> from bilevel.problems import Quadratic
        >>> from bilevel.solvers import Fixed
        >>> settings_of(Quadratic.random(seed=1), Fixed())["solver.inner_steps"]
        '5'
    """
    found = {f"problem.space.{name}": text(v) for name, v in space_to_json(problem.space).items()}
    if (size := getattr(problem, "batch_size", None)) is not None:
        found["problem.batch_size"] = text(size)
    known: Mapping[str, Any] = vars(solver)
    if is_dataclass(solver):
        known = {field.name: getattr(solver, field.name) for field in fields(solver) if field.init}
    plain = {k: v for k, v in known.items() if not k.startswith("_") and k not in FREE}
    return found | {f"solver.{name}": text(value) for name, value in plain.items()}


def text(value: Any) -> str:
    """Return a setting as text that is the same in every process.

    Example:
        >>> import torch
        >>> text(partial(torch.optim.SGD, lr=0.1)), text([1, None, "a"]), text(object())
        ('SGD(lr=0.1)', "[1, None, 'a']", 'object')
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, partial):
        return _call(text(value.func), value.keywords)
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return str(value.__qualname__)
    if is_dataclass(value):
        of = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
        return _call(type(value).__qualname__, of)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(map(text, value)) + "]"
    return type(value).__qualname__


def _call(name: str, settings: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={text(value)}' for key, value in settings.items())})"
