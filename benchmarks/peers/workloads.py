"""The bilevel problems of the comparison, as functions of lists of tensors.

    L_T(w, u) = cross-entropy + ½ Σ_i e^{u_i} w_i²,    L_V(w) = cross-entropy on other examples

Either u has one coordinate for each weight, or one for each tensor of w.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EXAMPLES = 128
"""Number of training examples and of validation examples; every pass takes all of them."""
K = 10
"""Number of CG iterations, of Neumann terms and of unrolled steps."""
RATE = 0.05
"""Learning rate of the unrolled steps."""
LOG_DECAY = -2.0
"""u at every coordinate."""
TRAINED = 300
"""Steps of gradient descent, with momentum 0.9, before a hypergradient is taken."""

Tensors = Sequence[Tensor]


class Size(NamedTuple):
    """The size of a problem.

    Attributes:
        widths: the widths of the layers.
        per_weight: one coordinate of u for each weight, and no biases.
    """

    widths: tuple[int, ...]
    per_weight: bool = False


SIZES: dict[str, Size] = {
    "MLP 20-32-2, h = 4": Size((20, 32, 2)),
    "MLP 64-100-10, h = 4": Size((64, 100, 10)),
    "logistic regression 784-10, h = m": Size((784, 10), per_weight=True),
    "MLP 784-256-256-10, h = 6": Size((784, 256, 256, 10)),
}


class Work(NamedTuple):
    """One problem, at trained weights.

    Attributes:
        size: its size.
        w: the weights, [out, in] and [out] for each layer.
        u: the logarithms of the decays.
        train: inputs [n, in] and labels [n].
        valid: the same for L_V.
        step: η = 1/L of the Neumann series, L the largest eigenvalue of H.
    """

    size: Size
    w: list[Tensor]
    u: Tensor
    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    step: float

    @property
    def weights(self) -> int:
        """Return the number of weights."""
        return sum(t.numel() for t in self.w)

    def inner(self, w: Tensors, u: Tensor) -> Tensor:
        """Return L_T."""
        x, labels = self.train
        return F.cross_entropy(network(self.size, w, x), labels) + penalty(self.size, w, u)

    def outer(self, w: Tensors) -> Tensor:
        """Return L_V."""
        x, labels = self.valid
        return F.cross_entropy(network(self.size, w, x), labels)

    def to(self, dtype: torch.dtype) -> "Work":
        """Return the same problem in another type."""
        (x, labels), (y, others) = self.train, self.valid
        return self._replace(
            w=[t.to(dtype) for t in self.w],
            u=self.u.to(dtype),
            train=(x.to(dtype), labels),
            valid=(y.to(dtype), others),
        )


def network(size: Size, w: Tensors, x: Tensor) -> Tensor:
    """Return the logits, with tanh between layers."""
    if size.per_weight:
        return F.linear(x, w[0])
    last = len(w) - 2
    for i in range(0, last, 2):
        x = torch.tanh(F.linear(x, w[i], w[i + 1]))
    return F.linear(x, w[last], w[last + 1])


def penalty(size: Size, w: Tensors, u: Tensor) -> Tensor:
    """Return ½ Σ_i e^{u_i} w_i², or with u_i for all entries of the tensor w_i."""
    if size.per_weight:
        return 0.5 * (u.exp() * w[0].square()).sum()
    return 0.5 * u.exp().dot(torch.stack([t.square().sum() for t in w]))


def prepare(size: Size) -> Work:
    """Return the problem in float32 at weights near the minimum of L_T, computed in float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    widths, w = size.widths, []
    for fan_in, out in pairwise(widths):
        w.append(normal(out, fan_in) / fan_in**0.5)
        w += [] if size.per_weight else [torch.zeros(out, dtype=torch.float64)]
    truth = normal(widths[-1], widths[0])

    def examples() -> tuple[Tensor, Tensor]:
        x = normal(EXAMPLES, widths[0])
        return x, (x @ truth.T).argmax(1)

    u = torch.full(tuple(w[0].shape) if size.per_weight else (len(w),), LOG_DECAY)
    work = Work(size, w, u.double(), examples(), examples(), 1.0)
    trained = descend(work)
    work = work._replace(w=trained)
    return work._replace(step=1 / largest_eigenvalue(work)).to(torch.float32)


def descend(work: Work) -> list[Tensor]:
    """Return the weights after `TRAINED` steps."""
    w = [t.clone().requires_grad_() for t in work.w]
    optimizer = torch.optim.SGD(w, lr=RATE, momentum=0.9)
    for _ in range(TRAINED):
        optimizer.zero_grad()
        work.inner(w, work.u).backward()
        optimizer.step()
    return [t.detach() for t in w]


def largest_eigenvalue(work: Work) -> float:
    """Return the largest eigenvalue of the Hessian, from 50 power iterations."""
    w = [t.clone().requires_grad_() for t in work.w]
    gradients = torch.autograd.grad(work.inner(w, work.u), w, create_graph=True)
    generator = torch.Generator().manual_seed(1)
    q = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in w]
    largest = 0.0
    for _ in range(50):
        norm = torch.stack([t.norm() for t in q]).norm()
        q = list(torch.autograd.grad(gradients, w, [t / norm for t in q], retain_graph=True))
        largest = float(torch.stack([t.norm() for t in q]).norm())
    return largest
