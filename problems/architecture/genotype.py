"""The derived cell: one operation on each edge that is kept, from α, from a run, from chance or from its text."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bilevel import BilevelError
from bilevel.loggers.records import SUMMARY
from bilevel.problems.architecture.cell import edge, pairs
from bilevel.problems.architecture.operations import NONE
from bilevel.text import near

Weights = Mapping[str, Sequence[float]]
"""α of every edge, as plain numbers."""


class Edge(NamedTuple):
    """source → node by one operation."""

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
        """The cell that `str` writes.

        Raises:
            BilevelError: it is no such text, repeats an edge, or leaves a node without one.
        """
        found = []
        for word in text.split():
            ends, _, operation = word.partition(":")
            source, _, node = ends.partition("-")
            if not (
                source.isdecimal() and node.isdecimal() and operation and int(source) < int(node)
            ):
                raise BilevelError(
                    f"genotype={text!r}: `{word}` is no edge; give a run's directory, random-SEED, or edges as 0-1:conv3x3"
                )
            found.append(Edge(int(source), int(node), operation))
        cell = cls(found)
        if len({e[:2] for e in cell}) < len(cell):
            raise BilevelError(f"genotype={text!r} has an edge twice; give each one operation")
        if empty := [
            node for node in range(1, cell.nodes + 1) if all(e.node != node for e in cell)
        ]:
            raise BilevelError(
                f"genotype={text!r} leaves node {empty[0]} without an edge; give it one"
            )
        return cell

    def __str__(self) -> str:
        return " ".join(f"{source}-{node}:{operation}" for source, node, operation in self)

    @property
    def nodes(self) -> int:
        """How many nodes it has beside its input."""
        return max((e.node for e in self), default=0)

    def share(self, operations: Sequence[str]) -> float:
        """The part of its edges that are one of `operations`."""
        return sum(e.operation in operations for e in self) / len(self)


def derive(weights: Weights, operations: Sequence[str], nodes: int, keep: int) -> Genotype:
    """Every edge takes its strongest operation, `none` apart; every node keeps its `keep` strongest edges.

        o_ij = argmax_{o ≠ none} α^{ij}_o,    strength of i → j = max_{o ≠ none} α^{ij}_o

    Example:
        >>> weights = {"edge_0_1": [0.9, 0.1, 0.0], "edge_0_2": [0.0, 0.4, 0.6], "edge_1_2": [0.0, 0.7, 0.3]}
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
        strongest = sorted(best, key=lambda source: -weights[edge(source, node)][best[source]])[
            :keep
        ]
        kept += [Edge(source, node, operations[best[source]]) for source in strongest]
    return Genotype(kept)


def random_genotype(seed: int, operations: Sequence[str], nodes: int, keep: int) -> Genotype:
    """A cell of the same form by chance: sources without replacement, operations evenly among all but `none`."""
    draws = torch.Generator().manual_seed(seed)
    real = [name for name in operations if name != NONE]
    kept = []
    for node in range(1, nodes + 1):
        for source in torch.randperm(node, generator=draws)[:keep].tolist():
            kept.append(
                Edge(source, node, real[int(torch.randint(len(real), (), generator=draws))])
            )
    return Genotype(kept)


def genotype(source: str, operations: Sequence[str], nodes: int, keep: int) -> Genotype:
    """The cell that `source` names: the directory of a search, whose last α are discretized; `random-SEED`; or its text.

    Raises:
        BilevelError: a run that did not end well or searched among other cells; an operation that there is not.
    """
    kind, _, seed = source.partition("-")
    if kind == "random" and seed.isdecimal():
        return random_genotype(int(seed), operations, nodes, keep)
    if Path(source).is_dir():
        return derive(_searched(Path(source), operations, nodes), operations, nodes, keep)
    if "/" in source:
        raise BilevelError(
            f"genotype={source!r} is no directory of a run; give one that holds {SUMMARY}"
        )
    cell = Genotype.parse(source)
    real = [name for name in operations if name != NONE]
    if unknown := [e.operation for e in cell if e.operation not in real]:
        raise BilevelError(
            f"genotype={source!r}: there is no operation `{unknown[0]}`{near(unknown[0], real)}; there are {', '.join(real)}"
        )
    return cell


def _searched(run: Path, operations: Sequence[str], nodes: int) -> dict[str, list[float]]:
    """The last α of a run."""
    try:
        summary: dict[str, Any] = json.loads((run / SUMMARY).read_text())
        ended, found = (
            {key: summary[key] for key in ("diverged", "interrupted")},
            dict(summary["hypers"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        raise BilevelError(
            f"genotype={str(run)!r} holds no {SUMMARY} of a run that ended; give the run of a search"
        ) from None
    if any(ended.values()):
        how = "diverged" if ended["diverged"] else "was interrupted"
        raise BilevelError(f"genotype={str(run)!r}: that search {how}; give one that ended")
    found = {name: leaf for name, leaf in found.items() if name.startswith("edge_")}
    if not found:
        raise BilevelError(
            f"genotype={str(run)!r} is a run that searched no cells; give the run of a search"
        )
    among = _operations(run)
    if (
        set(found) != {edge(*ends) for ends in pairs(nodes)}
        or any(len(leaf) != len(operations) for leaf in found.values())
        or (among is not None and among != list(operations))
    ):
        known = f" ({', '.join(among)})" if among else ""
        raise BilevelError(
            f"genotype={str(run)!r} did not search cells of {nodes} nodes and these {len(operations)} operations; give "
            f"problem.nodes and problem.operations as that run had them{known}"
        )
    return found


def _operations(run: Path) -> list[str] | None:
    """Those that a run searched among, in the order of its α; None where its settings do not say."""
    import yaml

    try:
        return list(
            map(str, yaml.safe_load((run / "config.yaml").read_text())["problem"]["operations"])
        )
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):  # of a run from Python, say
        return None
