"""Products with the second derivatives of L_T, all of one graph of ∇_w L_T."""

from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.autograd.variable import Variable

from bilevel import Batch, Carry, Params, Prediction, Problem
from bilevel.params import detached
from bilevel.solvers.autodiff.decompositions import (
    NOT_TWICE,
    RECURRENT,
    twice_differentiable,
)

Output: TypeAlias = Tensor | GradientEdge
"""An output of a graph, of which `vjp` needs no value."""

SMALL = 2**16
"""Numbers in a vector whose memory does not matter, and whose time is that of the calls."""


class Pullback:
    """The gradient g(u, w) = ∇_w L_T(λ(u), w) at one point, and products with its derivatives.

        q ↦ H q = (∂g/∂w)ᵀ q    and    q ↦ (∂g/∂u)ᵀ q = (∂²L_T/∂u∂w)ᵀ q

    The graph of g is built once. So all products see the same sampled masks, and H is one symmetric
    matrix. Vectors in the space of w are flat, in the order of `params`. L_T is the mean over
    several batches.

    Args:
        problem: the problem of L_T.
        u: unconstrained coordinates, [h].
        params: w, as constants.
        carry: the carry before the first batch; each batch starts from the carry of the one before,
            as in training.
        batches: training batches, at least one.
        generator: for the masks.
        functions: the torch functions that the network calls.

    Attributes:
        problem: the problem of L_T.
        hypers: λ(u), differentiable in u.
        params: w, the leaves of the graph.
        passes: each batch with its prediction, differentiable in u and w.
        loss: L_T, as a constant.
        carried: the carry after the first batch, as a constant.
    """

    def __init__(
        self,
        problem: Problem,
        u: Float[Tensor, " h"],
        params: Params,
        carry: Carry,
        batches: Sequence[Batch],
        generator: torch.Generator,
        functions: Set[Any] = frozenset(),
    ) -> None:
        self.problem = problem
        self._functions = functions
        self.passes: list[tuple[Batch, Prediction]] = []
        losses, carries = [], [carry]
        with torch.enable_grad():  # a solve runs in a custom backward, which disables gradients
            self._u = u.detach().requires_grad_()
            self.params = {name: p.detach().requires_grad_() for name, p in params.items()}
            self._w = list(self.params.values())
            self.hypers = problem.space.constrain(self._u, generator)
            with self.differentiable_twice():
                for batch in batches:
                    prediction, after = problem.predict(
                        self.hypers,
                        self.params,
                        carries[-1],
                        batch,
                        train=True,
                        generator=generator,
                    )
                    losses.append(
                        problem.inner_objective(self.hypers, self.params, prediction, batch)
                    )
                    self.passes.append((batch, prediction))
                    carries.append(detached(after))
            loss = losses[0]
            if len(losses) > 1:  # a division by 1 would stay in the graph of every product
                loss = sum(losses[1:], start=loss) / len(losses)
            g = [
                torch.zeros_like(w) if part is None else part
                for w, part in zip(
                    self._w, gradient_of(loss, self._w, create_graph=True), strict=True
                )
            ]
            # small parts stay apart: a node that joined them would cost every product some calls
            self._apart = sum(part.numel() for part in g) <= SMALL
            joined = flat(g)
            self._outputs: list[Output] = g if self._apart else [joined]
            self._gradient: Tensor | None = joined.detach()
        self._split: tuple[Tensor, list[Tensor]] | None = None
        self.loss = loss.detach()
        self.carried = carries[1]

    @property
    def gradient(self) -> Float[Tensor, " m"]:
        """Return g as a constant."""
        assert self._gradient is not None, "free_gradient was called"
        return self._gradient

    @property
    def gradient_norm(self) -> Float[Tensor, ""]:
        """Return ‖g‖."""
        return torch.linalg.vector_norm(self.gradient)

    def check(self) -> None:
        """Raise PyTorch's error if a layer cannot be differentiated twice.

        The products do not raise it. They follow the graph to w and u only, skip the node that
        would raise, and return a wrong value.
        """
        g = [out for out in self._outputs if isinstance(out, Tensor) and out.requires_grad]
        if g:
            torch.autograd.backward(g, [torch.zeros_like(out) for out in g], retain_graph=True)

    def free_gradient(self) -> None:
        """Free the memory of g; the products do not need it."""
        self._gradient = None
        self._outputs = [
            without_value(out) if isinstance(out, Tensor) else out for out in self._outputs
        ]

    def hessian(self, q: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Return H q."""
        return flatten_and_free(list(vjp(self._outputs, self._w, self._parts(q))))

    def cross(self, q: Float[Tensor, " m"]) -> Float[Tensor, " h"]:
        """Return (∂²L_T/∂u∂w)ᵀ q."""
        return vjp(self._outputs, [self._u], self._parts(q))[0]

    def both(self, q: Float[Tensor, " m"]) -> tuple[Float[Tensor, " m"], Float[Tensor, " h"]]:
        """Return H q and (∂²L_T/∂u∂w)ᵀ q, at the cost of one product."""
        *products, cross = vjp(self._outputs, [*self._w, self._u], self._parts(q))
        return flatten_and_free(products), cross

    def unflat(self, q: Float[Tensor, " m"]) -> list[Tensor]:
        """Return the vector q as tensors in the shapes of w."""
        return unflat(q, self._w)

    def _parts(self, q: Tensor) -> list[Tensor]:
        """Return q in the shapes of the outputs, as views that follow a q that changes in place."""
        if not self._apart:
            return [q]
        if self._split is None or self._split[0] is not q:
            self._split = q, self.unflat(q)
        return self._split[1]

    @contextmanager
    def differentiable_twice(self) -> Iterator[None]:
        """Open a context in which the functions can be differentiated twice, if possible."""
        if self._functions.isdisjoint(NOT_TWICE):
            yield
            return
        recurrent = not self._functions.isdisjoint(RECURRENT)  # cuDNN differentiates them once
        without = torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()
        with twice_differentiable(self._functions), without:
            yield


def without_value(output: Tensor) -> Output:
    """Return an output for `vjp` whose value nobody needs; a constant stays as it is.

    A large output becomes its edge in the graph, which keeps no value in memory; a solve may have
    no room for it. A small one stays, because PyTorch checks a tensor faster than an edge.
    """
    keep = output.numel() <= SMALL or not output.requires_grad
    return output if keep else get_gradient_edge(output)


def vjp(
    outputs: Sequence[Output], inputs: Sequence[Tensor], q: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Return (∂outputs/∂inputs)ᵀ q as constants and keep the graph.

    An input that no output depends on gets zeros.

    Args:
        outputs: tensors or their edges.
        inputs: leaves of the graph.
        q: one tensor for each output.
    """
    moving, parts = outputs, q
    if any(isinstance(output, Tensor) and not output.requires_grad for output in outputs):
        pairs = [
            pair
            for pair in zip(outputs, q, strict=True)
            if not isinstance(pair[0], Tensor) or pair[0].requires_grad
        ]
        if not pairs:
            return [torch.zeros_like(x) for x in inputs]
        moving, parts = zip(*pairs, strict=True)
    products = backward(moving, parts, inputs, retain_graph=True)
    return [
        torch.zeros_like(x) if part is None else part
        for x, part in zip(inputs, products, strict=True)
    ]


def backward(
    outputs: Sequence[Output],
    cotangents: Sequence[Tensor],
    inputs: Sequence[Tensor],
    *,
    retain_graph: bool,
    create_graph: bool = False,
) -> Sequence[Tensor | None]:
    """Return (∂outputs/∂inputs)ᵀ cotangents, with None for an input that no output depends on.

    On the CPU it leaves out the checks that `torch.autograd.grad` makes of every argument, which
    take a seventh of a product on a small model. The engine of a device runs in other threads,
    which `torch.autograd.grad` prepares.
    """
    if cotangents[0].device.type != "cpu":
        return torch.autograd.grad(
            cast(Any, outputs),
            inputs,
            cotangents,
            retain_graph=retain_graph,
            create_graph=create_graph,
            allow_unused=True,
        )
    engine = Variable._execution_engine
    return engine.run_backward(
        tuple(outputs),
        tuple(cotangents),
        retain_graph,
        create_graph,
        tuple(inputs),
        True,  # an input may be unused
        accumulate_grad=False,
    )


def gradient_of(loss: Tensor, inputs: Sequence[Tensor], *, create_graph: bool) -> Any:
    """Return the gradient of a scalar, differentiable if `create_graph`; None where it is unused.

    Without `create_graph` the graph of the loss is freed.
    """
    one = torch.ones_like(loss)
    return backward([loss], [one], inputs, retain_graph=create_graph, create_graph=create_graph)


def flat(tensors: Sequence[Tensor]) -> Float[Tensor, " m"]:
    """Return the tensors as one vector.

    Example:
        >>> flat([torch.ones(2, 2), torch.zeros(1)])
        tensor([1., 1., 1., 1., 0.])
    """
    return torch.cat([t if t.ndim == 1 else t.reshape(-1) for t in tensors])


def flatten_and_free(tensors: list[Tensor]) -> Float[Tensor, " m"]:
    """Return `flat(tensors)`; many large ones are freed one by one, so that no copy is held."""
    size = sum(t.numel() for t in tensors)
    if size <= SMALL:
        return flat(tensors)
    vector, end = tensors[0].new_empty(size), size
    while tensors:
        t = tensors.pop()
        vector[end - t.numel() : end] = t.reshape(-1)
        end -= t.numel()
    return vector


def unflat(vector: Float[Tensor, " m"], like: Sequence[Tensor]) -> list[Tensor]:
    """Return the inverse of `flat`, in the shapes of `like`."""
    return [
        part.view(t.shape)
        for part, t in zip(vector.split([t.numel() for t in like]), like, strict=True)
    ]
