"""Optuna's studies on the command line: a run begins at one, and `bilevel export` adds to one."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel import studies
from bilevel.checkpoint.checkpoints import best_of, load
from bilevel.checkpoint.refit_directory import result_directory
from bilevel.cli import targets
from bilevel.cli.setting_types import check_type
from bilevel.errors import BilevelError
from bilevel.loggers.records import DESCRIPTION
from bilevel.loggers.space_json import space_from_json
from bilevel.problem import Problem
from bilevel.text import first_line, printable, without_password
from bilevel.untrusted_files import read_bytes
from bilevel.validate import one_of

if TYPE_CHECKING:
    import optuna

USES = ("start", "history")


def with_study(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with the trials of its study as plain values.

    `study.use=start` writes the best trial into `problem.space`, and `study.use=history` writes all
    complete trials into `solver.history`. So a resumed run opens no study.

    Args:
        config: the resolved configuration of a new run; `study` is left out where it has no
            storage.

    Raises:
        BilevelError: the study cannot be opened, or does not fit.
    """
    given = config.get("study")
    if not isinstance(given, Mapping):
        raise BilevelError(
            f"study={given!r} must be settings; write study.storage=sqlite:///file.db"
        )
    one_of(USES, **{"study.use": given.get("use")})
    for key in ("storage", "name"):
        check_type(given.get(key), str | None, f"study.{key}")
    rest = {name: value for name, value in config.items() if name != "study"}
    if given.get("storage") is None:
        for key, default in (("name", None), ("use", "start")):
            if given.get(key) != default:
                raise BilevelError(
                    f"study.{key}={given[key]} has no effect without a storage; add "
                    "study.storage=sqlite:///file.db"
                )
        return rest
    rest["study"] = {**given, "storage": without_password(given["storage"])}
    with opened(given["storage"], given.get("name")) as study:
        if given["use"] == "history":
            return {**rest, "solver": {**rest["solver"], "history": studies.history(study)}}
        problem = targets.build(rest["problem"], "problem")
        if not isinstance(problem, Problem):
            return rest  # the run itself explains it
        space = studies.start(problem.space, study)
    changes = dict(rest["problem"].get("space") or {})
    for name in space.tuned:
        changes[name] = {**changes.get(name, {}), "init": space[name].init}
    return {**rest, "problem": {**rest["problem"], "space": changes}}


def export_to_study(run: Path, storage: str, name: str | None, *, completed: bool = False) -> str:
    """Give λ of the best evaluation of a run to a study, and return a sentence about it.

    Nothing in the run directory is executed.

    Args:
        run: the run directory.
        storage: the URL of the storage of Optuna.
        name: the name of the study; None for the only one.
        completed: add a complete trial with the validation loss of that evaluation. Otherwise the
            study evaluates λ in its next trial.

    Raises:
        BilevelError: the directory holds no run, or the study cannot take the values.
    """
    chosen = result_directory(run)
    state = load(chosen)
    hypers = best_of(state, chosen).hypers
    params = studies.params_of(hypers, space_from_json(_described(run).get("space")))
    with opened(storage, name) as study:
        if completed:
            studies.add(study, params, state["best"]["record"]["valid_loss"])
        else:
            studies.enqueue(study, params)
        done = "is a complete trial" if completed else "is the next trial"
        return f"λ of {run} {done} of study {printable(study.study_name)}"


@contextmanager
def opened(storage: str, name: str | None = None) -> Iterator["optuna.Study"]:
    """Open a study in a storage, which must exist, and close the storage at the end of a block.

    Args:
        storage: its URL, `sqlite:///file.db`.
        name: the name of the study; None for the only one.

    Raises:
        BilevelError: there is no such storage or study.
    """
    import optuna
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    shown = printable(without_password(storage))
    failed = (
        *(ImportError, OSError, RuntimeError, ValueError),
        *(SQLAlchemyError, optuna.exceptions.OptunaError),
    )
    try:
        url = make_url(storage)
        if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
            raise FileNotFoundError  # the library would make the file
        opened_storage = optuna.storages.RDBStorage(storage, skip_table_creation=True)
        names = optuna.get_all_study_names(opened_storage)
    except failed as error:
        why = "it is no storage of Optuna"
        if isinstance(error, FileNotFoundError):
            why = "there is no such file"
        elif isinstance(error, (ImportError, RuntimeError)):  # no driver, or an older version
            why = first_line(error)
        raise BilevelError(
            f"storage={shown} cannot be opened ({why}); give the URL of Optuna's "
            "storage, such as sqlite:///file.db"
        ) from None
    try:
        if name is None and len(names) == 1:
            name = names[0]
        if name not in names:
            what = "needs the name of a study" if name is None else f"has no study {name!r}"
            listed = ", ".join(map(printable, names)) or "none; make one with Optuna"
            raise BilevelError(f"{shown} {what}; its studies are {listed}")
        yield optuna.load_study(study_name=name, storage=opened_storage)
    finally:
        opened_storage.remove_session()
        opened_storage.engine.dispose()


def _described(run: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_bytes(run / DESCRIPTION))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
