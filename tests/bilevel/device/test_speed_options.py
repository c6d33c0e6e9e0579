"""Fused optimizers and channels-last images: the same training up to rounding, exact resumption."""

import copy
from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_leaves

from bilevel import Refused
from bilevel.problems import Classification, digits
from bilevel.problems.datasets.labelled_images import Images
from bilevel.problems.networks.simple_cnn import SimpleCNN
from bilevel.solvers import Fixed, Unrolled, delta_stn, stn
from tests.support.solver_cases import groups, ready

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01),
}


def flat(solver):
    return torch.cat(
        [leaf.detach().reshape(-1) for group in groups(solver).values() for leaf in group.leaves]
    )


def trained(optimizer, make=delta_stn, rounds=3):
    solver = ready(digits(hidden=[16]), make(inner_optimizer=optimizer, clip_norm=1.0))
    before = flat(solver)
    for _ in range(rounds):
        solver.step()
    return solver, flat(solver) - before


@pytest.mark.parametrize("form", ["fused", "foreach"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_other_forms_of_an_optimizer_take_the_same_steps(name, form):
    _, plain = trained(OPTIMIZERS[name])
    _, moved = trained(partial(OPTIMIZERS[name], **{form: True}))
    assert float((plain - moved).norm() / plain.norm()) < 1e-4
    assert float(plain.norm()) > 0.01


@pytest.mark.parametrize("form", ["fused", "foreach"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("make", [delta_stn, Fixed])
def test_and_are_resumed_bit_for_bit(name, form, make):
    optimizer = partial(OPTIMIZERS[name], **{form: True})
    first, _ = trained(optimizer, make)
    second = ready(digits(hidden=[16]), make(inner_optimizer=optimizer, clip_norm=1.0), seed=2)
    parts = [
        copy.deepcopy(part.state_dict())
        for part in (first, first.core.data.train, first.core.data.valid)
    ]
    for part, state in zip(
        (second, second.core.data.train, second.core.data.valid), parts, strict=True
    ):
        part.load_state_dict(state)
    for _ in range(2):
        first.step()
        second.step()
    ours, theirs = tree_leaves(first.state_dict()), tree_leaves(second.state_dict())
    assert all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(ours, theirs, strict=True)
    )


def test_an_optimizer_without_a_fused_form_is_named():
    with pytest.raises(Exception, match=r"the optimizer or its schedule cannot be made: .*fused"):
        ready(
            digits(hidden=[8]),
            delta_stn(inner_optimizer=partial(torch.optim.RMSprop, lr=0.1, fused=True)),
        )


def test_what_differentiates_through_the_optimizer_refuses_a_fused_one():
    with pytest.raises(Refused, match="fused=true of SGD has no differentiable form"):
        ready(
            digits(hidden=[8], dropout="gaussian"),
            Unrolled(inner_optimizer=partial(torch.optim.SGD, lr=0.1, fused=True)),
        )


# --- channels side by side ---


def colour(channels_last):
    pixels = torch.randint(
        256, (48, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    split = (pixels, torch.arange(48) % 10)
    network = partial(SimpleCNN, 4, 8, 16, (3, 8, 8))
    return Classification(
        network,
        Images(split, split, split, 127.0, 64.0),
        sites=4,
        augment=["affine"],
        channels_last=channels_last,
        batch_size=24,
    )


def inputs_seen(problem):
    seen = []
    problem._module.convolutions[0].register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    return seen


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_network_sees_the_layout_in_every_pass(channels_last):
    problem = colour(channels_last)
    solver = ready(problem, stn())
    seen = inputs_seen(problem)
    solver.step()
    solver.core.problem.predict(
        *solver.solution(), solver.core.data.valid.peek(), train=False, generator=None
    )
    assert len(seen) == 7  # five training batches, one of validation, one of evaluation
    assert all(x.is_contiguous(memory_format=torch.channels_last) == channels_last for x in seen)


@pytest.mark.parametrize("make", [Fixed, stn, delta_stn])
def test_the_layout_changes_rounding_alone(make):
    ends = []
    for channels_last in (False, True):
        solver = ready(colour(channels_last), make())
        before = flat(solver)
        for _ in range(3):
            solver.step()
        ends.append(flat(solver) - before)
    assert float((ends[0] - ends[1]).norm() / ends[0].norm()) < 1e-3
    assert float(ends[0].norm()) > 0.01
