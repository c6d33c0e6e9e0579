"""The hypergradient of jaxopt, compiled by JAX."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.workloads import K, Work


def jaxopt_cg(work: Work) -> Callable[[], Tensor]:
    """Return K iterations of CG at a decorated root, as one compiled function.

    A call ends when the result is there. Its conversion to a tensor is not part of the work.
    """
    import jax
    import jax.numpy as jnp
    import jaxopt

    def array(t: Tensor) -> Any:
        return jnp.asarray(t.numpy())

    w, u = [array(t) for t in work.w], array(work.u)
    train, valid = [array(t) for t in work.train], [array(t) for t in work.valid]

    def network(w: Any, x: Any) -> Any:
        if work.size.per_weight:
            return x @ w[0].T
        last = len(w) - 2
        for i in range(0, last, 2):
            x = jnp.tanh(x @ w[i].T + w[i + 1])
        return x @ w[last].T + w[last + 1]

    def cross_entropy(w: Any, x: Any, labels: Any) -> Any:
        logs = jax.nn.log_softmax(network(w, x))
        return -jnp.take_along_axis(logs, labels[:, None], 1).mean()

    def inner(w: Any, u: Any, train: Any) -> Any:
        if work.size.per_weight:
            decay = 0.5 * (jnp.exp(u) * w[0] ** 2).sum()
        else:
            decay = 0.5 * jnp.exp(u) @ jnp.stack([(t**2).sum() for t in w])
        return cross_entropy(w, *train) + decay

    solve = partial(jaxopt.linear_solve.solve_cg, maxiter=K, tol=0.0)

    @jaxopt.implicit_diff.custom_root(jax.grad(inner), solve=solve)
    def trained(w: Any, u: Any, train: Any) -> Any:
        return w

    compiled = jax.jit(
        jax.grad(lambda u, w, train, valid: cross_entropy(trained(w, u, train), *valid))
    )

    def run() -> Tensor:
        return torch.from_dlpack(compiled(u, w, train, valid).block_until_ready())

    return run
