"""Names for groups of runs: the solver, and the settings in which its runs differ."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

IGNORED = (
    *("seed", "resume", "data", "loggers", "wandb", "tensorboard", "names", "hydra"),
    *("runner.progress", "runner.picture", "runner.checkpoint_every", "runner.keep_checkpoints"),
)
"""Settings that change no number that is compared."""

SHARED = ("lr.", "trial.", "response")
"""Settings that solvers' own settings are interpolated from: they count for a solver that has such a one."""

ABSENT = object()


def label(runs: Sequence[tuple[str, str, Mapping[str, Any]]]) -> list[str]:
    """A label for each run, from its problem, its solver and its configuration.

    Settings of the solver count where they differ between runs of one solver on one problem; all others where they differ
    between any runs on that problem, so that what was not run under the same conditions does not look as if it had been.

    Example:
        >>> label([("ridge", "stn", {"seed": 0, "solver": {"inner_steps": 1}}),
        ...        ("ridge", "stn", {"seed": 0, "solver": {"inner_steps": 5}}),
        ...        ("ridge", "fixed", {"seed": 1, "solver": {"clip_norm": 3.0}})])
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
        told = [
            f"{_short(key)}={_value(key, flat[key])}"
            for key in varied[problem, solver]
            if key in flat
        ]
        labels.append(" ".join([solver, *told]))
    return labels


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings that can change a number, by dotted key.

    Example:
        >>> flatten({"seed": 0, "lr": {"inner": 0.1}, "runner": {"epochs": 3, "progress": "none"}})
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
    """Keys whose value differs between the runs whose settings are known, in the order of the configuration."""
    known = [flat for flat in settings if flat]
    keys = dict.fromkeys(key for flat in known for key in flat)
    return [key for key in keys if len({repr(flat.get(key, ABSENT)) for flat in known}) > 1]


def _is_used(key: str, settings: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a shared setting reaches the solver: a setting of its own, of a similar name, goes with it."""
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
    """Without keys that only repeat another one, as `solver.inner_optimizer.lr` does where it is `lr.inner`."""
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
    """Whether each value goes with one of the others, and the other way round."""
    return len(set(values)) == len(set(others)) == len(set(zip(values, others, strict=True)))


def _short(key: str) -> str:
    """The key without the node that says nothing new."""
    return re.sub(r"\._target_$", "", re.sub(r"^(solver|problem|runner)\.(?!_target_)", "", key))


def _value(key: str, value: Any) -> str:
    if key.endswith("_target_"):
        return str(value).rpartition(".")[2]
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, float):
        return f"{value:g}"
    return re.sub(r"[\s']+", "", str(value))  # a list as it is written on the command line
