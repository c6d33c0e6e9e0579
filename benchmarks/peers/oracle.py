"""The value that every library must return, in float64 from dense second derivatives.

The recursions are written down anew here, with H and ∂²L_T/∂w∂u from forward over reverse mode.
Above 1,000 weights, products with H take its place; tests compare the two.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from benchmarks.peers.workloads import RATE, K, Work

DENSE = 1000

Gradient = Callable[[Tensor, Tensor], Tensor]


class Oracle:
    """H and the cross derivative of L_T at any w, in flat coordinates.

    Args:
        work: the problem; it is taken in float64.
    """

    def __init__(self, work: Work) -> None:
        self.work = work.to(torch.float64)
        self.shapes = [t.shape for t in self.work.w]
        self.w = torch.cat([t.reshape(-1) for t in self.work.w])
        self.gradient: Gradient = grad(lambda w, u: self.work.inner(self.cut(w), u))

    def cut(self, w: Tensor) -> list[Tensor]:
        """Return the tensors of a flat w."""
        parts = w.split([s.numel() for s in self.shapes])
        return [part.reshape(s) for part, s in zip(parts, self.shapes, strict=True)]

    def product(self, w: Tensor, *, dense: bool | None = None) -> Callable[[Tensor], Tensor]:
        """Return q ↦ H q at w, by default with a dense H up to `DENSE` weights."""
        dense = w.numel() <= DENSE if dense is None else dense

        def hessian(q: Tensor) -> Tensor:
            return jvp(lambda w: self.gradient(w, self.work.u), (w,), (q,))[1]

        if not dense:
            return hessian
        H = vmap(hessian, chunk_size=64)(torch.eye(w.numel(), dtype=w.dtype))
        return lambda q: H @ q

    def cross(self, w: Tensor, q: Tensor) -> Tensor:
        """Return (∂²L_T/∂u∂w)ᵀ q, the derivative of ∇_u L_T along q."""
        in_u = grad(lambda u, w: self.work.inner(self.cut(w), u))
        return jvp(lambda w: in_u(self.work.u, w), (w,), (q,))[1]

    def outer_gradient(self, w: Tensor) -> Tensor:
        """Return ∇_w L_V."""
        return grad(lambda w: self.work.outer(self.cut(w)))(w)


def conjugate_gradients(oracle: Oracle) -> Tensor:
    """Return the hypergradient after K iterations of CG from 0."""
    v = oracle.outer_gradient(oracle.w)
    product = oracle.product(oracle.w)
    x, r, p = torch.zeros_like(v), v, v
    for _ in range(K):
        image = product(p)
        α = r.dot(r) / p.dot(image)
        x, after = x + α * p, r - α * image
        p, r = after + after.dot(after) / r.dot(r) * p, after
    return -oracle.cross(oracle.w, x)


def neumann(oracle: Oracle) -> Tensor:
    """Return the hypergradient with x = η Σ_{k<K} (I − ηH)ᵏ v."""
    η, v = oracle.work.step, oracle.outer_gradient(oracle.w)
    product = oracle.product(oracle.w)
    total = v
    for _ in range(K - 1):
        v = v - η * product(v)
        total = total + v
    return -oracle.cross(oracle.w, η * total)


def reverse(oracle: Oracle) -> Tensor:
    """Return dL_V/du through K steps of gradient descent from w."""
    path = [oracle.w]
    for _ in range(K):
        path.append(path[-1] - RATE * oracle.gradient(path[-1], oracle.work.u))
    α = oracle.outer_gradient(path[-1])
    total = torch.zeros_like(oracle.work.u)
    for w in reversed(path[:-1]):
        total = total - RATE * oracle.cross(w, α)
        α = α - RATE * oracle.product(w)(α)
    return total


ROWS: dict[str, Callable[[Oracle], Tensor]] = {
    "CG": conjugate_gradients,
    "Neumann": neumann,
    "reverse": reverse,
}
"""The methods that are compared, with their values."""
