"""The runner keeps budgets exactly, leaves the trajectory alone, and loses nothing at any end."""

import json
import os
import signal
import threading
import time

import pytest
import torch

from bilevel import BilevelError, Runner, evaluate
from bilevel.checkpoint import file_format
from bilevel.checkpoint.checkpoints import best_solution, load
from bilevel.files import write_atomically
from bilevel.loggers.records import read_metrics
from tests.support.fakes import BATCH, STEPS_PER_EPOCH, FakeProblem, FakeSolver
from tests.support.runs import comparable, run, same_weights


class Killed(Exception):
    pass


def kill():
    raise Killed


@pytest.fixture(autouse=True)
def _global_state():
    torch.manual_seed(0)  # FakeSolver draws from it, and nothing here seeds it


@pytest.fixture
def twin():
    """A run from the same global state as the test's own."""

    def run_twin(*args, **kwargs):
        torch.manual_seed(0)
        return run(*args, **kwargs)

    return run_twin


# --- budgets and warm-up


@pytest.mark.parametrize(("epochs", "steps"), [(1, 6), (2.5, 15), (0.5, 3), (0.01, 1)])
def test_epochs_end_exactly(tmp_path, epochs, steps):
    summary, solver = run(tmp_path, epochs=epochs)
    assert solver.inner_count == summary["steps"] == summary["last"]["step"] == steps
    assert summary["stopped"] == "epochs"


def test_warmup_ends_exactly_and_outer_steps_begin_there(tmp_path):
    _, solver = run(tmp_path, epochs=3, warmup_epochs=1.5)  # 9 steps, in rounds of 4
    assert solver.rounds == [
        (0, 4, True),
        (4, 4, True),
        (8, 1, True),
        (9, 4, False),
        (13, 4, False),
        (17, 1, False),
    ]


def test_examples_end_the_run_after_the_round_that_reaches_them(tmp_path):
    summary, solver = run(tmp_path, epochs=None, examples=30, warmup_epochs=0)
    per_round = BATCH * (solver.inner_steps + 1)
    assert summary["stopped"] == "examples"
    assert summary["examples"] == 3 * per_round == 30


def test_seconds_end_the_run_and_evaluation_is_not_counted(tmp_path):
    class Slow(FakeProblem):
        def metrics(self, *args):
            time.sleep(0.02)
            return super().metrics(*args)

    hooks = dict.fromkeys(range(100), lambda: time.sleep(0.01))
    began = time.perf_counter()
    summary, solver = run(
        tmp_path, FakeSolver(hooks=hooks), Slow(), epochs=None, seconds=0.1, evaluate_every=0.5
    )
    wall = time.perf_counter() - began
    assert summary["stopped"] == "seconds"
    assert summary["seconds"] >= 0.1
    assert solver.inner_count <= 12  # 10 sleeps, to the end of the round
    assert (
        wall - summary["seconds"] > summary["evaluations"] * 3 * 0.02
    )  # two batches of valid and one of train each


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"epochs": 0},
        {"epochs": 1, "seconds": -1},
        {"epochs": True},
        {"epochs": 1, "warmup_epochs": -1},
        {"epochs": 1, "progress": "lively"},
        {"epochs": 1, "evaluate_every": 0},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(BilevelError):
        Runner(**settings)


def test_unavailable_device_is_one_sentence(tmp_path):
    for device in ("cuda:99", "nonsense"):
        with pytest.raises(BilevelError, match="is not available here"):
            run(tmp_path, device=device)


def test_a_solver_that_stands_still_is_named(tmp_path):
    class Still(FakeSolver):
        def step(self, **_):
            return {}

    with pytest.raises(BilevelError, match=r"Still\.step took no inner step"):
        run(tmp_path, Still())


def test_a_solver_is_not_run_twice(tmp_path):
    _, solver = run(tmp_path / "a")
    with pytest.raises(BilevelError, match="has already taken 24 steps"):
        run(tmp_path / "b", solver)


# --- evaluation


def test_measuring_does_not_alter_the_trajectory(tmp_path, twin):
    _, reference = twin(tmp_path / "0", evaluate_every=1)
    for every in (0.5, 3):
        _, solver = twin(tmp_path / str(every), evaluate_every=every, checkpoint_every=2)
        assert same_weights(solver, reference)
        assert (
            solver.data.valid.state_dict()["examples"]
            == reference.data.valid.state_dict()["examples"]
        )
    _, other = twin(tmp_path / "seed", seed=1)
    assert not same_weights(other, reference)


def test_nothing_is_seeded_globally(tmp_path):
    _, first = run(tmp_path / "a")
    _, second = run(tmp_path / "b")  # the global state has moved on
    assert not same_weights(first, second)


def test_the_schedule_is_told_of_every_epoch_once(tmp_path, twin):
    _, solver = twin(tmp_path / "a", epochs=4, evaluate_every=1)
    assert [step // STEPS_PER_EPOCH for step, _ in solver.epochs] == [1, 2, 3, 4]
    records = {r["step"]: r["valid_loss"] for r in read_metrics(tmp_path / "a" / "metrics.jsonl")}
    assert [loss for _, loss in solver.epochs] == [records[step] for step, _ in solver.epochs]
    _, seldom = twin(tmp_path / "b", epochs=4, evaluate_every=2)
    assert [step for step, _ in seldom.epochs] == [step for step, _ in solver.epochs]
    _, long_rounds = twin(tmp_path / "c", FakeSolver(inner_steps=20), epochs=4, warmup_epochs=0)
    assert len(long_rounds.epochs) == 4


def test_evaluations_come_at_the_round_that_reaches_their_epoch(tmp_path):
    run(tmp_path, epochs=4, warmup_epochs=0, evaluate_every=1)
    # rounds of 4 steps, epochs of 6
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [0, 8, 12, 20, 24]


def test_train_metrics_are_those_of_evaluation_mode(tmp_path):
    _, solver = run(tmp_path)
    record = read_metrics(tmp_path / "metrics.jsonl")[-1]
    x, y = solver.data.train.tensors
    assert record["train_loss"] == pytest.approx(
        (x[:4] @ solver.params["w"] - y[:4]).pow(2).mean().item()
    )


def test_best_and_last_are_tested_each_with_its_own_weights(tmp_path):
    summary, solver = run(tmp_path, FakeSolver(rate=0.4), epochs=6)
    records = read_metrics(tmp_path / "metrics.jsonl")
    best = min(records, key=lambda r: r["valid_loss"])
    assert summary["best"]["step"] == best["step"] < summary["last"]["step"] == solver.inner_count
    for name, solution in (("best", best_solution(tmp_path)), ("last", solver.solution())):
        expected = evaluate(solver.problem, solution, solver.data.test)
        assert summary[name]["test_loss"] == expected["loss"]
        assert summary[name]["test_accuracy"] == expected["accuracy"]
    assert summary["best"]["test_loss"] != summary["last"]["test_loss"]


def test_without_a_test_split_its_metrics_are_unknown(tmp_path):
    summary, _ = run(tmp_path, problem=FakeProblem(test=False))
    assert summary["best"]["test_loss"] is None
    assert summary["last"]["test_accuracy"] is None


def test_patience_counts_evaluations_after_warmup(tmp_path):
    summary, _ = run(tmp_path, FakeSolver(rate=-0.05), epochs=50, warmup_epochs=3, patience=2)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert summary["stopped"] == "patience"
    assert summary["best"]["step"] == 0
    assert len([r for r in records if r["epoch"] > 3]) == 2


# --- selection


class Scored(FakeProblem):
    """Its score is best at the middle of the path of the weights, and its loss at the end."""

    def metrics(self, hypers, params, prediction, batch):
        found = super().metrics(hypers, params, prediction, batch)
        loss = torch.as_tensor(found["loss"])
        return {**found, "accuracy": -(loss.mean() - 0.3).abs()}


def test_the_best_evaluation_is_that_of_another_metric(tmp_path):
    found = {}
    for select in ("valid_loss", "valid_accuracy", "min valid_accuracy"):
        place = tmp_path / select.replace(" ", "-")
        summary, _ = run(place, FakeSolver(), problem=Scored(), epochs=20, select=select)
        name = select.split()[-1]
        records = [r[name] for r in read_metrics(place / "metrics.jsonl")]
        wanted = max(records) if select == "valid_accuracy" else min(records)
        assert summary["best"][name] == wanted
        found[select] = summary["best"]["step"]
    assert len(set(found.values())) > 1


def test_a_metric_to_select_by_must_exist_and_have_a_direction(tmp_path):
    with pytest.raises(BilevelError, match=r"select='valid_acuracy' does not say.*max valid_acur"):
        run(tmp_path / "a", FakeSolver(), epochs=1, select="valid_acuracy")
    with pytest.raises(BilevelError, match=r"'max valid_los' is not measured .*mean `valid_loss`"):
        run(tmp_path / "b", FakeSolver(), epochs=1, select="max valid_los")


# --- divergence


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_was_good(tmp_path):
    summary, _ = run(tmp_path, FakeSolver(poison_at=15), epochs=20)
    assert summary["diverged"]
    assert summary["stopped"] == "diverged"
    assert "at step 15" in summary["message"]
    assert "decay=" in summary["message"]
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert records[-1]["valid_loss"] is None
    good = records[-2]
    assert load(tmp_path)["good"]["step"] == good["step"] < 15
    assert summary["best"]["test_loss"] is not None
    assert best_solution(tmp_path).params["w"].isfinite().all()
    stored = json.loads(
        (tmp_path / "summary.json").read_text(),
        parse_constant=lambda c: pytest.fail(f"{c} is not JSON"),
    )
    assert stored["diverged"] is True
    assert stored["last"]["valid_loss"] is None


def test_a_run_that_was_never_finite_says_so(tmp_path):
    class Undefined(FakeProblem):
        def metrics(self, *args):
            return {"loss": torch.tensor(torch.inf)}

    summary, solver = run(tmp_path, problem=Undefined())
    assert summary["diverged"]
    assert not solver.rounds
    assert summary["best"]["valid_loss"] is None
    assert "no evaluation was finite" in summary["message"]


def test_a_bad_step_is_noticed_before_an_interrupted_run_overwrites_its_checkpoint(tmp_path):
    hooks = {14: lambda: os.kill(os.getpid(), signal.SIGINT)}
    summary, _ = run(tmp_path, FakeSolver(poison_at=13, hooks=hooks), epochs=50, evaluate_every=10)
    assert summary["diverged"]
    assert load(tmp_path)["solver"]["params"]["w"].isfinite().all()


# --- stopping and going on


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_round_and_the_run_can_go_on(tmp_path, twin, number):
    _, undisturbed = twin(tmp_path / "a")
    hooks = {9: lambda: os.kill(os.getpid(), number)}

    def own(*_):
        pytest.fail("the signal reached its former handler")

    former = signal.signal(number, own)
    try:
        summary, stopped = twin(tmp_path / "b", FakeSolver(hooks=hooks))
        assert signal.getsignal(number) is own
    finally:
        signal.signal(number, former)
    assert summary["interrupted"]
    assert not summary["diverged"]
    assert "resume=" in summary["message"]
    assert summary["steps"] == stopped.inner_count == 10  # 6 of warm-up, then rounds of 4
    assert json.loads((tmp_path / "b" / "summary.json").read_text())["best"]["test_loss"] is None
    summary, resumed = run(tmp_path / "b", resume=True)
    assert not summary["interrupted"]
    assert same_weights(resumed, undisturbed)
    assert comparable(tmp_path / "b") == comparable(tmp_path / "a")


@pytest.mark.parametrize("step", [7, 13, 21])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, twin, step):
    settings = {"evaluate_every": 0.5, "checkpoint_every": 3, "epochs": 5}
    full, undisturbed = twin(tmp_path / "a", **settings)
    with pytest.raises(Killed):
        twin(tmp_path / "b", FakeSolver(hooks={step: kill}), **settings)
    with open(tmp_path / "b" / "metrics.jsonl", "a") as file:
        file.write('{"step": 9')  # killed while it wrote a line
    torch.rand(step)  # another process has another global state
    summary, resumed = run(tmp_path / "b", resume=True, **settings)
    assert same_weights(resumed, undisturbed)
    assert comparable(tmp_path / "b") == comparable(tmp_path / "a")
    for name in ("best", "last"):
        assert summary[name]["test_loss"] == full[name]["test_loss"]
    assert summary["examples"] == full["examples"]
    assert resumed.epochs == undisturbed.epochs[len(undisturbed.epochs) - len(resumed.epochs) :]


def test_a_finished_run_resumes_to_the_same_summary_or_a_longer_one(tmp_path):
    first, _ = run(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text()
    again, _ = run(tmp_path, resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == lines
    assert (again["best"], again["last"], again["examples"]) == (
        first["best"],
        first["last"],
        first["examples"],
    )
    longer, _ = run(tmp_path, resume=True, epochs=6)
    assert longer["steps"] == 36
    assert (tmp_path / "metrics.jsonl").read_text().startswith(lines)


def test_a_run_outside_the_main_thread_leaves_signals_alone(tmp_path):
    result = []
    thread = threading.Thread(target=lambda: result.append(run(tmp_path)[0]))
    thread.start()
    thread.join()
    assert result[0]["stopped"] == "epochs"


def test_a_directory_is_not_overwritten(tmp_path):
    run(tmp_path)
    with pytest.raises(BilevelError, match="already holds a run"):
        run(tmp_path)


def test_an_unwritable_directory_is_found_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    solver = FakeSolver()
    with pytest.raises(BilevelError, match=r"file.* is not writable"):
        run(tmp_path / "file" / "run", solver)
    assert not solver.rounds


# --- weights of one's own


def test_training_starts_from_given_weights(tmp_path):
    w = torch.tensor([1.0, -2.0, 0.5])
    _, solver = run(tmp_path / "a", params={"w": w.double()})
    first = read_metrics(tmp_path / "a" / "metrics.jsonl")[0]
    assert first["valid_loss"] < 0.05
    assert solver.params["w"].dtype == torch.float32
    torch.save({"w": w}, tmp_path / "w.pt")
    run(tmp_path / "b", initial_params=str(tmp_path / "w.pt"))
    assert read_metrics(tmp_path / "b" / "metrics.jsonl")[0]["valid_loss"] == first["valid_loss"]
    run(tmp_path / "c", params={"w": w})
    assert torch.equal(w, torch.tensor([1.0, -2.0, 0.5]))  # a solver trains a copy
    (tmp_path / "w.pt").unlink()
    run(
        tmp_path / "b", initial_params=str(tmp_path / "w.pt"), resume=True
    )  # its weights are in the checkpoint


def test_training_starts_from_the_best_weights_of_a_run(tmp_path):
    run(tmp_path / "a")
    before = read_metrics(tmp_path / "a" / "metrics.jsonl")
    run(tmp_path / "b", initial_params=str(tmp_path / "a"))
    assert read_metrics(tmp_path / "b" / "metrics.jsonl")[0]["valid_loss"] == min(
        r["valid_loss"] for r in before
    )
    with pytest.raises(BilevelError, match="not a run"):
        run(tmp_path / "c", initial_params=str(tmp_path))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "lack `w`"),
        ({"w": torch.zeros(3), "v": torch.zeros(3)}, "hold `v`"),
        ({"w": torch.zeros(2)}, r"`w` is \[2\]; give a tensor of shape \[3\]"),
        ({"w": torch.zeros(3), "count": torch.zeros(2)}, "`count`"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, params, message):
    with pytest.raises(BilevelError, match=message):
        run(tmp_path, params=params)


def test_a_file_of_weights_that_is_none_is_refused(tmp_path):
    with pytest.raises(BilevelError, match="No such file"):
        run(tmp_path / "a", initial_params=str(tmp_path / "w.pt"))
    (tmp_path / "w.pt").write_bytes(b"not weights")
    with pytest.raises(BilevelError, match="holds no state dict"):
        run(tmp_path / "a", initial_params=str(tmp_path / "w.pt"))


def test_a_run_goes_on_on_the_kind_of_device_that_it_began_on(tmp_path):
    run(tmp_path)
    content = torch.load(tmp_path / "checkpoint.pt")
    assert content["state"]["device"] == "cpu"
    content["state"]["device"] = "cuda"
    write_atomically(
        tmp_path / "checkpoint.pt", lambda file: file_format.write(content, file), mode="wb"
    )
    with pytest.raises(
        BilevelError,
        match=r"runner\.device=cpu cannot continue a run of cuda.*; "
        r"resume with runner\.device=cuda",
    ):
        run(tmp_path, resume=True)


def test_the_draws_of_a_solver_are_its_own_to_save(tmp_path):
    run(tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt")["state"]
    assert "generator" not in state
    assert "rng" in state["solver"]


def test_few_weights_run_on_one_thread_unless_told_otherwise(tmp_path, monkeypatch):
    """Afterwards PyTorch's own number is back."""
    asked = []
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    monkeypatch.setattr("torch.set_num_threads", asked.append)
    for threads in (None, 3):
        runner = Runner(epochs=1, progress="none", picture=False, threads=threads)
        runner.run(FakeProblem(), FakeSolver(), directory=tmp_path / str(threads))
    assert asked == [1, 7, 3, 7]


def test_a_solver_that_takes_no_services_is_one_sentence(tmp_path):
    class Older(FakeSolver):
        def setup(self, problem, data, device, generator):
            super().setup(problem, data, device, generator)

    with pytest.raises(BilevelError, match=r"Older\.setup does not take `services`; add"):
        Runner(epochs=1, progress="none").run(FakeProblem(), Older(), directory=tmp_path / "run")
