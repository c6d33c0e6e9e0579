"""`embedding_bag` in elementary operations: its kernel has neither forward mode nor a rule."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bilevel import BilevelError
from bilevel.solvers.response.per_example_weight import rule


@rule(F.embedding_bag)
def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Return the sum, mean or maximum of the rows of each bag, with bags of ids [B, n].

    Entries equal to `padding_idx` are no members of a bag; an empty bag gives 0.
    """
    if input.ndim != 2 or input.is_nested:
        raise BilevelError(
            "embedding_bag with offsets has bags of several lengths, in which no axis holds the "
            "examples; pad the ids to [B, n] with padding_idx, or use a solver that needs the "
            "gradient alone (solver=fixed, SAMA, evolution strategies, black box)"
        )
    rows: Any = F.embedding(input, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[..., None]
    if padding_idx is None:
        return {"sum": rows.sum, "mean": rows.mean, "max": rows.amax}[mode](1)
    padding = padding_idx + weight.shape[0] if padding_idx < 0 else padding_idx
    absent = (input == padding)[..., None]
    if mode == "max":
        highest = rows.masked_fill(absent, float("-inf")).amax(1)
        return highest.masked_fill(absent.all(1), 0.0)
    total = rows.masked_fill(absent, 0.0).sum(1)
    return total if mode == "sum" else total / (~absent).sum(1).clamp(min=1)
