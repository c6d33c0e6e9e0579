import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian
from torch.utils._pytree import tree_leaves

from bilevel import BilevelError, problems
from bilevel.cli import targets
from bilevel.problems import MLP, Classification, ElasticNet, Quadratic, Ridge
from bilevel.problems.closed_form import linear_data
from bilevel.problems.closed_form.input_dropout import InputDropout
from bilevel.problems.closed_form.linear_network import LinearNetwork
from bilevel.problems.datasets import standard_images
from bilevel.problems.datasets.labelled_images import Images
from bilevel.problems.networks.dropout import dropout

CPU = torch.device("cpu")
F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


CLOSED = {
    "quadratic": lambda: Quadratic.random(6, 3, condition=30.0, seed=1, dtype=F64),
    "quadratic with a direct term": lambda: Quadratic.random(6, 3, seed=2, direct=0.7, dtype=F64),
    "ridge": lambda: Ridge.synthetic(40, 5, condition=20.0, dtype=F64),
    "ridge, a decay per feature": lambda: Ridge.synthetic(40, 5, per_feature=True, dtype=F64),
    "ridge on diabetes": lambda: Ridge.diabetes(dtype=F64),
    "ridge on wine": lambda: Ridge.wine(dtype=F64),
    "ridge on linnerud": lambda: Ridge.linnerud(dtype=F64),
    "linear network": lambda: LinearNetwork.synthetic(40, 5, condition=20.0, dtype=F64, hidden=[4]),
    "deep linear network on wine": lambda: LinearNetwork.wine(dtype=F64, hidden=[3, 2]),
    "expected dropout": lambda: InputDropout.synthetic(
        40, 5, condition=20.0, dtype=F64, expected=True
    ),
    "expected dropout on wine, a rate per feature": lambda: InputDropout.wine(
        dtype=F64, expected=True, per_feature=True
    ),
    "elastic net": lambda: ElasticNet.synthetic(60, 10, 100.0, active=5, dtype=F64),
    "elastic net on diabetes": lambda: ElasticNet.diabetes(4, dtype=F64),
}


@pytest.fixture(params=CLOSED)
def closed(request):
    return CLOSED[request.param]()


@pytest.fixture
def u(closed):
    return torch.randn(closed.space.numel, generator=generator(5), dtype=F64)


def losses(problem):
    """Return L_T and L_V as functions of u and of w, by name."""
    data = problem.data(CPU, generator())

    def inner(u, params):
        return problem.inner_loss(problem.space.constrain(u), params, {}, data.train.peek(), None)[
            0
        ]

    def outer(u, params):
        return problem.outer_loss(problem.space.constrain(u), params, {}, data.valid.peek())[0]

    return inner, outer


def unflattened(params, flat):
    parts = flat.split([p.numel() for p in params.values()])
    return {
        name: part.reshape(p.shape) for (name, p), part in zip(params.items(), parts, strict=True)
    }


def jacobian_of(problem, u):
    at = () if isinstance(problem, Quadratic) else (problem.space.constrain(u),)
    return problem.best_response_jacobian(*at)


def test_best_response_minimizes_the_inner_loss(closed, u):
    inner, _ = losses(closed)
    params = closed.best_response(closed.space.constrain(u))
    assert {name: p.shape for name, p in closed.init(generator())[0].items()} == {
        name: p.shape for name, p in params.items()
    }
    w, unflat = torch.nn.utils.parameters_to_vector(params.values()), partial(unflattened, params)
    assert jacobian(lambda w: inner(u, unflat(w)), w).abs().max() < 1e-12
    eigenvalues = torch.linalg.eigvalsh(hessian(lambda w: inner(u, unflat(w)), w))
    assert eigenvalues.min() > (
        -1e-12 if isinstance(closed, LinearNetwork) else 0
    )  # of a network's minimizers there are many


def test_jacobian_of_the_best_response_by_differences(closed, u):
    def w(u):
        params = closed.best_response(closed.space.constrain(u))
        return params["w"] if isinstance(closed, Quadratic) else closed.linear_map(params)

    J, step = jacobian_of(closed, u), 1e-5
    columns = [
        (w(u + step * e) - w(u - step * e)) / (2 * step) for e in torch.eye(len(u), dtype=F64)
    ]
    torch.testing.assert_close(J, torch.stack(columns, 1), rtol=1e-6, atol=1e-8)


def test_hypergradient_by_autograd_through_the_best_response(closed, u):
    _, outer = losses(closed)
    total = jacobian(lambda u: outer(u, closed.best_response(closed.space.constrain(u))), u)
    torch.testing.assert_close(
        closed.hypergradient(closed.space.constrain(u)), total, rtol=1e-9, atol=1e-12
    )


def test_optimum_has_no_hypergradient_and_is_a_minimum(closed):
    if getattr(closed, "per_feature", False):
        with pytest.raises(BilevelError, match="there is no λ"):
            closed.optimum()
        return
    _, outer = losses(closed)
    best = closed.space.unconstrain(closed.optimum())
    assert closed.hypergradient(closed.optimum()).abs().max() < 1e-10
    curvature = hessian(lambda u: outer(u, closed.best_response(closed.space.constrain(u))), best)
    assert torch.linalg.eigvalsh(curvature).min() > 0


def test_direct_term_moves_the_optimum():
    indirect, direct = (
        Quadratic.random(6, 3, seed=2, direct=p, dtype=F64).optimum()["hyper"] for p in (0.0, 0.7)
    )
    assert (indirect - direct).abs().max() > 0.01


def test_decays_per_feature_are_recovered():
    X, y = (
        torch.randn(30, 4, generator=generator(0), dtype=F64),
        torch.randn(30, generator=generator(1), dtype=F64),
    )
    wanted = torch.tensor([-1.0, -2.0, 0.5, -0.5], dtype=F64)
    response = Ridge((X, y), (X, y), per_feature=True).best_response({"log_decay": wanted})[
        "weight"
    ][0]
    X_valid = torch.randn(50, 4, generator=generator(2), dtype=F64)
    problem = Ridge((X, y), (X_valid, X_valid @ response), per_feature=True)
    torch.testing.assert_close(problem.optimum()["log_decay"], wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("condition", [1.0, 100.0])
def test_conditioning_is_what_was_asked_for(condition):
    for curvature in (
        Quadratic.random(6, 2, condition, dtype=F64).A,
        Ridge.synthetic(40, 6, condition, dtype=F64).gram,
    ):
        assert torch.linalg.cond(curvature).item() == pytest.approx(condition)


def test_seeds_and_dtypes():
    assert torch.equal(Quadratic.random(seed=3).A, Quadratic.random(seed=3).A)
    assert not torch.equal(Quadratic.random(seed=3).A, Quadratic.random(seed=4).A)
    assert Quadratic.random().init(generator())[0]["w"].dtype == torch.float32
    assert Ridge.synthetic(dtype=F64).init(generator())[0]["weight"].dtype == F64
    for problem in (
        Quadratic.random(dtype="float64"),
        Ridge.synthetic(dtype="float64"),
        ElasticNet.diabetes(dtype="float64"),
    ):
        (weight,) = problem.init(generator())[0].values()
        assert weight.dtype == F64
        assert all(t.dtype == F64 for t in tree_leaves(problem.data(CPU, generator()).train.peek()))
    with pytest.raises(
        BilevelError,
        match=r"dtype='float46' is unknown \(did you mean `float64` or `float32`\?\)",
    ):
        Quadratic.random(dtype="float46")
    with pytest.raises(
        BilevelError, match=r"dtype=torch\.int64 is unknown.*; choose float32 or float64"
    ):
        Ridge.synthetic(dtype=torch.int64)


def test_ridge_batches_and_leaves_per_example():
    problem = Ridge.synthetic(40, 5, batch_size=8, dtype=F64)
    batch = problem.data(CPU, generator()).train.next()
    params, carry = problem.init(generator())
    decays = torch.randn(8, generator=generator(1), dtype=F64)
    each = [
        problem.inner_loss({"log_decay": decay}, params, carry, batch, None)[0] for decay in decays
    ]
    together, _ = problem.inner_loss({"log_decay": decays}, params, carry, batch, None)
    torch.testing.assert_close(together, torch.stack(each).mean())


def test_ridge_with_fewer_examples_than_features():
    with pytest.raises(BilevelError, match="choose at least 10"):
        Ridge.synthetic(examples=5, features=10)


@pytest.mark.parametrize(("weights", "hypers"), [(1, 1), (5, 1), (2, 4), (1, 3)])
def test_quadratics_of_any_dimensions(weights, hypers):
    """With more hyperparameters than weights there are many λ*; each is as good as w̄."""
    problem = Quadratic.random(weights, hypers, seed=4, dtype=F64)
    best = problem.optimum()
    assert problem.hypergradient(best).abs().max() < 1e-11
    if hypers >= weights:
        torch.testing.assert_close(problem.best_response(best)["w"], problem.w_bar)
        assert problem.best_loss(best) < 1e-20
    data = problem.data(CPU, generator())
    for λ in torch.randn(5, hypers, generator=generator(1), dtype=F64):
        w = problem.best_response({"hyper": λ})
        expected = problem.outer_loss({"hyper": λ}, w, {}, data.valid.peek())[0]
        torch.testing.assert_close(problem.best_loss({"hyper": λ}), expected)


def test_features_without_effect():
    (X, y), *_ = linear_data.synthetic(40, 6, noise=0.0, active=2, dtype=F64)
    assert torch.linalg.lstsq(X, y[:, None]).solution[2:].abs().max() < 1e-12
    dense = linear_data.synthetic(40, 6, noise=0.0, dtype=F64).train
    assert torch.equal(dense[0], X)
    assert torch.linalg.lstsq(X, dense[1][:, None]).solution[2:].abs().min() > 0.01
    with pytest.raises(BilevelError, match="active=7 must be between 0 and 6"):
        linear_data.synthetic(40, 6, active=7)


def test_mlp_sites_stand_before_every_layer():
    seen = []

    def drop(site, x):
        seen.append((site, tuple(x.shape), bool((x >= 0).all())))
        return x

    x = -torch.ones(2, 1, 2, 2)
    network = MLP([4, 5, 6, 3])
    assert torch.equal(network(x, drop), network(x))
    assert seen == [(0, (2, 4), False), (1, (2, 5), True), (2, (2, 6), True)]
    assert [tuple(layer.weight.shape) for layer in network.layers] == [(5, 4), (6, 5), (3, 6)]


def test_dropout_keeps_the_mean_at_each_examples_own_rate():
    rate = torch.tensor([0.0, 0.3, 0.9])
    dropped = dropout(torch.ones(3, 50, 400), rate, generator())
    torch.testing.assert_close((dropped == 0).float().mean((1, 2)), rate, atol=0.01, rtol=0)
    torch.testing.assert_close(dropped.mean((1, 2)), torch.ones(3), atol=0.06, rtol=0)
    assert torch.equal(dropped[0], torch.ones(50, 400))
    shared = dropout(torch.ones(3, 50, 400), torch.tensor(0.3), generator())
    assert abs((shared == 0).float().mean() - 0.3) < 0.01


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:FutureWarning"
)  # raised inside torch by its first dual
def test_dropout_has_one_mask_for_value_and_tangent_and_no_derivative_in_its_rate():
    x, rate = torch.ones(4, 100), torch.full((4,), 0.5, requires_grad=True)
    assert not dropout(x, rate, generator()).requires_grad
    with forward_ad.dual_level():
        primal, tangent = forward_ad.unpack_dual(
            dropout(forward_ad.make_dual(x, 3 * x), rate, generator())
        )
    assert torch.equal(tangent, 3 * primal)


def test_digits_are_split_without_overlap_and_normalized():
    images = standard_images.load_digits()
    assert [len(labels) for _, labels in (images.train, images.valid, images.test)] == [
        1078,
        359,
        360,
    ]
    assert (
        sum(int(x.long().sum()) for x, _ in (images.train, images.valid, images.test)) == 561718
    )  # every image once
    assert all(
        labels.bincount().min() > 20 for _, labels in (images.train, images.valid, images.test)
    )
    x = (images.train[0] - images.mean) / images.std
    assert abs(x.mean()) < 1e-5
    assert abs(x.std() - 1) < 1e-5
    assert not torch.equal(standard_images.load_digits(1).train[1], images.train[1])


@pytest.fixture
def images():
    def split(n, seed):
        x = torch.randint(0, 256, (n, 1, 3, 3), generator=generator(seed), dtype=torch.uint8)
        return x, torch.arange(n) % 4

    return Images(split(12, 0), split(8, 1), split(8, 2), mean=100.0, std=50.0)


@pytest.fixture
def classification(images):
    return Classification(lambda: MLP([9, 8, 8, 4]), images, sites=3, batch_size=4)


def test_classification_space(classification, images):
    space = classification.space
    assert list(space) == ["input_dropout", "dropout1", "dropout2", "weight_decay"]
    assert [space[name].differentiable for name in space] == [False, False, False, True]
    assert (space["dropout1"].low, space["dropout1"].high, space["dropout1"].init) == (
        0,
        0.95,
        0.05,
    )
    changed = Classification(
        lambda: MLP([9, 4]),
        images,
        sites=1,
        weight_decay=False,
        space={"input_dropout": {"init": 0.3}},
    )
    assert {name: domain.init for name, domain in changed.space.items()} == {"input_dropout": 0.3}
    with pytest.raises(BilevelError, match="did you mean `dropout2`"):
        Classification(
            lambda: MLP([9, 8, 8, 4]), images, sites=3, space={"dropout3": {"init": 0.3}}
        )


def test_classification_losses(classification):
    params, carry = classification.init(generator())
    batch = classification.data(CPU, generator()).train.next()
    hypers = {
        **dict.fromkeys(["input_dropout", "dropout1", "dropout2"], torch.tensor(0.0)),
        "weight_decay": torch.tensor(0.1),
    }
    x = (batch[0].flatten(1).float() - 100) / 50
    for layer in range(3):
        x = F.linear(
            F.relu(x) if layer else x,
            params[f"layers.{layer}.weight"],
            params[f"layers.{layer}.bias"],
        )
    entropy = F.cross_entropy(x, batch[1])
    norm = sum(float(p.square().sum()) for p in params.values())
    torch.testing.assert_close(
        classification.inner_loss(hypers, params, carry, batch, generator())[0],
        entropy + 0.05 * norm,
    )
    torch.testing.assert_close(classification.outer_loss(hypers, params, carry, batch)[0], entropy)
    each = {**hypers, "weight_decay": torch.tensor([0.0, 0.1, 0.1, 0.2])}
    torch.testing.assert_close(
        classification.inner_loss(each, params, carry, batch, generator())[0], entropy + 0.05 * norm
    )
    metrics = classification.metrics(hypers, params, x, batch)
    torch.testing.assert_close(metrics["loss"].mean(), entropy)
    assert torch.equal(metrics["accuracy"], (x.argmax(1) == batch[1]).float())


@pytest.mark.parametrize("name", ["input_dropout", "dropout1", "dropout2"])
def test_every_dropout_rate_acts_in_training_alone(classification, name):
    params, carry = classification.init(generator())
    batch = classification.data(CPU, generator()).train.next()
    off = dict.fromkeys(["input_dropout", "dropout1", "dropout2"], torch.tensor(0.0))
    on = {**off, name: torch.tensor([0.0, 0.9, 0.9, 0.9])}
    clean, _ = classification.predict(off, params, carry, batch, train=True, generator=generator())
    dropped, _ = classification.predict(on, params, carry, batch, train=True, generator=generator())
    assert torch.equal(clean[0], dropped[0])
    assert not torch.allclose(clean[1:], dropped[1:])
    assert torch.equal(
        classification.predict(on, params, carry, batch, train=False, generator=None)[0], clean
    )


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_every_parameter_receives_a_gradient(name, mnist_root):
    problem = problems.digits() if name == "digits" else problems.mnist(mnist_root, download=False)
    params, carry = problem.init(generator())
    leaves = {key: p.requires_grad_() for key, p in params.items()}
    batch = problem.data(CPU, generator()).train.next()
    prediction, _ = problem.predict(
        problem.space.constrain(problem.space.init()),
        leaves,
        carry,
        batch,
        train=True,
        generator=generator(),
    )
    assert prediction.shape == (problem.batch_size, 10)
    gradients = torch.autograd.grad(
        problem.inner_objective({}, params, prediction, batch), list(leaves.values())
    )
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.fixture
def mnist_root(request):
    root = Path(
        os.environ.get("BILEVEL_TEST_DATA", Path(__file__).parents[2] / ".." / "shared" / "data")
    )
    if not (root / "MNIST" / "raw").is_dir() and "digits" not in request.node.name:
        pytest.skip("no MNIST: set BILEVEL_TEST_DATA to a folder that holds MNIST/raw")
    return str(root)


def test_mnist_is_the_papers(mnist_root):
    problem = problems.mnist(mnist_root, download=False)
    data = problem.data(CPU, generator())
    assert (data.train.size, data.valid.size, data.test.size) == (51_000, 9_000, 10_000)
    assert list(problem.space) == ["input_dropout", "dropout1", "dropout2"]
    params, _ = problem.init(generator())
    assert [tuple(params[f"layers.{i}.weight"].shape) for i in range(3)] == [
        (1200, 784),
        (1200, 1200),
        (10, 1200),
    ]
    whole = torch.cat([data.train.tensors[0], data.valid.tensors[0]])
    (x,), _ = problem.inputs({}, (whole[::50], None), train=False, generator=None)
    assert abs(x.mean()) < 0.05
    assert abs(x.std() - 1) < 0.05


def test_a_part_of_mnist_is_its_first_images(mnist_root):
    whole, part = (
        problems.mnist(mnist_root, download=False, **sizes)
        for sizes in ({}, {"train_size": 300, "valid_size": 200})
    )
    few, all_ = part.data(CPU, generator()), whole.data(CPU, generator())
    assert (few.train.size, few.valid.size, few.test.size) == (300, 200, 10_000)
    assert torch.equal(few.train.tensors[0], all_.train.tensors[0][:300])
    with pytest.raises(BilevelError, match="train_size=60000 must be between 1 and 51000"):
        problems.mnist(mnist_root, download=False, train_size=60_000)


def test_missing_mnist_is_one_sentence_that_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(BilevelError, match=r"download is off; set data\.root=PATH"):
        standard_images.load_mnist(str(tmp_path), download=False)
    torchvision = pytest.importorskip("torchvision")

    def unreachable(self):
        raise RuntimeError("Error downloading train-images:\nTried mirrors")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", unreachable)
    with pytest.raises(
        BilevelError, match=r"could not be downloaded \(Error downloading.*Tried mirrors\)"
    ) as caught:
        standard_images.load_mnist(str(tmp_path), download=True)
    assert "\n" not in str(caught.value)


def test_problems_are_imported_without_heavy_libraries():
    heavy = ["sklearn", "torchvision", "matplotlib", "hydra", "wandb", "rich"]
    code = (
        "import sys, bilevel.problems.closed_form.quadratic; "
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_a_split_without_images_is_one_sentence(tmp_path, fraction):
    with pytest.raises(BilevelError, match=f"valid_fraction={fraction} must be between 0 and 1"):
        standard_images.load_mnist(str(tmp_path), download=False, valid_fraction=fraction)


@pytest.mark.parametrize(
    ("make", "space", "sentence"),
    [
        (
            problems.digits,
            {"dropout1": {"high": 2.0}},
            "space.dropout1 goes from 0 to 2 and must stay between 0 and 1; set",
        ),
        (
            problems.LossWeights.digits,
            {"smoothing": {"low": -1.0}},
            "space.smoothing goes from -1 to 0.9 and must stay",
        ),
        (
            problems.HyperCleaning.digits,
            {"example_weight": {"high": 2.0}},
            "space.example_weight goes from 0 to 2 and must",
        ),
        (
            problems.HyperCleaning.digits,
            {"example_weight": {"per_example": True}},
            "is a vector over all examples",
        ),
        (
            problems.distillation,
            {"images": {"per_example": True}},
            "`images` holds the training data",
        ),
    ],
)
def test_a_change_of_the_space_that_means_nothing_is_refused(make, space, sentence):
    with pytest.raises(BilevelError, match=sentence):
        make(space=space)


@pytest.mark.parametrize(
    ("node", "sentence"),
    [
        ({"hiden": [8]}, r"problem\.hiden is not a setting .*\(did you mean `hidden`"),
        ({"drpout": "gaussian"}, r"problem\.drpout is not a setting .*\(did you mean `dropout`"),
        (
            {"sites": 3},
            r"problem\.sites is not a setting of its target; choose",
        ),  # the recipe sets it
        ({"weight_decay": 3}, r"problem\.weight_decay=3"),
    ],
)
def test_a_recipe_names_the_settings_of_its_class(node, sentence):
    with pytest.raises(BilevelError, match=sentence):
        targets.build({"_target_": "bilevel.problems.digits", **node}, "problem")
