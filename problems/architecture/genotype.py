"""Derived cells, with one operation per edge: from α, from a run, at random, or from a text."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bilevel.loggers.records import SUMMARY
from bilevel.problems.architecture.cell import edge, pairs
from bilevel.problems.architecture.operations import NONE
from bilevel.text import near
from bilevel.untrusted_files import read_bytes, read_yaml
from bilevel.validate import wrong

Weights = Mapping[str, Sequence[float]]
"""α of every edge, as plain numbers."""


class Edge(NamedTuple):
    """The edge source → node with one operation."""

    source: int
    node: int
    operation: str


class Genotype(tuple[Edge, ...]):
    """The edges of a derived cell, by node and then by source.

    Example:
        >>> cell = Genotype.parse("0-1:relu 0-2:skip 1-2:tanh")
        >>> cell[2].operation, str(cell), cell.nodes
        ('tanh', '0-1:relu 0-2:skip 1-2:tanh', 2)
    """

    def __new__(cls, edges: Iterable[Edge]) -> "Genotype":
        return super().__new__(cls, sorted(edges, key=lambda e: (e.node, e.source)))

    @classmethod
    def parse(cls, text: str) -> "Genotype":
        """Return the cell that `str` wrote.

        Raises:
            BilevelError: the text is invalid, repeats an edge, or leaves a node without one.
        """
        found = []
        for word in text.split():
            ends, _, operation = word.partition(":")
            source, _, node = ends.partition("-")
            if not (
                source.isdecimal() and node.isdecimal() and operation and int(source) < int(node)
            ):
                reason = f"has `{word}`, which is not an edge"
                remedy = "give the directory of a run, random-SEED, or edges such as 0-1:conv3x3"
                raise wrong("genotype", text, reason, remedy)
            found.append(Edge(int(source), int(node), operation))
        cell = cls(found)
        if len({e[:2] for e in cell}) < len(cell):
            raise wrong("genotype", text, "has an edge twice", "give each edge one operation")
        reached = {e.node for e in cell}
        if empty := [node for node in range(1, cell.nodes + 1) if node not in reached]:
            raise wrong("genotype", text, f"leaves node {empty[0]} without an edge", "add one")
        return cell

    def __str__(self) -> str:
        return " ".join(f"{source}-{node}:{operation}" for source, node, operation in self)

    @property
    def nodes(self) -> int:
        """Return the number of nodes without the input."""
        return max((e.node for e in self), default=0)

    def share(self, operations: Sequence[str]) -> float:
        """Return the fraction of edges whose operation is in `operations`."""
        return sum(e.operation in operations for e in self) / len(self)


def derive(weights: Weights, operations: Sequence[str], nodes: int, keep: int) -> Genotype:
    """Return the cell of the strongest operations and edges.

        o_ij = argmax_{o ≠ none} α^{ij}_o,    strength of i → j = max_{o ≠ none} α^{ij}_o

    Every edge takes its strongest operation except `none`. Every node keeps its `keep` strongest
    edges.

    Example:
        >>> weights = {"edge_0_1": [0.9, 0.1, 0], "edge_0_2": [0, 0.4, 0.6]}
        >>> weights["edge_1_2"] = [0, 0.7, 0.3]
        >>> str(derive(weights, ["none", "skip", "relu"], nodes=2, keep=1))
        '0-1:skip 1-2:skip'

    Source: Liu et al., ICLR 2019, section 2.4.
    """
    kept: list[Edge] = []
    real = [place for place, name in enumerate(operations) if name != NONE]
    for node in range(1, nodes + 1):
        best = {
            source: max(real, key=weights[edge(source, node)].__getitem__) for source in range(node)
        }
        ranked = sorted(best, key=lambda source: -weights[edge(source, node)][best[source]])
        kept += [Edge(source, node, operations[best[source]]) for source in ranked[:keep]]
    return Genotype(kept)


def random_genotype(seed: int, operations: Sequence[str], nodes: int, keep: int) -> Genotype:
    """Draw a cell: sources without replacement, operations uniformly from all but `none`."""
    draws = torch.Generator().manual_seed(seed)
    real = [name for name in operations if name != NONE]
    kept = []
    for node in range(1, nodes + 1):
        for source in torch.randperm(node, generator=draws)[:keep].tolist():
            operation = real[int(torch.randint(len(real), (), generator=draws))]
            kept.append(Edge(source, node, operation))
    return Genotype(kept)


def read_genotype(source: str, operations: Sequence[str], nodes: int, keep: int) -> Genotype:
    """Return the cell that `source` names.

    Args:
        source: the directory of a search, whose last α give the cell; `random-SEED`; or edges such
            as `0-1:skip 0-2:relu`.
        operations: operations of the edges, in the order of α.
        nodes: number of nodes.
        keep: number of edges that a node keeps.

    Raises:
        BilevelError: the run did not end well or searched other cells, or an operation is unknown.
    """
    kind, _, seed = source.partition("-")
    if kind == "random" and seed.isdecimal():
        return random_genotype(int(seed), operations, nodes, keep)
    if Path(source).is_dir():
        return derive(_last_alphas(Path(source), operations, nodes), operations, nodes, keep)
    if "/" in source:
        reason = "is not the directory of a run"
        raise wrong("genotype", source, reason, f"give one that holds {SUMMARY}")
    cell = Genotype.parse(source)
    real = [name for name in operations if name != NONE]
    if unknown := [e.operation for e in cell if e.operation not in real]:
        reason = f"has the unknown operation `{unknown[0]}`{near(unknown[0], real)}"
        raise wrong("genotype", source, reason, f"choose from {', '.join(real)}")
    return cell


def _last_alphas(run: Path, operations: Sequence[str], nodes: int) -> dict[str, list[float]]:
    """Return the last α of a run."""
    search = "give the directory of an architecture search"
    try:
        summary: dict[str, Any] = json.loads(read_bytes(run / SUMMARY))
        failures = {"diverged": summary["diverged"], "was interrupted": summary["interrupted"]}
        found = dict(summary["hypers"])
    except (OSError, ValueError, KeyError, TypeError):
        reason = f"has no {SUMMARY} of a finished run"
        raise wrong("genotype", str(run), reason, search) from None
    if failed := [how for how, failure in failures.items() if failure]:
        reason = f"is the directory of a search that {failed[0]}"
        raise wrong("genotype", str(run), reason, "give a search that ended")
    found = {name: leaf for name, leaf in found.items() if name.startswith("edge_")}
    if not found:
        raise wrong(
            "genotype", str(run), "is the directory of a run that searched no cells", search
        )
    among = _operations(run)
    if (
        set(found) != {edge(*ends) for ends in pairs(nodes)}
        or any(len(leaf) != len(operations) for leaf in found.values())
        or (among is not None and among != list(operations))
    ):
        known = f" ({', '.join(among)})" if among else ""
        reason = f"did not search cells of {nodes} nodes and these {len(operations)} operations"
        remedy = f"give problem.nodes and problem.operations of that run{known}"
        raise wrong("genotype", str(run), reason, remedy)
    return found


def _operations(run: Path) -> list[str] | None:
    """Return the operations of a run in the order of its α, or None if its settings are unknown."""
    try:
        return list(map(str, read_yaml(run / "config.yaml")["problem"]["operations"]))
    except (OSError, ValueError, KeyError, TypeError):  # a run from Python has no config.yaml
        return None
