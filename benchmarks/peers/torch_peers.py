"""The hypergradients of other PyTorch libraries, each by the calls that its documentation shows.

A library gets L_T and L_V as functions of lists of tensors, or as a module where it needs one.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers.ours import module_of
from benchmarks.peers.workloads import RATE, K, Tensors, Work, penalty

Hypergradient = Callable[[], Tensor]


def leaves(work: Work) -> tuple[list[Tensor], Tensor]:
    """Return w and u as leaves that need gradients."""
    return [t.clone().requires_grad_() for t in work.w], work.u.clone().requires_grad_()


# --- hypertorch: Grazzi et al., ICML 2020 ---


def hypertorch_solve(name: str, work: Work, step: float, iterations: int) -> Hypergradient:
    """Return the hypergradient by the function `name`, on the map w ↦ w − step · ∇_w L_T."""
    import hypergrad as library

    w, u = leaves(work)
    descent = library.GradientDescent(lambda w, hypers: work.inner(w, hypers[0]), step)
    solve = getattr(library, name)
    return lambda: solve(
        w, [u], iterations, descent, lambda w, hypers: work.outer(w), tol=0.0, set_grad=False
    )[0]


def hypertorch_cg(work: Work) -> Hypergradient:
    """Return CG on I − ∂Φ/∂w, which is H at a step of 1."""
    return hypertorch_solve("CG", work, 1.0, K)


def hypertorch_neumann(work: Work) -> Hypergradient:
    """Return K terms of the series, K − 1 products."""
    return hypertorch_solve("neumann", work, work.step, K - 1)


def hypertorch_reverse(work: Work) -> Hypergradient:
    """Return back-propagation through K steps in one graph."""
    import hypergrad as library

    w, u = leaves(work)
    descent = library.GradientDescent(lambda w, hypers: work.inner(w, hypers[0]), RATE)

    def run() -> Tensor:
        now: Tensors = w
        for _ in range(K):
            now = descent(now, [u])
        return library.reverse_unroll(now, [u], lambda w, hypers: work.outer(w), set_grad=False)[0]

    return run


# --- higher: Grefenstette et al., 2019 ---


def higher_reverse(work: Work) -> Hypergradient:
    """Return back-propagation through K steps of a patched module."""
    import higher

    module, (_, u) = module_of(work), leaves(work)
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
    (x, labels), (valid, others) = work.train, work.valid

    def run() -> Tensor:
        with higher.innerloop_ctx(module, optimizer) as (network, steps):
            for _ in range(K):
                decay = penalty(work.size, list(network.parameters()), u)
                steps.step(F.cross_entropy(network(x), labels) + decay)
            return torch.autograd.grad(F.cross_entropy(network(valid), others), u)[0]

    return run


# --- TorchOpt: Ren et al., JMLR 2023 ---


def torchopt_solve(work: Work, solve: Any) -> Hypergradient:
    """Return the derivative of a decorated solution, with `solve` for the linear system."""
    import torchopt

    w, u = tuple(t.clone() for t in work.w), work.u.clone().requires_grad_()
    stationarity = torch.func.grad(lambda w, u: work.inner(w, u))

    @torchopt.diff.implicit.custom_root(stationarity, argnums=1, solve=solve)
    def trained(w: tuple[Tensor, ...], u: Tensor) -> tuple[Tensor, ...]:
        return w

    return lambda: torch.autograd.grad(work.outer(trained(w, u)), u)[0]


def torchopt_cg(work: Work) -> Hypergradient:
    """Return K iterations of CG."""
    import torchopt

    return torchopt_solve(work, torchopt.linear_solve.solve_cg(maxiter=K, rtol=0.0, atol=0.0))


def torchopt_neumann(work: Work) -> Hypergradient:
    """Return K terms of the series, K − 1 products."""
    import torchopt

    solve = torchopt.linear_solve.solve_inv(ns=True, maxiter=K - 1, alpha=work.step)
    return torchopt_solve(work, solve)


def torchopt_reverse(work: Work) -> Hypergradient:
    """Return back-propagation through K functional steps."""
    import torchopt

    w, u = leaves(work)
    optimizer = torchopt.sgd(lr=RATE)

    def run() -> Tensor:
        now, state = tuple(w), optimizer.init(tuple(w))
        for _ in range(K):
            gradients = torch.autograd.grad(work.inner(now, u), now, create_graph=True)
            updates, state = optimizer.update(gradients, state, inplace=False)
            now = torchopt.apply_updates(now, updates, inplace=False)
        return torch.autograd.grad(work.outer(now), u)[0]

    return run


# --- Betty: Choe et al., ICLR 2023 ---


def betty_solve(work: Work, **settings: Any) -> Hypergradient:
    """Return the product of Betty's path of problems, without the loop of its engine."""
    from betty.configs import Config
    from betty.hypergradient import get_grads

    w, u = leaves(work)
    inner = SimpleNamespace(
        config=Config(**settings),
        paths=[],
        cur_batch=None,
        training_step_exec=lambda batch: work.inner(w, u),
        parameters=lambda: w,
        trainable_parameters=lambda: w,
        meta_trainable_parameters=lambda: w,
    )
    outer = SimpleNamespace(_strategy="default", trainable_parameters=lambda: [u])
    return lambda: get_grads(work.outer(w), [outer, inner, outer], False, False)[0]


def betty_cg(work: Work) -> Hypergradient:
    """Return K iterations of its CG."""
    return betty_solve(work, type="cg", cg_iterations=K)


def betty_neumann(work: Work) -> Hypergradient:
    """Return K terms of the series, K − 1 products."""
    return betty_solve(work, type="neumann", neumann_iterations=K - 1, neumann_alpha=work.step)
