"""A cell as a graph whose edges mix operations with weights α, and the two forms that it has: of images and of tables."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Alphas = Mapping[str, Tensor]
"""α of every edge by its name, [operations] each; {} for a derived cell, whose edges have one operation."""

NONE, SKIP = "none", "skip"


def edge(source: int, node: int) -> str:
    """The name of the edge source → node, which is also that of its hyperparameter."""
    return f"edge_{source}_{node}"


def pairs(nodes: int) -> list[tuple[int, int]]:
    """All edges of a cell: node j ∈ {1, …, n} hears every i < j, and node 0 is the cell's input."""
    return [(source, node) for node in range(1, nodes + 1) for source in range(node)]


@dataclass(frozen=True)
class Form:
    """What a cell of one kind of data is made of; everything but `head` keeps the width.

    Attributes:
        operations: how each is made for a width, in the order of α; `none` is zero and has no module.
        parameter_free: those without weights, `none` apart.
        stem: from the inputs to the width.
        join: from all nodes of a cell, side by side, to the width.
        between: what lies between two cells.
        pool: from the last cell to [batch, width].
    """

    operations: Mapping[str, Callable[[int], nn.Module]]
    parameter_free: tuple[str, ...]
    stem: Callable[[int, int], nn.Module]
    join: Callable[[int, int], nn.Module]
    between: Callable[[Tensor], Tensor]
    pool: Callable[[Tensor], Tensor]


class Mixture(nn.Module):
    """x ↦ Σ_o α_o o(x); without α, its one operation. `none` counts among α and adds nothing."""

    def __init__(self, form: Form, names: Sequence[str], width: int) -> None:
        super().__init__()
        self.places = [place for place, name in enumerate(names) if name != NONE]
        self.operations = nn.ModuleList(
            form.operations[names[place]](width) for place in self.places
        )

    def forward(self, x: Tensor, alpha: Float[Tensor, " operations"] | None) -> Tensor:
        if alpha is None:
            return self.operations[0](x)
        weights = alpha.unbind()
        terms = [
            weights[place] * operation(x)
            for place, operation in zip(self.places, self.operations, strict=True)
        ]
        return sum(terms[1:], start=terms[0])


class Cell(nn.Module):
    """x_j = Σ_{i<j} Σ_o α^{ij}_o o(x_i) for the nodes j = 1, …, n, joined to one output.

    Args:
        form: of images or of tables.
        nodes: n.
        edges: the operations of every edge that there is, by its name; each node needs one.
        width: channels or features of every node.
    """

    def __init__(
        self, form: Form, nodes: int, edges: Mapping[str, Sequence[str]], width: int
    ) -> None:
        super().__init__()
        self.sources = [
            [source for source in range(node) if edge(source, node) in edges]
            for node in range(1, nodes + 1)
        ]
        self.mixtures = nn.ModuleDict(
            {name: Mixture(form, names, width) for name, names in edges.items()}
        )
        self.join = form.join(nodes * width, width)

    def forward(self, x: Tensor, alphas: Alphas) -> Tensor:
        states = [x]
        for node, sources in enumerate(self.sources, start=1):
            names = {source: edge(source, node) for source in sources}
            terms = [
                self.mixtures[name](states[source], alphas.get(name))
                for source, name in names.items()
            ]
            states.append(sum(terms[1:], start=terms[0]))
        return self.join(torch.cat(states[1:], dim=1))


class CellNetwork(nn.Module):
    """A stem, `cells` cells of one architecture and weights of their own, and a linear head.

    Example:
        >>> cell = {edge(0, 1): ["conv3x3"], edge(0, 2): ["skip"], edge(1, 2): ["max_pool"]}
        >>> network = CellNetwork(IMAGE, 2, cell, inputs=1, width=4, cells=2, classes=10)
        >>> network(torch.zeros(5, 1, 8, 8), {}).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        form: Form,
        nodes: int,
        edges: Mapping[str, Sequence[str]],
        *,
        inputs: int,
        width: int,
        cells: int,
        classes: int,
    ) -> None:
        super().__init__()
        self.between, self.pool = form.between, form.pool
        self.stem = form.stem(inputs, width)
        self.cells = nn.ModuleList(Cell(form, nodes, edges, width) for _ in range(cells))
        self.head = nn.Linear(width, classes)

    def forward(
        self, x: Float[Tensor, "batch *shape"], alphas: Alphas
    ) -> Float[Tensor, "batch classes"]:
        x = self.stem(x)
        for number, cell in enumerate(self.cells):
            x = cell(self.between(x) if number else x, alphas)
        return self.head(self.pool(x))


def _normed(*layers: nn.Module, width: int) -> nn.Module:
    """Layers and a norm without weights: an operation cannot undo its α by its scale, nor can the next by its own.

    Group norm, unlike batch norm, has no state, the same derivatives in training and evaluation, and second ones everywhere.
    """
    return nn.Sequential(*layers, nn.GroupNorm(1, width, affine=False))


def _convolution(width: int, size: int) -> nn.Module:
    return _normed(
        nn.ReLU(), nn.Conv2d(width, width, size, padding=size // 2, bias=False), width=width
    )


def _separable(width: int, dilation: int) -> nn.Module:
    depthwise = nn.Conv2d(
        width, width, 3, padding=dilation, dilation=dilation, groups=width, bias=False
    )
    return _normed(nn.ReLU(), depthwise, nn.Conv2d(width, width, 1, bias=False), width=width)


def _halved(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2) if min(x.shape[-2:]) > 1 else x


IMAGE = Form(
    operations={
        NONE: lambda width: nn.Identity(),
        SKIP: lambda width: nn.Identity(),
        "max_pool": lambda width: _normed(nn.MaxPool2d(3, stride=1, padding=1), width=width),
        "avg_pool": lambda width: _normed(
            nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False), width=width
        ),
        "conv3x3": lambda width: _convolution(width, 3),
        "separable": lambda width: _separable(width, 1),
        "dilated": lambda width: _separable(width, 2),
    },
    parameter_free=(SKIP, "max_pool", "avg_pool"),
    stem=lambda inputs, width: _normed(
        nn.Conv2d(inputs, width, 3, padding=1, bias=False), width=width
    ),
    join=lambda inputs, width: _normed(nn.Conv2d(inputs, width, 1, bias=False), width=width),
    between=_halved,
    pool=lambda x: x.mean((2, 3)),
)
"""Images [B, channels, height, width], halved between cells."""


class Gate(nn.Module):
    """x ↦ (Wx + b) ∘ sigmoid(Vx + c): the product of two linear maps, one of them squashed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value, self.gate = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.value(x) * torch.sigmoid(self.gate(x))


TABLE = Form(
    operations={
        NONE: lambda width: nn.Identity(),
        SKIP: lambda width: nn.Identity(),
        "linear": lambda width: _normed(nn.Linear(width, width), width=width),
        "relu": lambda width: _normed(nn.Linear(width, width), nn.ReLU(), width=width),
        "tanh": lambda width: _normed(nn.Linear(width, width), nn.Tanh(), width=width),
        "gate": lambda width: _normed(Gate(width), width=width),
    },
    parameter_free=(SKIP,),
    stem=lambda inputs, width: _normed(nn.Linear(inputs, width), width=width),
    join=lambda inputs, width: _normed(nn.Linear(inputs, width), width=width),
    between=lambda x: x,
    pool=lambda x: x,
)
"""Rows of features [B, width]."""
