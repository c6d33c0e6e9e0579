"""Tests of the language model: carried state, masks, penalties and tuning."""

import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from bilevel import BilevelError, Runner, Solution, check_problem, evaluate
from bilevel.checkpoint.checkpoints import best_solution
from bilevel.loggers.records import read_metrics
from bilevel.problems.language_modeling.corpus import Corpus, number_words
from bilevel.problems.language_modeling.problem import Language
from bilevel.problems.language_modeling.texts import split_prose
from bilevel.problems.language_modeling.windows import Windows
from bilevel.solvers import Fixed, SelfTuning
from bilevel.solvers.autodiff.decompositions import FORWARD_MODE, Decomposed
from bilevel.solvers.optim.lr_schedules import NonMonotone
from tests.support.device_waits import no_waiting
from tests.support.solver_cases import CPU, RECIPES, ready, sgd

WORDS = 11
RATES = ("input_dropout", "hidden_dropout", "output_dropout", "embedding_dropout", "weight_dropout")
STILL = {name: {"init": 1e-9, "scale": 1e-9} for name in RATES} | {
    name: {"scale": 1e-9} for name in ("ar", "tar")
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def text(seed=0, sizes=(150, 120, 90), words=WORDS):
    draws = generator(seed)
    return Corpus(
        *(torch.randint(words, (n,), generator=draws) for n in sizes),
        tuple(f"w{i}" for i in range(words)),
    )


def small(**options):
    sizes = {
        "embedding": 6,
        "hidden": 7,
        "layers": 2,
        "batch_size": 4,
        "bptt": 5,
        "evaluation_batch_size": 3,
    }
    return Language(text(), **{**sizes, "dtype": torch.float64, **options})


def start(problem, away=0.3):
    """Return weights away from the start, where biases are zero, and a nonzero state."""
    draws = generator(1)
    params, carry = problem.init(generator())
    moved = {
        name: p + away * torch.randn(p.shape, generator=draws, dtype=p.dtype)
        for name, p in params.items()
    }
    return moved, {
        name: torch.randn(s.shape, generator=draws, dtype=s.dtype) for name, s in carry.items()
    }


def hypers(problem, **values):
    drawn = problem.space.constrain(problem.space.init(torch.float64))
    return drawn | {
        name: torch.as_tensor(value, dtype=torch.float64) for name, value in values.items()
    }


def batch(length=5, rows=4, begins=False, seed=3):
    tokens = torch.randint(WORDS, (rows, length + 1), generator=generator(seed))
    return tokens[:, :-1], tokens[:, 1:], torch.full((rows,), begins)


def predict(problem, params, carry, batch, *, train=False, seed=0, **values):
    draws = generator(seed) if train else None
    return problem.predict(
        hypers(problem, **values), params, carry, batch, train=train, generator=draws
    )


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


ARCHITECTURES = {
    "lstm": {},
    "gru": {"cell": "gru"},
    "untied": {"tied": False, "hidden": 5},
    "one layer": {"layers": 1},
}
architectures = pytest.mark.parametrize("options", ARCHITECTURES.values(), ids=ARCHITECTURES)


# --- the problem


@pytest.mark.parametrize(
    "options",
    [*ARCHITECTURES.values(), {"dropout": "gaussian"}, {"dropout": "concrete"}],
    ids=[*ARCHITECTURES, "gaussian", "concrete"],
)
def test_nothing_is_wrong_with_it(options):
    report = check_problem(small(**options), solvers={"delta_stn": SelfTuning(), "fixed": Fixed()})
    assert str(report).splitlines() == [
        "Language: nothing is wrong",
        "  solvers that can tune it: delta_stn, fixed",
    ]


def test_space():
    space = small().space
    assert tuple(space) == (*RATES, "ar", "tar")
    assert [space[name].per_example for name in space] == [
        True,
        True,
        True,
        False,
        False,
        True,
        True,
    ]
    assert [space[name].differentiable for name in space] == [False] * 5 + [True] * 2
    assert small(dropout="gaussian").space["weight_dropout"].differentiable
    assert "hidden_dropout" not in small(layers=1).space
    leaves = space.constrain(torch.randn(4, space.numel, generator=generator()))
    assert [leaf.ndim for leaf in leaves.values()] == [1, 1, 1, 0, 0, 1, 1]


@architectures
def test_two_windows_say_what_one_long_window_says(options):
    problem = small(**options)
    params, carry = start(problem)
    tokens, targets, begins = batch(length=10)
    whole, last = predict(problem, params, carry, (tokens, targets, begins))
    first, between = predict(problem, params, carry, (tokens[:, :4], targets[:, :4], begins))
    second, end = predict(problem, params, between, (tokens[:, 4:], targets[:, 4:], begins))
    for name in whole:
        close(torch.cat([first[name], second[name]], 1), whole[name])
    for name, state in last.items():
        close(end[name], state)


def test_a_row_that_begins_forgets_the_state():
    problem = small()
    params, carry = start(problem)
    tokens, targets, _ = batch()
    begins = torch.tensor([True, False, True, False])
    ours, _ = predict(problem, params, carry, (tokens, targets, begins))
    fresh, _ = predict(
        problem, params, problem.fresh_carry(carry, (tokens,)), (tokens, targets, begins)
    )
    kept, _ = predict(problem, params, carry, (tokens, targets, torch.zeros_like(begins)))
    close(ours["logits"], torch.where(begins[:, None, None], fresh["logits"], kept["logits"]))


def reference(problem, params, carry, batch, rates, seed):
    """Compute the training pass step by step, with masks drawn in the same order."""
    draws, tokens = generator(seed), batch[0]

    def mask(shape, rate):
        keep = 1 - torch.as_tensor(rate, dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1))
        return (torch.rand(shape, generator=draws) < keep) / keep

    layers = len(problem.network.layers)
    names = [f"layers.{i}.weight_hh_l0" for i in range(layers)]
    recurrent = [params[name] * mask(params[name].shape, rates["weight_dropout"]) for name in names]
    words = mask((WORDS,), rates["embedding_dropout"])
    x = [
        params["embedding.weight"][tokens[:, t]] * words[tokens[:, t]][:, None]
        for t in range(tokens.shape[1])
    ]
    for site in range(layers + 1):
        name = "input" if site == 0 else "output" if site == layers else "hidden"
        locked, raw = mask((len(tokens), 1, x[0].shape[1]), rates[f"{name}_dropout"])[:, 0], x
        x = [step * locked for step in x]
        if site == layers:
            break
        h, p = (
            carry[f"hidden.{site}"],
            {k: params[f"layers.{site}.{k}_l0"] for k in ("weight_ih", "bias_ih", "bias_hh")},
        )
        c, outputs = carry.get(f"cell.{site}"), []
        for step in x:
            into, back = (
                step @ p["weight_ih"].T + p["bias_ih"],
                h @ recurrent[site].T + p["bias_hh"],
            )
            if c is None:
                (r, z, n), (r_h, z_h, n_h) = into.chunk(3, 1), back.chunk(3, 1)
                z = torch.sigmoid(z + z_h)
                h = (1 - z) * torch.tanh(n + torch.sigmoid(r + r_h) * n_h) + z * h
            else:
                i, f, g, o = (into + back).chunk(4, 1)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        x = outputs
    raw, dropped = torch.stack(raw, 1), torch.stack(x, 1)
    decoder = params.get("decoder", params["embedding.weight"])
    return {"logits": dropped @ decoder.T + params["bias"], "raw": raw, "dropped": dropped}


@architectures
def test_training_equals_its_steps_written_out_with_locked_masks(options):
    """Masks of activations do not change over time.

    The mask of the recurrent weights is one for all steps and rows.
    """
    problem = small(**options)
    params, carry = start(problem)
    rates = {
        "input_dropout": [0.2, 0.5, 0.0, 0.8],
        "output_dropout": 0.4,
        "embedding_dropout": 0.3,
        "weight_dropout": 0.5,
    }
    rates |= {"hidden_dropout": [0.6, 0.1, 0.4, 0.0]} if "hidden_dropout" in problem.space else {}
    ours, _ = predict(problem, params, carry, batch(), train=True, seed=5, **rates)
    for name, theirs in reference(problem, params, carry, batch(), rates, 5).items():
        close(ours[name], theirs)


def test_masks_are_constant_over_time_and_differ_between_rows():
    problem = small(hidden=40, embedding=40)
    params, carry = start(problem)
    out, _ = predict(
        problem, params, carry, batch(length=6), train=True, output_dropout=[0.0, 0.5, 0.5, 0.9]
    )
    factor = out["dropped"] / out["raw"]
    close(factor, factor[:, :1].expand_as(factor))
    assert factor[0].eq(1).all()
    assert not torch.equal(factor[1], factor[2])
    assert set(factor[1].unique().tolist()) == {0.0, 2.0}
    assert (factor[3, 0] == 0).sum() > 25


def test_evaluation_drops_nothing_and_has_no_penalty():
    problem = small()
    params, carry = start(problem)
    at = hypers(problem, ar=3.0, tar=2.0, **dict.fromkeys(RATES, 0.9))
    loss, _ = problem.outer_loss(at, params, carry, batch())
    prediction, _ = predict(problem, params, carry, batch())
    close(prediction["dropped"], prediction["raw"])
    log_p = torch.log_softmax(prediction["logits"], -1)
    close(
        loss,
        torch.stack([-log_p[b, t, batch()[1][b, t]] for b in range(4) for t in range(5)]).mean(),
    )


def test_penalties_by_their_formulas():
    problem = small()
    params, carry = start(problem)
    ar, tar = (
        torch.tensor([0.1, 0.2, 0.4, 0.8]).double(),
        torch.tensor([1.0, 0.0, 2.0, 0.5]).double(),
    )
    at = hypers(problem, ar=ar, tar=tar, output_dropout=0.5)
    prediction, _ = problem.predict(at, params, carry, batch(), train=True, generator=generator())
    raw, dropped = prediction["raw"], prediction["dropped"]
    units, rows, steps = raw.shape[2], range(4), range(5)
    size = [sum((dropped[b, t] ** 2).sum() for t in steps) / (5 * units) for b in rows]
    change = [
        sum(((raw[b, t + 1] - raw[b, t]) ** 2).sum() for t in steps[:-1]) / (4 * units)
        for b in rows
    ]
    penalty = sum(ar[b] * size[b] + tar[b] * change[b] for b in rows) / 4
    without = problem.outer_objective(at, params, prediction, batch())
    close(problem.inner_objective(at, params, prediction, batch()), without + penalty)


def test_the_table_of_a_tied_decoder_gets_both_gradients():
    tied, untied = small(embedding=6, hidden=6), small(embedding=6, hidden=6, tied=False)
    params, carry = start(tied)
    params = {name: p.requires_grad_() for name, p in params.items()}
    both = {**params, "decoder": params["embedding.weight"].detach().clone().requires_grad_()}
    ours, theirs = (
        p.inner_loss(hypers(p), w, carry, batch(), generator())[0]
        for p, w in ((tied, params), (untied, both))
    )
    close(ours, theirs)
    (whole,) = torch.autograd.grad(ours, [params["embedding.weight"]])
    embedding, decoder = torch.autograd.grad(theirs, [params["embedding.weight"], both["decoder"]])
    close(whole, embedding + decoder)
    assert embedding.abs().max() > 1e-4


# --- data and metrics


def test_perplexity_is_the_exponential_of_the_mean_over_tokens():
    problem = small()
    params, carry = start(problem, away=1.0)
    at = hypers(problem)
    stream = problem.data(CPU, generator()).valid
    measured = evaluate(problem, Solution(at, params, carry), stream)
    carry, losses = problem.fresh_carry(carry, (torch.zeros(3),)), []
    for tokens, targets, begins in stream.once():
        prediction, carry = predict(problem, params, carry, (tokens, targets, begins))
        losses.append(
            F.cross_entropy(prediction["logits"].flatten(0, 1), targets.flatten(), reduction="none")
        )
    assert len({len(part) for part in losses}) == 2  # the last window is shorter
    mean = torch.cat(losses).mean().item()
    assert measured == pytest.approx({"loss": mean, "perplexity": math.exp(mean)}, rel=1e-12)
    assert torch.cat(losses).exp().mean().item() > 1.05 * measured["perplexity"]
    assert torch.stack([part.mean() for part in losses]).mean().item() != pytest.approx(
        mean, rel=1e-6
    )
    assert problem.derived({"loss": 1e4})["perplexity"] == math.inf


def test_all_splits_are_windows_of_the_same_length():
    data = small().data(CPU, generator())
    assert [type(stream) for stream in data] == [Windows] * 3
    assert [tuple(stream.next()[0].shape) for stream in data] == [(4, 5), (4, 5), (1, 5)]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bptt": 1}, "bptt=1 must be a whole number of at least 2"),
        ({"cell": "ltsm"}, r"cell='ltsm' is unknown \(did you mean `lstm`\?\); choose lstm or gru"),
        ({"layers": 0}, "layers=0 must be a whole number of at least 1"),
        (
            {"space": {"weight_dropout": {"per_example": True}}},
            "`weight_dropout` masks weights, which all examples share",
        ),
        ({"dropout": "bernouli"}, "did you mean `bernoulli`"),
    ],
)
def test_bad_options(options, sentence):
    with pytest.raises(BilevelError, match=sentence):
        small(**options)


def test_a_text_shorter_than_its_batch():
    with pytest.raises(
        BilevelError, match="the train split has 150 tokens, which is too few for 40 rows of 5"
    ):
        small(batch_size=40).data(CPU, generator())


# --- self-tuning


@pytest.mark.parametrize("flags", RECIPES.values(), ids=RECIPES)
@architectures
def test_rounds_run_without_waiting_and_move_every_hyperparameter(options, flags):
    problem = small(dtype=torch.float32, **options)
    solver = ready(
        problem,
        SelfTuning(inner_steps=2, inner_optimizer=sgd(0.1), clip_norm=0.25, **flags),
        away=0.1,
    )
    before = solver.core.search.u.detach().clone()
    solver.step()
    with no_waiting():
        for _ in range(3):
            metrics = solver.step()
    assert all(torch.isfinite(value) for value in metrics.values())
    assert (solver.core.search.u != before).all()


def test_the_two_passes_carry_states_of_their_own():
    """Without learning, dropout and perturbation both states are those of w₀.

    The perturbed pass has its own state.
    """
    problem = small(space=STILL)
    still = ready(problem, SelfTuning(inner_steps=3, inner_optimizer=sgd(0.0)), away=0.3)
    params, carry = still.core.weights.detached(), dict(still.core.carry)
    still.step(warmup=True)
    stream = problem.data(CPU, generator()).train
    for _ in range(3):
        _, carry = predict(problem, params, carry, stream.next())
    for name in carry:
        torch.testing.assert_close(
            still.core.carry[name], carry[name]
        )  # rates and σ are small, not zero
        torch.testing.assert_close(still.method.response_carry[name], carry[name])
    perturbed = ready(small(), SelfTuning(inner_steps=3, inner_optimizer=sgd(0.0)), away=0.3)
    perturbed.step(warmup=True)
    assert all(
        not torch.allclose(perturbed.core.carry[name], perturbed.method.response_carry[name])
        for name in carry
    )
    joint = ready(small(), SelfTuning(**RECIPES["stn"], inner_steps=3), away=0.3)
    joint.step(warmup=True)
    assert joint.core.carry is joint.method.response_carry


@pytest.mark.parametrize("flags", RECIPES.values(), ids=RECIPES)
def test_outer_batches_continue_each_other_and_leave_the_states_of_training(flags):
    """At Θ = 0 they read w₀, as a pass over validation does, and then start again."""
    problem = small()
    solver = ready(problem, SelfTuning(inner_steps=1, tune_scale=False, **flags))
    solver.step(warmup=True)
    solver.method.theta.load_state_dict(
        ready(problem, SelfTuning(**flags)).method.theta.state_dict()
    )
    before, stream = (
        (dict(solver.core.carry), dict(solver.method.response_carry)),
        problem.data(CPU, generator()).valid,
    )
    params, carry = (
        solver.method.effective_weights(),
        problem.fresh_carry(solver.core.carry, stream.peek()),
    )
    losses = []
    for _ in range(stream.steps_per_epoch + 1):
        loss, carry = problem.outer_loss(hypers(problem), params, carry, stream.next())
        losses.append(loss)
        close(solver.outer_phase()["outer_loss"], loss)
    close(losses[-1], losses[0])
    assert (solver.core.carry, solver.method.response_carry) == before


@architectures
@pytest.mark.parametrize("tangent", [False, True])
def test_the_response_is_that_of_dense_weights_for_each_row(options, tangent):
    """The test covers embedding, tied decoder, masked recurrent weights and decoder together."""
    problem = small(**options)
    solver = ready(problem, SelfTuning(), away=0.3)
    assert solver.method.response.axes["embedding.weight"] == 1
    offset = torch.randn(4, problem.space.numel, generator=generator(), dtype=torch.float64)
    base, theta, h = solver.core.weights.detached(), solver.method.theta.detached(), 1e-6
    rates = dict.fromkeys((name for name in RATES if name in problem.space), 0.3)

    def f(offset, scale=1.0):
        params = solver.method.response.weights(theta, base, scale * offset, tangent=False)
        return predict(problem, params, solver.core.carry, batch(), train=True, seed=2, **rates)[0]

    if tangent:
        at = hypers(problem, **rates)
        solver.core.generator.manual_seed(2)
        ours, _ = solver.method.linearized(at, base, offset, solver.core.carry, batch())
        zero, ahead, behind = f(offset, 0.0), f(offset, h), f(offset, -h)
        theirs = {name: zero[name] + (ahead[name] - behind[name]) / (2 * h) for name in zero}
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)
        return
    ours = f(offset)
    for row in range(4):
        theirs = f(offset[row])
        for name in ours:
            close(ours[name][row], theirs[name][row])


def test_the_response_of_an_lstm_costs_five_units():
    """Units: W₀x, W₀ẋ and W₁x forward, W₀ᵀδ and ∂W₁ backward, recurrent products included."""
    problem = small(
        dtype=torch.float32, tied=False, embedding=24, hidden=32, batch_size=8, layers=1
    )
    solver = ready(problem, SelfTuning(inner_steps=1), away=0.1)
    window = solver.core.data.train.next()

    def count(work):
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    def response():
        solver.method.perturbed_loss(
            solver.core.weights.detached(), solver.method.response_carry, window
        )[0].backward()

    params = solver.core.weights.detached()
    unit = (
        2
        * 8
        * 5
        * sum(p.numel() for name, p in params.items() if p.ndim == 2 and name != "embedding.weight")
    )
    with Decomposed(FORWARD_MODE):
        at = problem.space.constrain(solver.core.search.u0)
        plain = count(
            lambda: problem.predict(
                at, params, solver.core.carry, window, train=False, generator=None
            )
        )
    assert plain == unit
    rows = 4 * 2 * 8 * solver.method.theta.tensors["rows"].numel()
    # The tangent before the first step is zero, so its factors need no gradient.
    first = 2 * 2 * 8 * params["layers.0.weight_hh_l0"].numel()
    assert 5 * unit - first <= count(response) <= 5 * unit + rows


@pytest.mark.parametrize("flags", RECIPES.values(), ids=RECIPES)
def test_a_run_resumes_bit_for_bit(tmp_path, flags):
    def run(name, epochs, resume=False):
        solver = SelfTuning(
            inner_steps=3,
            inner_optimizer=sgd(0.5),
            inner_scheduler=NonMonotone,
            clip_norm=0.25,
            **flags,
        )
        runner = Runner(
            epochs=epochs, warmup_epochs=0.5, progress="none", picture=False, device="cpu"
        )
        return runner.run(small(), solver, directory=tmp_path / name, resume=resume), solver

    def records(name):
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        return [
            {k: v for k, v in line.items() if not k.startswith(("seconds", "peak_memory_bytes"))}
            for line in lines
        ]

    whole, first = run("whole", 3)
    # The 7 steps of an epoch are whole rounds of 3, 1 (the end of warm-up) and 3 steps.
    run("parts", 1)
    parts, second = run("parts", 3, resume=True)
    assert records("parts") == records("whole")
    assert len(records("whole")) == 4
    for ours, theirs in (
        (first.core.carry, second.core.carry),
        (first.core.last_outer_carry, second.core.last_outer_carry),
        (first.method.response_carry, second.method.response_carry),
    ):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(map(torch.equal, first.core.weights.leaves, second.core.weights.leaves))
    assert all(
        record["valid_perplexity"] == math.exp(record["valid_loss"]) for record in records("whole")
    )
    assert (
        parts["last"]["test_perplexity"]
        == whole["last"]["test_perplexity"]
        == math.exp(whole["last"]["test_loss"])
    )
    assert (
        json.loads((tmp_path / "whole" / "summary.json").read_text())["best"]["valid_perplexity"]
        > 1
    )


@pytest.mark.parametrize("words", [WORDS, WORDS + 2])
def test_a_checkpoint_of_another_vocabulary_is_refused(tmp_path, words):
    runner = Runner(epochs=1, warmup_epochs=0, progress="none", picture=False, device="cpu")
    runner.run(small(), Fixed(inner_steps=3), directory=tmp_path)
    other = text(words=words)._replace(vocabulary=tuple(f"v{i}" for i in range(words)))
    problem = Language(
        other, embedding=6, hidden=7, layers=2, batch_size=4, bptt=5, dtype=torch.float64
    )
    sentence = "other words" if words == WORDS else "11 words and this text 13"
    with pytest.raises(BilevelError, match=f"the vocabulary of the checkpoint has {sentence}"):
        runner.run(problem, Fixed(inner_steps=3), directory=tmp_path, resume=True)


def test_it_learns_and_tunes(tmp_path):
    """The text has two sentences in turn, 14 words.

    All but one word in eight follow from the last one.
    """
    once = "the cat sat on a mat . \n\n the dog lay in a basket . \n\n"
    problem = Language(
        number_words(split_prose(once * 40, "it")),
        embedding=12,
        hidden=12,
        layers=1,
        batch_size=4,
        bptt=6,
        evaluation_batch_size=1,
    )
    adam, rmsprop = partial(torch.optim.Adam, lr=0.05), partial(torch.optim.RMSprop, lr=0.03)
    solver = SelfTuning(inner_steps=4, inner_optimizer=adam, outer_optimizer=rmsprop)
    runner = Runner(epochs=3, warmup_epochs=1, progress="none", picture=False, device="cpu")
    summary = runner.run(problem, solver, directory=tmp_path)
    assert summary["last"]["valid_perplexity"] < 2
    assert all(summary["hypers"][name] != summary["initial"][name] for name in summary["hypers"])
    assert best_solution(tmp_path).carry["hidden.0"].shape == (4, 12)


# --- the schedule


@pytest.mark.parametrize(
    ("losses", "drops"),
    [
        ([5, 4, 3, 2, 1, 0.5, 0.4, 0.3], []),  # it improves
        ([3, 4, 4, 4], [3]),  # the best of all but the last two is not beaten
        ([3, 4, 4, 2, 2.5], []),  # the best is new
        ([3, 4, 4, 2, 3.5], [4]),  # …but the last loss is not below what was before the window
        ([3, 4, 4, 4, 4, 2], [3, 4]),  # once for each such epoch
    ],
)
def test_the_learning_rate_drops_when_the_last_loss_is_no_better_than_before_the_window(
    losses, drops
):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=8.0)
    schedule, seen = NonMonotone(optimizer, factor=0.25, window=2), []
    for epoch, loss in enumerate(losses):
        before = optimizer.param_groups[0]["lr"]
        schedule.step(loss)
        if optimizer.param_groups[0]["lr"] != before:
            assert optimizer.param_groups[0]["lr"] == before / 4
            seen.append(epoch)
    assert seen == drops


def test_the_schedule_goes_on_from_its_state():
    whole, resumed = (
        NonMonotone(torch.optim.SGD([torch.zeros(1)], lr=1.0), window=2) for _ in range(2)
    )
    for loss in (3, 4, 4):
        whole.step(loss)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for schedule in (whole, resumed):
        schedule.step(4)
    assert resumed.get_last_lr() == whole.get_last_lr() == [0.25]


@pytest.mark.parametrize(
    ("options", "sentence"), [({"factor": 4.0}, "factor=4.0"), ({"window": 0}, "window=0")]
)
def test_a_schedule_that_cannot_be(options, sentence):
    with pytest.raises(BilevelError, match=sentence):
        NonMonotone(torch.optim.SGD([torch.zeros(1)], lr=1.0), **options)
