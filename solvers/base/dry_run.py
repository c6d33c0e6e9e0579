"""What a solver refuses at set-up: a response that would not fit, and a rehearsal of its round whose errors it explains."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel import Batch, Data, Problem, Refused, Space, Stream
from bilevel.checks.prediction_laws import recomputation_hint
from bilevel.params import count_examples
from bilevel.solvers.response.jacobian import Response
from bilevel.solvers.response.per_example_weight import MissingRule

MOST_RESPONSE_BYTES = 8 * 2**30
"""On the CPU; on a GPU a quarter of its memory."""

LACKS_DERIVATIVE = (
    "forward AD",
    "is not implemented",
    "inplace operation",
    "once_differentiable",
    "differentiate twice",
)
"""Parts of what PyTorch says where a derivative does not exist."""


def check_response(problem: Problem, response: Response, device: torch.device) -> None:
    """Refuse a space to which the response would not fit in memory beside its gradient.

    Raises:
        Refused: that, or weights of several types.
    """
    space = problem.space
    params, _ = problem.init(torch.Generator().manual_seed(0))
    if len(dtypes := {str(p.dtype) for p in params.values()}) > 1:
        raise Refused(
            f"the weights are of several types, {' and '.join(sorted(dtypes))}; give all of them one"
        )
    most = (
        torch.cuda.get_device_properties(device).total_memory // 4
        if device.type == "cuda"
        else MOST_RESPONSE_BYTES
    )
    needed = response.size(params, space.numel) * next(iter(params.values())).element_size()
    if 2 * needed > most:
        raise Refused(
            f"the response to {space.numel:,} hyperparameters (most of them `{largest(space)}`) would need {units(needed)} and "
            f"as much again for its gradient, and the limit is {units(most)}; share the hyperparameter between weights, or "
            "tune it with a solver whose memory does not grow with λ so fast (implicit, SAMA, unrolled)"
        )


def largest(space: Space) -> str:
    """The tuned hyperparameter of most coordinates."""
    return max(space.tuned, key=lambda name: space[name].numel)


def units(size: int) -> str:
    """Bytes as a reader takes them in.

    Example:
        >>> units(12), units(3 * 2**20), units(5 * 2**30)
        ('12 bytes', '3.0 MiB', '5.0 GiB')
    """
    for unit, least in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= least:
            return f"{size / least:,.1f} {unit}"
    return f"{size} bytes"


@contextmanager
def refusals(lacking: str | None) -> Iterator[None]:
    """Within it, an error that comes of a network that the solver cannot differentiate is a refusal that says what to do.

    Args:
        lacking: the sentence for a derivative that PyTorch lacks, with {said} for what it says; None where none is needed.
    """
    try:
        yield
    except MissingRule as error:
        raise Refused(str(error)) from None
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        if lacking is not None and any(sign in said for sign in LACKS_DERIVATIVE):
            raise Refused(lacking.format(said=said)) from None
        if hint := recomputation_hint(error):
            raise Refused(f"a training pass fails, {said}{hint}") from None
        raise


class Peeking(Stream):
    """A stream at its first batch, for a trial that must count nothing and leave the order of the batches as it is."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.examples = stream, 0
        self.size, self.steps_per_epoch = stream.size, stream.steps_per_epoch

    def next(self) -> Batch:
        return self.stream.peek()

    def peek(self) -> Batch:
        return self.stream.peek()

    def once(self, limit: int | None = None) -> Iterator[Batch]:
        yield self.stream.peek()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing moves here."""


def peeking(data: Data) -> Data:
    """The splits as a trial sees them."""
    return Data(Peeking(data.train), Peeking(data.valid))


def without_last(batch: Batch) -> Batch:
    """The batch without its last example, if it has enough."""
    examples = count_examples(batch)
    if examples < 3:
        return batch
    return pytree.tree_map(
        lambda x: x[:-1] if isinstance(x, Tensor) and x.ndim and len(x) == examples else x, batch
    )
