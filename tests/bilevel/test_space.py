import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel import BilevelError, Integer, Interval, Positive, Real, Simplex, Space

reals = st.floats(-30, 30)
law = settings(deadline=None, derandomize=True)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


@law
@given(reals)
def test_real_round_trip(u):
    domain = Real(init=0.0)
    assert domain.unconstrain(domain.constrain(f64(u), None)).item() == u


def test_the_initial_value_comes_first_where_it_cannot_be_mistaken():
    assert Real(0.0) == Real(init=0.0)
    assert Positive(0.1, low=0.01) == Positive(init=0.1, low=0.01)
    assert Simplex([0.5, 0.5], shape=(2,)) == Simplex(init=[0.5, 0.5], shape=(2,))
    for domain in (Interval, Integer):
        with pytest.raises(TypeError, match="positional"):
            domain(0.5, low=0.0, high=1.0)
    with pytest.raises(TypeError, match="positional"):
        Positive(0.1, 2.0)


@law
@given(reals, st.floats(-5, 5))
def test_positive_round_trip(u, low):
    domain = Positive(init=low + 1, low=low)
    value = domain.constrain(f64(u), None)
    assert value.item() >= low
    # λ − low is known to about 1e-15, so that u is known to 1e-15 / (λ − low)
    if u > -20:
        assert domain.unconstrain(value).item() == pytest.approx(
            u, abs=1e-14 / math.exp(min(u, 0)) + 1e-12
        )


@law
@given(st.floats(-40, 700))
def test_positive_round_trip_at_zero_neither_overflows_nor_loses_small_values(u):
    domain = Positive(init=1.0)
    assert domain.unconstrain(domain.constrain(f64(u), None)).item() == pytest.approx(
        u, rel=1e-12, abs=1e-12
    )


@law
@given(st.floats(-10, 10), st.floats(-5, 5), st.floats(0.1, 20))
def test_interval_round_trip(u, low, width):
    domain = Interval(low=low, high=low + width, init=low + width / 3)
    value = domain.constrain(f64(u), None)
    assert low <= value.item() <= low + width
    assert domain.unconstrain(value).item() == pytest.approx(u, abs=1e-8)


@law
@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=6))
def test_simplex_round_trip_and_sum(weights):
    value = f64(*weights) / sum(weights)
    domain = Simplex(init=value.tolist(), shape=(len(weights),))
    u = domain.unconstrain(value)
    assert u.sum().item() == pytest.approx(0, abs=1e-12)
    constrained = domain.constrain(u + 3.0, None)
    torch.testing.assert_close(constrained, value)
    assert constrained.sum().item() == pytest.approx(1)


def test_paper_values_of_dropout_at_its_initial_value():
    domain = Interval(low=0, high=0.95, init=0.05)
    assert domain.unconstrain(domain.initial()).item() == pytest.approx(-2.890, abs=5e-4)
    z = torch.tensor(
        [-2.3263, 0.0, 2.3263], dtype=torch.float64
    )  # the 1, 50 and 99 % quantiles of the perturbation at σ = 1
    quantiles = domain.constrain(domain.unconstrain(domain.initial()) + z, None)
    torch.testing.assert_close(quantiles, f64(0.005, 0.05, 0.342), atol=3e-3, rtol=0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Interval(low=0, high=1, init=0.0), "on the edge"),
        (lambda: Interval(low=0, high=1, init=1.0), "on the edge"),
        (lambda: Interval(low=0, high=1, init=1.5), "outside"),
        (lambda: Interval(low=1, high=0, init=0.5), "must be below high"),
        (lambda: Positive(init=0.0), "must be above low=0"),
        (lambda: Real(init=math.nan), "must be finite"),
        (lambda: Real(init="much"), "must be a number"),
        (lambda: Real(init=[1.0, 2.0], shape=(3,)), "shape"),
        (lambda: Real(init=0.0, scale=0.0), "standard deviation"),
        (lambda: Integer(low=0.5, high=3, init=1), "must be a whole number"),
        (lambda: Integer(low=0, high=3, init=1, differentiable=True), "no derivative"),
        (lambda: Simplex(init=[0.5, 0.6], shape=(2,)), "sum to one"),
        (lambda: Simplex(init=[1.0, 0.0], shape=(2,)), "positive weights"),
        (lambda: Simplex(init=0.5, shape=(2,), per_example=True), "per batch"),
        (lambda: Interval(low=0, high=1, init=7, frozen=True), "outside"),
        (lambda: Positive(init=-1.0, frozen=True), "below low=0"),
        (lambda: Integer(low=0, high=3, init=1.4, frozen=True), "must be a whole number"),
        (lambda: Simplex(init=[0.5, 0.6], shape=(2,), frozen=True), "sum to one"),
        (lambda: Simplex(init=[1.5, -0.5], shape=(2,), frozen=True), "positive weights"),
        (lambda: Interval(low="a", high=1, init=0.5), "low='a' must be a finite number"),
        (lambda: Real(init=0.0, shape=3), "shape=3 must be a tuple"),
        (lambda: Real(init=0.0, frozen="maybe"), "must be true or false"),
        (lambda: Real(init=True), "init=True must be a number"),
        (lambda: Real(init=[1.0, True], shape=(2,)), "must be a number"),
        (lambda: Real(init=10**400), "must be a number"),
        (lambda: Real(init=0.0, scale=True), "scale=True must be positive"),
        (lambda: Real(init=0.0, scale=10**400), "standard deviation"),
        (lambda: Interval(low=False, high=True, init=0.5), "low=False must be a finite number"),
        (lambda: Interval(low=0, high=10**400, init=0.5), "must be a finite number"),
        (lambda: Positive(init=1.0, low=math.nan), "low=nan must be a finite number"),
    ],
)
def test_refused(make, words):
    with pytest.raises(BilevelError, match=words):
        make()


def test_wrong_types_are_named_where_nothing_checks_annotations():
    code = """
import bilevel
class Mine(bilevel.ModuleProblem):
    inner_objective = outer_objective = None
for make in (lambda: bilevel.Space(rate=0.5), lambda: Mine(3, bilevel.Space(), None, None)):
    try:
        make()
    except bilevel.BilevelError as error:
        print(error)
"""
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert [line.split(";")[0] for line in shown] == [
        "rate=0.5 must be a Domain",
        "module=3 must be an nn.Module, or a function that returns one",
    ]


def test_frozen_value_may_lie_on_the_edge():
    assert Interval(low=0, high=1, init=0.0, frozen=True).initial() == 0
    assert Positive(init=0.0, frozen=True).initial() == 0
    assert Integer(low=0, high=3, init=3, frozen=True).initial() == 3
    assert Simplex(init=[1.0, 0.0], shape=(2,), frozen=True).initial().tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rounded_integer_stays_in_its_domain(dtype, rng):
    domain = Integer(low=0, high=5, init=4.99)
    u = torch.full(
        (1_000_000,), 20.0, dtype=dtype
    )  # the value is 5 itself, and a draw may be so near 1 that the sum is 6
    drawn = torch.cat(
        [domain.constrain(u, rng) for _ in range(20 if dtype == torch.float32 else 1)]
    )
    assert drawn.max() == 5
    assert domain.constrain(-u, rng).min() == 0


def test_frozen_values_are_copied_to_a_device_once(monkeypatch):
    space = Space(rate=Interval(low=0, high=1, init=0.5), fixed=Positive(init=3.0, frozen=True))
    with torch.inference_mode():
        first = space.constrain(space.init())["fixed"]
    monkeypatch.setattr(
        Positive, "initial", lambda self: pytest.fail("a copy, which waits for the device")
    )
    assert space.constrain(space.init())["fixed"] is first
    w = torch.ones((), requires_grad=True)
    (w * first).backward()  # what inference made serves training
    assert w.grad == 3
    with pytest.raises(pytest.fail.Exception):
        space.constrain(space.init().double())


def test_integer_rounding_is_unbiased_and_does_not_collapse_at_a_whole_number(rng):
    domain = Integer(low=0, high=5, init=1.0)
    u = domain.unconstrain(domain.initial())
    drawn = domain.constrain(u.expand(20_000), rng)
    assert set(drawn.tolist()) <= {0.0, 1.0, 2.0}
    assert (drawn == 0).float().mean() < 0.01  # floor of a perturbed value: half of them
    perturbed = u + 0.5 * torch.randn(20_000, generator=rng, dtype=torch.float64)
    value = 5 * torch.sigmoid(perturbed)
    drawn = domain.constrain(perturbed, rng)
    assert bool((drawn == drawn.round()).all())
    assert bool(((drawn - value).abs() < 1).all())
    assert (drawn - value).mean().abs() < 5 * (drawn - value).std() / math.sqrt(20_000)


def test_integer_without_generator_is_the_nearest():
    domain = Integer(low=0, high=5, init=1.4)
    assert domain.constrain(domain.unconstrain(domain.initial()), None) == 1


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def space():
    return Space(
        rate=Interval(low=0, high=1, init=0.5),
        gates=Real(init=[1.0, 2.0], shape=(2,), per_example=False),
        fixed=Positive(init=3.0, frozen=True),
        mix=Simplex(init=1 / 3, shape=(3,), scale=0.5),
    )


def test_layout(space):
    assert (space.numel, space.tuned) == (6, ("rate", "gates", "mix"))
    assert space.per_example.tolist() == [True, False, False, False, False, False]
    assert space.initial_scales().tolist() == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5]
    torch.testing.assert_close(space.init(), torch.tensor([0.0, 1.0, 2.0, 0.0, 0.0, 0.0]))


def test_leaves_per_example_and_per_batch(space, rng):
    u = torch.randn(4, 6, generator=rng)
    hypers = space.constrain(u)
    assert {name: tuple(leaf.shape) for name, leaf in hypers.items()} == {
        "rate": (4,),
        "gates": (2,),
        "fixed": (),
        "mix": (3,),
    }
    torch.testing.assert_close(hypers["rate"], torch.sigmoid(u[:, 0]))
    torch.testing.assert_close(hypers["gates"], u[0, 1:3])
    assert hypers["fixed"] == 3


def test_space_round_trip(space):
    u = torch.tensor([0.3, -1.0, 2.5, 0.2, -0.5, 0.3], dtype=torch.float64)
    torch.testing.assert_close(space.unconstrain(space.constrain(u)), u)


def test_gradient_reaches_u_through_the_domain(space):
    u = space.init().double().requires_grad_()
    (gradient,) = torch.autograd.grad(space.constrain(u)["rate"], u)
    assert gradient.tolist() == [0.25, 0, 0, 0, 0, 0]


def test_split(space):
    leaves = space.by_name(torch.arange(6))
    assert leaves["gates"].tolist() == [1, 2]
    assert set(leaves) == {"rate", "gates", "mix"}


def test_a_missing_value_is_named(space):
    with pytest.raises(BilevelError, match="`gates`"):
        space.unconstrain({"rate": torch.tensor(0.5)})


def test_everything_frozen():
    space = Space(rate=Interval(low=0, high=1, init=0.5, frozen=True))
    assert space.numel == 0
    assert space.init().shape == (0,)
    assert space.constrain(space.init())["rate"] == 0.5


def test_override(space):
    changed = space.override({"rate": {"init": 0.1, "scale": 2.0}, "mix": {"frozen": True}})
    assert (changed["rate"].init, changed["rate"].scale, changed.numel) == (0.1, 2.0, 3)
    assert space["rate"].init == 0.5
    assert list(changed) == list(space)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rat": {"init": 0.1}}, "hyperparameter `rat` is unknown.*did you mean `rate`"),
        ({"rate": {"inti": 0.1}}, "inti=0.1 is an unknown field.*did you mean `init`"),
        ({"rate": {"init": 2.0}}, "`rate`.*outside"),
        ({"rate": 0.5}, r"write rate\.init=0\.5"),
        ({"gates": {"shape": [3]}}, r"the problem fixes the shape \[2\]"),
        (3, "space=3 must map names of hyperparameters"),
        ({"rate": None}, r"write rate\.init=… for its initial value"),
        ({"rate": {"low": 0.5}}, "`rate`.*on the edge of"),  # re-ranged away from where it starts
        ({"rate": {"high": 0.4}}, "`rate`.*outside"),
        ({"rate": {"low": 2.0}}, "`rate`.*must be below high"),
        ({"mix": {"init": [0.5, 0.5, 0.5]}}, "`mix`.*sum to one"),
        ({"mix": {"init": [0.5, 0.5]}}, r"`mix`.*numbers of shape \(3,\)"),
        ({"mix": {"low": 0.1}}, r"`mix`: low=0\.1 is an unknown field"),
        ({"gates": {"init": "0.3"}}, "`gates`: init='0.3' must be a number"),
        ({"rate": {"optimizer": "lr"}}, r"for example rate\.optimizer=lr"),
    ],
)
def test_override_near_misses(space, changes, words):
    with pytest.raises(BilevelError, match=words):
        space.override(changes)


junk = st.one_of(
    st.floats(),
    st.integers(),
    st.booleans(),
    st.none(),
    st.text(max_size=4),
    st.lists(st.one_of(st.floats(), st.booleans(), st.text(max_size=2)), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
    st.sampled_from([10**400, -math.inf, "nan", "0.3", "true", [[0.2, 0.3, 0.5]], "lr"]),
)
field_names = (
    "init",
    "scale",
    "shape",
    "differentiable",
    "per_example",
    "frozen",
    "optimizer",
    "low",
    "high",
    "inti",
)


@settings(deadline=None, derandomize=True, max_examples=400)
@given(
    st.sampled_from(("rate", "gates", "fixed", "mix", "holes")),
    st.dictionaries(st.sampled_from(field_names), junk, max_size=2),
)
def test_whatever_an_override_says_the_space_is_sound_or_a_sentence_says_why_not(name, change):
    space = Space(
        rate=Interval(low=0, high=1, init=0.5),
        gates=Real(init=[1.0, 2.0], shape=(2,), per_example=False),
        fixed=Positive(init=3.0, frozen=True),
        mix=Simplex(init=1 / 3, shape=(3,), scale=0.5),
        holes=Integer(low=0, high=5, init=1.0),
    )
    refusal = ""
    try:
        changed = space.override({name: change})
    except BilevelError as error:
        refusal = str(error)
    if refusal:
        assert f"`{name}`" in refusal
        assert "\n" not in refusal
        return
    domain, u = changed[name], changed.init(torch.float64)
    for field in ("differentiable", "per_example", "frozen"):
        assert getattr(domain, field) in (True, False)
    for field in ("scale", *(f for f in ("low", "high") if hasattr(domain, f))):
        assert type(getattr(domain, field)) in (int, float)
    assert torch.isfinite(u).all()
    assert (changed.initial_scales() > 0).all()
    values = changed.constrain(u)
    if isinstance(domain, Interval):
        assert domain.low <= values[name] <= domain.high
    if not isinstance(domain, Integer):  # which constrain rounds
        torch.testing.assert_close(values[name].double(), domain.initial(), rtol=1e-6, atol=1e-9)
