"""A cell: a graph whose edges mix operations with weights α."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bilevel.problems.architecture.operations import NONE, Form

Alphas = Mapping[str, Tensor]
"""α of every edge by its name, [operations] each; {} for a derived cell."""


def edge(source: int, node: int) -> str:
    """Return the name of the edge source → node and of its hyperparameter."""
    return f"edge_{source}_{node}"


def pairs(nodes: int) -> list[tuple[int, int]]:
    """Return all edges i → j, i < j, of a cell with nodes 1, …, n; node 0 is its input."""
    return [(source, node) for node in range(1, nodes + 1) for source in range(node)]


class Mixture(nn.Module):
    """Map x to Σ_o α_o o(x), or to o(x) without α; `none` has an α and adds nothing."""

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
    """Compute x_j = Σ_{i<j} Σ_o α^{ij}_o o(x_i) for the nodes j = 1, …, n, and join them.

    Args:
        form: the parts of a cell, for images or for tables.
        nodes: n.
        edges: the operations of every existing edge, by its name; each node needs an edge.
        width: number of channels or features of every node.
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
    """A stem, `cells` cells with one architecture and separate weights, and a linear head.

    Example:
        >>> from bilevel.problems.architecture.operations import IMAGE
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
