"""Tests of a response pass at every n-th inner step, or on a part of the batch."""

import io

import pytest
import torch
from torch.utils._pytree import tree_leaves

from bilevel import BilevelError, Refused
from bilevel.params import count_examples
from bilevel.problems import digits
from bilevel.solvers import SelfTuning, stn
from bilevel.solvers.optim.optimized import descend
from bilevel.solvers.response.cheaper_pass import CheaperPass
from tests.support.device_waits import no_waiting
from tests.support.solver_cases import Recurrent, convolutional, normed, ready, sgd
from tests.support.solver_list import leaves_equal

CHEAPER = {
    "every second step": {"response_every": 2},
    "every third step": {"response_every": 3},
    "half of the batch": {"response_fraction": 0.5},
    "both": {"response_every": 2, "response_fraction": 0.3},
}
all_forms = pytest.mark.parametrize("settings", CHEAPER.values(), ids=CHEAPER)


def theta(solver):
    return [leaf.detach().clone() for leaf in solver.method.theta.leaves]


# --- the parts ---


@pytest.mark.parametrize(
    ("fraction", "examples", "kept"),
    [(0.5, 8, 4), (0.5, 7, 4), (0.1, 30, 3), (0.3, 10, 3), (1e-6, 9, 1), (1.0, 5, 5), (0.9, 1, 1)],
)
def test_a_part_is_the_first_examples(fraction, examples, kept):
    batch = {"x": torch.arange(examples * 2).reshape(examples, 2), "shared": torch.ones(1, 3)}
    part = CheaperPass(fraction=fraction).part(batch)
    assert torch.equal(part["x"], batch["x"][:kept])
    assert part["shared"] is batch["shared"]


@pytest.mark.parametrize("fraction", [0.5, 0.3, 0.9, 0.21])
def test_a_batch_that_is_shorter_by_a_step_has_a_shorter_part(fraction):
    cheaper = CheaperPass(fraction=fraction)
    for examples in range(cheaper.step + 1, 40):
        long, short = (torch.ones(n, 2) for n in (examples, examples - cheaper.step))
        assert len(cheaper.part(short)) < len(cheaper.part(long))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"response_every": 0}, r"^response_every=0 must be a whole number of at least 1; "),
        ({"response_every": 1.5}, r"^response_every=1.5 must be a whole number"),
        ({"response_fraction": 0}, r"^response_fraction=0 must be above 0 and at most 1; 0.5 take"),
        ({"response_fraction": 1.5}, r"^response_fraction=1.5 must be above 0"),
        ({"response_fraction": "half"}, r"^response_fraction='half' must be above 0"),
    ],
)
def test_a_wrong_setting_is_one_sentence(settings, match):
    with pytest.raises(BilevelError, match=match):
        SelfTuning(**settings)


@all_forms
def test_a_joint_step_has_no_cheaper_response(settings):
    name = next(iter(settings))
    with pytest.raises(
        BilevelError, match=rf"^{name}=.* needs regularized_w0=True.*; set {name}=1"
    ):
        stn(**settings)


# --- the steps ---


def test_theta_moves_at_every_nth_step_and_w_at_each():
    solver = ready(digits(hidden=[8]), SelfTuning(inner_steps=1, response_every=3))
    moved = []
    for _ in range(7):
        before, w = theta(solver), solver.core.weights.leaves[0].detach().clone()
        metrics = solver.step(warmup=True)
        moved.append(not leaves_equal(before, theta(solver)))
        assert ("response_loss" in metrics) == moved[-1]
        assert not torch.equal(w, solver.core.weights.leaves[0])
    assert moved == [True, False, False, True, False, False, True]


def test_the_mean_of_the_response_loss_is_one_over_the_steps_that_have_it():
    ours, plain = (
        ready(digits(hidden=[8]), SelfTuning(inner_steps=n, response_every=2)) for n in (5, 1)
    )
    each = [plain.step(warmup=True) for _ in range(5)]
    mean = ours.step(warmup=True)
    found = [metrics["response_loss"] for metrics in each if "response_loss" in metrics]
    assert len(found) == 3
    torch.testing.assert_close(mean["response_loss"], torch.stack(found).mean())
    losses = torch.stack([metrics["inner_loss"] for metrics in each])
    torch.testing.assert_close(mean["inner_loss"], losses.mean())


def test_the_pass_sees_the_first_examples_of_the_batch(monkeypatch):
    solver = ready(digits(hidden=[8], batch_size=8), SelfTuning(response_fraction=0.3))
    batch, seen = solver.core.data.train.next(), []
    plain = solver.core.problem.predict

    def predict(hypers, params, carry, batch, **options):
        seen.append(batch)
        return plain(hypers, params, carry, batch, **options)

    monkeypatch.setattr(solver.core.problem, "predict", predict)
    solver.method.inner_step(batch)
    assert [count_examples(one) for one in seen] == [8, 3]
    assert leaves_equal(seen[1], [leaf[:3] for leaf in tree_leaves(batch)])


@pytest.mark.parametrize("name", ["response_every", "response_fraction"])
def test_at_one_it_is_the_step_without_it(name):
    problem = normed(dropout=0.3)
    ours, plain = (ready(problem, SelfTuning(**s)) for s in ({name: 1}, {}))
    for solver in (ours, plain):
        for _ in range(2):
            solver.step()
    assert leaves_equal(ours.state_dict(), plain.state_dict())


def test_theta_learns_from_half_of_a_batch_as_from_a_batch_of_half():
    problem = convolutional()
    ours, other = (ready(problem, SelfTuning(response_fraction=f), away=0.3) for f in (0.5, 1.0))
    batch = ours.core.data.train.next()
    half = ours.method.response_pass.part(batch)
    assert 0 < count_examples(half) < count_examples(batch)
    ours.method.inner_step(batch)
    other.method.descend_weights(batch)
    w0 = other.core.weights.detached()
    descend(other.method.perturbed_loss(w0, other.core.carry, half)[0], other.method.theta)
    assert leaves_equal(theta(ours), theta(other))


# --- recurrent state ---


@all_forms
def test_the_pass_continues_from_the_state_of_w0_at_its_examples(settings, monkeypatch):
    solver = ready(Recurrent(), SelfTuning(inner_optimizer=sgd(0.5), **settings), away=0.5)
    fraction, seen = solver.response_fraction, []
    plain = solver.method.perturbed_loss

    def perturbed_loss(w0, carry, batch):
        seen.append((carry["h"].clone(), count_examples(batch)))
        return plain(w0, carry, batch)

    monkeypatch.setattr(solver.method, "perturbed_loss", perturbed_loss)
    solver.step(warmup=True)
    for _ in range(6):
        before, taken = solver.core.carry["h"].clone(), len(seen)
        solver.take_inner(solver.core.data.train.next())
        if len(seen) > taken:
            h, examples = seen[-1]
            assert examples == {1.0: 6, 0.5: 3, 0.3: 2}[fraction]
            assert torch.equal(h, before[:examples])
    solver.step()


def test_a_carry_whose_examples_are_not_an_axis_is_refused():
    class Folded(Recurrent):
        def init(self, generator):
            return super().init(generator)[0], {"h": torch.zeros(18).double()}

        def fresh_carry(self, carry, batch):
            return {"h": carry["h"].new_zeros(3 * len(batch[0]))}

        def predict(self, hypers, params, carry, batch, **options):
            rows = {"h": carry["h"].reshape(-1, 3)}
            h, _ = super().predict(hypers, params, rows, batch, **options)
            return h, {"h": h.reshape(-1)}

    with pytest.raises(Refused, match=r"needs a carry with an axis of examples, and `h` of shape"):
        ready(Folded(), SelfTuning(response_fraction=0.5, per_example=False))
    ready(Folded(), SelfTuning(response_every=2, per_example=False)).step()


def test_a_carry_that_stays_as_it_is_is_refused():
    class Stiff(Recurrent):
        def fresh_carry(self, carry, batch):
            return carry

    with pytest.raises(Refused, match=r"gives 3 of 6 examples to a network whose carry does not"):
        ready(Stiff(), SelfTuning(response_fraction=0.5, per_example=False))


# --- state and device ---


@all_forms
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(settings):
    problem = normed(dropout=0.3)
    options = {"inner_optimizer": sgd(0.05, momentum=0.9), "inner_steps": 3, **settings}
    solver = ready(problem, SelfTuning(**options), away=0.5)
    solver.step()
    file = io.BytesIO()
    data = [getattr(solver.core.data, split).state_dict() for split in ("train", "valid")]
    torch.save((solver.state_dict(), data), file)
    resumed = ready(problem, SelfTuning(**options), away=0.5, seed=2)
    file.seek(0)
    state, data = torch.load(file, weights_only=True)
    resumed.load_state_dict(state)
    for split, stored in zip(("train", "valid"), data, strict=True):
        getattr(resumed.core.data, split).load_state_dict(stored)
    for each in (solver, resumed):
        for _ in range(3):
            each.step()
    assert leaves_equal(solver.state_dict(), resumed.state_dict())


@all_forms
def test_no_step_waits_for_the_device(settings):
    solver = ready(digits(hidden=[8]), SelfTuning(**settings))
    solver.step()
    with no_waiting():
        solver.step()
        solver.step()
