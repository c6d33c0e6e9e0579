"""Tests of the language model by a transformer: its windows, its decay and its tuning."""

import math

import pytest
import torch
import torch.nn.functional as F

from bilevel import BilevelError, Runner, check_problem
from bilevel.problems.language_modeling.corpus import Corpus
from bilevel.problems.language_modeling.transformer import TransformerLanguage
from bilevel.solvers import SelfTuning, Unrolled, implicit_cg
from tests.support.solver_cases import CPU, RECIPES, ready

WORDS = 11


def small(**options):
    draws = torch.Generator().manual_seed(0)
    splits = (torch.randint(WORDS, (n,), generator=draws) for n in (150, 120, 90))
    corpus = Corpus(*splits, tuple(f"w{i}" for i in range(WORDS)))
    sizes = {"width": 8, "depth": 1, "heads": 2, "batch_size": 4, "length": 5}
    return TransformerLanguage(corpus, **{**sizes, "evaluation_batch_size": 3, **options})


@pytest.mark.parametrize("flags", RECIPES.values(), ids=RECIPES)
def test_self_tuning_takes_finite_rounds(flags):
    solver = ready(small(), SelfTuning(**flags))
    assert all(torch.isfinite(value) for value in solver.step().values())


@pytest.mark.parametrize("make", [implicit_cg, Unrolled])
def test_smooth_dropout_is_tuned_by_differentiation(make):
    solver = ready(small(dropout="gaussian"), make())
    assert float(solver.hypergradient().abs().min()) > 0


def test_objectives_are_the_mean_over_tokens_and_half_the_decay():
    problem = small()
    params, carry = problem.init(torch.Generator())
    batch = problem.data(CPU, torch.Generator()).train.peek()
    hypers = problem.space.constrain(problem.space.init())
    logits, _ = problem.predict(hypers, params, carry, batch, train=False, generator=None)
    token = F.cross_entropy(logits.reshape(-1, WORDS), batch[1].reshape(-1))
    outer = problem.outer_objective(hypers, params, logits, batch)
    penalty = problem.inner_objective(hypers, params, logits, batch) - outer
    norm = sum(p.square().sum() for p in params.values())
    torch.testing.assert_close(outer, token)
    torch.testing.assert_close(penalty, 0.5 * hypers["weight_decay"] * norm, rtol=1e-3, atol=1e-6)


def test_a_run_learns_and_reports_perplexity(tmp_path):
    runner = Runner(epochs=3, warmup_epochs=1, progress="none")
    summary = runner.run(small(), SelfTuning(), directory=tmp_path)
    assert summary["last"]["test_perplexity"] == pytest.approx(
        math.exp(summary["last"]["test_loss"]), rel=1e-5
    )


def test_the_problem_obeys_the_laws():
    assert check_problem(small(), solvers={}).ok


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"heads": 3}, r"heads=3 does not divide 8"),
        ({"length": 0}, r"length=0"),
        ({"length": 100}, r"too few"),
    ],
)
def test_a_size_that_does_not_fit_is_a_sentence(options, sentence):
    with pytest.raises(BilevelError, match=sentence):
        small(**options).data(CPU, torch.Generator())
