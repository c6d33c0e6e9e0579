"""The problem of a classifier: a module with logits, and no code beside it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, final

import torch.nn.functional as F
from torch import Tensor, nn

from bilevel.cross_entropy import cross_entropy
from bilevel.dropout.kinds import DropoutKind
from bilevel.dropout.tuned import Groups
from bilevel.errors import BilevelError
from bilevel.module_problem import ModuleProblem
from bilevel.params import Batch, Hypers, Metrics, Params, Prediction
from bilevel.space import Space, require_space
from bilevel.text import near

KNOWN = ("label_smoothing", "class_weights")
"""Hyperparameters that the loss reads."""


@final
class Classifier(ModuleProblem):
    """A module that returns logits, under cross-entropy.

        L_T = cross_entropy(f(x; w), y; label_smoothing, class_weights),    L_V = CE(f(x; w), y)

    A batch is (x, y); y holds classes, [B], or their probabilities, [B, C]. The space may hold
    `label_smoothing`, `class_weights` ([C], perturbed per batch), dropout rates (`dropout=`) and
    settings of the optimizer, such as `weight_decay`.

    Args:
        module: as in `ModuleProblem`.
        space: the hyperparameters.
        train: as in `ModuleProblem`.
        valid: the same for the outer objective.
        test: the same for the final report; None for no test split.
        batch_size: batch size for tensors and arrays; None takes a whole split at every step.
        dropout: patterns of the dropout layers whose rates λ holds; None for constant rates.
        dropout_kind: `bernoulli`, `gaussian` or `concrete`.

    Example:
        >>> import torch
        >>> from bilevel import Interval
        >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
        >>> module = nn.Sequential(nn.Dropout(0.1), nn.Linear(3, 2))
        >>> space = Space(label_smoothing=Interval(low=0.0, high=0.5, init=0.1))
        >>> list(Classifier(module, space, (x, y), (x, y), dropout="*").space)
        ['label_smoothing', 'dropout']

    Raises:
        BilevelError: the space has a hyperparameter that nothing reads.
    """

    def __init__(
        self,
        module: nn.Module | Callable[[], nn.Module],
        space: Space,
        train: Any,
        valid: Any,
        test: Any = None,
        *,
        batch_size: int | None = None,
        dropout: Groups | None = None,
        dropout_kind: DropoutKind = "bernoulli",
    ) -> None:
        require_space(space)
        if "class_weights" in space:  # they divide the loss of the batch
            weights = replace(space["class_weights"], per_example=False)
            space = Space(**{**space, "class_weights": weights})
        super().__init__(
            module,
            space,
            train,
            valid,
            test,
            batch_size=batch_size,
            dropout=dropout,
            dropout_kind=dropout_kind,
        )
        rates = self.tuned_dropout.domains if self.tuned_dropout else {}
        for name, domain in self.space.items():
            if name not in (*KNOWN, *rates) and domain.optimizer is None:
                hint = near(name, KNOWN)
                if "drop" in name:
                    hint = f" without dropout={ {name: '*'} }"
                raise BilevelError(
                    f"space.{name} is read by nothing in a Classifier{hint}; choose "
                    f"{' or '.join(KNOWN)}, pass dropout=…, or write a ModuleProblem"
                )

    def inner_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        return cross_entropy(
            prediction,
            batch[1],
            label_smoothing=hypers.get("label_smoothing", 0.0),
            class_weights=hypers.get("class_weights"),
        )

    def outer_objective(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Tensor:
        return F.cross_entropy(prediction, batch[1])

    def metrics(
        self, hypers: Hypers, params: Params, prediction: Prediction, batch: Batch
    ) -> Metrics:
        """Return cross-entropy `loss` [B] and `accuracy` [B]."""
        labels = batch[1]
        classes = labels.argmax(1) if labels.is_floating_point() else labels
        correct = prediction.argmax(1) == classes
        return {
            "loss": F.cross_entropy(prediction, labels, reduction="none"),
            "accuracy": correct.to(prediction.dtype),
        }
