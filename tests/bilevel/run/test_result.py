"""Test the result of a run: its solutions, its schedule, and its network as a module and a file."""

import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from bilevel import BilevelError, ModuleProblem, Positive, Result, Runner, Space, best_solution
from bilevel.problems import Ridge
from bilevel.solvers import SAMA, Fixed


class Tied(nn.Module):
    """Two layers with one weight, and a batch norm."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.norm(self.first(x)).tanh())


class Decayed(ModuleProblem):
    def inner_objective(self, hypers, params, prediction, batch):
        return (
            F.cross_entropy(prediction, batch[1]) + hypers["decay"] * params["second.bias"].norm()
        )

    def outer_objective(self, hypers, params, prediction, batch):
        return F.cross_entropy(prediction, batch[1])


X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
Y = X.argmax(1)
QUIET = {"warmup_epochs": 0, "progress": "none", "picture": False}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    torch.manual_seed(0)
    # wrong validation labels: the loss grows from the first evaluation on
    splits = (X, Y), (X, (Y + 1) % 3)
    problem = Decayed(Tied(), Space(decay=Positive(init=0.1)), *splits, batch_size=8)
    solver = SAMA(inner_optimizer=lambda params: torch.optim.SGD(params, lr=0.5))
    return Runner(epochs=8, **QUIET).run(problem, solver, directory=tmp_path_factory.mktemp("run"))


def test_a_result_is_the_summary_with_both_solutions(result):
    assert isinstance(result, dict)
    best, last = result.solution(), result.solution("last")
    assert result["best"]["step"] < result["steps"], "the case must tell best from last"
    assert result["best"]["hypers"] == {k: v.tolist() for k, v in best.hypers.items()}
    assert result["hypers"] == {k: v.tolist() for k, v in last.hypers.items()}
    for part, stored in zip(best, best_solution(result.directory), strict=True):
        assert all(torch.equal(part[key], stored[key]) for key in part)
    assert not torch.equal(best.params["first.weight"], last.params["first.weight"])
    with pytest.raises(BilevelError, match="at='first' is unknown; choose best or last"):
        result.solution("first")


def test_a_result_has_its_records_and_its_schedule(result):
    assert [record["step"] for record in result.metrics] == result.schedule.steps
    assert result.schedule.hypers["decay"][-1] == result["hypers"]["decay"]


@pytest.mark.parametrize("at", ["best", "last"])
def test_the_module_gives_the_measured_loss(result, at):
    module = result.module(at)
    assert not module.training
    assert module.second.weight is module.first.weight
    with torch.no_grad():
        loss = float(F.cross_entropy(module(X), (Y + 1) % 3))
    assert loss == pytest.approx(result[at]["valid_loss"], rel=1e-5)
    assert module is not result.module(at), "each call must give a module of its own"


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_saved_network_loads_into_the_module(result, suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    result.save(path, at="last")
    state = load_file(path) if suffix != ".pt" else torch.load(path, weights_only=True)
    module = Tied().eval()
    module.load_state_dict(state)
    assert torch.equal(module(X), result.module("last")(X))
    if suffix != ".pt":
        with safe_open(path, "pt") as file:
            assert str(result["hypers"]["decay"]) in file.metadata()["hypers"]


def test_a_file_that_cannot_be_written_is_refused(result, tmp_path, monkeypatch):
    with pytest.raises(BilevelError, match=r"no known suffix; choose .safetensors, .pt or .pth"):
        result.save(tmp_path / "model.onnx")
    with pytest.raises(BilevelError, match=r"cannot write .*No such file"):
        result.save(tmp_path / "missing" / "model.pt")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(BilevelError, match="needs safetensors, which is not installed"):
        result.save(tmp_path / "model.safetensors")


def test_a_problem_without_a_module_has_its_weights_by_name(tmp_path, monkeypatch):
    """The directory is optional: the default has the form of the command's."""
    monkeypatch.chdir(tmp_path)
    result = Runner(epochs=2, **QUIET).run(Ridge.synthetic(features=3), Fixed(), seed=4)
    assert result.directory.parent.name == "runs"
    assert result.directory.name.startswith("Ridge-Fixed-seed4-")
    assert (result.directory / "summary.json").exists()
    result.save("weights.pt")
    assert torch.load("weights.pt", weights_only=True).keys() == result.solution().params.keys()
    with pytest.raises(BilevelError, match="problem=Ridge is no ModuleProblem"):
        result.module()
    with pytest.raises(BilevelError, match="directory=None holds no run to continue"):
        Runner(epochs=2, **QUIET).run(Ridge.synthetic(features=3), Fixed(), resume=True)


def test_a_result_without_a_finite_loss_has_no_best_solution():
    nothing = Result({}, problem=Ridge.synthetic(), best=None, last=None)
    with pytest.raises(BilevelError, match="at='best' has no solution"):
        nothing.solution()
