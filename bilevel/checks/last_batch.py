"""A law about the last batch of an epoch, which may have one example only."""

from collections.abc import Iterator

import torch
from torch.utils import _pytree as pytree

from bilevel.checks.finding import Finding
from bilevel.checks.first_batch import FirstBatch, has_examples
from bilevel.data.tensor_stream import Data
from bilevel.errors import BilevelError
from bilevel.params import count_examples
from bilevel.problem import Problem


def last_batch(case: FirstBatch) -> Iterator[Finding]:
    """A last training batch of one example passes the network.

    Batch norm refuses it, which would end a run after most of its first epoch.
    """
    if getattr(case.data.train, "last_size", None) != 1:
        return
    examples = count_examples(case.batch)
    one = pytree.tree_map(lambda x: x[:1] if has_examples(x, examples) else x, case.batch)
    try:
        with torch.no_grad():
            case.predict(train=True, batch=one)
    except BilevelError as error:
        yield Finding("error", f"the last batch of an epoch has one example, and {error}")


def check_last_batch(problem: Problem, data: Data, device: torch.device) -> None:
    """Refuse a loader whose last batch the network cannot take.

    Raises:
        BilevelError: that batch has one example, and the network has batch norm.
    """
    for finding in last_batch(FirstBatch(problem, data, device)):
        raise BilevelError(finding.text)
