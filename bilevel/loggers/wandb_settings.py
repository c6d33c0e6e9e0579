"""Settings of a W&B run: from the user, else from W&B's variables of the environment, checked."""

import os
import secrets
import string
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from bilevel.errors import BilevelError
from bilevel.text import first_line
from bilevel.validate import is_number, wrong

LONGEST_TAG = 64
LONGEST_NAME = 128
PROJECT = "bilevel"
NOT_IN_A_PROJECT = "/\\#?%:"
NOT_IN_AN_ID = ":;,#?/'"

_used_ids: set[str] = set()


def variable(name: str) -> str | None:
    """Return a variable of the environment; None where it is absent or empty."""
    return os.environ.get(name) or None


def text(setting: str, value: Any, *, variable_name: str | None = None) -> str | None:
    """Return a setting as text, by default that of a variable of the environment; None for none.

    Raises:
        BilevelError: it is no text and no number, or too long.

    Example:
        >>> text("wandb.name", 7)
        '7'
    """
    if value is None:
        setting, value = variable_name or setting, variable(variable_name or "")
    if value is None:
        return None
    if not (isinstance(value, str) or is_number(value)):
        raise wrong(setting, value, "must be text", "give a name, or null for the default")
    if not str(value).strip() or len(str(value)) > LONGEST_NAME:
        what = f"must have 1 to {LONGEST_NAME} characters"
        raise wrong(setting, value, what, "choose another name, or null for the default")
    return str(value)


def project_of(value: Any) -> str:
    """Return the name of the project: the setting, else WANDB_PROJECT, else `bilevel`.

    Raises:
        BilevelError: the name has a character that W&B does not take.
    """
    setting = "wandb.project" if value is not None else "WANDB_PROJECT"
    project = text("wandb.project", value, variable_name="WANDB_PROJECT") or PROJECT
    if project.count("/") == 1 and all(parts := project.split("/")):
        remedy = f"set wandb.entity={parts[0]} and wandb.project={parts[1]}"
        raise wrong(setting, project, "must be the name of a project alone", remedy)
    if any(character in NOT_IN_A_PROJECT for character in project):
        what = f"must not contain any of {' '.join(NOT_IN_A_PROJECT)}"
        raise wrong(setting, project, what, "choose another name")
    return project


def entity_of(value: Any) -> str | None:
    """Return the name of the user or team; W&B itself reads WANDB_ENTITY.

    Raises:
        BilevelError: the name has a slash.
    """
    entity = text("wandb.entity", value)
    if entity is not None and "/" in entity:
        what = "must be the name of a user or a team alone"
        raise wrong("wandb.entity", entity, what, "set the project with wandb.project")
    return entity


def tags_of(value: Any) -> tuple[str, ...]:
    """Return tags as text, followed by those of WANDB_TAGS; commas separate tags in a text.

    Raises:
        BilevelError: a tag is no text and no number, or W&B does not take its length.

    Example:
        >>> tags_of("baseline"), tags_of([1, "two"]), tags_of(None)
        (('baseline',), ('1', 'two'), ())
    """
    given = value.split(",") if isinstance(value, str) else () if value is None else value
    given = [given] if is_number(given) else given
    if not isinstance(given, Iterable) or isinstance(given, (dict, bytes)):
        raise wrong("wandb.tags", value, "must be a list of tags", "write wandb.tags=[one,two]")
    named = [("wandb.tags", tag) for tag in given]
    named += [("WANDB_TAGS", tag) for tag in (variable("WANDB_TAGS") or "").split(",") if tag]
    tags = []
    for setting, tag in named:
        if not (isinstance(tag, str) or is_number(tag)):
            raise wrong(setting, tag, "must be text or a number", "write wandb.tags=[one,two]")
        short = str(tag).strip()
        if not 1 <= len(short) <= LONGEST_TAG:
            what = f"must have 1 to {LONGEST_TAG} characters"
            raise wrong(setting, tag, what, "choose a shorter tag, or leave an empty one out")
        tags.append(short)
    return tuple(tags)


def id_from_environment(*, in_sweep: bool) -> str | None:
    """Return WANDB_RUN_ID for the first single run of this process, and None for other runs.

    An id belongs to one run. All runs of a sweep, and all further runs of a process, have the same
    environment, so they get ids of their own.

    Raises:
        BilevelError: the id has a character that W&B does not take.
    """
    run_id = variable("WANDB_RUN_ID")
    if run_id is None or in_sweep or run_id in _used_ids:
        return None
    if (
        any(c in NOT_IN_AN_ID for c in run_id)
        or len(run_id) > LONGEST_TAG
        or run_id.strip() != run_id
    ):
        what = f"must have at most {LONGEST_TAG} characters and none of {' '.join(NOT_IN_AN_ID)}"
        raise wrong("WANDB_RUN_ID", run_id, what, "choose another id, or unset it")
    _used_ids.add(run_id)
    return run_id


def new_id() -> str:
    """Return a new id of a run, as W&B makes them."""
    return "".join(secrets.choice(string.digits + string.ascii_lowercase) for _ in range(8))


def unused_variables(mode: str) -> list[str]:
    """Return a sentence for each variable that asks for something else than the run does."""
    found = []
    if (asked := variable("WANDB_MODE")) is not None and asked != mode:
        found.append(f"WANDB_MODE={asked} has no effect; set wandb.mode={asked}")
    if (asked := variable("WANDB_DIR")) is not None:
        found.append(
            f"WANDB_DIR={asked} has no effect, since W&B's files lie in the run directory; set "
            "hydra.run.dir"
        )
    return found


@contextmanager
def explained() -> Iterator[None]:
    """Turn an error about W&B's settings within a block into a sentence.

    Raises:
        BilevelError: instead of the error.
    """
    import wandb

    try:
        yield
    except (wandb.errors.UsageError, ValueError) as error:
        reason = first_line(error)
        if callable(details := getattr(error, "errors", None)):  # of pydantic
            first = details()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise BilevelError(
            f"W&B does not take its settings ({reason}); correct the wandb.… settings and the "
            "WANDB_… variables, or set wandb.mode=disabled"
        ) from error
