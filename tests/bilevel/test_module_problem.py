import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from bilevel import BilevelError, ModuleProblem, Positive, Space, squared_norm
from bilevel.data import global_rng
from bilevel.run.initial_params import WithInitialParams

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 3


class Decayed(ModuleProblem):
    def inner_objective(self, hypers, params, prediction, batch):
        return (
            F.cross_entropy(prediction, batch[1])
            + 0.5 * (hypers["decay"] * squared_norm(params)).mean()
        )

    def outer_objective(self, hypers, params, prediction, batch):
        return F.cross_entropy(prediction, batch[1])


def problem(module, **options):
    return Decayed(module, Space(decay=Positive(init=0.1)), (X, Y), (X, Y), **options)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normed():
    return nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3)
    )


def run(p, params, carry, train=True, seed=0):
    drawn = generator(seed) if train else None
    return p.predict(
        {"decay": torch.tensor(0.1)}, params, carry, (X, Y), train=train, generator=drawn
    )


def test_a_module_gives_its_weights_and_is_never_changed():
    module = normed().eval()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    p = problem(module)
    params, carry = p.init(generator())
    assert all(torch.equal(t, before[name]) for name, t in {**params, **carry}.items())
    for t in (*params.values(), *carry.values()):
        t.add_(1)
    run(p, params, carry)
    again, _ = p.init(generator())
    assert not module.training
    assert all(torch.equal(t, before[name]) for name, t in {**module.state_dict(), **again}.items())


def test_what_happens_to_the_module_later_does_not_reach_the_problem():
    module = nn.Linear(4, 3)
    before = module.weight.detach().clone()
    p = problem(module)
    nn.init.zeros_(module.weight)
    assert torch.equal(p.init(generator())[0]["weight"], before)


def test_a_factory_draws_from_the_generator_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    p = problem(normed)
    first, again, other = (p.init(generator(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first["0.weight"], again["0.weight"])
    assert not torch.equal(first["0.weight"], other["0.weight"])
    torch.manual_seed(5)
    assert torch.equal(p.init(generator(1))[0]["0.weight"], first["0.weight"])


def test_training_statistics_are_returned_and_nothing_else_changes():
    p = problem(normed)
    params, carry = p.init(generator())
    before = {name: t.clone() for name, t in {**params, **carry}.items()}
    _, after = run(p, params, carry)
    assert all(torch.equal(t, before[name]) for name, t in {**params, **carry}.items())
    assert set(after) == set(carry)
    twin = nn.BatchNorm1d(5)
    twin(F.linear(X, params["0.weight"], params["0.bias"]))
    torch.testing.assert_close(after["1.running_mean"], twin.running_mean)
    torch.testing.assert_close(after["1.running_var"], twin.running_var)
    assert after["1.num_batches_tracked"] == 1


def test_evaluation_uses_the_carried_statistics_and_leaves_them():
    p = problem(normed)
    params, carry = p.init(generator())
    _, trained = run(p, params, carry)
    before = {name: t.clone() for name, t in trained.items()}
    prediction, after = run(p, params, trained, train=False)
    assert all(torch.equal(after[name], before[name]) for name in before)
    twin = normed().eval()
    twin.load_state_dict({**params, **trained})
    torch.testing.assert_close(prediction, twin(X))


def test_a_modules_own_dropout_follows_from_the_generator():
    p = problem(normed)
    params, carry = p.init(generator())
    state = torch.get_rng_state()
    drawn = generator(0)
    first, _ = p.predict({}, params, carry, (X, Y), train=True, generator=drawn)
    second, _ = p.predict({}, params, carry, (X, Y), train=True, generator=drawn)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, second)
    torch.manual_seed(99)
    assert torch.equal(run(p, params, carry)[0], first)


def test_the_hook_says_what_the_module_is_called_with():
    class Scaled(Decayed):
        def inputs(self, hypers, batch, *, train, generator):
            noise = torch.randn(batch[0].shape, generator=generator) if train else 0.0
            return (), {"input": batch[0] * hypers["decay"] + noise}

    p = Scaled(nn.Linear(4, 3), Space(decay=Positive(init=0.1)), (X, Y), (X, Y))
    params, carry = p.init(generator())
    torch.testing.assert_close(
        run(p, params, carry, train=False)[0], F.linear(0.1 * X, params["weight"], params["bias"])
    )
    assert not torch.equal(run(p, params, carry, seed=0)[0], run(p, params, carry, seed=1)[0])


def test_frozen_parameters_are_carried_and_not_trained():
    module = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    module[0].requires_grad_(False)
    params, carry = problem(module).init(generator())
    assert set(params) == {"1.weight", "1.bias"}
    assert set(carry) == {"0.weight", "0.bias"}


def test_tied_weights_are_one_weight():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.there, self.back, self.out = (
                nn.Linear(4, 4, bias=False),
                nn.Linear(4, 4, bias=False),
                nn.Linear(4, 3),
            )
            self.back.weight = self.there.weight

        def forward(self, x):
            return self.out(self.back(self.there(x)))

    p = problem(Tied)
    params, carry = p.init(generator())
    assert "back.weight" not in params
    params["there.weight"] = torch.eye(4) * 2
    torch.testing.assert_close(
        run(p, params, carry)[0], F.linear(4 * X, params["out.weight"], params["out.bias"])
    )


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.there, self.back, self.out = (
            nn.Linear(4, 4, bias=False),
            nn.Linear(4, 4, bias=False),
            nn.Linear(4, 3),
        )
        self.norm = nn.BatchNorm1d(4)
        self.back.weight = self.there.weight

    def forward(self, x):
        return self.out(self.norm(self.back(self.there(x))))


def test_a_state_dict_with_tied_weights_and_statistics_is_started_from():
    module = Tied()
    module(X)  # statistics that are not the initial ones
    state = module.state_dict()
    assert "back.weight" in state
    params, carry = WithInitialParams(problem(Tied), state).init(generator())
    assert torch.equal(params["there.weight"], module.there.weight)
    assert torch.equal(carry["norm.running_mean"], module.norm.running_mean)
    assert carry["norm.num_batches_tracked"] == 1
    only = {name: t for name, t in state.items() if name != "there.weight"}
    assert torch.equal(
        WithInitialParams(problem(Tied), only).init(generator())[0]["there.weight"],
        module.there.weight,
    )
    with pytest.raises(BilevelError, match=r"`back.weight` and `there.weight` are one tied weight"):
        WithInitialParams(problem(Tied), {**state, "back.weight": torch.zeros(4, 4)})


def test_lstm_runs_with_the_weights_it_is_given():
    class Last(nn.LSTM):
        def forward(self, x):
            return super().forward(x[:, None])[0][:, -1]

    p = problem(lambda: Last(4, 3, batch_first=True))
    params, carry = p.init(generator())
    first = run(p, params, carry)[0]
    assert not torch.allclose(run(p, {name: 2 * t for name, t in params.items()}, carry)[0], first)
    torch.testing.assert_close(run(p, params, carry)[0], first)


class Marked(torch.Tensor):
    """A tensor subclass that shows in what it touches."""


def test_weights_may_be_tensor_subclasses():
    p = problem(nn.Linear(4, 3))
    params, carry = p.init(generator())
    assert (
        type(run(p, {name: t.as_subclass(Marked) for name, t in params.items()}, carry)[0])
        is Marked
    )


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:FutureWarning"
)  # raised inside torch by its first dual
def test_weights_may_be_dual_numbers():
    p = problem(normed)
    params, carry = p.init(generator())
    params = {name: t.double() for name, t in params.items()}
    carry = {name: t.double() if t.is_floating_point() else t for name, t in carry.items()}
    direction = {
        name: torch.randn(t.shape, generator=generator(3), dtype=t.dtype)
        for name, t in params.items()
    }

    def at(step):
        moved = {name: t + step * direction[name] for name, t in params.items()}
        return p.predict({}, moved, carry, (X.double(), Y), train=True, generator=generator())[0]

    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(t, direction[name]) for name, t in params.items()}
        dual, _ = p.predict({}, duals, carry, (X.double(), Y), train=True, generator=generator())
        primal, tangent = forward_ad.unpack_dual(dual)
    torch.testing.assert_close(primal, at(0.0))
    torch.testing.assert_close(tangent, (at(1e-6) - at(-1e-6)) / 2e-6, rtol=1e-6, atol=1e-8)


def test_data_streams():
    data = problem(normed, batch_size=2, test=(X[:1], Y[:1])).data(torch.device("cpu"), generator())
    assert data.train.next()[0].shape == (2, 4)
    assert data.valid.steps_per_epoch == 3
    assert data.test.size == 1


@pytest.mark.parametrize(
    "module", [lambda: "no module", nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)]
)
def test_refused(module):
    with pytest.raises(BilevelError, match=r"must be an nn.Module|no trainable parameter"):
        problem(module)


def test_what_is_frozen_in_evaluation_mode_stays_in_it():
    module = normed()
    module[1].eval()
    p = problem(module)
    params, carry = p.init(generator())
    first, after = run(p, params, carry)
    run(p, params, carry, train=False)
    again, _ = run(p, params, carry)
    assert torch.equal(first, again)
    assert torch.equal(after["1.running_mean"], carry["1.running_mean"])
    assert not torch.equal(first, run(p, params, carry, seed=1)[0])  # dropout is in training mode


def test_a_module_in_evaluation_mode_is_trained_as_any_other():
    assert (
        run(problem(normed().eval()), *problem(normed()).init(generator()))[1][
            "1.num_batches_tracked"
        ]
        == 1
    )


def test_a_module_that_keeps_its_norm_frozen_itself_does_so_from_the_first_batch():
    class Frozen(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[1].eval()
            return self

    p = problem(lambda: Frozen(*normed()))
    params, carry = p.init(generator())
    assert run(p, params, carry)[1]["1.num_batches_tracked"] == 0
    run(p, params, carry, train=False)
    assert run(p, params, carry)[1]["1.num_batches_tracked"] == 0


def test_the_generator_of_the_device_in_use_is_seeded_and_no_other(monkeypatch):
    first, second = torch.Generator(), torch.Generator()
    monkeypatch.setattr(torch.cuda, "default_generators", (first, second))
    global_rng._seed_global(torch.device("cuda", 1), 5)
    assert second.initial_seed() == 5
    assert first.initial_seed() != 5


@pytest.mark.parametrize("own_train", [False, True])
def test_the_mode_reaches_every_submodule(own_train):
    """A module with a `train` of its own is told by it; the flags of others are set directly."""

    class Outer(nn.Sequential):
        told = None

        def train(self, mode=True):
            self.told = mode
            return super().train(mode)

    layers = (nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5)), nn.Linear(4, 2))
    p = problem(Outer(*layers) if own_train else nn.Sequential(*layers))
    params, carry = p.init(generator())
    other = copy.deepcopy(p)
    for train in (True, False, True, False):
        for each in (p, other):
            run(each, params, carry, train=train)
            assert [m.training for m in each._module.modules()] == [train] * 6
            assert not own_train or each._module.told is train
