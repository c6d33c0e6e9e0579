"""Test that a user's own loop takes the steps of the Runner, and what `attach` refuses."""

import copy
import io
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import bilevel
from bilevel import BilevelError, Interval, ModuleProblem, Positive, Runner, Space, squared_norm
from bilevel.run.stages import generators
from bilevel.solvers import (
    SAMA,
    SOBA,
    EvolutionStrategies,
    Fixed,
    PopulationBased,
    Unrolled,
    centered_stn,
    delta_stn,
    implicit_cg,
    random_search,
    stn,
)
from bilevel.solvers.penalty import Penalty

SOLVERS = {
    "fixed": Fixed,
    "delta_stn": delta_stn,
    "centered_stn": centered_stn,
    "stn": stn,
    "two outer steps": partial(delta_stn, outer_steps=2, clip_norm=1.0),
    "implicit_cg": implicit_cg,
    "unrolled": partial(Unrolled, inner_steps=3),
    "soba": SOBA,
    "sama": SAMA,
    "penalty": Penalty,
    "es": EvolutionStrategies,
}
STEPS, WARMUP, BATCH = 22, 7, 8
"""The last round is whole; the warm-up is no multiple of a round."""


def network(norm=True):
    torch.manual_seed(1)
    layers = [nn.Linear(4, 6), *([nn.BatchNorm1d(6)] if norm else []), nn.Tanh(), nn.Linear(6, 3)]
    return nn.Sequential(*layers)


def splits():
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(2))
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return (x[:32], y[:32]), (x[32:], y[32:])


def space():
    return Space(decay=Positive(init=0.01), smoothing=Interval(low=0.0, high=0.5, init=0.1))


def loss(prediction, batch):
    return F.cross_entropy(prediction, batch[1])


def train_loss(prediction, batch, hypers):
    target = F.one_hot(batch[1], 3).to(prediction.dtype)
    rate = hypers["smoothing"]
    rate = rate if rate.ndim == 0 else rate[:, None]
    return F.cross_entropy(prediction, (1 - rate) * target + rate / 3)


def penalty(hypers, params):
    return hypers["decay"] * squared_norm(params)


class Smoothed(ModuleProblem):
    def inner_objective(self, hypers, params, prediction, batch):
        return train_loss(prediction, batch, hypers) + penalty(hypers, params).mean()

    def outer_objective(self, hypers, params, prediction, batch):
        return loss(prediction, batch)


def adam(params):
    return torch.optim.Adam(params, lr=0.01, weight_decay=1e-3)


def attached(solver, model, make=adam, **more):
    settings = {"loss": loss, "train_loss": train_loss, "penalty": penalty, **more}
    return bilevel.attach(
        model, space(), optimizer=make(model.parameters()), solver=solver, **settings
    )


def batches():
    """Return the streams of a run, of training and validation batches."""
    problem = Smoothed(network(), space(), *splits(), batch_size=BATCH)
    return problem.data(torch.device("cpu"), generators(3, torch.device("cpu"))[0])


def drive(tuner, data, steps, each=lambda: None):
    """Take inner steps and the outer steps that are due, as the training loop of a user."""
    for _ in range(steps):
        both = isinstance(tuner.solver, (SOBA, Penalty))
        tuner.step(data.train.next(), data.valid.next() if both else None)
        while tuner.due:
            tuner.outer_step(data.valid.next() if tuner.solver.outer_takes else None)
        each()
    return tuner


@pytest.mark.filterwarnings("ignore::bilevel.SolverWarning")
@pytest.mark.parametrize(
    ("name", "norm"), [*((name, True) for name in SOLVERS), ("delta_stn", False)]
)
def test_a_loop_takes_the_steps_of_the_runner(name, norm, tmp_path):
    make = SOLVERS[name]
    # a step schedule of four steps, one epoch of the runner
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5)
    runner = Runner(
        epochs=STEPS / 4,
        warmup_epochs=WARMUP / 4,
        evaluate_every=100,
        progress="none",
        picture=False,
    )
    solver = make(inner_optimizer=adam, inner_scheduler=schedule)
    problem = Smoothed(network(norm), space(), *splits(), batch_size=BATCH)
    runner.run(problem, solver, directory=tmp_path, seed=3)

    model = network(norm)
    optimizer = adam(model.parameters())
    first = next(model.parameters())
    tuner = bilevel.attach(
        model,
        space(),
        loss=loss,
        train_loss=train_loss,
        penalty=penalty,
        optimizer=optimizer,
        solver=make(),
        warmup_steps=WARMUP,
        seed=3,
        example=[s.peek() for s in batches()[:2]],
    )
    scheduler = schedule(optimizer)
    data, ended = batches(), 0

    def each():  # epochs end with the rounds of the runner
        nonlocal ended
        while not tuner._inner_left and ended < tuner.solver.inner_count // 4:
            ended += 1
            scheduler.step()

    drive(tuner, data, STEPS, each)
    tuner.end_round()
    ours, theirs = tuner.solution(), solver.solution()
    assert tuner.solver.inner_count == STEPS == solver.inner_count
    for part, other in zip(ours, theirs, strict=True):
        assert part.keys() == other.keys()
        for key in part:
            assert torch.equal(part[key], other[key]), key
    assert first is next(model.parameters())
    if name != "stn":  # whose weights are w₀ + Θλ
        state = model.state_dict()
        assert all(
            torch.equal(state[key], value) for key, value in {**theirs[1], **theirs[2]}.items()
        )


@pytest.mark.filterwarnings("ignore::bilevel.SolverWarning")
@pytest.mark.parametrize("name", SOLVERS)
def test_a_loaded_state_continues_with_the_same_bits(name):
    """A run with a pause equals one that was saved, and loaded by new objects."""
    straight = attached(SOLVERS[name](), network())
    data = batches()
    drive(straight, data, 7)
    straight.end_round()
    file = io.BytesIO()
    torch.save({"tuner": straight.state_dict(), "data": [s.state_dict() for s in data[:2]]}, file)
    drive(straight, data, 6)

    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    model = network()
    resumed, data = attached(SOLVERS[name](), model, seed=9), batches()
    resumed.load_state_dict(saved["tuner"])
    before = {key: value.clone() for key, value in resumed.hypers.items()}
    for stream, state in zip(data[:2], saved["data"], strict=True):
        stream.load_state_dict(state)
    drive(resumed, data, 6)
    assert all(torch.equal(before[key], v) for key, v in saved["tuner"]["solution"][0].items())
    for part, other in zip(straight.solution(), resumed.solution(), strict=True):
        assert all(torch.equal(part[key], other[key]) for key in part)
    assert resumed.solver.outer_count == straight.solver.outer_count
    assert resumed.evaluate(splits()[1])["examples"] == straight.evaluate(splits()[1])["examples"]


def test_a_loaded_state_is_in_the_module_before_the_first_step():
    tuner = drive(attached(delta_stn(), network()), batches(), 5)
    state, model = copy.deepcopy(tuner.state_dict()), network()
    attached(delta_stn(), model).load_state_dict(state)
    trained = tuner.solution()
    ours = model.state_dict()
    assert all(torch.equal(ours[key], v) for key, v in {**trained[1], **trained[2]}.items())
    with pytest.raises(BilevelError, match="the state does not fit this model"):
        attached(delta_stn(), network(norm=False)).load_state_dict(state)
    with pytest.raises(BilevelError, match="the state is one of cuda"):
        attached(delta_stn(), network()).load_state_dict({**state, "device": "cuda"})


def test_a_state_is_refused_inside_a_round():
    tuner = attached(delta_stn(), network())
    with pytest.raises(BilevelError, match="no state before its first step"):
        tuner.state_dict()
    data = batches()
    drive(tuner, data, 3)
    with pytest.raises(BilevelError, match=r"inside a round.*end_round"):
        tuner.state_dict()
    tuner.end_round()
    tuner.state_dict()
    for _ in range(5):
        tuner.step(data.train.next())
    assert tuner.due
    with pytest.raises(BilevelError, match="inside a round"):
        tuner.state_dict()


def test_the_steps_and_batches_of_a_round_are_checked():
    data = batches()
    train, valid = data.train.next, data.valid.next
    tuner = attached(delta_stn(), network())
    with pytest.raises(BilevelError, match="no outer step is due"):
        tuner.outer_step(valid())
    with pytest.raises(BilevelError, match=r"valid_batch is one too many.*SelfTuning"):
        tuner.step(train(), valid())
    for _ in range(5):
        tuner.step(train())
    with pytest.raises(BilevelError, match="an outer step is due before this step"):
        tuner.step(train())
    with pytest.raises(BilevelError, match=r"batch=None is missing.*outer_step of SelfTuning"):
        tuner.outer_step()
    tuner.outer_step(valid())
    soba = attached(SOBA(), network())
    with pytest.raises(BilevelError, match=r"valid_batch=None is missing.*step of SOBA"):
        soba.step(train())
    soba.step(train(), valid())
    with pytest.raises(BilevelError, match=r"batch is one too many.*outer_step of SOBA"):
        soba.outer_step(valid())
    with pytest.raises(BilevelError, match="the train batch holds no tensor"):
        attached(Fixed(), network()).step(("no tensor",))
    moved = drive(attached(Fixed(), network(norm=False)), data, 1)
    moved._model.to("meta")
    with pytest.raises(BilevelError, match="model has moved from cpu to meta"):
        moved.step(train())


def test_what_cannot_be_attached_is_refused_in_a_sentence():
    model = network()

    def refused(match, **changes):
        arguments = {
            "model": model,
            "space": space(),
            "loss": loss,
            "solver": delta_stn(),
            "optimizer": adam(model.parameters()),
        } | changes
        with pytest.raises(BilevelError, match=match):
            bilevel.attach(arguments.pop("model"), arguments.pop("space"), **arguments)

    refused("solver=Search starts trainings of its own", solver=random_search())
    refused("solver=PopulationBased starts trainings", solver=PopulationBased())
    refused("solver=delta_stn must be a solver", solver=delta_stn)
    refused("inner_optimizer of SelfTuning has no effect", solver=delta_stn(inner_optimizer=adam))
    refused("inner_scheduler of Fixed has no effect", solver=Fixed(inner_scheduler=print))
    refused(
        "outer_scheduler of SelfTuning steps when an epoch", solver=delta_stn(outer_scheduler=print)
    )
    refused("already in use", solver=drive(attached(Fixed(), network()), batches(), 1).solver)
    refused("model=int must be an nn.Module", model=3)
    refused("model=.*is wrapped|module=DataParallel is wrapped", model=nn.DataParallel(model))
    refused("space=dict must be a Space", space={})
    refused("loss=None cannot be called", loss=None)
    refused(r"loss=<lambda> does not fit: .*\(prediction, batch\)", loss=lambda prediction: 0)
    refused(r"penalty=<lambda> does not fit: .*\(hypers, params\)", penalty=lambda params: 0)
    refused("train_loss=3 cannot be called", train_loss=3)
    refused("inputs=loss does not fit", inputs=loss)
    refused("optimizer=function must be an instance", optimizer=adam)
    refused("does not train `2.weight`|does not train", optimizer=adam(model[0].parameters()))
    refused("no parameter of model", optimizer=adam([*model.parameters(), torch.zeros(1)]))
    refused("warmup_steps=-1 must be", warmup_steps=-1)
    refused("example=int must be a pair", example=3)
    rate = Space(rate=bilevel.domains.optimizer_setting("lr", init=0.5))
    refused("space.rate.init=0.5 differs from lr=0.01", space=rate, solver=Unrolled())
    half = network()
    half[3].to("meta")
    refused("has no values|lies on cpu and meta", model=half, optimizer=adam(half.parameters()))


def test_groups_of_the_optimizer_are_kept():
    """Each group trains its own weights; the second network of a penalty has the same groups."""

    def grouped(params):
        params = list(params)
        return torch.optim.SGD([{"params": params[:2]}, {"params": params[2:], "lr": 1e-9}], lr=0.1)

    model = network(norm=False)
    start = copy.deepcopy(model.state_dict())
    tuner = drive(attached(Penalty(), model, grouped), batches(), 5)
    first, second = (
        not torch.allclose(start[k], v) for k, v in list(model.state_dict().items())[::2]
    )
    assert first
    assert not second
    y = tuner.solver.scheduled()[0]
    assert [group["lr"] for group in y.param_groups] == [0.1, 1e-9]
    with pytest.raises(BilevelError, match=r"groups with lr=1e-09 and 0.1.*response_optimizer"):
        drive(attached(delta_stn(), network(norm=False), grouped), batches(), 1)
    own = partial(torch.optim.SGD, lr=0.2)
    tuner = attached(delta_stn(response_optimizer=own), network(norm=False), grouped)
    drive(tuner, batches(), 1)
    tuner._own.optimizer.param_groups[0]["lr"] = 0.05  # as a schedule would
    drive(tuner, batches(), 1)
    assert tuner.solver.scheduled()[0].param_groups[0]["lr"] == pytest.approx(0.1)


def test_memory_and_hooks_of_the_optimizer_are_the_users():
    model = network(norm=False)
    optimizer, calls = adam(model.parameters()), []
    F.cross_entropy(model(splits()[0][0]), splits()[0][1]).backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    tuner = bilevel.attach(
        model,
        space(),
        loss=loss,
        train_loss=train_loss,
        penalty=penalty,
        optimizer=optimizer,
        solver=delta_stn(),
    )
    drive(tuner, batches(), 5)
    assert len(calls) == 5, "the dry run must not take steps of the user's optimizer"
    assert {int(state["step"]) for state in optimizer.state.values()} == {6}


def test_autocast_surrounds_the_network_alone():
    """Products of the network are in bfloat16 as with `runner.precision=bf16`; w stays float32."""
    model, seen = network(norm=False), []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model

        def forward(self, x):
            seen.append(self.body[0](x).dtype)
            return self.body(x)

    tuner = attached(delta_stn(), Watched())
    data = batches()
    with torch.autocast("cpu", torch.bfloat16):
        drive(tuner, data, 5)
    assert set(seen) == {torch.bfloat16, torch.float64}, "one check at set-up is in float64"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with pytest.raises(BilevelError, match="some steps are taken under"):
        tuner.step(data.train.next())
    with torch.autocast("cpu", torch.float16), pytest.raises(BilevelError, match="float16 needs"):
        attached(delta_stn(), network()).step(data.train.next())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(BilevelError, match="SAMA follows"):
        attached(SAMA(), network()).step(data.train.next())


def test_an_evaluation_is_a_record_and_the_best_one_is_the_result(tmp_path):
    model, data = network(), batches()
    train, valid = splits()
    tuner = attached(implicit_cg(stationarity=1e9), model)
    first = tuner.evaluate(valid)
    assert (first["step"], first["hypers.decay"]) == (0, pytest.approx(0.01))
    drive(tuner, data, 10)
    with pytest.warns(bilevel.SolverWarning, match="Implicit"):
        record = tuner.evaluate(valid, train=[(train[0][:16], train[1][:16])])
    assert {"train_loss", "valid_loss", "inner_loss", "outer_loss"} <= record.keys()
    model.eval()
    with torch.no_grad():
        assert record["valid_loss"] == pytest.approx(float(loss(model(valid[0]), valid)))
    assert record["valid_loss"] < first["valid_loss"]
    best = copy.deepcopy(model)
    result = tuner.result()
    drive(tuner, data, 5)
    assert torch.equal(result.module()(valid[0]), best(valid[0])), "the result must not move on"
    assert result.schedule.steps == [0, 10]
    assert result["outer_steps"] == 2
    assert result.metrics == [first, record]
    bilevel.loggers.plot.draw(result.metrics, tmp_path / "curves.png", space=space())
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_loss_that_is_not_finite_is_reported():
    tuner = attached(Fixed(), network(), partial(torch.optim.SGD, lr=1e30))
    drive(tuner, batches(), 6)
    with pytest.raises(BilevelError, match="became NaN or infinite at step"):
        tuner.evaluate(splits()[1])


def test_inputs_pass_hyperparameters_to_the_model():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network(norm=False)

        def forward(self, x, noise):
            return self.body(x + noise)

    def inputs(hypers, batch, *, train, generator):
        x = batch[0]
        draws = torch.randn(x.shape, generator=generator) if train else torch.zeros_like(x)
        std = hypers["std"] if hypers["std"].ndim == 0 else hypers["std"][:, None]
        return (x, std * draws), {}

    model = Noisy()
    tuner = bilevel.attach(
        model,
        Space(std=Positive(init=0.3)),
        loss=loss,
        inputs=inputs,
        optimizer=adam(model.parameters()),
        solver=delta_stn(),
    )
    drive(tuner, batches(), 5)
    assert tuner.hypers["std"] != 0.3
    x, y = splits()[0]
    with pytest.raises(BilevelError, match="the inputs of the model are unknown; pass inputs="):
        attached(Fixed(), network()).step({"x": x, "labels": y})


def test_weights_that_are_loaded_after_attach_are_trained():
    """Buffers too: the first step begins where the module stands, not where it stood at attach."""
    model, other = network(), network()
    tuner = attached(Fixed(), model)
    with torch.no_grad():
        other[1].running_mean.fill_(3.0)
        other[0].weight.fill_(0.5)
    model.load_state_dict(other.state_dict())
    late, early = drive(tuner, batches(), 3), drive(attached(Fixed(), other), batches(), 3)
    for part, same in zip(late.solution(), early.solution(), strict=True):
        assert all(torch.equal(part[key], same[key]) for key in part)
