"""Tests of the comparison with other libraries; none of them needs one of these."""

import math
import statistics

import pytest
import torch

from benchmarks.peers import __main__ as command
from benchmarks.peers import oracle
from benchmarks.peers.libraries import LIBRARIES, Library
from benchmarks.peers.measure import in_turn, paired_ratio, rank_below
from benchmarks.peers.ours import OURS
from benchmarks.peers.workloads import K, Size, prepare

SMALL = {
    "tensors": Size((5, 4, 3)),
    "two hidden layers": Size((4, 3, 3, 2)),
    "weights": Size((6, 3), per_weight=True),
}


@pytest.mark.parametrize("row", OURS)
@pytest.mark.parametrize("size", SMALL)
def test_our_value_is_that_of_the_dense_oracle(size, row):
    work = prepare(SMALL[size])
    exact = oracle.ROWS[row](oracle.Oracle(work))
    call = OURS[row](work)
    assert command.error(call(), exact) < 1e-5
    assert command.error(call(), exact) < 1e-5  # a call leaves nothing to the next


def test_the_values_tend_to_the_implicit_function_theorem(monkeypatch):
    """With many products the solves agree with the inverse; ten are not enough."""
    found = oracle.Oracle(prepare(SMALL["weights"]))
    H = torch.stack(
        [found.product(found.w, dense=False)(e) for e in torch.eye(18, dtype=torch.float64)]
    )
    v = found.outer_gradient(found.w)
    exact = -found.cross(found.w, torch.linalg.solve(H, v))
    assert command.error(oracle.neumann(found), exact) > 1e-3
    monkeypatch.setattr(oracle, "K", 2000)
    assert command.error(oracle.neumann(found), exact) < 1e-8
    monkeypatch.setattr(oracle, "K", 18)
    assert command.error(oracle.conjugate_gradients(found), exact) < 1e-8


@pytest.mark.parametrize("size", SMALL)
def test_products_equal_the_dense_matrix(size):
    found = oracle.Oracle(prepare(SMALL[size]))
    q = torch.linspace(-1, 1, found.w.numel(), dtype=torch.float64)
    products = [found.product(found.w, dense=dense)(q) for dense in (True, False)]
    assert command.error(*products) < 1e-13


def test_the_oracle_of_unrolled_steps_is_the_derivative_of_the_steps():
    found = oracle.Oracle(prepare(SMALL["tensors"]))
    u = found.work.u.clone().requires_grad_()
    w = found.w
    for _ in range(K):
        w = w - oracle.RATE * found.gradient(w, u)
    (exact,) = torch.autograd.grad(found.work.outer(found.cut(w)), u)
    assert command.error(oracle.reverse(found), exact) < 1e-12


@pytest.mark.parametrize("n", [5, 6, 20, 101, 2000])
def test_the_lower_bound_is_an_order_statistic(n):
    """Fair coins: more than i of n show heads with at least 97.5 %, and i + 1 would be too much."""

    def more_than(i):
        return 1 - sum(math.comb(n, k) for k in range(i + 1)) / 2**n

    i = rank_below(n)
    assert i == 0 or more_than(i) >= 0.975
    assert more_than(i + 1) < 0.975
    assert n < 1000 or i / n > 0.47


def test_a_ratio_is_paired_so_a_slow_moment_affects_both():
    own = [1.0, 1.0, 50.0, 1.0, 1.0, 1.0, 1.0]
    ratio = paired_ratio([2 * t for t in own], own)
    assert ratio.median == ratio.low == 2.0
    assert ratio.rounds == 7
    spread = paired_ratio([0.5, 1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 6)
    assert spread.low == 0.5 < spread.median == statistics.median([2.0, 3.0])


def test_only_lines_with_an_aim_can_miss_it():
    slow = paired_ratio([0.5, 0.5], [1.0, 1.0])
    lines = [command.Line("size", "CG", name, 0.0, 0.0, 1.0, slow) for name in ("a", "b")]
    libraries = {"a": Library((), (), "", {}), "b": Library((), (), "", {}, aim=None)}
    assert command.below(lines, libraries) == ["a, CG, size: 0.50"]
    assert command.below([lines[0]._replace(ratio=paired_ratio([1.0], [1.0]))], libraries) == []


def test_calls_are_taken_in_turn_and_equally_often():
    counts = {"a": 0, "b": 0}

    def call(name):
        counts[name] += 1

    taken = in_turn({name: lambda name=name: call(name) for name in counts}, 0.0)
    assert counts["a"] == counts["b"] == len(taken["a"]) + 2 == len(taken["b"]) + 2


def test_a_missing_library_is_left_out_with_its_reason():
    missing = Library(("no_such_module.part",), ("no-such-package",), "pip install it", {})
    assert missing.missing() == "the module no_such_module.part is not installed; pip install it"
    assert missing.versions() == "no-such-package unknown"
    for library in LIBRARIES.values():
        assert library.missing() is None or "install" in library.missing()


def test_the_table_has_a_line_for_each_library_and_method(monkeypatch, capsys):
    """A library that repeats our own calls has our own error and a ratio near 1."""
    twin = Library(("torch",), ("torch",), "", {"CG": OURS["CG"], "reverse": OURS["reverse"]})
    absent = Library(("no_such_module",), (), "pip install it", OURS)
    monkeypatch.setattr(command, "LIBRARIES", {"twin": twin, "absent": absent})
    monkeypatch.setattr(command, "SIZES", SMALL)
    monkeypatch.setattr(command, "one_thread", lambda: None)
    monkeypatch.setattr("sys.argv", ["peers", "--quick"])
    command.main()
    printed = capsys.readouterr().out
    assert "absent: left out, the module no_such_module is not installed; pip install it" in printed
    assert "twin: torch 2" in printed
    lines = [line for line in printed.splitlines() if line.startswith("| tensors")]
    assert [line.split(" | ")[1:3] for line in lines] == [["CG", "twin"], ["reverse", "twin"]]
    for line in lines:
        _, _, _, its, own, _, ratio, low, _, n = line.strip("| ").split(" | ")
        assert its == own
        assert float(low) <= float(ratio)
        assert int(n) == 5
