"""Dataset distillation on MNIST with LeNet: the two accuracies of Wang et al., 2018.

Source: Wang, Zhu, Torralba & Efros, arXiv 1811.10959; defaults of SsnL/dataset-distillation.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.outside.objectives import CPU, InOrder, sgd
from benchmarks.outside.rows import Options, Row, sampled
from bilevel import Params, Positive, Space
from bilevel.problems import Distillation
from bilevel.problems.datasets import load_mnist
from bilevel.problems.datasets.labelled_images import Images
from bilevel.solvers import Unrolled
from bilevel.solvers.unroll.trajectory import InnerState

CLASSES, PASSES = 10, 3


class Setting(NamedTuple):
    """One of the two experiments.

    Attributes:
        per_class: learned images per class; each inner step takes one of each class.
        fixed: train the images for one initial network, and not for random ones.
        accuracy: the published test accuracy.
        published: its text.
        rounds: outer steps here.
        seeds: seeds here.
        fresh: networks that judge the images; the fixed start is one.
        halvings: how often the outer rate is halved; theirs is halved ten times.
    """

    per_class: int
    fixed: bool
    accuracy: float
    published: str
    rounds: int
    seeds: tuple[int, ...]
    fresh: int
    halvings: int = 10


SETTINGS = {
    "10 images, fixed start": Setting(1, True, 0.94, "94 %", 2000, (1,), 1),
    "100 images, random starts": Setting(10, False, 0.80, "80 %", 500, (1,), 20),
    "10 images, constant rate": Setting(1, True, 0.94, "94 %", 2000, (1,), 1, 0),
    "100 images, constant rate": Setting(10, False, 0.80, "80 %", 500, (1,), 20, 0),
}
"""A short run moves the images less if its rate is halved, hence the last two."""

REAL_BATCH = 256
"""Real images in an outer step here."""

THEIR_ROUNDS, THEIR_BATCH = 23_600, 1024
"""Their outer steps, and their real images in one."""

LR = 0.02


class LeNet(nn.Module):
    """LeNet as in their code: two convolutions of 5 × 5 and three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = F.max_pool2d(self.conv1(x).relu(), 2)
        x = F.max_pool2d(self.conv2(x).relu(), 2).flatten(1)
        return self.fc3(self.fc2(self.fc1(x).relu()).relu())


def drawn(like: Params, generator: torch.Generator) -> Params:
    """Return initial weights: Xavier's normal distribution, and biases of 0."""
    params = {}
    for name, w in like.items():
        fan_out, fan_in = (w[:, :1].numel(), w[:1].numel()) if w.ndim > 1 else (1, 1)
        std = (2 / (fan_in + fan_out)) ** 0.5 if w.ndim > 1 else 0.0
        params[name] = std * torch.randn(w.shape, generator=generator)
    return params


def images(root: str) -> Images:
    """Return MNIST with all 60,000 training images in the training split."""
    stored = load_mnist(root, download=False)
    x, y = (torch.cat(pair) for pair in zip(stored.train, stored.valid, strict=True))
    return stored._replace(train=(x, y))


class Distilling:
    """The images, the rate and the solver of one run."""

    def __init__(self, data: Images, setting: Setting, seed: int, batch_size: int) -> None:
        self.setting = setting
        self.problem = Distillation(
            LeNet,
            data,
            per_class=setting.per_class,
            start="noise",
            start_seed=seed,
            weight_decay=0.0,
            batch_size=batch_size,
        )
        self.problem.space = Space(**self.problem.space, lr=Positive(init=LR, optimizer="lr"))
        streams = self.problem.data(CPU, torch.Generator().manual_seed(seed))
        index = torch.arange(CLASSES * setting.per_class).view(CLASSES, -1).T.flatten()
        ordered = {"index": index, "label": self.problem.labels[index]}
        self.train = InOrder(ordered, CLASSES, torch.Generator())
        self.solver = Unrolled(
            inner_steps=PASSES * setting.per_class,
            restart=True,
            inner_optimizer=sgd(LR),
            outer_optimizer=partial(torch.optim.Adam, lr=0.01, betas=(0.5, 0.999)),
        )
        generator = torch.Generator().manual_seed(seed)
        self.solver.setup(self.problem, streams._replace(train=self.train), CPU, generator)
        self.weights = torch.Generator().manual_seed(seed)
        self.start_at(self.fresh())

    def fresh(self) -> Params:
        """Return initial weights of a new network."""
        return drawn(self.solver.core.weights.detached(), self.weights)

    def start_at(self, params: Params) -> None:
        """Begin the next rounds at these weights."""
        point = self.solver.method.restart_point
        self.solver.method.restart_point = InnerState(params, point.moments, point.carry)

    def run(self, rounds: int) -> None:
        """Take outer steps, with the halvings of the rate spread over them."""
        optimizer, parts = self.solver.core.search.mean.optimizer, max(1, self.setting.halvings)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, -(-rounds // parts), gamma=0.5)
        for _ in range(rounds):
            if not self.setting.fixed:
                self.start_at(self.fresh())
            self.solver.step()
            schedule.step()

    @torch.no_grad()
    def accuracy(self, test: tuple[Tensor, Tensor]) -> float:
        """Return the test accuracy of a network after training on the learned images."""
        params = self.solver.method.restart_point.params
        hypers = self.problem.space.constrain(self.solver.core.search.u0)
        for _ in range(self.solver.inner_steps):
            with torch.enable_grad():
                w = {name: p.detach().requires_grad_() for name, p in params.items()}
                loss, _ = self.problem.inner_loss(hypers, w, {}, self.train.next(), None)
                gradients = torch.autograd.grad(loss, list(w.values()))
            params = {
                name: p - hypers["lr"] * g
                for (name, p), g in zip(w.items(), gradients, strict=True)
            }
        right = 0
        for x, y in zip(*(t.split(1000) for t in test), strict=True):
            logits, _ = self.problem.predict(
                hypers, params, {}, {"image": x, "label": y}, train=False, generator=None
            )
            right += int((logits.argmax(1) == y).sum())
        return right / len(test[1])


def run(options: Options) -> list[Row]:
    """Return a row for each experiment."""
    data = images(options.root())
    assert data.test is not None
    rows = []
    batch_size = THEIR_BATCH if options.full else REAL_BATCH
    for name, setting in SETTINGS.items():
        rounds = 20 if options.quick else THEIR_ROUNDS if options.full else setting.rounds
        found = []
        for seed in setting.seeds[: 1 if options.quick else None]:
            made = Distilling(data, setting, seed, batch_size)
            made.run(rounds)
            for _ in range(min(2, setting.fresh) if options.quick else setting.fresh):
                if not setting.fixed:
                    made.start_at(made.fresh())
                found.append(made.accuracy(data.test))
        what = f"{name}: test accuracy after {rounds} rounds (theirs: {THEIR_ROUNDS:,})"
        rows.append(sampled(what, setting.published, found, 0.03, mean=setting.accuracy))
    return rows
