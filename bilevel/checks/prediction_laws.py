"""Laws about `init` and `predict`: pure functions whose first axis is the example axis."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointError

from bilevel.checks.equality import bitwise_equal, nearly_equal
from bilevel.checks.finding import Finding
from bilevel.checks.first_batch import FirstBatch, has_examples
from bilevel.checks.hints import remedy_of, without_hint
from bilevel.errors import Refused
from bilevel.params import Carry, count_examples
from bilevel.prediction import check_prediction
from bilevel.text import first_line


def initial_weights(case: FirstBatch) -> Iterator[Finding]:
    """`init` depends on its generator alone, and returns dictionaries of tensors."""
    _ = case.start  # it refuses other types
    drawn = []
    with torch.random.fork_rng(devices=[]):
        for seed in (1, 2):  # the seed of the global generator must have no effect
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            drawn.append(case.problem.init(torch.Generator().manual_seed(0)))
            if not torch.equal(before, torch.get_rng_state()):
                yield Finding(
                    "error",
                    (
                        "`init` moves PyTorch's global random state; draw from the generator that "
                        "it receives"
                    ),
                )
                break
    if len(drawn) == 2 and not bitwise_equal(*drawn):
        yield Finding(
            "error",
            (
                "`init` returns different weights for the same generator; draw all of them from "
                "the generator"
            ),
        )
    for name, p in drawn[0][0].items():
        if not p.is_floating_point():
            yield Finding(
                "error",
                f"the weight `{name}` is {p.dtype}, which has no gradient; move it to the carry",
            )


def prediction_tree(case: FirstBatch) -> Iterator[Finding]:
    """The prediction is a tensor or a pytree of tensors, also where gradients are off."""
    try:
        check_prediction(case.problem, case.data, case.device)
    except Refused as refusal:
        yield Finding("error", str(refusal))


def purity(case: FirstBatch) -> Iterator[Finding]:
    """`predict` changes no argument, and the same generator state gives the same bits."""
    found = {train: list(_impurities(case, train=train)) for train in (True, False)}
    for text in dict.fromkeys([*found[True], *found[False]]):
        modes = [train for train, texts in found.items() if text in texts]
        mode = f" with train={modes[0]}" if len(modes) == 1 else ""
        yield Finding("error", f"`predict`{mode} {text}")


def _impurities(case: FirstBatch, *, train: bool) -> Iterator[str]:
    """Yield what `predict` does wrong in one mode; the sentences go on after its name."""
    arguments = {
        "hypers": case.hypers,
        "params": case.params,
        "carry": case.start[1],
        "batch": case.batch,
    }
    before = pytree.tree_map(
        lambda x: x.detach().clone() if isinstance(x, Tensor) else x, arguments
    )
    writes = {part: _writes(tree) for part, tree in arguments.items()}
    state = torch.get_rng_state()
    first, second = case.predict(train=train), case.predict(train=train)
    modified = [
        part
        for part, tree in arguments.items()
        if writes[part] != _writes(tree) or not bitwise_equal(tree, before[part])
    ]
    for part in modified:
        yield f"modifies its {part} in place; work on a clone, and return changes in the carry"
    if not torch.equal(state, torch.get_rng_state()):
        torch.set_rng_state(state)
        yield "draws from PyTorch's global random state; draw from the generator that it receives"
    elif not modified and not bitwise_equal(first, second):
        yield (
            "returns different results at the same generator state; keep no state outside the carry"
        )
    if not _alike(first[1], case.start[1]):
        yield (
            "returns a carry with other names or shapes than `init`; return all entries, unchanged "
            "or new"
        )


def _writes(tree: Any) -> list[int]:
    """Return how often each tensor was written in place: a write may leave the values alone."""
    return [leaf._version for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def depends_on_weights(case: FirstBatch) -> Iterator[Finding]:
    """The prediction depends on w."""
    leaves = [
        leaf
        for leaf in pytree.tree_leaves(case.training[0])
        if isinstance(leaf, Tensor) and leaf.requires_grad
    ]
    try:
        sums, weights = [leaf.sum() for leaf in leaves], list(case.params.values())
        gradients = (
            torch.autograd.grad(sums, weights, allow_unused=True, retain_graph=True)
            if leaves
            else ()
        )
    except RuntimeError as error:
        yield Finding(
            "error",
            (
                f"the prediction cannot be differentiated in w ({without_hint(error)}); use "
                f"operations with a derivative{remedy_of(error)}{recomputation_hint(error)}"
            ),
            first_line(error),
        )
        return
    if all(g is None for g in gradients):
        yield Finding(
            "error",
            (
                "the prediction does not depend on w, so nothing can be learned; compute it from "
                "the `params` that `predict` receives (a module of your own through "
                "torch.func.functional_call), without detach() or no_grad()"
            ),
        )


def example_axis(case: FirstBatch) -> Iterator[Finding]:
    """In evaluation mode, reordered examples have the same predictions in the new order.

    A network may couple the examples of a batch: batch statistics do not depend on their order.
    """
    examples = count_examples(case.batch)
    if examples < 2:
        return

    def reversed_examples(x: Any) -> Any:
        return x.flip(0) if has_examples(x, examples) else x

    with torch.no_grad():
        straight, _ = case.predict(train=False)
        turned, _ = case.predict(train=False, batch=pytree.tree_map(reversed_examples, case.batch))
    for ours, theirs in zip(pytree.tree_leaves(straight), pytree.tree_leaves(turned), strict=False):
        # a leaf that does not change has no example axis: w itself, for example
        if (
            reversed_examples(ours) is ours
            or nearly_equal(ours, theirs)
            or nearly_equal(reversed_examples(ours), theirs)
        ):
            continue
        per_example = any(case.problem.space[name].per_example for name in case.problem.space.tuned)
        yield Finding(
            "error" if per_example else "note",
            (
                "in evaluation mode, reversing the examples of a batch does not reverse the "
                "predictions; use the first axis of every tensor for the examples (for nn.LSTM: "
                "batch_first=True), or declare per_example=False where their order matters"
            ),
        )
        return


def recomputation_hint(error: RuntimeError) -> str:
    """Return a hint where a backward pass recomputes activations that it did not save."""
    if isinstance(error, CheckpointError) or "meta" in str(error):
        return (
            "; remove torch.utils.checkpoint from the network, since it recomputes when the "
            "weights of the call are gone"
        )
    return ""


def _alike(one: Carry, other: Carry) -> bool:
    return {name: t.shape for name, t in one.items()} == {
        name: t.shape for name, t in other.items()
    }
