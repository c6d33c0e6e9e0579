"""Cross-entropy whose label smoothing and class weights may be hyperparameters."""

from types import NoneType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from bilevel.errors import BilevelError
from bilevel.params import along_examples
from bilevel.validate import wrong

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
        BilevelError: an argument has another shape or type, or a label has no logit.
    """
    if has_torch_function((logits, labels)):  # a check of the problem follows the labels
        options: dict[str, Any] = {
            "label_smoothing": label_smoothing,
            "class_weights": class_weights,
            "ignore_index": ignore_index,
        }
        both = (logits, labels)
        loss: Tensor = handle_torch_function(cross_entropy, both, *both, **options)
        return loss
    _check_labels(logits, labels)
    classes = logits.shape[1]
    if not isinstance(label_smoothing, (int, float, Tensor)):
        raise wrong("label_smoothing", label_smoothing, "is no number", "give one, or a tensor")
    if not isinstance(class_weights, (Tensor, NoneType)):
        shown = type(class_weights).__name__
        raise BilevelError(f"class_weights={shown} is no tensor; give a tensor [C], or None")
    ε = torch.as_tensor(label_smoothing, dtype=logits.dtype, device=logits.device)
    _check("label_smoothing", ε, [(), (len(logits),)])
    losses = -F.log_softmax(logits, 1)
    soft = labels.is_floating_point()
    counted = torch.ones_like(losses[:, 0]) if soft else (labels != ignore_index).to(losses.dtype)
    index = None if soft else labels.where(labels != ignore_index, 0).long()[:, None]
    share = torch.ones_like(losses[:, 0])
    weighted = losses
    if class_weights is not None:
        _check("class_weights", class_weights, [(classes,), (len(logits), classes)])
        c = class_weights.expand(len(logits), classes).to(losses.dtype)
        weighted = losses * c.reshape(*c.shape, *[1] * (losses.ndim - 2))
        if index is not None:
            share = along_examples(_mean_weight(c, index, counted), share).expand_as(share)
    hit = (weighted * labels).sum(1) if index is None else _gathered(weighted, index)
    ε = along_examples(ε, hit)
    terms = (1 - ε) * hit + ε / classes * weighted.sum(1)
    return (terms * counted / share).sum() / counted.sum()


def _check_labels(logits: Any, labels: Any) -> None:
    """Raise `BilevelError` if logits and labels have no form that a loss of classes takes."""
    for name, value in (("logits", logits), ("labels", labels)):
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise BilevelError(f"{name} are a {kind}; convert them with torch.as_tensor")
    shape = list(logits.shape)
    if logits.ndim < 2 or not logits.is_floating_point():
        kind = str(logits.dtype).removeprefix("torch.")
        raise BilevelError(
            f"logits are {kind} {shape}, and must be floating-point numbers [B, C, …]; give the "
            "output of the network, with the classes on the second axis"
        )
    known = [shape[:1] + shape[2:]]
    known = [shape] if labels.is_floating_point() else known
    if list(labels.shape) not in known:
        given = f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
        expected = "probabilities" if labels.is_floating_point() else "classes"
        remedy = "give one class per example"
        if labels.is_floating_point():
            remedy = "convert classes with .long()"
        elif list(labels.shape) == shape:
            remedy = "give the classes (y.argmax(1)), or probabilities as floating-point numbers"
        elif labels.numel() == logits[:, 0].numel():
            remedy = "remove its axes of length 1 (y.reshape(len(y)))"
        raise BilevelError(
            f"labels are {given}, but logits {shape} take {expected} of shape {known[0]}; {remedy}"
        )


def _gathered(losses: Tensor, index: Tensor) -> Tensor:
    """Return the loss of each label; only the CPU notices a label out of range."""
    try:
        return losses.gather(1, index)[:, 0]
    except RuntimeError as error:
        if "out of bounds" not in str(error):
            raise
        low, high = (int(x) for x in index.aminmax())
        classes = losses.shape[1]
        raise BilevelError(
            f"labels hold the class {low if low < 0 else high}, but logits have {classes} classes "
            f"(0 to {classes - 1}); number the classes from 0, or give the network more outputs"
        ) from None


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
