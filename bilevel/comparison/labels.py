"""Names for groups of runs: the solver, and the settings in which its runs differ."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

IGNORED = (
    *("seed", "resume", "trust", "data", "loggers", "wandb", "tensorboard", "names", "hydra"),
    *("runner.progress", "runner.picture", "runner.checkpoint_every", "runner.keep_checkpoints"),
)
"""Settings that change no compared number."""

SHARED = ("lr.", "trial.", "response")
"""Settings from which solvers' settings are interpolated; they count for solvers that use them."""

ABSENT = object()


def label(runs: Sequence[tuple[str, str, Mapping[str, Any]]]) -> list[str]:
    """Return a label for each run, from its problem, its solver and its configuration.

    A setting of the solver counts where it differs between runs of one solver on one problem. Any
    other setting counts where it differs between runs on that problem. So runs under different
    conditions never have one label.

    Example:
        >>> label([
        ...     ("ridge", "stn", {"seed": 0, "solver": {"inner_steps": 1}}),
        ...     ("ridge", "stn", {"seed": 0, "solver": {"inner_steps": 5}}),
        ...     ("ridge", "fixed", {"seed": 1, "solver": {"clip_norm": 3.0}})])
        ['stn inner_steps=1', 'stn inner_steps=5', 'fixed']
    """
    settings = [flatten(config) for _, _, config in runs]
    varied: dict[tuple[str, str], list[str]] = {}
    for problem in dict.fromkeys(problem for problem, _, _ in runs):
        here = [index for index, run in enumerate(runs) if run[0] == problem]
        common = [
            key for key in _varied([settings[i] for i in here]) if not key.startswith("solver.")
        ]
        for solver in dict.fromkeys(runs[i][1] for i in here):
            own = [settings[i] for i in here if runs[i][1] == solver]
            keys = [key for key in common if _is_used(key, own)]
            keys += [key for key in _varied(own) if key.startswith("solver.")]
            varied[problem, solver] = _independent(keys, own)
    labels = []
    for (problem, solver, _), flat in zip(runs, settings, strict=True):
        differences = [
            f"{_short(key)}={value_text(key, flat[key])}"
            for key in varied[problem, solver]
            if key in flat
        ]
        labels.append(" ".join([solver, *differences]))
    return labels


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the settings that can change a compared number, by dotted key.

    Example:
        >>> config = {"seed": 0, "lr": {"inner": 0.1}, "runner": {"epochs": 3, "progress": "none"}}
        >>> flatten(config)
        {'lr.inner': 0.1, 'runner.epochs': 3}
    """
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if any(name == ignored or name.startswith(f"{ignored}.") for ignored in IGNORED):
            continue
        if isinstance(value, Mapping):
            leaves |= flatten(value, f"{name}.")
        else:
            leaves[name] = value
    return leaves


def _varied(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys whose values differ between runs with known settings, in order."""
    known = [flat for flat in settings if flat]
    keys = dict.fromkeys(key for flat in known for key in flat)
    return [key for key in keys if len({repr(flat.get(key, ABSENT)) for flat in known}) > 1]


def _is_used(key: str, settings: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a shared setting reaches the solver.

    It does if a solver setting with a similar name varies together with it.
    """
    if not key.startswith(SHARED):
        return True
    values = [repr(flat.get(key, ABSENT)) for flat in settings]
    similar = {
        other
        for flat in settings
        for other in flat
        if other.startswith("solver.") and any(word in other for word in key.split("."))
    }
    return any(
        _alike(values, [repr(flat.get(other, ABSENT)) for flat in settings]) for other in similar
    )


def _independent(keys: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys without those that repeat another one.

    `solver.inner_optimizer.lr` repeats `lr.inner`, for example.
    """
    kept: dict[str, list[str]] = {}
    for key in keys:
        values = [repr(flat.get(key, ABSENT)) for flat in settings]
        repeats = any(
            values == others
            or (other.startswith(SHARED) and len(set(values)) > 1 and _alike(values, others))
            for other, others in kept.items()
            if key.startswith("solver.")
        )
        if not repeats:
            kept[key] = values
    return list(kept)


def _alike(values: Sequence[str], others: Sequence[str]) -> bool:
    """Return whether the values correspond one to one."""
    return len(set(values)) == len(set(others)) == len(set(zip(values, others, strict=True)))


def _short(key: str) -> str:
    """Return the key without the parts that carry no information."""
    return re.sub(r"\._target_$", "", re.sub(r"^(solver|problem|runner)\.(?!_target_)", "", key))


def value_text(key: str, value: Any) -> str:
    """Return a setting as it is written on the command line."""
    if key.endswith("_target_"):
        return str(value).rpartition(".")[2]
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, float):
        return f"{value:g}"
    return re.sub(r"[\s']+", "", str(value))
