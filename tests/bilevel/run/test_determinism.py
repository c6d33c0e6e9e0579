"""The same seed gives the same bits on the same device, whatever is logged, shown or saved."""

import warnings
from functools import partial

import pytest
import torch
from torch.utils import _pytree as pytree

from bilevel import Runner, SolverWarning
from bilevel.checkpoint.checkpoints import load
from bilevel.loggers.logger import Logger
from bilevel.loggers.records import read_metrics
from bilevel.problems import Quadratic, digits
from bilevel.run.hypergradient_error import HypergradientError
from bilevel.solvers import (
    EvolutionStrategies,
    Unrolled,
    delta_stn,
    implicit_cg,
    implicit_nystrom,
    random_search,
    stn,
)

SOLVERS = {
    "delta_stn": delta_stn,
    "stn": stn,
    "unrolled": partial(Unrolled, inner_steps=3),
    "implicit_cg": implicit_cg,
    "implicit_nystrom": implicit_nystrom,
    "es": EvolutionStrategies,
    "random_search": partial(random_search, trial_epochs=1),
}
CHECKED = ("solver", "train", "valid", "best", "epochs_ended")
TIMES = ("seconds", "peak_memory_bytes")


@pytest.fixture(autouse=True)
def _doubts_are_meant():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolverWarning)
        yield


class Noisy(Logger):
    """Draws from every global generator whenever it is called, and wants pictures."""

    takes_pictures = True

    def start(self, run, state):
        torch.rand(3)

    log = advance = show_pictures = finish = lambda self, *_: torch.rand(7)
    state = lambda self: {"drawn": float(torch.rand(()))}  # noqa: E731


def run(directory, name, problem=None, loggers=(), **settings):
    """A run of three epochs, from the same global state each time."""
    torch.manual_seed(0)
    runner = Runner(
        **{
            "epochs": 3,
            "warmup_epochs": 1,
            "progress": "none",
            "picture": False,
            "device": "cpu",
            **settings,
        }
    )
    problem = problem or digits(hidden=[8], dropout="gaussian", batch_size=256)
    runner.run(problem, SOLVERS[name](), directory=directory, loggers=loggers)
    return directory


def end(directory):
    """What the run ended with, without what it was told of on the way."""
    state = load(directory)
    best = {
        **state["best"],
        "record": {k: v for k, v in state["best"]["record"].items() if k in ("step", "valid_loss")},
    }
    return {name: state[name] for name in CHECKED} | {"best": best}


def lines(directory):
    return [
        {k: v for k, v in r.items() if not k.startswith(TIMES)}
        for r in read_metrics(directory / "metrics.jsonl")
    ]


def assert_same(ours, theirs):
    (left, shape), (right, other) = pytree.tree_flatten(ours), pytree.tree_flatten(theirs)
    assert shape == other
    assert left
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("name", SOLVERS)
def test_what_is_told_shown_and_saved_leaves_the_bits_alone(tmp_path, name, capsys):
    plain = run(tmp_path / "plain", name)
    busy = run(
        tmp_path / "busy",
        name,
        progress="live",
        picture=name == "stn",  # once is enough: it takes a second
        checkpoint_every=2,
        keep_checkpoints=1,
        loggers=[Noisy()],
    )
    assert_same(end(plain), end(busy))
    assert lines(plain) == lines(busy)
    other = tmp_path / "other"
    torch.manual_seed(0)
    Runner(epochs=3, warmup_epochs=1, progress="none", picture=False, device="cpu").run(
        digits(hidden=[8], dropout="gaussian", batch_size=256),
        SOLVERS[name](),
        directory=other,
        seed=1,
    )
    assert lines(other) != lines(plain)  # the comparison can fail


@pytest.mark.parametrize("name", SOLVERS)
def test_how_often_it_is_evaluated_leaves_the_trajectory_alone(tmp_path, name):
    often = run(tmp_path / "often", name, evaluate_every=0.5)
    seldom = run(tmp_path / "seldom", name, evaluate_every=3)
    ours, theirs = end(often), end(seldom)
    for part in ("solver", "train", "valid", "epochs_ended"):
        assert_same(ours[part], theirs[part])
    assert len(lines(often)) > len(lines(seldom))
    shared = {r["step"]: r for r in lines(often)}
    for record in lines(seldom):  # means over the steps between are those of another interval
        measured = [k for k in record if k.startswith(("train_", "valid_", "hypers.", "scales."))]
        assert {k: record[k] for k in measured} == {k: shared[record["step"]][k] for k in measured}


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "random_search"])
def test_to_ask_for_its_hypergradient_leaves_the_bits_alone(tmp_path, name, monkeypatch):
    make = partial(Quadratic.random, weights=3, hypers=2)
    asked = run(tmp_path / "asked", name, make(), epochs=12, evaluate_every=2)
    assert "hypergradient.norm" in lines(asked)[-1]
    monkeypatch.setattr(HypergradientError, "of", classmethod(lambda *_: None))
    alone = run(tmp_path / "alone", name, make(), epochs=12, evaluate_every=2)
    assert "hypergradient.norm" not in lines(alone)[-1]
    assert_same(end(asked), end(alone))


@pytest.mark.parametrize("name", ["delta_stn", "implicit_cg"])
def test_the_strict_option_changes_no_bit_on_a_cpu(tmp_path, name):
    plain = run(tmp_path / "plain", name)
    strict = run(tmp_path / "strict", name, deterministic=True)
    assert_same(end(plain), end(strict))
    assert lines(plain) == lines(strict)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", SOLVERS)
def test_the_strict_option_repeats_its_bits_on_a_gpu(tmp_path, name):
    first, second = (
        run(tmp_path / part, name, device="cuda", deterministic=True) for part in ("a", "b")
    )
    assert lines(first) == lines(second)
    assert_same(end(first), end(second))
