"""Two gloo processes give the results of one; problems that cannot be sharded are refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from bilevel import BilevelError, Refused
from bilevel.cli.app import prepared
from bilevel.parallel.batch_norm import BatchStatistics, without_statistics
from bilevel.parallel.check_shards import dry_run_shards
from bilevel.parallel.collectives import enter, leave
from bilevel.parallel.per_example_draws import DRAWS, WholeBatchDraws
from bilevel.parallel.process_group import SINGLE_PROCESS, open_ranks
from bilevel.parallel.sharded_problem import ShardedProblem
from bilevel.parallel.shards import Shard, even_shards
from tests.soak.kills import differences, without_costs
from tests.support.parallel_cases import CASES, CPU, SOLVERS, Decayed, both, exact_run
from tests.support.solver_cases import Recurrent, all_problems

ROOT = Path(__file__).parents[3]
EQUAL = [name for name, case in CASES.items() if getattr(case, "func", None) is both]
QUICK = [
    "problem=digits",
    "solver=delta_stn",
    "runner.epochs=2",
    "runner.warmup_epochs=1",
    "logger=jsonl",
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Return the results of every case on both ranks, from one pair of processes."""
    out = tmp_path_factory.mktemp("parallel")
    command = [sys.executable, "-m", "tests.support.parallel_cases", out]
    with open(out / "log0", "w") as first, open(out / "log1", "w") as second:
        pair = [
            subprocess.Popen([*command, str(rank), out / "store"], cwd=ROOT, stderr=log)
            for rank, log in enumerate((first, second))
        ]
        deadline = time.monotonic() + 600
        while any(process.poll() is None for process in pair) and time.monotonic() < deadline:
            if any(process.poll() for process in pair):
                break  # the other process would wait for it
            time.sleep(0.1)
    for process in pair:
        process.kill()
        process.wait()
    errors = [(out / f"log{rank}").read_text() for rank in (0, 1)]
    assert [process.returncode for process in pair] == [0, 0], errors
    results = [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    return {name: (results[0][name], results[1][name]) for name in results[0]} | {"out": out}


# --- equal to one process ---


def test_every_solver_is_among_the_cases():
    assert {f"mlp, {name}" for name in SOLVERS} <= set(EQUAL)


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_give_what_one_gives(name, outcomes):
    """Compare λ, w, carry, metrics, hypergradient and generators; both ranks hold the same bits."""
    ours, theirs = outcomes[name]
    assert not isinstance(ours, str), ours
    (alone, together), (_, second) = ours, theirs
    assert alone.keys() == together.keys() == second.keys()
    single = any(key.startswith("params.") and t.dtype == torch.float32 for key, t in alone.items())
    for key, expected in alone.items():
        assert torch.equal(together[key].nan_to_num(), second[key].nan_to_num()), key
        torch.testing.assert_close(
            together[key], expected, rtol=1e-3 if single else 1e-9, atol=1e-5 if single else 1e-11
        )


# --- the wrong ways are wrong ---


def test_shares_that_count_alike_are_off(outcomes):
    """Five and four examples at equal weight."""
    (alone, _), wrong = outcomes["mlp, fixed"][0], outcomes["unweighted"][0]
    moved = [key for key in alone if key.startswith("params.")]
    off = max(float((alone[key] - wrong[key]).abs().max()) for key in moved)
    assert off > 1e-4
    assert abs(float(alone["metrics.inner_loss"] - wrong["metrics.inner_loss"])) > 1e-3


def test_solves_on_shares_averaged_are_off(outcomes):
    right, averaged = outcomes["local solves"][0]
    assert float((right - averaged).norm() / right.norm()) > 0.05


def test_what_cannot_be_shared_is_refused_in_a_sentence(outcomes):
    for name, words in {
        "a sum": "is not a mean over examples",
        "padding": "is not a mean over examples",
        "a mean over the batch": "lets examples interact",
        "a mean that is kept": "`seen` of the carry differs between parts of a batch",
        "other batches": "the ranks read different batches",
        "weights of each task": "the problem cannot be computed on a part of a batch (ValueError",
        "a mask of weights": (
            "batch_size=9 gives a rank 5 examples, and the network draws another tensor"
        ),
    }.items():
        for message in outcomes[name]:
            assert words in message


def test_ranks_that_differ_are_named(outcomes):
    for message in outcomes["parted"]:
        assert message.startswith("the ranks hold different values of the hypers `decay` at step 3")


def test_an_error_of_the_first_rank_is_that_of_all(outcomes):
    assert outcomes["failing"] == ("rank 0 cannot write", "rank 0 cannot write")


# --- what it costs ---


def test_an_update_is_one_flat_all_reduce_beside_the_loss(outcomes):
    weights = 6 * 8 + 8 + 8 * 7 + 7 + 7 * 3 + 3
    for sizes in outcomes["collectives of training"]:
        assert sizes == [1, weights] * 5
    scales = 9 * 2 * (8 + 7 + 3)  # of nine examples, for weights and biases
    w0, response, outer = [1, weights], [1, scales, weights + scales], [1, scales]
    assert outcomes["collectives of delta_stn"][0] == [*w0, *response, *outer]


def test_batch_norm_costs_one_collective_a_layer_and_direction(outcomes):
    first, second, weights = 2 * 4, 2 * 6, 507
    assert (
        outcomes["collectives of batch norm"][0] == [first, second, 1, second, first, weights] * 5
    )


def test_no_step_waits_for_the_device(outcomes):
    for name in ("no waiting", "no waiting in batch norm"):
        assert outcomes[name] == (None, None)


# --- runs ---


def test_a_run_stopped_by_a_signal_on_the_other_rank_goes_on_to_the_same_bits(outcomes):
    ours, theirs = outcomes["runs"]
    assert not isinstance(ours, str), ours
    whole, first, second = ours
    assert (first["stopped"], first["signal"]) == ("interrupted", "SIGINT")
    assert first["steps"] < whole["steps"]
    assert [drop_costs(x["best"]) for x in (whole, second)] == [
        drop_costs(x["best"]) for x in (theirs[0], theirs[2])
    ]
    assert drop_costs(whole["best"]) == drop_costs(second["best"])
    lines = [read(outcomes["out"] / name) for name in ("whole", "stopped")]
    assert lines[0] == lines[1]
    assert len(lines[0]) > 4


def test_a_refit_stopped_by_a_signal_on_the_other_rank_goes_on_to_the_same_bits(outcomes):
    ours, theirs = outcomes["refits"]
    assert not isinstance(ours, str), ours
    whole, first, second = ours
    assert (first["stopped"], first["signal"]) == ("interrupted", "SIGINT")
    assert first["refit"]["chosen"] is None
    for one, other in ((whole, theirs[0]), (second, theirs[2]), (whole, second)):
        assert without_costs(one) == without_costs(other)
    assert differences(outcomes["out"] / "refitted", outcomes["out"] / "refit-stopped") == []
    assert not (outcomes["out"] / "refitted1").exists()


@pytest.mark.filterwarnings("ignore:Implicit. CG leaves")  # its curvature is damped
def test_a_run_is_that_of_one_process_with_its_hypergradients_held_against_the_exact_ones(
    outcomes, tmp_path
):
    exact_run(tmp_path / "alone")
    ours, theirs = read(outcomes["out"] / "ridge"), read(tmp_path / "alone")
    assert "hypergradient.error" in theirs[-1]
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for key, value in other.items():
            assert one[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


def test_one_rank_writes(outcomes):
    assert not (outcomes["out"] / "whole1").exists()
    assert {path.name for path in (outcomes["out"] / "whole").iterdir()} >= {
        "metrics.jsonl",
        "summary.json",
        "checkpoint.pt",
    }


def torchrun(*arguments, cwd, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONWARNINGS", None)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "bilevel",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *arguments], cwd=cwd, env=environment, **pipes, **options)


@pytest.mark.parametrize(
    ("device", "tolerance"),
    [
        ("cpu", 1e-4),
        pytest.param(
            "cuda",
            1e-3,
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
            ],
        ),
    ],
)
def test_torchrun_leaves_one_set_of_files_and_the_metrics_of_one_process(
    device, tolerance, tmp_path
):
    process = torchrun(*QUICK, f"runner.device={device}", cwd=tmp_path)
    shown, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert shown.count("saved in") == 1
    (run,) = (tmp_path / "runs").iterdir()
    files = {path.name for path in run.iterdir()}
    assert {
        "config.yaml",
        "curves.png",
        "run.json",
        "metrics.jsonl",
        "summary.json",
        "checkpoint.pt",
    } <= files
    command = [
        sys.executable,
        "-m",
        "bilevel",
        *QUICK,
        f"runner.device={device}",
        "runner.progress=none",
        "hydra.run.dir=one",
    ]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    for ours, theirs in zip(read(run), read(tmp_path / "one"), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=tolerance, abs=1e-5), key


def test_a_mistake_is_reported_once_and_leaves_nothing(tmp_path):
    process = torchrun(*QUICK, "runner.device=cpu", "problem.space.dropout1.init=7", cwd=tmp_path)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode != 0
    assert errors.count("lies outside (0, 0.95)") == 1
    assert not list((tmp_path / "runs").iterdir())


def test_a_sweep_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        BilevelError,
        match="-m is a sweep, but torchrun and srun spread one run over their processes",
    ):
        prepared([*QUICK, "-m", "seed=0,1"])


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="asks /proc for the ranks")
def test_a_rank_that_dies_does_not_leave_the_other(tmp_path):
    process = torchrun(*QUICK, "runner.device=cpu", "runner.epochs=2000", cwd=tmp_path)
    metrics = None
    while metrics is None or len(metrics.read_text().splitlines()) < 3:
        time.sleep(0.2)
        assert process.poll() is None, process.communicate()
        metrics = next(tmp_path.glob("runs/*/metrics.jsonl"), None)
    ranks = [
        int(pid)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]
    os.kill(ranks[1], signal.SIGKILL)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode != 0, errors
    assert not any(alive(pid) for pid in ranks)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def read(directory):
    return [
        drop_costs(json.loads(line))
        for line in (directory / "metrics.jsonl").read_text().splitlines()
    ]


def drop_costs(record):
    return {
        key: value
        for key, value in record.items()
        if not key.startswith(("seconds", "peak_memory_bytes"))
    }


# --- the parts, in this process ---


class Twice:
    """Two ranks with equal shares: the sum over ranks is twice the own part."""

    rank, world, device = 0, 2, CPU

    def sum(self, tensor):
        tensor.mul_(2)

    def gather(self, value):
        return [value, value]


def dry_run(problem):
    parallel = ShardedProblem(problem, Twice())
    dry_run_shards(parallel, problem.data(CPU, torch.Generator().manual_seed(1)), CPU)
    return parallel


def through(*tensors):
    """Return a nonlinear function of two tensors, summed over two ranks."""
    x, y = enter(Twice(), tensors)
    return leave(Twice(), [torch.tanh(x @ y), (x * x).sum()])


def test_the_operators_have_every_derivative():
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(n, generator=generator, dtype=torch.float64, requires_grad=True)
        for n in ((2, 3), (3, 2))
    ]
    assert gradcheck(through, tensors)
    assert gradgradcheck(through, tensors)


def test_forward_mode_goes_through_and_can_be_differentiated():
    generator = torch.Generator().manual_seed(0)
    x, y, dx = (torch.randn(3, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    dx.requires_grad_()
    with forward_ad.dual_level():
        out, _ = through(forward_ad.make_dual(x, dx), y)
        tangent = forward_ad.unpack_dual(out).tangent
    expected = 2 * (1 - torch.tanh(x @ y) ** 2) * (dx @ y)
    torch.testing.assert_close(tangent, expected)
    torch.testing.assert_close(
        torch.autograd.grad(tangent.sum(), dx), torch.autograd.grad(expected.sum(), dx)
    )


def test_what_needs_no_gradient_enters_as_it_is():
    x, y = torch.zeros(2), torch.zeros(2, requires_grad=True)
    assert enter(Twice(), [x, y])[0] is x
    with torch.no_grad():
        assert enter(Twice(), [y])[0] is y


@pytest.mark.parametrize(
    ("examples", "world", "sizes"), [(16, 3, [6, 5, 5]), (2, 2, [1, 1]), (9, 2, [5, 4])]
)
def test_shares_are_contiguous_and_nearly_equal(examples, world, sizes):
    parts = even_shards(examples, world)
    assert [part.size for part in parts] == sizes
    assert torch.equal(
        torch.cat([part.of(torch.arange(examples)) for part in parts]), torch.arange(examples)
    )
    assert sum(part.weight for part in parts) == pytest.approx(1)


def calls(x, generator):
    """Every function of `DRAWS` for the examples of x, [b, 6]: by its name, the draw."""
    own, named = {"generator": generator}, {"size": x.shape, "generator": generator}
    p = torch.sigmoid(x)
    return {
        "rand": lambda: torch.rand(*x.shape, **own),
        "rand of size": lambda: torch.rand(**named),
        "randn": lambda: torch.randn((len(x), 2), **own),
        "randint": lambda: torch.randint(3, 9, (len(x),), **own),
        "normal": lambda: torch.normal(0.0, 1.0, x.shape, **own),
        "normal of tensors": lambda: torch.normal(x, p, **own),
        "rand_like": lambda: torch.rand_like(x),
        "randn_like": lambda: torch.randn_like(x),
        "randint_like": lambda: torch.randint_like(x, 5),
        "bernoulli": lambda: torch.bernoulli(p, **own),
        "bernoulli method": lambda: p.bernoulli(**own),
        "multinomial": lambda: torch.multinomial(p, 2, **own),
        "multinomial method": lambda: p.multinomial(3, replacement=True, **own),
        "uniform_": lambda: torch.empty_like(x).uniform_(-1, 1, **own),
        "normal_": lambda: x.clone().normal_(**own),
        "bernoulli_": lambda: x.clone().bernoulli_(0.3, **own),
        "bernoulli_ of a tensor": lambda: x.clone().bernoulli_(p, **own),
        "random_": lambda: x.clone().random_(7, **own),
        "exponential_": lambda: x.clone().exponential_(**own),
        "geometric_": lambda: x.clone().geometric_(0.4, **own),
        "cauchy_": lambda: x.clone().cauchy_(**own),
        "log_normal_": lambda: x.clone().log_normal_(**own),
        "dropout": lambda: F.dropout(x, 0.4),
        "dropout in place": lambda: F.dropout(x.clone(), p=0.4, inplace=True),
        "dropout1d": lambda: F.dropout1d(x[..., None].expand(-1, -1, 3), 0.4),
        "dropout2d": lambda: F.dropout2d(x.view(-1, 6, 1, 1), 0.4),
        "dropout3d": lambda: F.dropout3d(x.view(-1, 6, 1, 1, 1), 0.4),
        "torch.dropout": lambda: torch.dropout(x, 0.4, train=True),
        "feature_dropout": lambda: torch.feature_dropout(x, 0.4, True),
        "alpha_dropout": lambda: F.alpha_dropout(x, 0.4, training=True),
        "feature_alpha_dropout": lambda: F.feature_alpha_dropout(x, 0.4, training=True),
        "gumbel_softmax": lambda: F.gumbel_softmax(x),
        "for weights": lambda: torch.rand(17, 2, **own),
        "one for all": lambda: torch.rand((), **own),
    }


@pytest.mark.parametrize("name", calls(torch.zeros(1, 6), torch.Generator()))
def test_a_share_draws_its_rows_of_what_the_batch_draws(name):
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))

    def drawn(shard):
        generator = torch.Generator().manual_seed(2)
        torch.manual_seed(3)
        with WholeBatchDraws(shard, without_statistics):
            draw = calls(shard.of(x), generator)[name]()
        return draw, generator.get_state(), torch.get_rng_state()

    whole, *states = drawn(Shard(0, 9, 9))
    for shard in even_shards(9, 2):
        part, *after = drawn(shard)
        torch.testing.assert_close(part, shard.of(whole))
        assert all(torch.equal(one, other) for one, other in zip(after, states, strict=True))


def test_every_function_that_is_taught_is_called_above():
    seen = set()

    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.add(func)
            return func(*args, **(kwargs or {}))

    with Seen():
        for call in calls(torch.zeros(3, 6), torch.Generator()).values():
            call()
    assert set(DRAWS) <= seen


def test_batch_norm_in_shares_is_that_of_the_batch():
    """Compare outputs, running statistics and gradients; both ranks hold the same values."""
    x = torch.randn(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e3
    weight, bias = torch.rand(3).double() + 1, torch.rand(3).double()
    running = [torch.zeros(3).double(), torch.ones(3).double()]
    own = [t.clone() for t in running]
    both = torch.cat([x, x])
    expected = F.batch_norm(both, *running, weight, bias, True, 0.3)
    out = BatchStatistics(Twice())(Shard(0, 4, 8), x, *own, weight, bias, True, 0.3)
    torch.testing.assert_close(out, expected[:4], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(own, running)


@all_problems
def test_the_problems_of_the_laws_can_be_shared(make_problem):
    parallel = dry_run(make_problem())
    assert parallel.state_axes == ({"h": 0} if isinstance(parallel.problem, Recurrent) else {})


class Network(nn.Module):
    """A function of sequences [B, T, 4] between a module and a linear layer."""

    def __init__(self, module, apply):
        super().__init__()
        self.module, self.apply_to, self.head = module, apply, nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.apply_to(self.module, x).mean(1))


def attend(module, x):
    query = module(x)[:, None]
    return F.scaled_dot_product_attention(
        query, query, query, dropout_p=0.5 if module.training else 0.0
    )[:, 0]


@pytest.mark.parametrize(
    ("module", "apply"),
    [
        (
            nn.LSTM(4, 4, num_layers=2, dropout=0.5, batch_first=True),
            lambda module, x: module(x)[0],
        ),
        (
            nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True),
            lambda module, x: module(x, x, x)[0],
        ),
        (nn.Linear(4, 4), attend),
        (nn.Identity(), lambda module, x: x[torch.randperm(len(x))] if module.training else x),
    ],
    ids=[
        "dropout in a fused lstm",
        "dropout in attention",
        "dropout in fused attention",
        "a mixture of examples",
    ],
)
def test_draws_that_cannot_be_cut_are_refused(module, apply):
    with pytest.raises(
        Refused, match="draws without a leading example axis; run it in one process"
    ):
        dry_run(Decayed(Network(module, apply), (6, 4)))


def test_draws_per_example_after_a_fused_layer_can_be_cut():
    def apply(module, x):
        return F.dropout(module(x)[0], 0.5, module.training)

    dry_run(Decayed(Network(nn.GRU(4, 4, batch_first=True), apply), (6, 4)))


def test_one_process_is_alone():
    with open_ranks(CPU) as ranks:
        assert ranks is SINGLE_PROCESS
    assert SINGLE_PROCESS.maximum(1.5, True) == [1.5, True]
    assert SINGLE_PROCESS.on_first(lambda: 3) == 3
    with pytest.raises(RuntimeError, match="gloo"), open_ranks(CPU):
        raise RuntimeError("of gloo, without another process")
