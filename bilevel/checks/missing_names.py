"""The sentence about a hyperparameter or a weight that a problem reads and that does not exist."""

import linecache
import re
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from bilevel.params import Batch, Hypers, Params
from bilevel.text import near


def missing_name(
    stage: str, error: Exception, hypers: Hypers, params: Params, batch: Batch
) -> str | None:
    """Return a sentence about a name that λ or w does not have; None for another error.

    The failing line decides which of them the problem looked into. Without it (code from a prompt),
    a name is that of a hyperparameter, unless the batch has names too.

    Args:
        stage: the method that was called.
        error: the error.
        hypers: λ.
        params: w.
        batch: the batch.
    """
    name = error.args[0] if isinstance(error, KeyError) and error.args else None
    if not isinstance(name, str):
        return None
    read = _read(error, name)
    if read is None and not isinstance(batch, Mapping):
        read = params if "." in name else hypers
    if not isinstance(read, Mapping) or not read:
        return None
    if set(read) == set(hypers) and name not in hypers:
        declared = ", ".join(f"`{known}`" for known in hypers)
        return (
            f"`{stage}` reads the hyperparameter `{name}`, which the space does not have"
            f"{near(name, hypers)}; declare it, or read one of {declared}"
        )
    if set(params) <= set(read) and name not in params:
        return (
            f"`{stage}` reads the weight `{name}`, which the network does not have"
            f"{near(name, params)}; use a name of `module.named_parameters()`"
        )
    return None


def _read(error: Exception, name: str) -> Any:
    """Return the mapping of which the failing line takes an entry, or None."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return None
    frame = trace.tb_frame
    line = linecache.getline(frame.f_code.co_filename, trace.tb_lineno, frame.f_globals)
    found = re.search(rf"(\w+)\[['\"]{re.escape(name)}['\"]\]", line)
    return None if found is None else frame.f_locals.get(found[1])
