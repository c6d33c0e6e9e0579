"""Replayed steps equal normal steps, bit for bit: on a tape that acts like a CUDA graph."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from bilevel import Runner, SpeedWarning
from bilevel.data import global_rng
from bilevel.data.global_rng import GlobalDraws
from bilevel.device.recording import count_on_device
from bilevel.problems import digits
from bilevel.run.cuda_graph import Capture
from bilevel.services import Capturable
from bilevel.solvers import SOBA, Fixed, Gaussian, SelfTuning, Sinusoidal
from tests.support.device_waits import no_waiting_on_cuda
from tests.support.fakes import FakeProblem
from tests.support.solver_cases import PROBLEMS, RECIPES, Decayed, normed, ready, sgd

CPU = torch.device("cpu")
aten = torch.ops.aten


class Tape(TorchDispatchMode):
    """A tape of operations with their tensors, as a CUDA graph holds kernels with addresses.

    Decisions of Python, numbers and places of results stay as recorded. A draw from a generator is
    drawn anew. Reading a number fails, as it does while CUDA captures. Nothing is computed before
    `replay`: all tensors and generators that were there get their values back.
    """

    def __init__(self, solver):
        super().__init__()
        self.solver, self.calls, self.seen, self.replays = solver, [], {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is aten._local_scalar_dense:
            raise RuntimeError("a number is read while a graph is recorded")
        for leaf in tree_leaves((args, kwargs or {})):
            if isinstance(leaf, Tensor) and id(leaf) not in self.seen:
                self.seen[id(leaf)] = leaf, leaf.detach().clone()
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if id(leaf) not in self.seen:  # an operation in place answers what it was given
                self.seen[id(leaf)] = leaf, None
        self.calls.append(tree_map(_place, (func, args, kwargs or {}, out)))
        return out

    def record(self, work):
        generator = self.solver.core.generator
        state = generator.get_state()
        try:
            with self:
                work()
        finally:
            generator.set_state(state)
            with torch.no_grad():
                for leaf, value in self.seen.values():
                    if value is not None:
                        leaf.copy_(value)

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _place(x):
    """The memory of a tensor, with shape and strides as they are now: a kernel knows no more."""
    return x.detach() if isinstance(x, Tensor) else x


@pytest.fixture(autouse=True)
def _unseeded(request, monkeypatch):
    """Call networks without seeding the global generators, which reads a number on the CPU."""
    if "cuda" not in request.keywords and "gpu" not in request.fixturenames:

        def call(self, run, generator):
            torch.rand((), generator=generator)
            return run()

        monkeypatch.setattr(GlobalDraws, "__call__", call)


def twins(make_problem, make=SelfTuning, **options):
    """Two solvers that begin alike."""
    solvers = []
    for _ in range(2):
        torch.manual_seed(0)  # a module is drawn when it is made
        solvers.append(ready(make_problem(), make(), **options))
    return solvers


def captured(solver):
    solver.services.capture = Capture(solver, lambda: Tape(solver), CPU)
    return solver


def replays(solver):
    return {
        name: recorded.graph.replays for name, recorded in solver.services.capture.recorded.items()
    }


def rounds(solver):
    for _ in range(3):
        solver.step()


def states(solver):
    return [*tree_leaves((stable(solver), tuple(solver.solution()))), solver.services.bad_step()]


def stable(solver):
    """Return the state of a solver without that of its generator, which is a copy."""
    state = solver.state_dict()
    del state["core"]["generator"]
    return state


def assert_same(ours, theirs):
    """Bit for bit; on the tape, sums of float64 may be taken in another order, as memory lies."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, Tensor) and a.dtype == torch.float64 and not a.is_cuda:
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
        else:
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def assert_steps_are_the_same(make_problem, make, rounds=7, between=lambda solver: None):
    """Compare twins, one of which replays, over warm-up, whole rounds and a short one."""
    plain, ours = twins(make_problem, make)
    captured(ours)
    for number in range(rounds):
        options = {"warmup": number == 0, "limit": 1 if number == 3 else None}
        told, expected = (solver.step(**options) for solver in (ours, plain))
        assert told.keys() == expected.keys()
        assert_same([told[key] for key in expected], list(expected.values()))
        assert_same(states(ours), states(plain))
        for solver in (ours, plain):
            between(solver)
    assert torch.equal(ours.core.generator.get_state(), plain.core.generator.get_state())
    assert not ours.services.capture.failed
    return ours


SOLVERS = {name: partial(SelfTuning, inner_steps=2, **flags) for name, flags in RECIPES.items()} | {
    "fixed": partial(Fixed, inner_steps=2),
    "perturbed": partial(Fixed, inner_steps=2, hypers=Gaussian(0.01)),
    "clipped": partial(
        SelfTuning,
        inner_steps=2,
        clip_norm=0.1,
        inner_optimizer=sgd(0.1, momentum=0.9, nesterov=True),
    ),
    "not tuned": partial(SelfTuning, inner_steps=2, tune_scale=False),
}


@pytest.mark.parametrize("make", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("name", ["digits", "convolutions with batch norm"])
def test_replayed_steps_are_the_steps(name, make):
    solver = assert_steps_are_the_same(PROBLEMS[name], make)
    assert replays(solver).keys() == (
        {"inner_step"} if isinstance(solver, Fixed) else {"inner_step", "outer_step"}
    )
    assert all(count >= 3 for count in replays(solver).values())


@pytest.mark.parametrize(
    "name", ["augmented images", "lstm per batch", "every domain", "carried state", "quadratic"]
)
def test_whatever_the_problem(name):
    assert_steps_are_the_same(PROBLEMS[name], partial(SelfTuning, inner_steps=2))


def test_statistics_that_follow_w_see_the_last_training_batch_in_a_replay():
    make_problem = partial(normed, per_example=False)
    solver = assert_steps_are_the_same(make_problem, partial(SelfTuning, inner_steps=2))
    assert solver.core.follows
    assert all(count >= 3 for count in replays(solver).values())


def test_the_first_bad_step_is_noted_by_its_number():
    plain, ours = twins(partial(digits, hidden=[8]))
    captured(ours)
    for solver in (plain, ours):
        solver.step(warmup=True)
        assert solver.services.bad_step() is None
        with torch.no_grad():
            solver.core.weights.leaves[0].fill_(torch.nan)
        solver.step(warmup=True)
        solver.step(warmup=True)
        assert solver.services.bad_step() == 6
    assert replays(ours)["inner_step"] > 0


def test_a_schedule_is_followed():
    """The learning rate is a number in the recording, so a new rate is recorded again."""
    halved = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    solver = assert_steps_are_the_same(
        PROBLEMS["digits"],
        partial(SelfTuning, inner_steps=2, inner_scheduler=halved),
        between=lambda solver: solver.epoch_ended(None),
    )
    assert replays(solver) == {"inner_step": 2, "outer_step": 1}  # since the last change, of seven


@pytest.mark.parametrize("name", ["digits", "carried state"])
@pytest.mark.parametrize(
    "cheaper", [{"response_every": 2}, {"response_every": 2, "response_fraction": 0.5}]
)
def test_steps_with_and_without_the_response_are_recorded_apart(name, cheaper):
    solver = assert_steps_are_the_same(
        PROBLEMS[name], partial(SelfTuning, inner_steps=2, **cheaper), rounds=10
    )
    assert replays(solver).keys() == {"inner_step", "weights_step", "outer_step"}
    assert all(count >= 3 for count in replays(solver).values())


@pytest.mark.parametrize("recipe", ["delta_stn", "stn"])
def test_frozen_steps_are_recorded_apart_from_the_others(recipe):
    plain, ours = twins(PROBLEMS["digits"], SOLVERS[recipe])
    captured(ours)
    for frozen in (False, False, True, True, True, False, True):
        told, expected = (solver.step(frozen=frozen) for solver in (ours, plain))
        assert_same([told[key] for key in expected], list(expected.values()))
        assert_same(states(ours), states(plain))
    assert not ours.services.capture.failed
    assert replays(ours)["frozen_step"] >= 3


def test_without_looking_at_settings_a_schedule_would_be_lost(monkeypatch):
    """The law above fails without the comparison of settings."""
    monkeypatch.setattr(Capture, "_settings", lambda self: [])
    with pytest.raises(AssertionError):
        test_a_schedule_is_followed()


def test_without_buffers_carries_would_be_lost(monkeypatch):
    """The laws above can fail: statistics that are bound anew would be read at the old place."""
    monkeypatch.setattr(Capture, "_in_place", lambda self, step, batches: step(*batches))
    with pytest.raises(AssertionError):
        assert_steps_are_the_same(
            PROBLEMS["convolutions with batch norm"], partial(SelfTuning, inner_steps=2)
        )


def test_without_its_count_a_bad_step_would_have_the_number_of_the_recording(monkeypatch):
    monkeypatch.setattr(
        Capture, "_adopt", lambda self: setattr(self.services, "device_count", None)
    )
    with pytest.raises(AssertionError):
        test_the_first_bad_step_is_noted_by_its_number()


def test_all_that_a_step_reads_and_writes_stays_where_it_is():
    solver = captured(ready(PROBLEMS["convolutions with batch norm"](), SelfTuning(inner_steps=2)))
    places = []
    for _ in range(6):
        solver.step()
        services = solver.services
        held = [*tree_leaves(stable(solver)), services.first_bad_step, services.device_count]
        places.append([x.data_ptr() for x in held if isinstance(x, Tensor) and x.numel()])
    assert places[3] == places[4] == places[5]
    assert len(set(places[5])) == len(places[5])  # and no two of them share their memory


def test_a_batch_of_another_shape_is_taken_step_by_step():
    solver = captured(ready(digits(hidden=[8], batch_size=8)))
    for _ in range(2):
        solver.step(warmup=True)
    before = replays(solver)["inner_step"]
    draw = solver.core.data.train.next
    solver.core.data.train.next = lambda: tree_map(lambda x: x[:5], draw())
    solver.step(warmup=True, limit=1)
    solver.core.data.train.next = draw
    solver.step(warmup=True, limit=1)
    assert replays(solver)["inner_step"] == before + 1
    assert not solver.services.capture.failed


def test_a_loaded_state_is_gone_on_from():
    torch.manual_seed(0)
    problem = normed()
    first, second = (
        captured(ready(problem, SelfTuning(inner_steps=2), seed=seed)) for seed in (1, 2)
    )
    for solver in (first, second):
        for _ in range(4):
            solver.step()
    parts = [
        copy.deepcopy(part.state_dict())
        for part in (first, first.core.data.train, first.core.data.valid)
    ]
    for part, state in zip(
        (second, second.core.data.train, second.core.data.valid), parts, strict=True
    ):
        part.load_state_dict(state)
    for _ in range(3):
        first.step()
        second.step()
    assert_same(states(second), states(first))
    assert replays(second)["inner_step"] > 0


# --- what cannot be captured says so, and goes on ---


def test_a_network_that_reads_a_number_is_trained_step_by_step():
    class Reading(nn.Linear):
        def forward(self, x):
            return super().forward(x) / x.abs().max().item()

    plain, ours = twins(lambda: Decayed(Reading(4, 3)))
    captured(ours)
    told = []
    for _ in range(3):
        plain.step()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bilevel.run.cuda_graph._warn", told.append)
            ours.step()
    assert told == [
        "`inner_step` cannot be recorded (RuntimeError: a number is read while a graph is recorded)"
    ]
    assert ours.services.capture.failed
    assert_same(states(ours)[:-1], states(plain)[:-1])


def test_a_step_that_counts_on_the_host_is_found():
    solver = ready(digits(hidden=[8]))
    method, step = solver.method, solver.method.inner_step
    method.turns = 0

    def inner_step(batch):
        method.turns = method.turns + 1
        return step(batch)

    method.inner_step = inner_step
    captured(solver)
    with pytest.warns(
        SpeedWarning,
        match=r"`inner_step` cannot be recorded \(ValueError: `turns` changes on the host\)",
    ):
        solver.step()


def test_without_a_gpu_a_run_says_so_and_is_the_same(tmp_path):
    summaries = []
    for capture in (False, True):
        runner = Runner(
            epochs=1, warmup_epochs=0, capture=capture, progress="none", picture=False, device="cpu"
        )
        if capture:
            with pytest.warns(
                SpeedWarning,
                match="steps are not captured as CUDA graphs, since cpu has no graphs; the run",
            ):
                summaries.append(
                    runner.run(FakeProblem(), Fixed(), directory=tmp_path / "captured")
                )
        else:
            summaries.append(runner.run(FakeProblem(), Fixed(), directory=tmp_path / "plain"))
    assert summaries[0]["last"]["valid_loss"] == summaries[1]["last"]["valid_loss"]


def test_which_solvers_can_be():
    problem = digits(hidden=[8], dropout="gaussian")
    assert isinstance(ready(problem, SelfTuning()).capturable(), Capturable)
    assert isinstance(ready(problem, Fixed()).capturable(), Capturable)
    waving = ready(problem, Fixed(hypers=Sinusoidal(0.1, 10)))
    assert "number of the step" in waving.capturable()
    soba = ready(problem, SOBA())
    assert soba.capturable() is None
    with pytest.raises(ValueError, match="SOBA change what lies on the host"):
        captured(soba)


def test_a_tensor_that_a_step_binds_unannounced_is_found():
    """Without its declaration the carry of the response would be read where it no longer is."""
    solver = ready(PROBLEMS["convolutions with batch norm"](), SelfTuning(inner_steps=2))
    solver.method.rebound = lambda: ()
    captured(solver)
    solver.step(warmup=True)
    with pytest.warns(SpeedWarning, match="`response_carry` changes on the host"):
        solver.step(warmup=True)


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (torch.optim.SGD, None),
        (torch.optim.Adam, None),
        (torch.optim.RMSprop, None),
        (torch.optim.Adagrad, "Adagrad has no"),
    ],
)
def test_optimizers_count_on_the_device_or_are_named(optimizer, reason):
    made = optimizer([torch.zeros(2, requires_grad=True)], lr=0.1)
    told = count_on_device([made])
    assert told is reason or told.startswith(reason)
    if "capturable" in made.param_groups[0]:
        assert made.param_groups[0]["capturable"]


# --- draws from the global generators, with a device that is none ---


class Device:
    """Generators of CUDA as numbers: a seed, and how far it has been drawn from."""

    def __init__(self, monkeypatch):
        self.offset, self.seeds, self.capturing = 0, [], False
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(global_rng, "_global_state", lambda device: self.offset)
        monkeypatch.setattr(
            global_rng, "_restore_global", lambda device, offset: setattr(self, "offset", offset)
        )
        monkeypatch.setattr(global_rng, "_seed_global", self.seed)
        monkeypatch.setattr(
            global_rng,
            "_advance",
            lambda generator: generator.set_offset(generator.get_offset() + 4),
        )
        monkeypatch.setattr(
            torch.random, "fork_rng", lambda *args, **kwargs: torch.random.__dict__["_kept"](self)
        )

    def seed(self, device, seed):
        self.seeds.append(seed)
        self.offset = 0


class Own:
    device = torch.device("cuda", 0)

    def __init__(self):
        self.offset = 0

    def get_offset(self):
        return self.offset

    def set_offset(self, offset):
        self.offset = offset

    def get_state(self):
        return torch.tensor([11, self.offset], dtype=torch.int64).view(torch.uint8)


@pytest.fixture
def gpu(monkeypatch):
    from contextlib import contextmanager

    @contextmanager
    def kept(device):
        before, state = device.offset, torch.get_rng_state()
        yield
        device.offset = before
        torch.set_rng_state(state)

    monkeypatch.setattr(torch.random, "_kept", kept, raising=False)
    return Device(monkeypatch)


def test_a_network_that_draws_nothing_is_no_longer_seeded(gpu):
    draws, own = GlobalDraws(), Own()
    for _ in range(3):
        assert draws(lambda: "prediction", own) == "prediction"
    assert len(gpu.seeds) == 1
    assert (
        own.offset == 12
    )  # as far as if it had been: a resumed run, which looks again, goes on alike


@pytest.mark.parametrize("where", ["device", "host"])
def test_a_network_that_draws_is_seeded_in_every_pass(gpu, where):
    def draw():
        if where == "host":
            return torch.rand(())
        gpu.offset += 4
        return gpu.seeds[-1]

    draws, own = GlobalDraws(), Own()
    before = torch.get_rng_state()
    told = [draws(draw, own) for _ in range(3)]
    assert len(gpu.seeds) == len(set(gpu.seeds)) == len(set(told)) == 3
    assert torch.equal(torch.get_rng_state(), before)
    gpu.capturing = True
    with pytest.raises(Exception, match="which a graph cannot seed"):
        draws(draw, own)


def test_a_network_that_begins_to_draw_is_called_again_seeded(gpu):
    draws, own, calls = GlobalDraws(), Own(), []

    def run():
        calls.append(own.offset)
        if len(calls) > 2:
            gpu.offset += 4
        return len(gpu.seeds)

    draws(run, own)
    draws(run, own)
    assert draws(run, own) == 2  # the call that counts was made after a second seeding
    assert len(calls) == 4
    assert draws.draws
    assert own.offset == 12
    assert gpu.offset == 0


def test_a_captured_pass_moves_on_as_one_that_is_not(gpu):
    draws, own = GlobalDraws(), Own()
    draws(lambda: None, own)
    gpu.capturing = True
    draws(lambda: None, own)
    assert own.offset == 8


# --- on a GPU ---

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.cuda
@cuda
@pytest.mark.parametrize("make", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("name", ["digits", "convolutions with batch norm", "augmented images"])
def test_on_cuda_graphs_take_the_very_steps(name, make, monkeypatch):
    """Capture equals the same solver with optimizers that count on the device, bit for bit."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    device = torch.device("cuda")
    solvers = twins(PROBLEMS[name], make, device=device)
    for solver in solvers:
        solver.services.capture = Capture.of(solver, device, solver.core.generator)
    solvers[0].services.capture = None
    for number in range(8):
        with no_waiting_on_cuda() if number > 5 else nullcontext():
            for solver in solvers:
                solver.step()
        if number > 5:
            assert_same(*(states(solver) for solver in solvers))
    assert solvers[1].services.capture.recorded
    assert not solvers[1].services.capture.failed


@pytest.mark.cuda
@cuda
def test_on_cuda_a_network_that_waits_is_trained_step_by_step():
    class Reading(nn.Linear):
        def forward(self, x):
            return super().forward(x) / x.abs().max().item()

    device = torch.device("cuda")
    solver = ready(Decayed(Reading(4, 3)), device=device)
    solver.services.capture = Capture.of(solver, device, solver.core.generator)
    with pytest.warns(SpeedWarning, match="`inner_step` waits for the device"):
        rounds(solver)
    assert solver.services.bad_step() is None


@pytest.mark.cuda
@cuda
def test_on_cuda_a_network_with_global_dropout_is_trained_step_by_step():
    device = torch.device("cuda")
    solver = ready(normed(dropout=0.3), device=device)
    solver.services.capture = Capture.of(solver, device, solver.core.generator)
    with pytest.warns(SpeedWarning, match="which a graph cannot seed"):
        rounds(solver)
    assert solver.services.bad_step() is None
