"""The cost of a step of VGG16 and ResNet-18 with everything tuned, against plain training."""

import pytest
import torch

from bilevel.problems import Classification
from bilevel.problems.datasets.labelled_images import Images
from bilevel.problems.networks.registry import image_network
from bilevel.solvers import Fixed, SelfTuning, centered_stn, delta_stn, stn
from tests.support.flops import count
from tests.support.solver_cases import ready

CASES = {"vgg16": (None, 27), "resnet18": ("batch", 16), "resnet18 without norm": ("none", 16)}
SHARE = 5e-4
"""Of a unit: what augmentation multiplies."""


class Case:
    """A network with everything tuned.

    The networks have a quarter of their published width. A wider one has more weights for each
    product of ε with U and V, and comes closer to 8/3.
    One image: every product is over the batch.

    Attributes:
        unit: multiplications by all the weights for the batch.
        first: the first layer's share of it: the gradient with respect to the data is never needed.
        plain: a step of plain training.
    """

    def __init__(self, label):
        torch.manual_seed(0)
        norm, self.hypers = CASES[label]
        network = image_network(label.split()[0], (3, 32, 32), 10, norm=norm, width=0.25)
        split = torch.rand(1, 3, 32, 32), torch.zeros(1, dtype=torch.long)
        images = Images(split, split, split, mean=0.5, std=0.3)
        self.problem = Classification(
            network.make,
            images,
            sites=network.sites,
            augment=["affine", "colour", "cutout"],
            batch_size=1,
        )
        module = network.make()
        self.unit = count(lambda: module(split[0]))
        self.first = (
            count(lambda: (module.convolutions[0] if label == "vgg16" else module.stem)(split[0]))
            / self.unit
        )
        self.plain = count(self.ready(Fixed(inner_steps=1)).step) / self.unit

    def ready(self, solver):
        """Set up without the dry run, which costs more than the counted steps."""
        solver.check = lambda *_: None
        return ready(self.problem, solver)

    def steps(self, solver):
        """Return the units of a training step, an outer step and a product of ε with U and V."""
        solver = self.ready(solver)
        train, valid = solver.core.data.train.next(), solver.core.data.valid.next()
        inner = count(lambda: solver.method.inner_step(train)) / self.unit
        outer = count(lambda: solver.method.outer_step(valid)) / self.unit
        return inner, outer, 2 * 2 * solver.method.theta.tensors["rows"].numel() / self.unit


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return Case(request.param)


def between(low, value, high):
    assert low - 1e-9 <= value <= high + 1e-9


def test_plain_training_costs_three_with_everything_tuned(case):
    assert case.problem.space.numel == case.hypers
    between(3 - case.first, case.plain, 3 - case.first + SHARE)


def test_stn_costs_twice_plain_training_and_the_rows(case):
    inner, outer, rows = case.steps(stn())
    between(6 - 2 * case.first, inner, 6 - 2 * case.first + rows + SHARE)
    between(4 - 2 * case.first, outer, min(4, 4 - 2 * case.first + rows))
    assert inner / case.plain <= 2 + rows
    assert rows < 0.008


def test_centered_stn_costs_eight_thirds(case):
    inner, _, rows = case.steps(centered_stn())
    between(8 - 3 * case.first, inner, 8 - 3 * case.first + rows + 2 * SHARE)
    assert inner / case.plain <= 2.67


def test_delta_stn_costs_eight_thirds_and_its_outer_step_four(case):
    """Its rows count twice: for the prediction, and for the penalties on w."""
    inner, outer, rows = case.steps(delta_stn())
    between(8 - 3 * case.first, inner, 8 - 3 * case.first + 2 * rows + 2 * SHARE)
    between(4 - 2 * case.first, outer, min(4, 4 - 2 * case.first + rows))
    assert inner / case.plain <= 2.67


def test_a_linearization_by_double_backward_is_over_that_budget(case):
    """Training w₀ through the linearized prediction too exceeds the budget."""
    inner, _, _ = case.steps(SelfTuning(regularized_w0=False))
    assert inner / case.plain > 3
