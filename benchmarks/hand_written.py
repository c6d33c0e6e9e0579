"""A minimal training loop of PyTorch, the yardstick of a plain step.

It has what a careful user writes: autocast, fused SGD, channels-last images, and on CUDA one graph
of the whole step, or `torch.compile`. It trains the same network on the same augmented images as
the plain step of `benchmarks.images`, and nothing of a solver or a runner is in it.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel.problems import Classification

Form = Literal["eager", "graph", "compiled"]
"""Step by step, one CUDA graph, or the network under `torch.compile`."""


class HandWritten:
    """One training step on a fixed batch of `problem`, at its initial hyperparameters.

    Args:
        problem: gives the network, the images and the augmentation.
        device: where everything lies.
        form: how a step is launched.
        bf16: whether products are in bfloat16, by autocast.
        lr: the learning rate; the momentum is 0.9.
    """

    def __init__(
        self,
        problem: Classification,
        device: torch.device,
        *,
        form: Form = "eager",
        bf16: bool = False,
        lr: float = 0.01,
    ) -> None:
        self.device, self.bf16 = device, bf16
        self.problem = problem
        self.generator = torch.Generator(device).manual_seed(0)
        self.network = problem._build().to(device, memory_format=problem._layout)
        params, carry = problem.init(torch.Generator().manual_seed(0))
        self.network.load_state_dict(params | carry)
        self.network.train()
        self.call = torch.compile(self.network) if form == "compiled" else self.network
        hypers = problem.space.constrain(problem.space.init())
        self.hypers = {name: t.to(device) for name, t in hypers.items()}
        self.rates = [float(hypers[name]) for name in problem._rates]
        decay = float(hypers.get("weight_decay", 0.0))
        fused = {"fused": True} if device.type == "cuda" else {}
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), lr=lr, momentum=0.9, weight_decay=decay, **fused
        )
        data = problem.data(device, torch.Generator().manual_seed(1))
        self.images, self.labels = data.train.next()
        self.loss = torch.zeros((), device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        if form == "graph":
            self._capture()

    def __call__(self) -> None:
        """Take one step."""
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def _step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            batch = (self.images, self.labels)
            (x, _), _ = self.problem.inputs(
                self.hypers, batch, train=True, generator=self.generator
            )
        with self._autocast():
            logits = self.call(x, self._drop)
        loss = F.cross_entropy(logits.float(), self.labels)
        loss.backward()
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def _drop(self, site: int, x: Tensor) -> Tensor:
        return F.dropout(x, self.rates[site])

    def _autocast(self) -> AbstractContextManager[object]:
        if not self.bf16:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _capture(self) -> None:
        """Record the step, after three steps on a stream of its own, as PyTorch's notes ask for."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        self._graph.register_generator_state(self.generator)
        with torch.cuda.graph(self._graph):
            self._step()
