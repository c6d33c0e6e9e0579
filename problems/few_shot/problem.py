"""Few-shot meta-learning: the hyperparameters are the initial weights of many tasks."""

from collections.abc import Callable
from typing import final

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
)
from bilevel.problems.space_checks import SpaceChanges
from bilevel.validate import positive, whole

REPORTED_STEPS = (0, 1, 5, 10)
"""Adaptation steps after which the error on unseen tasks is reported, if there are that many."""


@final
class FewShot(Problem):
    """Learn initial weights φ from which each task t reaches a good fit w_t on few points.

        L_T(φ, w) = Σ_t MSE(f(support x_t; w_t), support y_t) + ½ ρ ‖w_t − φ‖²
        L_V(φ, w) = mean over t of MSE(f(query x_t; w_t), query y_t)

    λ holds φ, all weights of the network in one vector `initialization` [m], and ρ, `proximity`,
    which is frozen unless `space` changes it. The inner weights are δ_t = w_t − φ, stacked over
    tasks; they start at zero. In these coordinates two known methods are existing solvers:

    - MAML is `Unrolled(restart=True)` with plain gradient descent, because K steps from δ = 0 are
      K steps from φ. L_V also depends on φ directly.
    - Implicit MAML is `Implicit`.

    L_T is a sum over tasks, not a mean. So a step of the inner optimizer is a separate step of each
    task, for any number of tasks.

    A training batch is the support of the current tasks, and a validation batch is their queries.
    With `fresh_tasks`, queries end a round, and the next support batch has new tasks. The last δ_t
    does not fit new tasks; use `solver=unrolled solver.restart=true` without warm-up. Otherwise the
    tasks stay the same, as in the bilevel problem.

    Evaluation, and with it the choice of the best step, uses unseen tasks: gradient descent on L_T
    of a task's own support, from δ = 0. The prediction is [T, steps + 1, queries, outputs], from
    before the first step to after the last one.

    Args:
        network: makes a module without buffers, from [n, inputs] to [n, outputs].
        draw: the distribution of tasks.
        tasks: T, the number of tasks in a batch.
        fresh_tasks: whether every round has new tasks.
        proximity: ρ.
        unseen: number of tasks for evaluation, in validation and in test.
        adaptation_steps: number of gradient steps on an unseen task.
        adaptation_lr: step size of these steps.
        start_seed: seed of the initial φ.
        data_seed: seed of the unseen tasks.
        space: changes of the space, as in `Space.override`.

    Source: Finn, Abbeel & Levine, ICML 2017 (MAML); Rajeswaran, Finn, Kakade & Levine, NeurIPS 2019
    (implicit MAML, eq. 3).

    Raises:
        BilevelError: a number of tasks or steps is below 1, or the step size is not positive.
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
        space: SpaceChanges | None = None,
    ) -> None:
        whole(1, tasks=tasks, unseen=unseen, adaptation_steps=adaptation_steps)
        positive(adaptation_lr=adaptation_lr)
        self.draw = draw
        self.tasks = tasks
        self.fresh_tasks = fresh_tasks
        self.adaptation_steps = adaptation_steps
        self.adaptation_lr = adaptation_lr
        self.data_seed = data_seed
        self.unseen = unseen
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(start_seed)
            module = network()
        start = {name: p.detach() for name, p in module.named_parameters()}
        if next(module.buffers(), None) is not None:
            raise BilevelError(
                f"network={type(module).__name__} has buffers, and tasks cannot share them; "
                "give a network without buffers"
            )
        self.shapes = {name: p.shape for name, p in start.items()}
        self.dtype = next(iter(start.values())).dtype
        self.module = module.to("meta")  # only shapes: every call has its own weights
        flat = torch.cat([p.reshape(-1) for p in start.values()])
        self.space = Space(
            initialization=Real(init=flat.tolist(), shape=tuple(flat.shape), per_example=False),
            proximity=Positive(init=proximity, per_example=False, frozen=True),
        ).override(space or {})

    def init(self, generator: torch.Generator) -> tuple[Params, Carry]:
        """Return the offsets δ = 0 for any generator, because λ holds the initial weights."""
        offsets = {
            name: torch.zeros(self.tasks, *shape, dtype=self.dtype)
            for name, shape in self.shapes.items()
        }
        return offsets, {}

    def data(self, device: torch.device, generator: torch.Generator) -> Data:
        seed = int(torch.randint(2**62, (), generator=generator))
        episodes = Episodes(self._drawn, self.tasks, seed, device, fresh=self.fresh_tasks)
        apart = torch.Generator().manual_seed(self.data_seed)
        valid, test = (self._drawn(self.unseen, apart).to(device) for _ in range(2))
        return Data(SupportStream(episodes), QueryStream(episodes, valid), UnseenStream(test))

    def _drawn(self, count: int, generator: torch.Generator) -> Tasks:
        return Tasks(*(t.to(self.dtype) for t in self.draw(count, generator)))

    def initialization(self, hypers: Hypers) -> Params:
        """Return φ by the names of the network's weights."""
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
        """Return the outputs of each task; for unseen tasks, those after each adaptation step."""
        φ = self.initialization(hypers)
        if "support_x" not in batch:
            return vmap(self._outputs, in_dims=(None, 0, 0))(φ, params, batch["x"]), carry
        return self.adapted(hypers, batch, self.adaptation_steps), carry

    def adapted(
        self, hypers: Hypers, batch: Batch, steps: int
    ) -> Float[Tensor, "tasks steps queries outputs"]:
        """Return predictions on queries of unseen tasks, before and after each adaptation step."""
        φ = self.initialization(hypers)

        def loss(δ: Params, x: Tensor, y: Tensor) -> Tensor:
            norm = sum((d.square().sum() for d in δ.values()), start=y.new_zeros(()))
            fit = (self._outputs(φ, δ, x) - y).square().mean()
            return fit + 0.5 * hypers["proximity"] * norm

        slopes, outputs = vmap(grad(loss)), vmap(self._outputs, in_dims=(None, 0, 0))
        δ = {name: p.new_zeros(len(batch["x"]), *p.shape) for name, p in φ.items()}
        path = [outputs(φ, δ, batch["x"])]
        for _ in range(steps):
            gradients = slopes(δ, batch["support_x"], batch["support_y"])
            δ = {name: d - self.adaptation_lr * gradients[name] for name, d in δ.items()}
            path.append(outputs(φ, δ, batch["x"]))
        return torch.stack(path, 1)

    def _outputs(self, φ: Params, δ: Params, x: Tensor) -> Tensor:
        """Return the outputs of one task."""
        return functional_call(self.module, {name: p + δ[name] for name, p in φ.items()}, (x,))

    def inner_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        own = sum((δ.square().sum() for δ in params.values()), start=prediction.new_zeros(()))
        return self._errors(prediction, batch).sum() + 0.5 * hypers["proximity"] * own

    def outer_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        """Return the mean error on queries; of unseen tasks, the one after the last step."""
        last = prediction[:, -1] if "support_x" in batch else prediction
        return self._errors(last, batch).mean()

    def metrics(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Metrics:
        """Return the MSE of each task as `loss` [T].

        For unseen tasks `loss` is the MSE after the last step; `mse_0`, `mse_1`, … are those after
        other steps.
        """
        if "support_x" not in batch:
            return {"loss": self._errors(prediction, batch)}
        errors = {
            step: self._errors(prediction[:, step], batch)
            for step in (*REPORTED_STEPS, self.adaptation_steps)
            if step < prediction.shape[1]
        }
        return {"loss": errors[self.adaptation_steps]} | {
            f"mse_{step}": errors[step] for step in REPORTED_STEPS if step in errors
        }

    def _errors(self, prediction: Tensor, batch: Batch) -> Float[Tensor, " tasks"]:
        return (prediction - batch["y"]).square().mean((1, 2))
