"""The MLP of the first benchmark with h weight decays, each for an equal share of the weights."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workloads import BATCH
from bilevel import Batch, Hypers, ModuleProblem, Params, Positive, Prediction, Space
from bilevel.problems.networks.mlp import MLP


class Decays(ModuleProblem):
    """Cross-entropy + ½ Σ_i λ_{g(i)} w_i² on random images of MNIST's shape.

    g assigns the weights to h groups in order.

    Args:
        hypers: Number of decays; None gives one decay per weight.
        sizes: Widths of the layers.
    """

    def __init__(self, hypers: int | None, sizes: Sequence[int]) -> None:
        module = partial(MLP, sizes)
        weights = sum(p.numel() for p in module().parameters())
        h = weights if hypers is None else hypers
        self.share = -(-weights // h)
        generator = torch.Generator().manual_seed(0)

        def split() -> tuple[Tensor, Tensor]:
            n = 8 * BATCH
            return torch.randn(n, sizes[0], generator=generator), torch.randint(
                sizes[-1], (n,), generator=generator
            )

        space = Space(decay=Positive(init=1e-2, shape=(h,), per_example=False))
        super().__init__(module, space, split(), split(), batch_size=BATCH)

    def inner_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        squares = torch.cat([p.reshape(-1) for p in params.values()]).square()
        if self.share > 1:
            h = len(hypers["decay"])
            squares = (
                F.pad(squares, (0, self.share * h - len(squares))).reshape(h, self.share).sum(1)
            )
        return F.cross_entropy(prediction, batch[1]) + 0.5 * hypers["decay"] @ squares

    def outer_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        return F.cross_entropy(prediction, batch[1])


def decays(hypers: int | None, sizes: Sequence[int] = (784, 1200, 1200, 1200, 10)) -> Decays:
    """Return the problem with `hypers` decays, or with one decay per weight."""
    return Decays(hypers, sizes)
