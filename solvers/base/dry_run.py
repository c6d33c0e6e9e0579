"""Refusals at set-up: a response that would not fit, and the errors of a dry run, explained."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel import Batch, Data, Need, Problem, Refused, Solver, Space, Stream
from bilevel.checks.hints import described, hint
from bilevel.checks.prediction_laws import recomputation_hint
from bilevel.half_weights import HalfWeights, wide
from bilevel.params import count_examples
from bilevel.solvers.base.core import Core
from bilevel.solvers.response.cheaper_pass import CheaperPass
from bilevel.solvers.response.jacobian import Response
from bilevel.solvers.response.per_example_weight import MissingRule
from bilevel.text import byte_size, first_line

MOST_RESPONSE_BYTES = 8 * 2**30
"""On the CPU; on a GPU a quarter of its memory."""

MANY_COORDINATES = 500
"""Coordinates of λ above which a warning is due: a step shows the response one direction of λ."""

_SMALLER = (
    "share the hyperparameter between weights, or tune it with a solver whose memory does not grow "
    "with λ so fast (implicit, SAMA, unrolled)"
)

LACKS_DERIVATIVE = (
    "forward AD",
    "implement the jvp",
    "is not implemented",
    "inplace operation",
    "once_differentiable",
    "differentiate twice",
)
"""Parts of PyTorch's messages about a derivative that does not exist."""


def check_types(problem: Problem) -> None:
    """Refuse weights of several types, which the vectors of a solver cannot hold.

    Raises:
        Refused: that, with a weight of each type.
    """
    params, _ = problem.init(torch.Generator().manual_seed(0))
    kinds: dict[torch.dtype, str] = {}
    for name, p in params.items():
        kinds.setdefault(p.dtype, name)
    if len(kinds) > 1:
        found = [f"`{name}` in {str(kind).removeprefix('torch.')}" for kind, name in kinds.items()]
        raise Refused(
            f"the weights have several types, {' and '.join(found)}; give all of them the same "
            "type (module.float())"
        )


def check_response(problem: Problem, response: Response, device: torch.device) -> None:
    """Refuse a space whose response would not fit in memory together with its gradient.

    Raises:
        Refused: that.
    """
    space = problem.space
    params, _ = problem.init(torch.Generator().manual_seed(0))
    most = (
        torch.cuda.get_device_properties(device).total_memory // 4
        if device.type == "cuda"
        else MOST_RESPONSE_BYTES
    )
    needed = response.size(params, space.numel) * wide(next(iter(params.values())).dtype).itemsize
    if 2 * needed > most:
        raise Refused(
            f"the response to {space.numel:,} hyperparameters (most of them `{largest(space)}`) "
            f"would need {byte_size(needed)} and as much again for its gradient, and the limit is "
            f"{byte_size(most)}; {_SMALLER}"
        )


def large_response(
    space: Space, weights: Sequence[Tensor], theta: Sequence[Tensor]
) -> dict[str, str]:
    """Return a warning if λ has so many coordinates that a step shows Θ too few of them."""
    if (h := space.numel) <= MANY_COORDINATES:
        return {}
    numbers = sum(leaf.numel() for leaf in theta)
    each = round(numbers / sum(leaf.numel() for leaf in weights))
    size = byte_size(numbers * theta[0].element_size())
    return {
        "response": f"SelfTuning: λ has {h:,} coordinates (most of them `{largest(space)}`), and "
        f"the response holds {numbers:,} numbers ({size}), {each:,} for each weight, while a step "
        f"learns from one random direction of λ; {_SMALLER}"
    }


def largest(space: Space) -> str:
    """Return the tuned hyperparameter with the most coordinates."""
    return max(space.tuned, key=lambda name: space[name].numel)


def lacks_derivative(solver: Solver) -> str:
    """Return the refusal of a layer without second derivatives, with {error} in it."""
    return (
        f"{type(solver).__name__} needs {Need.SECOND_DERIVATIVES.value}, which PyTorch lacks for a "
        "layer of this network ({error}); compose that layer from elementary operations, or use a "
        "solver that needs the gradient alone (self-tuning, SAMA, penalty, evolution strategies, "
        "black box)"
    )


def refuse_half_weights(solver: str, problem: Problem) -> None:
    """Refuse weights of 16 bits for a solver that follows a difference of nearly equal numbers."""
    if isinstance(problem, HalfWeights):
        raise Refused(
            f"{solver} follows the difference of nearly equal numbers, which weights of 16 bits "
            "round to 3 digits; give the problem float32 weights (`module.float()`), or use a "
            "solver that differentiates (for SAMA: finite_difference=false)"
        )


@contextmanager
def refusals(lacking: str | None) -> Iterator[None]:
    """Turn an error about a missing derivative or rule within a block into a refusal.

    Args:
        lacking: the message, with {error} for PyTorch's own; None if no derivative is needed.
    """
    try:
        yield
    except MissingRule as error:
        raise Refused(str(error)) from None
    except (RuntimeError, TypeError) as error:
        line = first_line(error)
        if hint(error):
            raise Refused(f"a call of the problem raises {described(error)}") from None
        if isinstance(error, TypeError):
            raise
        if lacking is not None and any(sign in line for sign in LACKS_DERIVATIVE):
            raise Refused(lacking.format(error=line)) from None
        if remedy := recomputation_hint(error):
            raise Refused(f"a training pass fails, {line}{remedy}") from None
        raise


class Peeking(Stream):
    """A stream that stays at its first batch, for a dry run; it counts and moves nothing."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.examples = 0
        self.size = stream.size
        self.steps_per_epoch = stream.steps_per_epoch

    def next(self) -> Batch:
        return self.stream.peek()

    def peek(self) -> Batch:
        return self.stream.peek()

    def once(self, limit: int | None = None) -> Iterator[Batch]:
        yield self.stream.peek()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: the stream never moves."""


def peeking(data: Data) -> Data:
    """Return the splits for a dry run."""
    return Data(Peeking(data.train), Peeking(data.valid))


def takes(core: Core, batch: Batch) -> bool:
    """Return whether the network runs with plain weights on a batch of another size."""
    if not core.carry:
        return True  # the problem must
    carry = core.problem.fresh_carry(core.carry, batch)
    try:
        with torch.no_grad():
            core.predict(core.hypers(), carry, batch, core.weights.detached())
    except Exception:  # a carry for batches of one size
        return False
    return True


def check_part(core: Core, cheaper: CheaperPass) -> None:
    """Refuse a response pass on a part of the batch if the network does not take the part."""
    batch = core.data.train.peek()
    part = cheaper.part(batch)
    kept, examples = count_examples(part), count_examples(batch)
    if kept < examples and not takes(core, part):
        raise Refused(
            f"response_fraction={cheaper.fraction:g} gives {kept} of {examples} examples to a "
            "network whose carry does not fit to them; let fresh_carry of the problem follow the "
            "size of the batch, or set response_fraction=1 (response_every=2 saves as much)"
        )


def without_last(batch: Batch, count: int = 1) -> Batch:
    """Return the batch without its last examples, if two are left."""
    examples = count_examples(batch)
    if examples < 2 + count:
        return batch
    return pytree.tree_map(
        lambda x: x[:-count] if isinstance(x, Tensor) and x.ndim and len(x) == examples else x,
        batch,
    )
