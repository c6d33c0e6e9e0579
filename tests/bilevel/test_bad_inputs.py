"""Test that bad inputs outside the command end in one sentence with a remedy, and odd ones work.

Each row of the table has an entry point, an input, and a pattern of the sentence. A row fails if
the check that it names is removed.
"""

import inspect
import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bilevel
from bilevel import (
    BilevelError,
    Classifier,
    Interval,
    Positive,
    Runner,
    Space,
    best_solution,
    cross_entropy,
    squared_norm,
    tuned_dropout,
)
from bilevel.checks.calls import Calls
from bilevel.cli import compare, export, log, refit
from bilevel.comparison.runs import read_runs
from bilevel.data.tensor_stream import stream
from bilevel.solvers import Fixed, delta_stn, implicit_cg

X = torch.randn(48, 4, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
TRAIN, VALID = (X[:32], Y[:32]), (X[32:], Y[32:])
LOGITS, LABELS = X[:6, :3], Y[:6]
# without the check of annotations, which only this session has
plain_cross_entropy = inspect.unwrap(cross_entropy)
SGD = partial(torch.optim.SGD, lr=0.1)


def network(width=6):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))


def loss(prediction, batch):
    return F.cross_entropy(prediction, batch[1])


def decay(hypers, params):
    return hypers["decay"] * squared_norm(params)


def attached(model=None, make=SGD, solver=None, space=None, **more):
    model = model or network()
    return bilevel.attach(
        model,
        space or Space(decay=Positive(init=0.01)),
        **{"loss": loss, "penalty": decay, **more},
        optimizer=make(model.parameters()),
        solver=solver or delta_stn(),
    )


def driven(tuner, steps=10, train=TRAIN, valid=VALID):
    for _ in range(steps):
        tuner.step(train)
        while tuner.due:
            tuner.outer_step(valid)
    return tuner


def after_a_step(change):
    """Return a function that takes a step, changes the model, and takes another step."""

    def steps():
        model = network()
        tuner = driven(attached(model), 1)
        change(model)
        tuner.step(TRAIN)

    return steps


def unfreeze_none(model):
    model[0].requires_grad_(False)


def replace_layer(model):
    model[0] = nn.Linear(4, 6)


def loaded(change=lambda state: state, **more):
    """Return a function that loads a changed state into a new tuner, and takes a step."""

    def load():
        tuner = attached(**{name: make() for name, make in more.items()})
        tuner.load_state_dict(change(driven(attached()).state_dict()))

    return load


def classifier(module=None, train=TRAIN, space=None, **more):
    space = space or Space(label_smoothing=Interval(low=0.0, high=0.5, init=0.1))
    return Classifier(module or network(), space, train, VALID, **{"batch_size": 8, **more})


RUN = {"epochs": 1, "warmup_epochs": 0, "progress": "none", "picture": False}


def run(place="run", settings=None, **changes):
    """Return a function that runs a classifier with changed arguments in a new directory."""

    def start(tmp_path):
        arguments = {"problem": classifier(), "solver": delta_stn(), "directory": tmp_path / place}
        return Runner(**RUN | (settings or {})).run(**arguments | changes)

    return start


def with_optimizer(**settings):
    return lambda tmp_path: run(solver=delta_stn(**settings))(tmp_path)


def other_schedule(optimizer):
    return torch.optim.lr_scheduler.StepLR(SGD(network().parameters()), 1)


def result(tmp_path):
    return run()(tmp_path)


def without_records(tmp_path):
    found = result(tmp_path)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    return found.metrics


def with_damaged_records(tmp_path):
    found = result(tmp_path)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write("{bad\n")
    return found.metrics


def not_in_folder(tmp_path):
    result(tmp_path).save(tmp_path / "nowhere" / "model.pt")


def checkpoint_file(tmp_path):
    result(tmp_path)
    return best_solution(tmp_path / "run" / "checkpoint.pt")


def estimator(y=None, kind="Classifier", **settings):
    def fit():
        pytest.importorskip("sklearn")
        made = getattr(bilevel, f"SelfTuning{kind}")
        made = made(**{"hidden": [4], "epochs": 1, "random_state": 0, **settings})
        return made.fit(X.numpy(), Y.numpy() if y is None else y)

    return fit


def nothing(*_, **__):
    return None


TUNER = {
    "empty batch": (lambda: attached().step((X[:0], Y[:0])), "train batch has no example"),
    "labels as text": (lambda: attached().step((X, ["a"] * 48)), "field 1: a list of 48"),
    "five columns": (
        lambda: attached().step((X[:, :3], Y)),
        r"does not fit the weight `0\.weight`",
    ),
    "later columns": (
        lambda: driven(attached(), 1).step((X[:, :3], Y)),
        r"does not fit the weight `0\.weight`",
    ),
    "later class": (
        lambda: [attached().step(b) for b in [TRAIN]] and driven(attached(), 1).step((X, Y + 7)),
        "holds the class 9",
    ),
    "class out of range": (lambda: attached().step((X, Y + 7)), "holds the class 9"),
    "labels as float": (lambda: attached().step((X, Y.float())), "must be int64"),
    "NaN features": (lambda: attached().step((X * np.nan, Y)), "48 of 48 rows.*hold NaN"),
    "loss is None": (lambda: attached(loss=nothing).step(TRAIN), "loss returns a NoneType"),
    "loss is a float": (
        lambda: attached(train_loss=lambda p, b, h: 1.0).step(TRAIN),
        "train_loss returns a float",
    ),
    "penalty is a float": (
        lambda: attached(penalty=lambda h, w: 0.0).step(TRAIN),
        "penalty returns a float",
    ),
    "unknown hyperparameter": (
        lambda: attached(penalty=lambda h, w: h["dekay"]).step(TRAIN),
        "`dekay`.*did you mean `decay`",
    ),
    "inputs is a tensor": (
        lambda: attached(inputs=lambda h, b, *, train, generator: b[0]).step(TRAIN),
        "`inputs` returns a Tensor",
    ),
    "inputs is short": (
        lambda: attached(inputs=lambda h, b, *, train, generator: (b[0],)).step(TRAIN),
        "`inputs` returns a tuple of Tensor",
    ),
    "seed as text": (lambda: attached(seed="0"), "seed='0' must be a whole number"),
    "seed too large": (lambda: attached(seed=2**70), "at most 64 bits"),
    "frozen later": (after_a_step(unfreeze_none), "requires_grad of a parameter"),
    "float64 later": (after_a_step(nn.Module.double), "was float32 and is float64"),
    "other layer": (after_a_step(replace_layer), "other parameters than at attach"),
    "no validation split": (lambda: attached().evaluate(None), "valid=None leaves nothing"),
    "no record": (lambda: attached().result().schedule, "no record of λ"),
    "state is None": (loaded(lambda state: None), "state=NoneType is not a state"),
    "state in a dict": (loaded(lambda state: {"tuner": state}), r"pass state\['tuner'\]"),
    "state of a module": (loaded(lambda state: network().state_dict()), "no entry `weights`"),
    "state of another width": (loaded(model=lambda: network(9)), r"has the shape \[6, 4\]"),
    "state of a part": (
        loaded(model=lambda: nn.Sequential(*network(), nn.Linear(3, 3))),
        r"lacks `3\.weight` of the model",
    ),
    "state of another space": (
        loaded(space=lambda: Space(decay=Positive(init=0.01), b=Positive(init=1.0))),
        "lacks `b` of the space",
    ),
    "state of another solver": (loaded(solver=implicit_cg), "its solver is SelfTuning"),
    "state of another optimizer": (
        loaded(make=lambda: torch.optim.Adam),
        "its optimizer is SGD, and not Adam",
    ),
}

RUNNER = {
    "problem is a class": (run(problem=Classifier), "problem=Classifier is not a Problem"),
    "problem is a module": (run(problem=network()), "problem=Sequential is not a Problem"),
    "solver is a name": (run(solver="delta_stn"), "solver=str is not a Solver"),
    "solver is a function": (run(solver=delta_stn), "solver=delta_stn is not a Solver"),
    "seed as text": (run(seed="a"), "seed='a' must be a whole number"),
    "directory is a number": (run(directory=3), "directory=3 is not a path"),
    "directory with a null": (run(directory="a\0b"), "is not a path"),
    "directory too long": (run("x" * 300), "is not writable"),
    "one name": (run(names="abc"), "names='abc' must be two names"),
    "config as text": (run(config="x"), "config=str is not a Mapping"),
    "loggers is a number": (run(loggers=3), "loggers=int is not a Sequence"),
    "no logger": (run(loggers=[3]), "loggers holds a int"),
    "params is a module": (run(params=network()), "params=Sequential must map names"),
    "threads": (run(settings={"threads": 100_000}), "threads=100000 must be between 1 and 1024"),
    "half a thread": (run(settings={"threads": 1.5}), "threads=1.5 must be a whole number"),
    "device": (run(settings={"device": None}), "device=None must be a name"),
    "select": (run(settings={"select": 3}), "select=3 must be a name"),
    "picture": (run(settings={"picture": "x"}), "picture='x' is unknown"),
    "sensitivities": (run(settings={"sensitivities": None}), "sensitivities=None is unknown"),
    "initial_params": (run(settings={"initial_params": 3}), "initial_params=3 is not a path"),
    "schedule of another": (with_optimizer(inner_scheduler=other_schedule), "of another optimizer"),
    "optimizer is None": (with_optimizer(inner_optimizer=nothing), "returns a NoneType"),
    "no records": (without_records, r"cannot read .*metrics\.jsonl"),
    "damaged records": (with_damaged_records, "a line of it is not JSON"),
    "path is a number": (lambda tmp_path: result(tmp_path).save(3), "path=3 is not a path"),
    "no folder": (not_in_folder, "choose a folder that exists"),
    "checkpoint for a run": (checkpoint_file, "it is a file"),
    "number for a run": (lambda tmp_path: best_solution(3), "directory=3 is not a path"),
}

PARTS = {
    "space is None": (lambda: Classifier(network(), None, TRAIN, VALID), "space=NoneType"),
    "space is a dict": (
        lambda: Classifier(network(), {"label_smoothing": 0.1}, TRAIN, VALID),
        "space=dict must be a Space",
    ),
    "batch_size as text": (
        lambda: stream(TRAIN, "8", torch.Generator()),
        "batch_size='8' must be a whole number",
    ),
    "no module": (lambda: tuned_dropout(None), "module=NoneType must be"),
    "no groups": (
        lambda: tuned_dropout(nn.Sequential(nn.Dropout(0.1)), {}),
        r"dropout=\{\} must name",
    ),
    "logits [C]": (lambda: plain_cross_entropy(LOGITS[0], LABELS[0]), r"must be floating.*\[B, C"),
    "labels in a list": (lambda: plain_cross_entropy(LOGITS, [0, 1]), "labels are a list"),
    "labels as float": (lambda: plain_cross_entropy(LOGITS, LABELS.float()), r"convert.*\.long"),
    "one-hot as int": (lambda: plain_cross_entropy(LOGITS, F.one_hot(LABELS, 3)), "argmax"),
    "labels [B, 1]": (lambda: plain_cross_entropy(LOGITS, LABELS[:, None]), "axes of length 1"),
    "fewer labels": (lambda: plain_cross_entropy(LOGITS, LABELS[:4]), "one class per example"),
    "class out of range": (lambda: plain_cross_entropy(LOGITS, LABELS + 7), "hold the class 9"),
    "negative class": (lambda: plain_cross_entropy(LOGITS, LABELS - 3), "hold the class -3"),
    "smoothing as text": (
        lambda: plain_cross_entropy(LOGITS, LABELS, label_smoothing="a"),
        "label_smoothing='a' is no number",
    ),
    "weights in a list": (
        lambda: plain_cross_entropy(LOGITS, LABELS, class_weights=[1.0] * 3),
        "class_weights=list",
    ),
    "hidden is a number": (estimator(hidden=8), "hidden=8 must be a list"),
    "tune as text": (estimator(tune="decay"), "tune='decay' must be a list"),
    "fraction as text": (estimator(valid_fraction="a"), "valid_fraction='a' must be between"),
    "targets as text": (estimator(y=np.array(["a"] * 48), kind="Regressor"), "no numbers"),
    "huge targets": (estimator(y=X[:, 0].double().numpy() * 1e300, kind="Regressor"), "variance"),
}


def truncated(place):
    checkpoint = place / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:900])
    for older in place.glob("checkpoint-step*.pt"):
        older.unlink()


COMMANDS = {
    "export of nothing": (export.main, ["nowhere"], "there is no such directory"),
    "export of a file": (export.main, ["run/metrics.jsonl"], "it is a file"),
    "export into a file": (export.main, ["run", "--out", "run/metrics.jsonl"], "choose another"),
    "export of a part": (export.main, ["truncated"], r"checkpoint\.pt is truncated"),
    "refit from Python": (refit.main, ["run"], "as in every run that Python started"),
    "refit of a part": (refit.main, ["truncated"], r"checkpoint\.pt is truncated"),
    "refit of nothing": (refit.main, ["nowhere"], "is not a directory"),
    "log of nothing": (log.main, ["nowhere"], r"cannot read nowhere/metrics\.jsonl"),
    "log from Python": (log.main, ["run"], "has no dashboard; add logger=wandb"),
    "log of settings": (log.main, ["a=1"], "log has no run"),
    "compare nothing": (compare.main, ["nowhere"], "nowhere does not exist"),
    "compare a file": (compare.main, ["run/metrics.jsonl"], "is a file"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a directory with a whole run, and with one whose checkpoint is truncated."""
    place = tmp_path_factory.mktemp("runs")
    for name in ("run", "truncated"):
        run(name)(place)
    truncated(place / "truncated")
    return place


def sentence_of(call, *arguments):
    """Return the message of the error; data of an estimator raise the ValueError of its library."""
    allowed = (BilevelError, ValueError) if call.__qualname__.startswith("estimator") else ()
    with pytest.raises(allowed or BilevelError) as caught:
        call(*arguments)
    return str(caught.value)


def is_one_sentence(text):
    return "\n" not in text and "Traceback" not in text and "; " in text.rstrip("; ")


@pytest.mark.filterwarnings("ignore::bilevel.checks.check_problem.ProblemWarning")
@pytest.mark.parametrize("name", TUNER)
def test_a_tuner_refuses_in_one_sentence(name):
    call, pattern = TUNER[name]
    text = sentence_of(call)
    assert re.search(pattern, text), text
    assert is_one_sentence(text), text


@pytest.mark.parametrize("name", RUNNER)
def test_a_run_refuses_in_one_sentence(name, tmp_path):
    call, pattern = RUNNER[name]
    text = sentence_of(call, tmp_path)
    assert re.search(pattern, text), text
    assert is_one_sentence(text), text


@pytest.mark.parametrize("name", PARTS)
def test_a_part_refuses_in_one_sentence(name):
    call, pattern = PARTS[name]
    text = sentence_of(call)
    assert re.search(pattern, text), text
    assert is_one_sentence(text), text


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_refuses_in_one_line(name, runs, monkeypatch, capsys):
    command, words, pattern = COMMANDS[name]
    monkeypatch.chdir(runs)
    before = sorted(runs.rglob("*"))
    assert command(words) == 1
    first = capsys.readouterr().err.splitlines()[0]
    assert re.search(pattern, first), first
    assert is_one_sentence(first), first
    assert sorted(runs.rglob("*")) == before, "a command that refuses writes nothing"


def test_a_state_that_does_not_fit_changes_nothing():
    state, model = driven(attached()).state_dict(), network(9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(BilevelError, match="does not fit"):
        attached(model).load_state_dict(state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_state_of_other_settings_is_refused_when_the_solver_takes_it():
    def grouped(params):
        return SGD([{"params": [p]} for p in params])

    state = driven(attached(solver=Fixed())).state_dict()
    tuner = attached(solver=Fixed(), make=grouped)
    tuner.load_state_dict(state)
    for _ in range(2):  # half a state is never used
        with pytest.raises(BilevelError, match=r"settings of this solver.*attach them as in"):
            tuner.step(TRAIN)


def test_a_loss_of_nan_is_never_the_best():
    tuner = attached()
    tuner.evaluate((VALID[0] * np.nan, VALID[1]))
    with pytest.raises(BilevelError, match="at='best' has no solution"):
        tuner.result().module()
    good = driven(tuner).evaluate(VALID)
    worse = tuner.evaluate((VALID[0], (VALID[1] + 1) % 3))
    assert worse["valid_loss"] > good["valid_loss"]
    assert tuner.result()["best"] == good


def test_a_step_after_a_wrong_batch_is_that_without_it():
    models = network(), network()
    one, other = (attached(model, solver=Fixed()) for model in models)
    for tuner in (one, other):
        driven(tuner, 2)
    with pytest.raises(BilevelError, match="does not fit the weight"):
        one.step((X[:, :3], Y))
    for tuner in (one, other):
        driven(tuner, 3)
    states = [model.state_dict() for model in models]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_weights_of_half_precision_cause_no_warning_about_metrics():
    half = (TRAIN[0].half(), TRAIN[1]), (VALID[0].half(), VALID[1])
    assert float(driven(attached(network().half()), 5, *half).hypers["decay"]) > 0


def test_batches_may_change_their_size_and_be_dictionaries():
    def inputs(hypers, batch, *, train, generator):
        return (batch["x"],), {}

    def named(rows):
        return {"x": X[rows], "y": Y[rows]}

    one = attached(inputs=inputs, loss=lambda p, b: F.cross_entropy(p, b["y"]))
    other = attached()
    for n in (32, 7, 1, 19, 3):
        one.step(named(slice(n)))
        other.step((X[:n], Y[:n]))
    one.outer_step(named(slice(32, 40)))
    other.outer_step((X[32:40], Y[32:40]))
    assert torch.equal(one.hypers["decay"], other.hypers["decay"])


def test_a_check_follows_labels_into_our_own_loss():
    """A class out of range is then found before the call, where a GPU would not survive it."""
    calls = Calls((LOGITS, LABELS + 7), {})
    with calls, pytest.raises(BilevelError):
        cross_entropy(*calls.batch)
    assert calls.failed.func is cross_entropy


@pytest.mark.parametrize("kind", [torch.int8, torch.int32, torch.uint8])
def test_labels_may_be_whole_numbers_of_any_type(kind):
    assert torch.equal(cross_entropy(LOGITS, LABELS.to(kind)), cross_entropy(LOGITS, LABELS))


def test_labels_of_a_classifier_may_be_probabilities(tmp_path):
    losses = []
    for name, labels in (("classes", Y), ("probabilities", F.one_hot(Y, 3).float())):
        problem = Classifier(network(), classifier().space, (X, labels), (X, labels), batch_size=8)
        best = run(name, problem=problem)(tmp_path)["best"]
        losses.append((best["valid_loss"], best["valid_accuracy"]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_relative_directory_is_found_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run(directory="ein Ort ü $x")(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(found.metrics) == 2
    assert found.schedule.at(0)["label_smoothing"] == pytest.approx(0.1)


def test_a_summary_that_is_no_object_does_not_stop_an_export(tmp_path):
    result(tmp_path)
    (tmp_path / "run" / "summary.json").write_text("[1, 2]")
    assert export.main([str(tmp_path / "run"), "--format", "pt"]) == 0
    assert (tmp_path / "run" / "schedule.json").exists()


def test_a_run_from_python_can_be_logged_again(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    result(tmp_path)
    assert log.main([str(tmp_path / "run"), "logger=tensorboard"]) == 0
    assert "2 records and its summary were logged" in capsys.readouterr().out


def test_a_generator_may_be_evaluated_once():
    tuner, batches = attached(), [(X[:20], Y[:20]), (X[20:], Y[20:])]
    given = (batch for batch in batches)
    assert tuner.evaluate(given)["valid_loss"] == tuner.evaluate(batches)["valid_loss"]
    with pytest.raises(BilevelError, match="the valid split is empty"):
        tuner.evaluate(given)


def test_runs_without_settings_and_without_a_name_are_compared(runs, tmp_path):
    summary = {"problem": None, "solver": None, "best": {"step": "x"}, "hypers": 3, "steps": []}
    for name in ("one", "other"):
        shutil.copytree(runs / "run", tmp_path / name)
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
        (tmp_path / name / "run.json").unlink()
    told = []
    found = read_runs(tmp_path, warn=told.append)
    assert {(run.problem, run.solver) for run in found} == {("unknown problem", "unknown solver")}
    assert any("and 1 more have no settings" in sentence for sentence in told)
