"""On a GPU: no step synchronizes, seeds give one start, and a resumed run equals a whole one."""

import io

import pytest
import torch
from torch.utils._pytree import tree_leaves

from bilevel.params import to_device
from bilevel.solvers import SelfTuning
from tests.support.device_waits import no_waiting_on_cuda
from tests.support.solver_cases import PROBLEMS, all_problems, all_solvers, groups, ready

DEVICE = torch.device("cuda")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # functional_call passes an LSTM its weights one by one; cuDNN packs them anew and warns
    pytest.mark.filterwarnings(
        "ignore:RNN module weights are not part of single contiguous chunk:UserWarning"
    ),
]


@pytest.fixture(scope="module", autouse=True)
def _peak(request):
    """In the summary: what the heaviest test of this file took of the device's memory."""
    peaks = {}
    yield peaks
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    if peaks and reporter is not None:
        heaviest = max(peaks, key=peaks.get)
        reporter.write_line(f"\npeak CUDA memory: {peaks[heaviest] / 2**20:.1f} MiB in {heaviest}")


@pytest.fixture(autouse=True)
def _measured(request, _peak):
    torch.cuda.reset_peak_memory_stats()
    yield
    _peak[request.node.name] = torch.cuda.max_memory_allocated()


def rounds_without_waiting(solver, n):
    with no_waiting_on_cuda():
        for _ in range(n):
            solver.step()


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@all_solvers
@all_problems
def test_no_round_waits_for_the_device_and_all_of_it_is_there(make_problem, make):
    """After a first round, which hands the epoch's order over: once an epoch, not once a batch."""
    solver = ready(make_problem(), make(inner_steps=1), device=DEVICE)
    solver.step()
    rounds_without_waiting(solver, 2)
    assert solver.services.bad_step() is None
    assert all(t.is_cuda for t in tree_leaves(solver.solution()))


def test_a_step_that_waits_is_found():
    solver = ready(PROBLEMS["quadratic"](), device=DEVICE)
    solver.services.watch = lambda loss, count: loss.item()
    with pytest.raises(RuntimeError, match="synchroniz"):
        rounds_without_waiting(solver, 1)


@all_solvers
@all_problems
def test_one_seed_begins_alike_on_every_device(make_problem, make):
    problem, starts = make_problem(), []
    for device in (torch.device("cpu"), DEVICE):
        solver = ready(problem, make(), device=device)
        starts.append(
            to_device(
                [t.detach() for group in groups(solver).values() for t in group.leaves],
                "cpu",
            )
        )
    assert_same(*starts)


@all_solvers
@pytest.mark.parametrize(
    "name", ["digits", "dropout and batch norm", "carried state", "lstm per example"]
)
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(name, make, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    solver, resumed = (
        ready(PROBLEMS[name](), make(inner_steps=2), seed=seed, device=DEVICE) for seed in (1, 2)
    )
    solver.step()
    file = io.BytesIO()
    torch.save(
        (
            solver.state_dict(),
            solver.core.data.train.state_dict(),
            solver.core.data.valid.state_dict(),
        ),
        file,
    )
    file.seek(0)
    state, train, valid = torch.load(file, weights_only=True)
    resumed.load_state_dict(state)
    resumed.core.data.train.load_state_dict(train)
    resumed.core.data.valid.load_state_dict(valid)
    for _ in range(2):
        solver.step()
        resumed.step()
    assert_same(*(tree_leaves((s.state_dict(), s.solution())) for s in (resumed, solver)))


@pytest.mark.parametrize(
    "name", ["lstm per batch", "lstm per example", "convolutions with batch norm"]
)
def test_the_outer_loss_and_its_gradient_are_those_of_the_cpu(name):
    """Compare cuDNN, and its replacement for derivatives, with the formulas of the CPU."""
    problem, results = PROBLEMS[name](), []
    for device in (torch.device("cpu"), DEVICE):
        solver = ready(problem, SelfTuning(tune_scale=False), away=0.3, device=device)
        with torch.no_grad():
            solver.core.search.u.add_(0.3)
        loss = solver.method.outer_loss(solver.core.data.valid.peek())
        results.append(
            to_device([loss.detach(), *torch.autograd.grad(loss, solver.core.search.u)], "cpu")
        )
    torch.testing.assert_close(*results)
