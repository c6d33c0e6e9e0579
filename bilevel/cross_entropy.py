"""Cross-entropy whose label smoothing and class weights may be hyperparameters."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bilevel.errors import BilevelError
from bilevel.params import along_examples

IGNORED = -100
"""The label that `ignore_index` of PyTorch skips by default."""


def cross_entropy(
    logits: Float[Tensor, "batch classes *items"],
    labels: Tensor,
    *,
    label_smoothing: Tensor | float = 0.0,
    class_weights: Tensor | None = None,
    ignore_index: int = IGNORED,
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy with label smoothing ε and class weights c.

        ℓ_b = (1 − ε) c_{y_b} n_b[y_b] + ε/C Σ_k c_k n_b[k],    n_b = −log softmax(logits_b)
        L = Σ_b ℓ_b / Σ_b c_{y_b}

    It equals `F.cross_entropy`, which takes numbers alone and has no derivative in either. It is
    convex in the logits. With one ε or c for each example, term b is that of a batch in which all
    examples have the ε and the c of example b.

    Args:
        logits: with the classes on the second axis.
        labels: class indices, [B, *items], or probabilities of the classes in the shape of logits.
        label_smoothing: ε in [0, 1], [] or [B].
        class_weights: c ≥ 0, [C] or [B, C]. Their sum over the labels of the batch divides the
            loss, so a hyperparameter of class weights needs `per_example=False`.
        ignore_index: items with this label do not count.

    Example:
        >>> logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
        >>> smoothing = torch.tensor(0.1, requires_grad=True)
        >>> cross_entropy(logits, labels, label_smoothing=smoothing).backward()
        >>> smoothing.grad
        tensor(0.7500)
        >>> each = torch.tensor([0.1, 0.1])
        >>> cross_entropy(logits, labels, label_smoothing=each).item().__round__(4)
        0.2951

    Raises:
        BilevelError: ε or c has another shape.
    """
    classes = logits.shape[1]
    ε = torch.as_tensor(label_smoothing, dtype=logits.dtype, device=logits.device)
    _check("label_smoothing", ε, [(), (len(logits),)])
    losses = -F.log_softmax(logits, 1)
    soft = labels.is_floating_point()
    if labels.shape != (losses if soft else losses[:, 0]).shape:
        F.cross_entropy(logits, labels)  # raises what users know, and what the checks explain
    counted = torch.ones_like(losses[:, 0]) if soft else (labels != ignore_index).to(losses.dtype)
    index = None if soft else labels.where(labels != ignore_index, 0)[:, None]
    share = torch.ones_like(losses[:, 0])
    weighted = losses
    if class_weights is not None:
        _check("class_weights", class_weights, [(classes,), (len(logits), classes)])
        c = class_weights.expand(len(logits), classes).to(losses.dtype)
        weighted = losses * c.reshape(*c.shape, *[1] * (losses.ndim - 2))
        if index is not None:
            share = along_examples(_mean_weight(c, index, counted), share).expand_as(share)
    hit = (weighted * labels).sum(1) if index is None else weighted.gather(1, index)[:, 0]
    ε = along_examples(ε, hit)
    terms = (1 - ε) * hit + ε / classes * weighted.sum(1)
    return (terms * counted / share).sum() / counted.sum()


def _mean_weight(c: Tensor, index: Tensor, counted: Tensor) -> Tensor:
    """Return the mean of c over the labels of the batch, for the c of each example, [B]."""
    of_class = torch.zeros(c.shape[1], dtype=c.dtype, device=c.device)
    of_class = of_class.index_add(0, index.reshape(-1), counted.reshape(-1))
    return c @ of_class / counted.sum()


def _check(setting: str, value: Tensor, shapes: list[tuple[int, ...]]) -> None:
    if value.shape not in shapes:
        known = " or ".join(str(list(shape)) for shape in shapes)
        raise BilevelError(
            f"{setting} has the shape {list(value.shape)}, and must be {known}; give one value, or "
            "one for each example of logits [B, C]"
        )
