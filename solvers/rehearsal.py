"""What a self-tuning solver refuses at set-up: by looking at the problem, and by a rehearsal whose errors it explains."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel import Batch, Problem, Refused
from bilevel.laws import recomputed
from bilevel.params import count_examples
from solvers.responding import MissingRule
from solvers.response import Response

MOST_RESPONSE_BYTES = 8 * 2**30
"""On the CPU; on a GPU a quarter of its memory."""

LACKS_DERIVATIVE = ("forward AD", "is not implemented", "inplace operation")
"""Parts of what PyTorch says where a derivative does not exist."""


def check_space(problem: Problem, response: Response, device: torch.device) -> None:
    """Refuse a space with nothing to tune, and one to which the response would not fit in memory.

    Raises:
        Refused: either, or weights of several types.
    """
    space = problem.space
    if space.numel == 0:
        raise Refused("every hyperparameter is frozen, so there is nothing to tune; unfreeze one, or use solver=fixed")
    params, _ = problem.init(torch.Generator().manual_seed(0))
    if len(dtypes := {str(p.dtype) for p in params.values()}) > 1:
        raise Refused(f"the weights are of several types, {' and '.join(sorted(dtypes))}; give all of them one")
    most = torch.cuda.get_device_properties(device).total_memory // 4 if device.type == "cuda" else MOST_RESPONSE_BYTES
    needed = response.size(params, space.numel) * next(iter(params.values())).element_size()
    if needed > most:
        largest = max(space.tuned, key=lambda name: space[name].numel)
        raise Refused(
            f"the response to {space.numel:,} hyperparameters (most of them `{largest}`) would need {needed / 2**30:,.1f} GiB; "
            "share the hyperparameter between weights, or tune it with an implicit solver"
        )


@contextmanager
def refusals(*, linearize: bool) -> Iterator[None]:
    """Within it, an error that comes of a network that self-tuning cannot differentiate is a refusal that says what to do."""
    try:
        yield
    except MissingRule as error:
        raise Refused(str(error)) from None
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        if linearize and any(sign in said for sign in LACKS_DERIVATIVE):
            raise Refused(
                f"linearize=true needs derivatives that PyTorch lacks for a layer of this network ({said}); compose that layer "
                "from elementary operations, or set linearize=false (centered STN)"
            ) from None
        if hint := recomputed(error):
            raise Refused(f"a training pass fails, {said}{hint}") from None
        raise


def without_last(batch: Batch) -> Batch:
    """The batch without its last example, if it has enough."""
    examples = count_examples(batch)
    if examples < 3:
        return batch
    return pytree.tree_map(lambda x: x[:-1] if isinstance(x, Tensor) and x.ndim and len(x) == examples else x, batch)
