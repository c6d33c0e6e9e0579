"""Run the fake solver on the fake problem, and compare two runs."""

import torch

from bilevel import Runner
from bilevel.loggers.records import read_metrics
from tests.support.fakes import FakeProblem, FakeSolver


def run(
    directory,
    solver=None,
    problem=None,
    *,
    resume=False,
    seed=0,
    params=None,
    loggers=(),
    **settings,
):
    runner = Runner(
        **{
            "epochs": 4,
            "warmup_epochs": 1,
            "progress": "none",
            "picture": False,
            "device": "cpu",
            **settings,
        }
    )
    solver = solver or FakeSolver()
    arguments = {
        "directory": directory,
        "seed": seed,
        "resume": resume,
        "params": params,
        "loggers": loggers,
    }
    return runner.run(problem or FakeProblem(), solver, **arguments), solver


def comparable(directory):
    """Records without what differs from run to run by nature."""
    return [
        {k: v for k, v in r.items() if not k.startswith(("seconds", "peak_memory_bytes"))}
        for r in read_metrics(directory / "metrics.jsonl")
    ]


def same_weights(a, b):
    return torch.equal(a.params["w"], b.params["w"]) and torch.equal(a.u, b.u)
