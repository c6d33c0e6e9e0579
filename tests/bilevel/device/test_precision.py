"""Products in bfloat16, all else in float32: gradients stay near those of float32."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from bilevel import (
    BilevelError,
    ModuleProblem,
    Positive,
    Refused,
    Runner,
    Space,
    SpeedWarning,
    squared_norm,
)
from bilevel.device.precision import Autocast, at_precision, matmul_precision
from bilevel.problems import Quadratic, augmented_images, digits
from bilevel.problems.datasets import standard_images
from bilevel.problems.networks.dropout import concrete_dropout
from bilevel.solvers import SAMA, delta_stn, stn
from tests.support.solver_cases import at, ready
from tests.support.solver_list import BLACK_BOX, SOLVERS, suited

CPU = torch.device("cpu")
SUBTRACT = {"sama", "es", "es, truncated"}
ALIKE = {"fixed", "first_order", "unrolled, checkpointed"}
"""Solvers left out: without a hypergradient, without one through the network, or repeated."""
ROUNDING = 2.0**-8
"""The relative rounding of bfloat16."""

pytestmark = pytest.mark.filterwarnings("ignore::bilevel.SolverWarning")
differentiating = pytest.mark.parametrize(
    "name", [n for n in SOLVERS if n not in BLACK_BOX | SUBTRACT | ALIKE]
)


class Seen(nn.Module):
    """Two layers, or given ones, that record the type of the second one's input."""

    def __init__(self, *layers):
        super().__init__()
        self.first, self.last = nn.Sequential(*layers), nn.LazyLinear(3)
        self.types = set()

    def forward(self, x):
        x = self.first(x)
        self.types.add(x.dtype)
        return self.last(x)


class Penalized(ModuleProblem):
    def inner_objective(self, hypers, params, prediction, batch):
        assert prediction.dtype == torch.float32
        loss = nn.functional.cross_entropy(prediction, batch[1])
        return loss + 0.5 * (hypers["decay"] * squared_norm(params)).mean()

    def outer_objective(self, hypers, params, prediction, batch):
        assert prediction.dtype == torch.float32
        return nn.functional.cross_entropy(prediction, batch[1])


def penalized(shape, make_layers, per_example):
    """Return cross-entropy plus weight decay on random inputs, with equal layers at every call."""
    torch.manual_seed(0)
    network = Seen(*make_layers())
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(24, *shape, generator=draws)
    network(x)
    split = (x, torch.arange(24) % 3)
    space = Space(decay=Positive(init=0.1, per_example=per_example))
    return Penalized(network, space, train=split, valid=split)


SHAPES = {"linear": (4,), "batch norm": (2, 6, 6), "group norm": (2, 6, 6), "layer norm": (4,)}
LAYERS = {
    "linear": lambda: [nn.Linear(4, 16), nn.Tanh()],
    "batch norm": lambda: [nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten()],
    "group norm": lambda: [nn.Conv2d(2, 8, 3), nn.GroupNorm(2, 8), nn.Tanh(), nn.Flatten()],
    "layer norm": lambda: [nn.Linear(4, 16), nn.LayerNorm(16), nn.Tanh()],
}
NETWORKS = {name: partial(penalized, SHAPES[name], LAYERS[name]) for name in LAYERS}


def hypergradients(make_problem, make, rounds=4):
    """Return the hypergradients in float32 and bfloat16 at one state, batch and draw."""
    first = ready(make_problem(), make())
    for _ in range(rounds):
        first.step()
    state = copy.deepcopy(
        (first.state_dict(), at(first).data.train.state_dict(), at(first).data.valid.state_dict())
    )
    gradients = []
    for wrap in (lambda problem: problem, Autocast):
        solver = ready(wrap(make_problem()), make())
        for part, held in zip(
            (solver, at(solver).data.train, at(solver).data.valid),
            copy.deepcopy(state),
            strict=True,
        ):
            part.load_state_dict(held)
        gradients.append(solver.hypergradient(at(solver).data.valid.peek()))
    return gradients


def assert_near(exact, narrow, within=20.0):
    """A few roundings apart, and more than none."""
    error = float((exact - narrow).norm() / exact.norm())
    assert narrow.dtype == torch.float32
    assert 0.001 * ROUNDING < error < within * ROUNDING, error


@differentiating
def test_hypergradients_are_near_those_of_float32(name):
    exact, narrow = hypergradients(
        lambda: suited(name, digits(hidden=[32, 32], dropout="gaussian")), SOLVERS[name], rounds=12
    )
    assert_near(exact, narrow, within=32)
    assert float(torch.cosine_similarity(exact, narrow, dim=0)) > 0.99


@pytest.mark.parametrize("name", ["delta_stn", "unrolled_forward", "implicit_cg"])
@pytest.mark.parametrize("network", NETWORKS)
def test_norms_differentiate_as_well(network, name):
    """Norms are fused in the self-tuning passes, and decomposed for second derivatives.

    They are per example where the solver allows it.
    """
    assert_near(
        *hypergradients(partial(NETWORKS[network], per_example=name.endswith("stn")), SOLVERS[name])
    )


@pytest.mark.parametrize("name", ["delta_stn", "stn", "fixed", "unrolled_forward"])
@pytest.mark.parametrize("network", ["linear", "batch norm"])
def test_products_are_narrow_and_all_that_is_kept_is_float32(network, name):
    problem = NETWORKS[network](per_example=True)
    solver = ready(Autocast(problem), SOLVERS[name]())
    problem._module.types.clear()
    metrics = solver.step()
    assert problem._module.types == {torch.bfloat16}
    kept = [
        *tree_leaves(solver.state_dict()),
        *tree_leaves(tuple(solver.solution())),
        *metrics.values(),
    ]
    types = {
        leaf.dtype for leaf in kept if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    }
    assert types == {torch.float32}


def test_batch_norm_statistics_are_near_those_of_float32():
    carries = []
    for wrap in (lambda problem: problem, Autocast):
        solver = ready(wrap(NETWORKS["batch norm"](per_example=True)), delta_stn())
        solver.step()
        carries.append(
            torch.cat([t.flatten() for t in solver.core.carry.values() if t.is_floating_point()])
        )
    assert_near(*carries, within=5)


def test_augmentation_stays_in_float32():
    problem = augmented_images(
        standard_images.load_digits(), channels=[4, 8], hidden=16, train_size=48, batch_size=24
    )
    augmented, seen = problem._augment, []

    def noted(*args):
        seen.append(augmented(*args))
        return seen[-1]

    problem._augment = noted
    ready(Autocast(problem), delta_stn()).step()
    narrowed = [(x - x.bfloat16().float()).abs().max() for x in seen]
    assert {x.dtype for x in seen} == {torch.float32}
    assert min(narrowed) > 1e-3  # its values are none of bfloat16's


def test_concrete_masks_are_those_of_float32():
    """The noise is drawn in float32: bfloat16 would leave it 256 values."""
    rate, x = torch.full((64,), 0.3), torch.ones(64, 100)
    wide, narrow = (
        concrete_dropout(x.to(kind), rate, torch.Generator().manual_seed(1))
        for kind in (torch.float32, torch.bfloat16)
    )
    torch.testing.assert_close(narrow.float(), wide, rtol=ROUNDING, atol=ROUNDING)


def test_a_difference_that_would_drown_is_refused():
    for make in (SOLVERS[name] for name in sorted(SUBTRACT)):
        with pytest.raises(Refused, match="difference of nearly equal numbers"):
            at_precision(digits(hidden=[8]), make(), "bf16", CPU)
    assert isinstance(
        at_precision(digits(hidden=[8]), SAMA(finite_difference=False), "bf16", CPU), Autocast
    )


def test_and_it_would():
    """The reason for the refusal: SAMA's hypergradient in bfloat16 is far off."""
    exact, narrow = hypergradients(
        lambda: digits(hidden=[32, 32], dropout="gaussian"), SOLVERS["sama"]
    )
    assert float((exact - narrow).norm() / exact.norm()) > 50 * ROUNDING
    exact, narrow = hypergradients(
        lambda: digits(hidden=[32, 32], dropout="gaussian"), partial(SAMA, finite_difference=False)
    )
    assert_near(exact, narrow)


def test_float64_is_refused(tmp_path):
    runner = Runner(epochs=1, precision="bf16", progress="none", picture=False, device="cpu")
    with pytest.raises(BilevelError, match="leaves `w` in float64"):
        runner.run(Quadratic.random(dtype=torch.float64), stn(), directory=tmp_path)


def test_an_unknown_precision_is_refused():
    with pytest.raises(BilevelError, match=r"did you mean `bf16`\?\); choose fp32, tf32 or bf16"):
        Runner(epochs=1, precision="b16")


def test_tf32_says_where_it_means_nothing(tmp_path):
    runner = Runner(
        epochs=1, warmup_epochs=0, precision="tf32", progress="none", picture=False, device="cpu"
    )
    with pytest.warns(SpeedWarning, match="tf32 has no effect on cpu"):
        runner.run(digits(hidden=[8], batch_size=256), stn(), directory=tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_pytorchs_own_settings_come_back(precision):
    flags = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]

    def fail():
        assert [flag.allow_tf32 for flag in flags] == [precision == "tf32"] * 2
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"), matmul_precision(precision):
        fail()
    assert [flag.allow_tf32 for flag in flags] == before


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="PyTorch has them since 2.9"
)
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_someone_may_have_set_the_newer_switches(precision):
    """PyTorch then refuses to read the older ones."""
    matrices, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matrices.fp32_precision
    matrices.fp32_precision = "tf32"
    try:
        with pytest.raises(RuntimeError, match="mix of the legacy and new"):
            _ = matrices.allow_tf32
        with matmul_precision(precision):
            wanted = "tf32" if precision == "tf32" else "ieee"
            assert [place.fp32_precision for place in (matrices, cudnn.conv, cudnn.rnn)] == [
                wanted
            ] * 3
        assert matrices.fp32_precision == "tf32"
    finally:
        matrices.fp32_precision = before


def test_a_run_in_bfloat16_is_near_that_in_float32(tmp_path):
    losses = []
    for precision in ("fp32", "bf16"):
        runner = Runner(
            epochs=4,
            warmup_epochs=0,
            precision=precision,
            progress="none",
            picture=False,
            device="cpu",
        )
        summary = runner.run(
            digits(hidden=[8], batch_size=256), delta_stn(), directory=tmp_path / precision
        )
        losses.append(summary["last"]["valid_loss"])
    assert 0 < abs(losses[0] - losses[1]) < 0.05 * losses[0]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_on_cuda_each_precision_rounds_as_it_says(precision):
    """A product of matrices and a convolution against float64."""
    device = torch.device("cuda")
    a = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).to(device)
    image, kernel = a.view(1, 64, 64, 64), a[:64, :576].reshape(64, 64, 3, 3)
    bound = {"fp32": (0.0, 1e-5), "tf32": (1e-5, 2e-3), "bf16": (2e-3, 2e-2)}[precision]
    narrow = torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16")
    for product in (lambda x, y: x @ y, nn.functional.conv2d):
        x, y = (a, a) if product is not nn.functional.conv2d else (image, kernel)
        with matmul_precision(precision), narrow:
            rounded = product(x, y).double()
        exact = product(x.double(), y.double())
        error = float((rounded - exact).norm() / exact.norm())
        assert bound[0] <= error < bound[1]
