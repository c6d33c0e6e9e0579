"""A last batch of one example under batch norm is refused before the first step."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bilevel import (
    BilevelError,
    ModuleProblem,
    Positive,
    Runner,
    Space,
    check_problem,
    solvers,
    squared_norm,
)

WORDS = "batch norm cannot normalize a training batch of one example; set drop_last=True"
X = torch.randn(21, 3, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(21) % 2


class Decayed(ModuleProblem):
    def inner_objective(self, hypers, params, prediction, batch):
        penalty = 0.5 * (hypers["decay"] * squared_norm(params)).mean()
        return F.cross_entropy(prediction, batch[1]) + penalty

    def outer_objective(self, hypers, params, prediction, batch):
        return F.cross_entropy(prediction, batch[1])


def network(kind="flat"):
    if kind == "flat":
        return nn.Sequential(nn.Flatten(), nn.Linear(15, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    norm = nn.BatchNorm1d(4) if kind == "channels" else nn.LayerNorm(5)
    return nn.Sequential(nn.Conv1d(3, 4, 1), norm, nn.Flatten(), nn.Linear(20, 2))


def problem(net, batch_size=10, **options):
    loader = DataLoader(TensorDataset(X, Y), batch_size, shuffle=True, **options)
    return Decayed(net, Space(decay=Positive(init=0.1)), loader, loader)


def run(made, solver, directory):
    runner = Runner(epochs=2, warmup_epochs=0, progress="none", picture=False)
    return runner.run(made, solver, directory=directory)


@pytest.mark.parametrize("solver", [solvers.Fixed, solvers.delta_stn, solvers.stn])
@pytest.mark.parametrize("batch_size", [1, 4, 10, 20])
def test_a_last_batch_of_one_is_refused(tmp_path, solver, batch_size):
    with pytest.raises(BilevelError, match=WORDS):
        run(problem(network(), batch_size), solver(), tmp_path)
    assert WORDS in str(check_problem(problem(network(), batch_size), solvers={}))


def test_the_error_of_a_loader_of_ones_own_is_a_sentence_too(tmp_path):
    batches = [(X[:20], Y[:20]), (X[20:], Y[20:])]
    made = Decayed(network(), Space(decay=Positive(init=0.1)), batches, batches)
    with pytest.raises(BilevelError, match=WORDS):
        run(made, solvers.Fixed(), tmp_path)


def frozen():
    net = network()
    net[2].eval()
    return net


@pytest.mark.parametrize(
    "make",
    [
        lambda: problem(network(), drop_last=True),
        lambda: problem(network(), batch_size=7),
        lambda: problem(frozen()),
        lambda: problem(network("channels")),  # which has five values per channel
        lambda: problem(network("layer norm")),
    ],
)
def test_the_remedies_work_and_other_networks_run(tmp_path, make):
    assert run(make(), solvers.Fixed(), tmp_path)["steps"] > 0
