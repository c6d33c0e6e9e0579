"""Errors of loaders in one sentence: a worker that died, and examples that do not fit together."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

from bilevel.data.fields import fields
from bilevel.errors import BilevelError
from bilevel.text import first_line

DEAD_WORKER = re.compile(r"DataLoader worker .*(exited unexpectedly|is killed by signal)")
"""Matches PyTorch's message about a worker that has ended."""
DEAD_WORKER_ERRORS = (RuntimeError, ConnectionError, EOFError)
"""Errors that PyTorch raises where a worker has ended.

The latter two occur while the worker passes a batch.
"""
UNCOLLATED = re.compile(
    r"default_collate: batch must contain .*|stack expects each tensor to be equal size.*|"
    r"each element in list of batch should be of equal size|"
    r"Trying to resize storage that is not resizable|Batches of sparse tensors are not .*"
)
"""Matches PyTorch's messages about examples that cannot become one batch."""

COLLATED = (str, bytes, int, float, Mapping, Sequence)
"""Types that become a batch, beside tensors and arrays."""


@contextmanager
def explained(loader: Any, name: str) -> Iterator[None]:
    """Raise errors with a remedy where a worker died or examples do not make a batch.

    Args:
        loader: a DataLoader or another iterable.
        name: name of the split.

    Raises:
        BilevelError: one of the two happened; other errors pass.
    """
    try:
        yield
    except (TypeError, *DEAD_WORKER_ERRORS) as error:
        if found := UNCOLLATED.search(str(error)):
            raise BilevelError(
                f"the {name} loader cannot make a batch of its examples "
                f"({first_line(found.group()).rstrip('. ')}{_odd_field(loader)}); return dense "
                "tensors of one shape and numbers from the dataset, or give the DataLoader a "
                "collate_fn"
            ) from error
        if isinstance(error, TypeError):
            raise
        gone = (
            not isinstance(error, RuntimeError)
            and getattr(loader, "num_workers", False)
            and "Caught" not in str(error)
        )
        if gone or DEAD_WORKER.search(str(error)):
            raise BilevelError(
                f"a worker of the {name} loader died ({first_line(error).rstrip('. ')}), most "
                "often for lack of memory; lower num_workers, prefetch_factor or batch_size, and "
                "resume=… continues from the last checkpoint"
            ) from error
        raise


def _odd_field(loader: Any) -> str:
    """Return the field of the first example that makes no batch, in words; "" if none is found."""
    with suppress(Exception):  # the data set is a user's own code
        for name, value in fields(loader.dataset[0]).items():
            dense = getattr(value, "layout", torch.strided) == torch.strided
            if not dense or getattr(value, "is_nested", False):
                return f"; {name} is not dense"
            if not (isinstance(value, COLLATED) or hasattr(value, "dtype")):
                return f"; {name} is a {type(value).__name__}"
    return ""
