"""Architecture search by relaxation: the weights with which a cell's edges mix operations are λ, the network's weights w."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, final

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel import (
    Batch,
    BilevelError,
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
from bilevel.problems.architecture.genotype import Genotype, derive, genotype
from bilevel.problems.architecture.operations import NONE, Form
from bilevel.problems.datasets.standardize import Level, Standardize
from bilevel.problems.dtypes import DType, floating
from bilevel.text import near

Changes: TypeAlias = Mapping[str, Mapping[str, Any]]


@final
class Architecture(ModuleProblem):
    """Cross-entropy of a network of cells; while it searches, a simplex α^{ij} for every edge of the cell is tuned.

        L_T = mean of CE(f(x; α, w), y) + ½ weight_decay ‖w‖²,    L_V = mean of CE(f(x; α, w), y) + free_price · F(α)

    F is the mean over edges of Σ α_o over the operations without parameters, divided by 1 − α_none. All cells share α. They
    enter the prediction in both losses, so that the hypergradient has a direct term beside the indirect one, and are perturbed
    once per batch. `weight_decay` is frozen unless `space` says otherwise.

    Args:
        form: of images or of tables, as in `bilevel.problems.architecture.cell`.
        splits: inputs and labels for train, valid and test.
        inputs: channels or features of the inputs.
        classes: how many there are.
        operations: those that an edge mixes, in the order of α; by default all of the form.
        nodes: of a cell.
        cells: of the network.
        width: channels or features of every node.
        keep: how many edges a node of the derived cell keeps (the paper: 2).
        free_price: what L_V pays for operations without parameters, against the collapse to them.
        genotype: None searches. Otherwise the network has the derived cell, and no α: the directory of a search, `random-SEED`,
            or edges as in `0-1:skip 0-2:relu`.
        mean: what is subtracted from inputs as they are stored, before a division by `std`.
        std: see `mean`.
        batch_size: of training and of validation.
        dtype: of the weights.
        space: changes to the space, as in `Space.override`.

    Attributes:
        cell: the derived cell, or None while it searches.

    Raises:
        BilevelError: unknown or too few operations, a number out of its range, or a genotype that cannot be had.

    Source: Liu, Simonyan and Yang, DARTS, ICLR 2019; the collapse: Chu et al., Fair DARTS, ECCV 2020. The price is ours.
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
        space: Changes | None = None,
    ) -> None:
        self.form, self.nodes, self.keep, self.free_price = form, nodes, keep, free_price
        self.operations = _known(form, operations)
        _check(nodes=nodes, cells=cells, width=width, keep=keep)
        if not 0 <= free_price < float("inf"):
            raise BilevelError(f"free_price={free_price!r} is no price; give a number, 0 or more")
        self.cell = self._derived(genotype) if genotype is not None else None
        edges = {edge(*ends): self.operations for ends in pairs(nodes)}
        if self.cell is not None:
            edges = {edge(e.source, e.node): [e.operation] for e in self.cell}
        self._alphas = [] if self.cell is not None else list(edges)
        self._seen, self._dtype = Standardize(mean, std), floating(dtype)
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
        self.space = Space(**dict.fromkeys(self._alphas, even), weight_decay=decay).override(
            space or {}
        )

    def inputs(
        self, hypers: Hypers, batch: Batch, *, train: bool, generator: torch.Generator | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (
            self._seen(batch[0].to(self._dtype)),
            {name: hypers[name] for name in self._alphas},
        ), {}

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
        """Cross-entropy `loss` [B], the price included, and `accuracy` [B]."""
        correct = prediction.argmax(-1) == batch[1]
        loss = F.cross_entropy(prediction, batch[1], reduction="none") + self._price(hypers)
        return {"loss": loss, "accuracy": correct.to(prediction.dtype)}

    def exact(self, hypers: Hypers) -> Metrics:
        """How far the search has collapsed and how decided it is; nothing of a derived cell.

        `parameter_free`: F(α), the mean over edges of the weight of operations without parameters, Σ α_o / (1 − α_none).
        `derived_parameter_free`: their part of the edges of the cell that would be derived now.
        `entropy`: mean over edges of −Σ α_o log α_o, in nats.
        """
        if not self._alphas:
            return {}
        alpha = torch.stack(
            [hypers[name].detach().to("cpu", torch.float64) for name in self._alphas]
        )
        return {
            "parameter_free": self._parameter_free(alpha),
            "derived_parameter_free": torch.tensor(
                self.derive(hypers).share(self.form.parameter_free), dtype=torch.float64
            ),
            "entropy": torch.special.entr(alpha).sum(1).mean(),
        }

    def _price(self, hypers: Hypers) -> Tensor | float:
        if not (self._alphas and self.free_price):
            return 0.0
        return self.free_price * self._parameter_free(
            torch.stack([hypers[name] for name in self._alphas])
        )

    def _parameter_free(self, alpha: Tensor) -> Tensor:
        """F of α [edges, …, operations], as []."""
        terms = dict(zip(self.operations, alpha.unbind(-1), strict=True))
        real = [term for name, term in terms.items() if name != NONE]
        free = [term for name, term in terms.items() if name in self.form.parameter_free]
        if not free:
            return alpha.new_zeros(())
        # where softmax leaves nothing beside `none`, 0 / 0 would end the run
        return (
            sum(free[1:], start=free[0])
            / sum(real[1:], start=real[0]).clamp_min(torch.finfo(alpha.dtype).tiny)
        ).mean()

    def derive(self, hypers: Hypers) -> Genotype:
        """The cell that α stand for: see `bilevel.problems.architecture.genotype.derive`."""
        weights = {name: hypers[name].tolist() for name in self._alphas}
        return derive(weights, self.operations, self.nodes, self.keep)

    def _derived(self, source: str) -> Genotype:
        return genotype(source, self.operations, self.nodes, self.keep)


def _known(form: Form, operations: Sequence[str] | None) -> list[str]:
    """The operations, checked."""
    names = list(form.operations if operations is None else operations)
    if unknown := [name for name in names if name not in form.operations]:
        known = ", ".join(form.operations)
        raise BilevelError(
            f"there is no operation `{unknown[0]}`{near(str(unknown[0]), form.operations)}; there are {known}"
        )
    if len(set(names)) < len(names) or len(names) < 2 or set(names) == {NONE}:
        raise BilevelError(
            f"operations={names} is nothing to choose from; give two or more, each once"
        )
    return names


def _check(**numbers: Any) -> None:
    for name, value in numbers.items():
        if not (isinstance(value, int) and value >= 1):
            raise BilevelError(f"{name}={value!r} makes no network; give a whole number, 1 or more")
