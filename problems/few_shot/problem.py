"""Few-shot meta-learning: the hyperparameters are the weights from which each of many tasks starts."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from bilevel import (
    Batch,
    BilevelError,
    Carry,
    Data,
    Hypers,
    Metrics,
    Params,
    Positive,
    Prediction,
    Problem,
    Real,
    Space,
)
from bilevel.problems.few_shot.tasks import (
    Draw,
    Episodes,
    QueryStream,
    SupportStream,
    Tasks,
    UnseenStream,
    sinusoids,
)
from bilevel.problems.networks.mlp import MLP

STEPS = (0, 1, 5, 10)
"""Of adaptation, after which the error on an unseen task is reported, as far as there are so many."""


@final
class FewShot(Problem):
    """A start φ from which the weights w_t of every task t come to a good fit on few points.

        L_T(φ, w) = Σ_t MSE(f(support x_t; w_t), support y_t) + ½ ρ ‖w_t − φ‖²
        L_V(φ, w) = mean over t of MSE(f(query x_t; w_t), query y_t)

    λ is φ, all weights of the network in one vector `initialization` [m], and ρ, `proximity`, which is frozen unless `space`
    thaws it. What is trained inside is δ_t = w_t − φ, stacked over tasks, and it begins at zero. In these coordinates the
    famous methods are solvers that are there: MAML is `Unrolled(restart=True)` with plain gradient descent, since K steps from
    δ = 0 are K steps from φ, and L_V depends on φ directly besides; implicit MAML is `Implicit`. L_T is a sum over tasks and
    no mean, so that a step of the inner optimizer is one of each task by itself, whatever their number.

    Training batches are the support of the tasks at hand, validation batches their queries. With `fresh_tasks`, queries end a
    round, and the next support batch is of new tasks (a δ_t of the last round is then nothing to start from: take
    `solver=unrolled solver.restart=true` and no warm-up). Otherwise the same tasks are kept, as the bilevel problem has it.

    Evaluation, and with it the choice of the best step, is on unseen tasks: from δ = 0, gradient descent on L_T of the task's
    own support; the prediction is [T, steps + 1, queries, outputs], from before the first step to after the last.

    Args:
        network: makes a module without buffers, from [n, inputs] to [n, outputs].
        draw: the distribution of tasks.
        tasks: T, in a batch.
        fresh_tasks: whether every round has new ones.
        proximity: ρ.
        unseen: how many tasks are evaluated on, in validation and in test.
        adaptation_steps: of gradient descent on an unseen task.
        adaptation_lr: its step size.
        start_seed: of the initial φ.
        data_seed: of the unseen tasks.
        space: changes to the space, as in `Space.override`.

    Source: Finn, Abbeel & Levine, ICML 2017 (MAML); Rajeswaran, Finn, Kakade & Levine, NeurIPS 2019 (implicit MAML, eq. 3).

    Raises:
        BilevelError: a number of tasks or steps below 1, or a step size that is not above zero.
    """

    def __init__(
        self,
        network: Callable[[], nn.Module],
        draw: Draw,
        *,
        tasks: int = 25,
        fresh_tasks: bool = False,
        proximity: float = 0.1,
        unseen: int = 200,
        adaptation_steps: int = 10,
        adaptation_lr: float = 0.01,
        start_seed: int = 0,
        data_seed: int = 0,
        space: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        for name, value in {
            "tasks": tasks,
            "unseen": unseen,
            "adaptation_steps": adaptation_steps,
        }.items():
            if type(value) is not int or value < 1:
                raise BilevelError(
                    f"{name}={value!r} leaves nothing to learn from; give a whole number, 1 or more"
                )
        if not 0 < adaptation_lr < math.inf:
            raise BilevelError(
                f"adaptation_lr={adaptation_lr} is no step size; give a positive, finite number"
            )
        self.draw, self.tasks, self.fresh_tasks = draw, tasks, fresh_tasks
        self.adaptation_steps, self.adaptation_lr, self.data_seed = (
            adaptation_steps,
            adaptation_lr,
            data_seed,
        )
        self.unseen = unseen
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(start_seed)
            module = network()
        start = {name: p.detach() for name, p in module.named_parameters()}
        if next(module.buffers(), None) is not None:
            raise BilevelError(
                f"{type(module).__name__} has buffers, which tasks cannot share; give a network without any"
            )
        self.shapes = {name: p.shape for name, p in start.items()}
        self.dtype = next(iter(start.values())).dtype
        self.module = module.to("meta")  # every call brings its own weights
        flat = torch.cat([p.reshape(-1) for p in start.values()])
        self.space = Space(
            initialization=Real(init=flat.tolist(), shape=tuple(flat.shape), per_example=False),
            proximity=Positive(init=proximity, per_example=False, frozen=True),
        ).override(space or {})

    def init(self, generator: torch.Generator) -> tuple[Params, Carry]:
        """The offsets δ = 0, whatever the generator: the start is λ's to give."""
        return {
            name: torch.zeros(self.tasks, *shape, dtype=self.dtype)
            for name, shape in self.shapes.items()
        }, {}

    def data(self, device: torch.device, generator: torch.Generator) -> Data:
        seed = int(torch.randint(2**62, (), generator=generator))
        episodes = Episodes(self._drawn, self.tasks, seed, device, fresh=self.fresh_tasks)
        apart = torch.Generator().manual_seed(self.data_seed)
        valid, test = (self._drawn(self.unseen, apart).to(device) for _ in range(2))
        return Data(SupportStream(episodes), QueryStream(episodes, valid), UnseenStream(test))

    def _drawn(self, count: int, generator: torch.Generator) -> Tasks:
        return Tasks(*(t.to(self.dtype) for t in self.draw(count, generator)))

    def initialization(self, hypers: Hypers) -> Params:
        """The start φ by the names of the network's weights."""
        parts = hypers["initialization"].split([shape.numel() for shape in self.shapes.values()])
        return {
            name: part.view(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def predict(
        self,
        hypers: Hypers,
        params: Params,
        carry: Carry,
        batch: Batch,
        *,
        train: bool,
        generator: torch.Generator | None,
    ) -> tuple[Prediction, Carry]:
        """Of each task, at its own weights; of unseen tasks, at each step of their adaptation."""
        φ = self.initialization(hypers)
        if "support_x" not in batch:
            return vmap(self._outputs, in_dims=(None, 0, 0))(φ, params, batch["x"]), carry
        return self.adapted(hypers, batch, self.adaptation_steps), carry

    def adapted(
        self, hypers: Hypers, batch: Batch, steps: int
    ) -> Float[Tensor, "tasks steps queries outputs"]:
        """Predictions on the queries of unseen tasks, before, between and after `steps` steps of gradient descent on L_T."""
        φ = self.initialization(hypers)

        def loss(δ: Params, x: Tensor, y: Tensor) -> Tensor:
            proximity = sum((d.square().sum() for d in δ.values()), start=y.new_zeros(()))
            return (self._outputs(φ, δ, x) - y).square().mean() + 0.5 * hypers[
                "proximity"
            ] * proximity

        slopes, outputs = vmap(grad(loss)), vmap(self._outputs, in_dims=(None, 0, 0))
        δ = {name: p.new_zeros(len(batch["x"]), *p.shape) for name, p in φ.items()}
        path = [outputs(φ, δ, batch["x"])]
        for _ in range(steps):
            gradients = slopes(δ, batch["support_x"], batch["support_y"])
            δ = {name: d - self.adaptation_lr * gradients[name] for name, d in δ.items()}
            path.append(outputs(φ, δ, batch["x"]))
        return torch.stack(path, 1)

    def _outputs(self, φ: Params, δ: Params, x: Tensor) -> Tensor:
        """Of one task."""
        return functional_call(self.module, {name: p + δ[name] for name, p in φ.items()}, (x,))

    def inner_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        own = sum((δ.square().sum() for δ in params.values()), start=prediction.new_zeros(()))
        return self._errors(prediction, batch).sum() + 0.5 * hypers["proximity"] * own

    def outer_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        """On unseen tasks, after the last step."""
        return (
            self._errors(prediction[:, -1] if "support_x" in batch else prediction, batch)
        ).mean()

    def metrics(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Metrics:
        """The MSE of each task as `loss` [T]; of unseen ones that after the last step, and `mse_0`, `mse_1`, … after others."""
        if "support_x" not in batch:
            return {"loss": self._errors(prediction, batch)}
        errors = {
            step: self._errors(prediction[:, step], batch)
            for step in (*STEPS, self.adaptation_steps)
            if step < prediction.shape[1]
        }
        return {"loss": errors[self.adaptation_steps]} | {
            f"mse_{step}": errors[step] for step in STEPS if step in errors
        }

    def _errors(self, prediction: Tensor, batch: Batch) -> Float[Tensor, " tasks"]:
        return (prediction - batch["y"]).square().mean((1, 2))


def sinusoid(
    hidden: Sequence[int] = (40, 40), shots: int = 10, queries: int = 10, **options: Any
) -> FewShot:
    """Regression on sinusoids from few points, by an MLP.

    Example:
        >>> sinusoid().space["initialization"].shape
        (1761,)

    Raises:
        BilevelError: as `FewShot`, or no points.
    """
    for name, value in {"shots": shots, "queries": queries}.items():
        if type(value) is not int or value < 1:
            raise BilevelError(
                f"{name}={value!r} gives a task no points; give a whole number, 1 or more"
            )
    return FewShot(partial(MLP, [1, *hidden, 1]), sinusoids(shots, queries), **options)
