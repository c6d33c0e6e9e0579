"""Architecture search by relaxation: λ are the weights with which edges mix operations."""

from collections.abc import Sequence
from functools import partial
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel import (
    Batch,
    Hypers,
    Metrics,
    ModuleProblem,
    Params,
    Positive,
    Prediction,
    Simplex,
    Space,
    squared_norm,
)
from bilevel.problems.architecture.cell import CellNetwork, edge, pairs
from bilevel.problems.architecture.genotype import Genotype, derive, read_genotype
from bilevel.problems.architecture.operations import NONE, Form
from bilevel.problems.datasets.standardize import Level, Standardize
from bilevel.problems.dtypes import DType, floating
from bilevel.problems.space_checks import SpaceChanges
from bilevel.validate import at_least, one_of, whole, wrong


@final
class Architecture(ModuleProblem):
    """Cross-entropy of a network of cells, with a tuned simplex α^{ij} for every edge of a cell.

        L_T = mean of CE(f(x; α, w), y) + ½ weight_decay ‖w‖²
        L_V = mean of CE(f(x; α, w), y) + free_price · F(α)

    F is the mean over edges of Σ α_o over the operations without parameters, divided by 1 − α_none.
    All cells share α. α enters the prediction in both losses, so the hypergradient has a direct and
    an indirect term. α is perturbed once per batch. `weight_decay` is frozen unless `space` changes
    it.

    Args:
        form: the parts of a cell, as in `bilevel.problems.architecture.operations`.
        splits: inputs and labels for train, valid and test.
        inputs: number of channels or features of the inputs.
        classes: number of classes.
        operations: operations that an edge mixes, in the order of α; by default all of the form.
        nodes: number of nodes of a cell.
        cells: number of cells of the network.
        width: number of channels or features of every node.
        keep: number of edges that a node of the derived cell keeps (paper: 2).
        free_price: price of operations without parameters in L_V, against the collapse to them.
        genotype: None searches. Otherwise the network has a derived cell and no α: the directory of
            a search, `random-SEED`, or edges such as `0-1:skip 0-2:relu`.
        mean: number that is subtracted from the stored inputs.
        std: number that divides them afterwards.
        batch_size: number of examples in a batch of training and of validation.
        dtype: floating-point type of the weights.
        space: changes of the space, as in `Space.override`.

    Attributes:
        cell: the derived cell, or None during a search.

    Raises:
        BilevelError: operations are unknown or too few, a number is out of its range, or the
            genotype is invalid.

    Source: Liu, Simonyan and Yang, DARTS, ICLR 2019; the collapse: Chu et al., Fair DARTS, ECCV
    2020. The price is ours.
    """

    def __init__(
        self,
        form: Form,
        splits: Sequence[Any],
        *,
        inputs: int,
        classes: int,
        operations: Sequence[str] | None = None,
        nodes: int = 3,
        cells: int = 2,
        width: int = 8,
        keep: int = 2,
        free_price: float = 0.0,
        genotype: str | None = None,
        mean: Level = 0.0,
        std: Level = 1.0,
        batch_size: int | None = 64,
        dtype: DType = None,
        space: SpaceChanges | None = None,
    ) -> None:
        whole(1, nodes=nodes, cells=cells, width=width, keep=keep)
        at_least(0, free_price=free_price)
        self.form = form
        self.nodes = nodes
        self.keep = keep
        self.free_price = free_price
        self.operations = _checked_operations(form, operations)
        self.cell = (
            None if genotype is None else read_genotype(genotype, self.operations, nodes, keep)
        )
        edges = {edge(*ends): self.operations for ends in pairs(nodes)}
        if self.cell is not None:
            edges = {edge(e.source, e.node): [e.operation] for e in self.cell}
        self._alphas = [] if self.cell is not None else list(edges)
        self._standardize = Standardize(mean, std)
        self._dtype = floating(dtype)
        network = partial(
            CellNetwork,
            form,
            nodes if self.cell is None else self.cell.nodes,
            edges,
            inputs=inputs,
            width=width,
            cells=cells,
            classes=classes,
        )
        super().__init__(lambda: network().to(self._dtype), Space(), *splits, batch_size=batch_size)
        even = Simplex(init=1 / len(self.operations), shape=(len(self.operations),))
        decay = Positive(init=3e-4, per_example=False, frozen=True)
        alphas = dict.fromkeys(self._alphas, even)
        self.space = Space(**alphas, weight_decay=decay).override(space or {})

    def inputs(
        self, hypers: Hypers, batch: Batch, *, train: bool, generator: torch.Generator | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        alphas = {name: hypers[name] for name in self._alphas}
        return (self._standardize(batch[0].to(self._dtype)), alphas), {}

    def inner_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        penalty = hypers["weight_decay"] * squared_norm(params)
        return F.cross_entropy(prediction, batch[1]) + 0.5 * penalty.mean()

    def outer_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        return F.cross_entropy(prediction, batch[1]) + self._price(hypers)

    def metrics(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Metrics:
        """Return cross-entropy with the price as `loss` [B], and `accuracy` [B]."""
        correct = prediction.argmax(-1) == batch[1]
        loss = F.cross_entropy(prediction, batch[1], reduction="none") + self._price(hypers)
        return {"loss": loss, "accuracy": correct.to(prediction.dtype)}

    def exact(self, hypers: Hypers) -> Metrics:
        """Return measures of the collapse and of the decision of a search; {} for a derived cell.

        - `parameter_free`: F(α), the mean over edges of Σ α_o / (1 − α_none) over the operations
          without parameters.
        - `derived_parameter_free`: their fraction of the edges of the cell that α give now.
        - `entropy`: mean over edges of −Σ α_o log α_o, in nats.
        """
        if not self._alphas:
            return {}
        leaves = [hypers[name].detach().to("cpu", torch.float64) for name in self._alphas]
        alpha = torch.stack(leaves)
        derived = self.derive(hypers).share(self.form.parameter_free)
        return {
            "parameter_free": self._parameter_free(alpha),
            "derived_parameter_free": torch.tensor(derived, dtype=torch.float64),
            "entropy": torch.special.entr(alpha).sum(1).mean(),
        }

    def _price(self, hypers: Hypers) -> Tensor | float:
        if not (self._alphas and self.free_price):
            return 0.0
        alpha = torch.stack([hypers[name] for name in self._alphas])
        return self.free_price * self._parameter_free(alpha)

    def _parameter_free(self, alpha: Tensor) -> Tensor:
        """Return F of α [edges, …, operations], []."""
        terms = dict(zip(self.operations, alpha.unbind(-1), strict=True))
        real = [term for name, term in terms.items() if name != NONE]
        free = [term for name, term in terms.items() if name in self.form.parameter_free]
        if not free:
            return alpha.new_zeros(())
        # If softmax leaves nothing except `none`, 0 / 0 would end the run.
        total = sum(real[1:], start=real[0]).clamp_min(torch.finfo(alpha.dtype).tiny)
        return (sum(free[1:], start=free[0]) / total).mean()

    def derive(self, hypers: Hypers) -> Genotype:
        """Return the cell that α give, as in `bilevel.problems.architecture.genotype.derive`."""
        weights = {name: hypers[name].tolist() for name in self._alphas}
        return derive(weights, self.operations, self.nodes, self.keep)


def _checked_operations(form: Form, operations: Sequence[str] | None) -> list[str]:
    names = list(form.operations if operations is None else operations)
    for name in names:
        one_of(form.operations, operations=name)
    if len(set(names)) < len(names) or len(names) < 2 or set(names) == {NONE}:
        reason = "leaves no choice, or repeats an operation"
        raise wrong("operations", names, reason, "give at least two, each once")
    return names
