"""Optuna's studies: a run begins where a study has ended, and a study takes over λ of a run.

Each coordinate of λ is one parameter of Optuna, in the units of λ. A number has the name of the
hyperparameter, `decay`; the entries of an array are `rates[3]`, or `mix[1,2]`.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict

from bilevel.domains import Integer
from bilevel.errors import BilevelError
from bilevel.params import Hypers
from bilevel.space import Space, entry_names
from bilevel.text import near, printable
from bilevel.validate import is_number

if TYPE_CHECKING:
    import optuna

INSIDE = 0.01
"""Distance from the ends of an Integer at which u is finite; it is rounded to the end."""

Params = dict[str, int | float]
"""The parameters of a trial of Optuna, by name."""


class PastTrial(TypedDict):
    """A complete trial of a study: its parameters and its value."""

    params: Params
    value: float


def start(space: Space, study: "optuna.Study") -> Space:
    """Return the space with the best trial of a study as the initial λ.

    Args:
        space: the space of the problem; the study has one parameter for each coordinate.
        study: a study with one objective, which may be minimized or maximized.

    Example:
        >>> import optuna
        >>> from bilevel import Positive, Space, studies
        >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
        >>> study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        >>> study.optimize(lambda trial: trial.suggest_float("decay", 0.1, 0.2) ** 2, n_trials=5)
        >>> space = studies.start(Space(decay=Positive(init=1.0)), study)
        >>> space["decay"].init == study.best_params["decay"]
        True

    Raises:
        BilevelError: the study has several objectives or no complete trial, or its best trial is no
            point of the space.
    """
    _completed(study)
    best = study.best_trial
    return space_at(space, best.params, f"trial {best.number} of study {_name(study)}")


def history(study: "optuna.Study") -> list[PastTrial]:
    """Return the complete trials of a study, for `tpe(history=…)` and `gp(history=…)`.

    Args:
        study: a study that minimizes one objective, which is a validation loss.

    Raises:
        BilevelError: the study has several objectives, maximizes, or has no complete trial.
    """
    completed = _completed(study)
    _check_minimizes(study)
    return [{"params": dict(trial.params), "value": trial.value} for trial in completed]


def space_at(space: Space, params: Mapping[str, Any], source: str) -> Space:
    """Return the space with the parameters of a trial as the initial λ.

    Args:
        space: the space; frozen hyperparameters have no parameter.
        params: by coordinate.
        source: the name of the trial in errors.

    Raises:
        BilevelError: a name is missing or unknown, or a value lies outside its domain.
    """
    names = {name: entry_names(name, space[name].shape) for name in space.tuned}
    _check_names(params, [entry for entries in names.values() for entry in entries], source)
    for name, value in params.items():
        if not is_number(value):
            raise BilevelError(
                f"{source}: {printable(name)}={value!r} must be a number; choose a study whose "
                "parameters are floats or integers"
            )
    changes = {}
    for name, entries in names.items():
        domain, values = space[name], [float(params[entry]) for entry in entries]
        if isinstance(domain, Integer):
            ends = domain.low + INSIDE, domain.high - INSIDE
            values = [
                min(max(v, ends[0]), ends[1]) if v in (domain.low, domain.high) else v
                for v in values
            ]
        changes[name] = {"init": _nested(values, domain.shape)}
    try:
        return space.override(changes)
    except BilevelError as error:
        raise BilevelError(f"{source}: {error}") from None


def params_of(hypers: Hypers, space: Space) -> Params:
    """Return λ as the parameters of a trial; frozen hyperparameters are left out.

    Example:
        >>> import torch
        >>> from bilevel import Positive, Space
        >>> space = Space(rates=Positive(init=0.5, shape=(2,)))
        >>> params_of({"rates": torch.tensor([0.5, 0.25])}, space)
        {'rates[0]': 0.5, 'rates[1]': 0.25}

    Raises:
        BilevelError: a value is not finite.
    """
    params: Params = {}
    for name, leaf in hypers.items():
        if name in space and space[name].frozen:
            continue
        for entry, value in zip(
            entry_names(name, tuple(leaf.shape)), leaf.double().reshape(-1).tolist(), strict=True
        ):
            if not math.isfinite(value):
                raise BilevelError(
                    f"{printable(entry)}={value} cannot be given to a study, which takes finite "
                    "values; choose another run"
                )
            whole = name in space and isinstance(space[name], Integer)
            params[entry] = int(value) if whole else value
    return params


def enqueue(study: "optuna.Study", params: Params) -> None:
    """Let the next trial of a study be at these parameters.

    Raises:
        BilevelError: earlier trials of the study have other parameters, or narrower ranges.
    """
    _check_ranges(study, params)
    study.enqueue_trial(dict(params))


def add(study: "optuna.Study", params: Params, value: Any) -> None:
    """Add a complete trial to a study.

    Its ranges are those of the newest trial there.

    Args:
        study: a study that minimizes the validation loss.
        params: the parameters of the trial.
        value: its validation loss.

    Raises:
        BilevelError: see `enqueue`; or the study does not minimize one objective, or has no trial
            with ranges, or the value is not finite.
    """
    import optuna

    _check_one_objective(study)
    _check_minimizes(study)
    if not (is_number(value) and math.isfinite(value)):
        raise BilevelError(
            f"valid_loss={value} cannot be the value of a trial, which is a finite number; enqueue "
            "the values instead"
        )
    ranges = _check_ranges(study, params)
    if ranges is None:
        raise BilevelError(
            f"study {_name(study)} has no trial, so the ranges of its parameters are unknown; "
            "enqueue the values instead"
        )
    study.add_trial(
        optuna.trial.create_trial(value=value, params=dict(params), distributions=ranges)
    )


# --- checks ---


def _check_one_objective(study: "optuna.Study") -> None:
    if len(study.directions) > 1:
        raise BilevelError(
            f"study {_name(study)} has {len(study.directions)} objectives, and a run has one; "
            "choose a study with one objective"
        )


def _check_minimizes(study: "optuna.Study") -> None:
    if study.direction.name == "MAXIMIZE":
        raise BilevelError(
            f"study {_name(study)} maximizes, and the value of a run is a loss; choose a study "
            "that minimizes, or use its best trial as the start"
        )


def _completed(study: "optuna.Study") -> list[Any]:
    _check_one_objective(study)
    completed = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    if not completed:
        raise BilevelError(
            f"study {_name(study)} has no complete trial; run it first, or choose another study"
        )
    return completed


def _check_ranges(study: "optuna.Study", params: Params) -> dict[str, Any] | None:
    """Check the parameters by the newest trial with ranges, and return these; None without one."""
    known = [trial.distributions for trial in study.trials if trial.distributions]
    if not known:
        return None
    ranges = known[-1]
    _check_names(ranges, list(params), f"study {_name(study)}")
    for name, value in params.items():
        found: Any = ranges[name]
        if not hasattr(found, "low"):
            raise BilevelError(
                f"study {_name(study)}: {printable(name)} must be a number, and is one of several "
                "choices there; choose a study whose parameters are floats or integers"
            )
        if not found.low <= value <= found.high:
            raise BilevelError(
                f"{printable(name)}={value:g} lies outside the range [{found.low:g}, "
                f"{found.high:g}] of study {_name(study)}; widen the range, or choose another study"
            )
    return dict(ranges)


def _check_names(given: Mapping[str, Any], wanted: list[str], source: str) -> None:
    for name in given:
        if name not in wanted:
            raise BilevelError(
                f"{source}: parameter `{printable(name)}` is no tuned hyperparameter"
                f"{near(name, wanted)}; choose a study of {', '.join(wanted)}"
            )
    for name in wanted:
        if name not in given:
            raise BilevelError(
                f"{source} has no parameter `{name}`; choose a study of {', '.join(wanted)}, or "
                "freeze that hyperparameter"
            )


def _name(study: "optuna.Study") -> str:
    return printable(study.study_name)


def _nested(values: list[float], shape: tuple[int, ...]) -> Any:
    """Return the entries of an array as nested lists."""
    if not shape:
        return values[0]
    size = math.prod(shape[1:])
    return [_nested(values[i * size : (i + 1) * size], shape[1:]) for i in range(shape[0])]
