"""Sentences about a batch that a problem cannot take: its field, shape or type, and a remedy."""

import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel.checks.calls import (
    CLASS_LOSSES,
    GATHERS,
    Call,
    Calls,
    class_outside,
    gathered,
    indices,
    loss_arguments,
    outside,
)
from bilevel.checks.hints import place
from bilevel.data.fields import dtype_of, fields, kind, shown, tensors
from bilevel.embedding_options import LOOKUPS, lookup
from bilevel.params import Batch, Params
from bilevel.text import describe

ENTRY = re.compile(
    r"index out of range|indices must be|not subscriptable|out of bounds for dimension|"
    r"invalid index of a 0-dim|too many indices"
)
"""Matches errors about an entry that a container does not have."""
ARGUMENTS = re.compile(r"forward\(\) (missing|takes|got)")
"""Matches errors about the arguments of a module."""
ALIKE = "give all splits the same fields, of one type and shape"


class Failure(NamedTuple):
    """An error in a trial: the split, its batch, the method that was called, and the calls."""

    split: str
    batch: Batch
    stage: str
    error: Exception
    calls: Calls

    @property
    def call(self) -> Call | None:
        """Return the failing call, if a field of the batch reached it."""
        call = self.calls.failed
        return call if call is not None and call.fields else None


def reason(failure: Failure, passed: Mapping[str, Batch], params: Params) -> str | None:
    """Return a sentence about the field that a problem cannot take.

    It compares the arguments of the failing call with each other and with the weights, and the
    batch with those of other splits. None means that the error has nothing to do with the data.

    Args:
        failure: the error.
        passed: batches of other splits without an error.
        params: w.
    """
    call = failure.call
    found = _container(failure, passed)
    if found is None and call is not None:
        for about in (_classes, _indices, _types, _weight, _target):
            if (found := about(failure, call)) is not None:
                break
    if found is None:
        found = _other_split(failure, passed) or _kind_of_weights(failure, params)
    if found is None and (call is not None or _of_torch(failure.error)):
        found = _facts(failure)
    return None if found is None else f"{failure.split} data{found}"


def _container(failure: Failure, passed: Mapping[str, Batch]) -> str | None:
    """Return a sentence about a batch of another form than the problem takes."""
    batch, error, call = failure.batch, failure.error, failure.calls.failed
    took = failure.calls.opened if isinstance(batch, Tensor) else None
    missing = isinstance(error, KeyError) or (
        isinstance(error, (IndexError, TypeError, AttributeError)) and ENTRY.search(str(error))
    )
    entry = _entry(batch, error)
    if took is None and entry is None and not (missing and (call is None or not call.fields)):
        return None
    for name, other in passed.items():
        if kind(other) != kind(batch):
            return f": a batch is {kind(batch)}, but a {name} batch is {kind(other)}; {ALIKE}"
    if entry is not None:
        return f", {entry}, where a function takes a tensor; give a flat tuple of tensors, (x, y)"
    if took is not None:
        return (
            f": a batch is {kind(batch)}, and `{failure.stage}` takes batch[{took}] of it, which "
            "is one example; give a tuple, (x,) or (x, y)"
        )
    return (
        f": a batch is {kind(batch)}, of which `{failure.stage}` takes another entry "
        f"({describe(error)}); give the fields that the problem reads, (x, y) for most, or "
        "override `inputs`"
    )


def _entry(batch: Batch, error: Exception) -> str | None:
    """Return the field that a function refused because it is no tensor, or None."""
    refused = re.search(r"must be Tensor, not (\w+)|'(\w+)' object has no attribute", str(error))
    if refused is None or isinstance(batch, Tensor):
        return None
    for name, value in fields(batch).items():
        if not isinstance(value, Tensor) and type(value).__name__ in refused.groups():
            return f"{name}: {kind(value)}"
    return None


def _classes(failure: Failure, call: Call) -> str | None:
    """Return a sentence about the target of a loss of classes."""
    if call.func in GATHERS and (found := gathered(call.args, call.kwargs)) is not None:
        size, index = found
        return _no_class(_field(failure, index), outside(index, size), size)
    if call.func not in CLASS_LOSSES:
        return None
    scores, target = loss_arguments(call.args, call.kwargs)
    if not (isinstance(scores, Tensor) and isinstance(target, Tensor)) or scores.ndim == 0:
        return None
    field, axis = _field(failure, target), 1 if scores.ndim > 1 else 0
    if field is None:
        return None
    shape, expected = list(target.shape), [*scores.shape[:axis], *scores.shape[axis + 1 :]]
    if shape == list(scores.shape) and not target.is_floating_point():
        return (
            f", {field}: {shown(target)} has the shape of the prediction, as probabilities would; "
            "give the classes (y.argmax(1)), or probabilities as floating-point numbers"
        )
    if shape != expected:
        remedy = (
            "remove its axes of length 1 (y.reshape(len(y)))"
            if target.numel() == scores[:, 0].numel()
            else "give one class per example"
        )
        return (
            f", {field}: {shown(target)} does not fit a prediction of shape {list(scores.shape)} "
            f"{_made_of(failure, scores)}, for which {call.name} takes classes of shape "
            f"{expected}; {remedy}"
        )
    if target.dtype != torch.int64:
        return f", {field}: {shown(target)}, but classes must be int64; convert it with .long()"
    return _no_class(field, class_outside(scores, target, call.kwargs), scores.shape[axis])


def _no_class(field: str | None, bad: int | None, size: int) -> str | None:
    """Return a sentence about a class without a score; None without a field or such a class."""
    if field is None or bad is None:
        return None
    return (
        f", {field} holds the class {bad}, but the prediction has {size} classes "
        f"(0 to {size - 1}); number the classes from 0, or give the network more outputs"
    )


def _indices(failure: Failure, call: Call) -> str | None:
    """Return a sentence about the indices into an embedding."""
    if call.func not in LOOKUPS:
        return None
    table, options = lookup(call.func, call.args, call.kwargs)
    index = indices(options)
    if not isinstance(index, Tensor) or (field := _field(failure, index)) is None:
        return None
    name = next((f"`{name}`" for name in call.weights), "the embedding")
    if index.dtype not in (torch.int64, torch.int32):
        return (
            f", {field}: {shown(index)}, but the indices into {name} must be int64; convert it "
            "with .long()"
        )
    if (bad := outside(index, len(table))) is not None:
        return (
            f", {field} holds the index {bad}, but {name} has {len(table)} rows "
            f"(0 to {len(table) - 1}); give it more rows, or map unknown entries to one of them"
        )
    return None


def _types(failure: Failure, call: Call) -> str | None:
    """Return a sentence about a field whose type is not that of the weight that it meets."""
    weights = {name: w for name, w in call.weights.items() if w.is_floating_point()}
    for t, origin in call.fields:
        for name, w in weights.items():
            if t.dtype != w.dtype and (field := _named(failure, origin)) is not None:
                return _wrong_type(field, t, f"the weight `{name}`", w)
    return None


def _wrong_type(field: str, t: Tensor, what: str, w: Tensor) -> str:
    remedy = f"convert it with .to(torch.{dtype_of(w)})"
    if t.is_complex():
        remedy = "give its real and its imaginary part as columns"
    elif t.is_floating_point():
        remedy += f", or the network with .to(torch.{dtype_of(t)})"
    return f", {field}: {shown(t)}, but {what} is {dtype_of(w)}; {remedy}"


def _weight(failure: Failure, call: Call) -> str | None:
    """Return a sentence about a field whose shape does not fit the weight that it meets."""
    big = {name: w for name, w in call.weights.items() if w.ndim > 1}
    if not big or not call.fields:
        return None
    name, w = next(iter(big.items()))
    t, origin = call.fields[0]
    if (field := _named(failure, origin)) is None:
        return None
    own = failure.calls.batch
    exact = any(t is leaf for leaf in tensors(own).values())
    through = "" if exact else f", which becomes {list(t.shape)},"
    remedy = "change its shape, or the layer"
    if call.func is F.linear:
        remedy = f"give it {w.shape[1]} columns, or change the layer"
    return (
        f", {field}: {shown(tensors(own)[field])}{through} does not fit the weight `{name}` "
        f"{list(w.shape)} in {call.name} ({describe(failure.error)}); {remedy}"
    )


def _target(failure: Failure, call: Call) -> str | None:
    """Return a sentence about a target that does not fit the prediction."""
    if failure.stage == "predict" or len(call.fields) < 2:
        return None
    sized = sorted(call.fields, key=lambda pair: len(pair[1]))
    (target, origin), (prediction, _) = sized[0], sized[-1]
    for t, names in call.fields[1:]:  # a target comes second
        if t is not prediction and len(names) == len(origin):
            target, origin = t, names
    own = tensors(failure.batch).values()
    exact = [pair for pair in call.fields if any(pair[0] is leaf for leaf in own)]
    if len(exact) == 1:  # the network has made the other one
        target, origin = exact[0]
    if (field := _named(failure, origin)) is None:
        return None
    prediction = next(t for t, _ in call.fields if t is not target)
    return (
        f", {field}: {shown(target)} does not fit the prediction {shown(prediction)} "
        f"{_made_of(failure, prediction)} in {call.name} ({describe(failure.error)}); give both "
        "one shape and one type"
    )


def difference(batch: Batch, others: Mapping[str, Batch], *, lengths: bool = True) -> str | None:
    """Return the words for a field that differs from that of another split, or None.

    Args:
        batch: the batch.
        others: batches of other splits.
        lengths: whether a length beyond the first axis counts, and not only the number of axes.
    """
    ours = tensors(batch)
    for name, other in others.items():
        alike = isinstance(other, (tuple, list)) and isinstance(batch, (tuple, list))
        alike = alike and len(other) == len(batch)  # a DataLoader makes a list of a tuple
        if not alike and kind(other) != kind(batch) and not isinstance(batch, Tensor):
            return f": a batch is {kind(batch)}, but a {name} batch is {kind(other)}"
        for field, theirs in tensors(other).items():
            t = ours.get(field)
            if t is None:
                continue
            longer = lengths and t.shape[1:] != theirs.shape[1:]
            if t.dtype != theirs.dtype or t.ndim != theirs.ndim or longer:
                return f", {field}: {shown(t)}, but that of a {name} batch is {shown(theirs)}"
    return None


def _other_split(failure: Failure, passed: Mapping[str, Batch]) -> str | None:
    """Return a sentence about a field that differs from that of a split without an error."""
    if (found := difference(failure.batch, passed)) is None:
        return None
    return f"{found} ({describe(failure.error)}); {ALIKE}"


def _kind_of_weights(failure: Failure, params: Params) -> str | None:
    """Return a sentence about a field of another type than w, if the error is about types."""
    floating = [p for p in params.values() if p.is_floating_point()]
    if not floating or not re.search(r"d?type|scalar", str(failure.error)):
        return None
    for field, t in tensors(failure.batch).items():
        if t.dtype != floating[0].dtype and (t.is_floating_point() or t.is_complex()):
            return _wrong_type(field, t, "the network", floating[0])
    return None


def _facts(failure: Failure) -> str:
    """Return a sentence with the facts alone."""
    named = tensors(failure.batch)
    call = failure.call
    if call is not None:
        reached = frozenset[str]().union(*(origin for _, origin in call.fields))
        named = {name: t for name, t in named.items() if name in reached}
    listed = ", ".join(f"{name}: {shown(t)}" for name, t in named.items())
    remedy = "compare shape and type with what the network and the losses take"
    if ARGUMENTS.search(str(failure.error)):
        remedy = "return the arguments of the module from `inputs`"
    return (
        f", {listed}: `{failure.stage}` raises {describe(failure.error).rstrip('.')}"
        f"{place(failure.error)}; {remedy}"
    )


def _field(failure: Failure, t: Tensor) -> str | None:
    """Return the name of the field that an argument of the failing call follows from, or None."""
    found = [] if failure.call is None else failure.call.fields
    return _named(failure, frozenset().union(*(origin for x, origin in found if x is t)))


def _made_of(failure: Failure, prediction: Tensor) -> str:
    """Return the fields that a prediction follows from, in words."""
    found = [] if failure.call is None else failure.call.fields
    names = frozenset[str]().union(*(origin for x, origin in found if x is prediction))
    made = [f"{name}: {shown(t)}" for name, t in tensors(failure.batch).items() if name in names]
    return f"of {', '.join(made)}" if made else "of the network"


def _named(failure: Failure, origin: frozenset[str]) -> str | None:
    """Return the field in `origin`; of several, the last one of the batch."""
    names = [name for name in tensors(failure.batch) if name in origin]
    return names[-1] if names else None


def _of_torch(error: Exception) -> bool:
    """Return whether PyTorch's own Python code raised an error."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(torch.__file__).parent in Path(frames[-1].filename).parents
