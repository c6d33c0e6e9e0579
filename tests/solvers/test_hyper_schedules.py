"""Hyperparameter schedules of fixed training: another run's, noise, a wave; and their file."""

import json
import math
from functools import partial

import pytest
import torch
import torch.nn as nn

from bilevel import (
    BilevelError,
    Integer,
    Interval,
    ModuleProblem,
    Positive,
    Refused,
    Runner,
    Simplex,
    Space,
    squared_norm,
)
from bilevel.cli.app import main
from bilevel.loggers import hyper_schedule
from bilevel.loggers.hyper_schedule import RecordedSchedule, export, from_run, read
from bilevel.loggers.records import read_metrics
from bilevel.solvers import Constant, Fixed, Gaussian, Replayed, SelfTuning, Sinusoidal
from bilevel.solvers.self_tuning import SelfTuningMethod
from tests.support.device_waits import no_waiting
from tests.support.solver_cases import ready, sgd

CALM = partial(Runner, progress="none", picture=False, device="cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def space(**changes):
    return Space(
        rate=Interval(low=0.0, high=0.9, init=0.2, differentiable=False),
        mask=Interval(low=0.0, high=0.9, init=0.3, differentiable=False, per_example=False),
        decay=Positive(init=1e-2),
    ).override(changes)


def network(dtype):
    return nn.Sequential(nn.Linear(3, 5, dtype=dtype), nn.Tanh(), nn.Linear(5, 1, dtype=dtype))


class Net(ModuleProblem):
    """Least squares by a small network with noise on the inputs, and every λ that a step had."""

    def __init__(self, domains=None, dtype=torch.float64):
        draws = generator(3)
        x = torch.randn(44, 3, generator=draws, dtype=dtype)
        y = x.sum(1, keepdim=True).sin()
        self.seen = []
        domains = space() if domains is None else domains
        super().__init__(
            lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype),
            domains,
            (x[:24], y[:24]),
            (x[24:], y[24:]),
            batch_size=4,
        )

    def inner_objective(self, hypers, params, prediction, batch):
        self.seen.append({name: leaf.detach().clone() for name, leaf in hypers.items()})
        penalty = sum(leaf.mean() for leaf in hypers.values()) * squared_norm(params)
        return (prediction - batch[1]).square().mean() + 0.1 * penalty.mean()

    def outer_objective(self, hypers, params, prediction, batch):
        return (prediction - batch[1]).square().mean()


def trained(hypers, steps, domains=None, dtype=torch.float64, **options):
    problem = Net(domains, dtype)
    solver = ready(
        problem, Fixed(hypers=hypers, inner_optimizer=sgd(0.05, momentum=0.9), **options)
    )
    problem.seen.clear()
    return problem, solver, [solver.step(warmup=True, limit=1) for _ in range(steps)]


def written(path, steps, **hypers):
    path.write_text(json.dumps({"steps": steps, "hypers": hypers}))
    return path


def three(rates):
    return {"rate": rates, "mask": [0.3] * len(rates), "decay": [0.01] * len(rates)}


# --- the schedule and its file


def tuned_run(directory, every, epochs=4, warmup=1):
    """Δ-STN in float32; 6 steps an epoch, rounds of 2."""
    runner = CALM(epochs=epochs, warmup_epochs=warmup, evaluate_every=every)
    solver = SelfTuning(inner_steps=2, inner_optimizer=sgd(0.05))
    problem = Net(dtype=torch.float32)
    runner.run(problem, solver, directory=directory)
    return problem


def test_the_file_says_what_the_records_say(tmp_path):
    tuned_run(tmp_path / "run", every=0.5)
    path = export(tmp_path / "run")
    assert path == tmp_path / "run" / "schedule.json"
    schedule, records = read(path), read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert list(schedule.steps) == [record["step"] for record in records]
    assert len(set(schedule.hypers["rate"])) > 5
    for name in ("rate", "mask", "decay"):
        assert schedule.hypers[name] == [record[f"hypers.{name}"] for record in records]
    assert schedule == read(tmp_path / "run") == from_run(tmp_path / "run")
    assert schedule.origin == {"problem": "Net", "solver": "SelfTuning", "seed": 0}
    elsewhere = export(tmp_path / "run", tmp_path / "other.json")
    assert elsewhere.read_text() == path.read_text()


def test_a_run_evaluated_every_round_is_replayed_at_the_very_values_that_it_had(
    tmp_path, monkeypatch
):
    """λ moves only at the end of a round, so evaluations of every round hold all its values."""
    had = []
    inner_step = SelfTuningMethod.inner_step

    def noted(self, batch):
        hypers = self.space.constrain(self.core.search.u0)
        had.append({name: leaf.detach().clone() for name, leaf in hypers.items()})
        return inner_step(self, batch)

    monkeypatch.setattr(SelfTuningMethod, "inner_step", noted)
    tuned_run(tmp_path, every=1 / 3)
    had = had[-24:]  # the steps before belong to the dry run
    problem, solver, _ = trained(Replayed(tmp_path), 24, dtype=torch.float32)
    assert len({float(each["rate"]) for each in had}) == 9  # rounds after warm-up
    for step in range(24):
        assert all(torch.equal(problem.seen[step][name], had[step][name]) for name in had[step])
    final = from_run(tmp_path).at(24)
    assert all(
        torch.equal(leaf, torch.tensor(final[name]))
        for name, leaf in solver.solution().hypers.items()
    )


def test_replayed_values_by_hand(tmp_path):
    """Held until the next entry, the first before the first, and the last after the last."""
    path = written(tmp_path / "s.json", [1, 3, 4], **three([0.1, 0.4, 0.5]))
    problem, solver, _ = trained(Replayed(path), 8)
    assert [step["rate"].item() for step in problem.seen] == [
        0.1,
        0.1,
        0.1,
        0.4,
        0.5,
        0.5,
        0.5,
        0.5,
    ]
    assert solver.solution().hypers["rate"].item() == 0.5
    problem, _, _ = trained(Replayed(path, final=True), 3)
    assert [step["rate"].item() for step in problem.seen] == [0.5] * 3


def test_a_constant_schedule_is_fixed_training_bit_for_bit(tmp_path):
    path = written(tmp_path / "s.json", [0, 5], rate=[0.2] * 2, mask=[0.3] * 2, decay=[1e-2] * 2)
    float32 = Net(dtype=torch.float32).space
    values = {name: leaf.item() for name, leaf in float32.constrain(float32.init()).items()}
    exact = written(tmp_path / "e.json", [0], **{name: [value] for name, value in values.items()})
    _, plain, losses = trained(None, 12, dtype=torch.float32)
    _, named, named_losses = trained(Constant(), 12, dtype=torch.float32)
    _, ours, our_losses = trained(Replayed(exact), 12, dtype=torch.float32)
    for other, other_losses in ((named, named_losses), (ours, our_losses)):
        assert losses == other_losses
        assert all(map(torch.equal, plain.core.weights.leaves, other.core.weights.leaves))
        assert torch.equal(plain.core.generator.get_state(), other.core.generator.get_state())
    _, moved, _ = trained(
        Replayed(written(path, [0, 5], **three([0.2, 0.25]))), 12, dtype=torch.float32
    )
    assert not torch.equal(plain.core.weights.leaves[0], moved.core.weights.leaves[0])


def test_all_kinds_of_hyperparameters_are_replayed(tmp_path):
    domains = Space(
        holes=Integer(low=0.0, high=4.0, init=1.0),
        weights=Simplex(init=[0.5, 0.5], shape=(2,)),
        rates=Interval(low=0.0, high=1.0, init=[0.1, 0.2], shape=(2,)),
        off=Positive(init=0.0, frozen=True),
    )
    values = {
        "holes": [0.0, 4.0],
        "weights": [[0.5, 0.5], [0.25, 0.75]],
        "rates": [[0.1, 0.2], [1.0, 0.0]],
        "off": [0.0, 0.0],
    }
    problem, _, _ = trained(Replayed(written(tmp_path / "s.json", [0, 1], **values)), 2, domains)
    for k, seen in enumerate(problem.seen):
        assert list(seen) == list(domains)
        assert {name: leaf.tolist() for name, leaf in seen.items()} == {
            name: each[k] for name, each in values.items()
        }


# --- noise and waves


def test_gaussian_noise_in_the_units_of_the_hyperparameter():
    problem, solver, _ = trained(Gaussian({"rate": 0.04, "mask": 0.02}), 400)
    rates, masks = (torch.stack([step[name] for step in problem.seen]) for name in ("rate", "mask"))
    assert rates.shape == (400, 4)  # one for every example
    assert masks.shape == (400,)  # one for the batch
    assert rates.mean().item() == pytest.approx(0.2, abs=4 * 0.04 / 40)
    assert rates.std().item() == pytest.approx(0.04, rel=4 / math.sqrt(2 * 1600))
    assert masks.mean().item() == pytest.approx(0.3, abs=4 * 0.02 / 20)
    assert masks.std().item() == pytest.approx(0.02, rel=4 / math.sqrt(2 * 400))
    assert abs(torch.corrcoef(rates.T)[0, 1]) < 4 / 20
    torch.testing.assert_close(
        torch.stack([step["decay"] for step in problem.seen]), torch.full((400, 4), 1e-2).double()
    )
    assert solver.solution().hypers["rate"].item() == pytest.approx(0.2)


def test_gaussian_noise_of_the_coordinates():
    problem, solver, _ = trained(Gaussian(0.5, unconstrained=True), 400)
    centre = solver.rule.u
    for k, name in enumerate(("rate", "mask", "decay")):
        domain = problem.space[name]
        u = torch.cat([domain.unconstrain(step[name]).reshape(-1) for step in problem.seen])
        assert u.mean().item() == pytest.approx(centre[k].item(), abs=4 * 0.5 / math.sqrt(len(u)))
        assert u.std().item() == pytest.approx(0.5, rel=4 / math.sqrt(2 * len(u)))
    assert len(problem.seen[0]["rate"].unique()) == 4


def test_a_wave_by_its_formula():
    problem, solver, _ = trained(
        Sinusoidal(0.1, period=8), 20, space(mask={"frozen": True}, decay={"frozen": True})
    )
    for step, seen in enumerate(problem.seen):
        assert seen["rate"].item() == pytest.approx(
            0.2 + 0.1 * math.sin(2 * math.pi * step / 8), abs=1e-12
        )
        assert seen["mask"].item() == 0.3
    assert solver.solution().hypers["rate"].item() == pytest.approx(
        0.2 + 0.1 * math.sin(2 * math.pi * 20 / 8), abs=1e-12
    )


@pytest.mark.parametrize("given", [Gaussian(3.0), Sinusoidal(3.0, 7)], ids=["gaussian", "wave"])
def test_what_is_shifted_stays_inside(given):
    problem, _, _ = trained(given, 30, space(rate={"init": 1e-5}))
    rates, decays = (
        torch.stack([step[name] for step in problem.seen]).reshape(-1) for name in ("rate", "decay")
    )
    torch.testing.assert_close(
        rates.min().item(), 1e-5
    )  # the start itself, nearer to the edge than others may come
    torch.testing.assert_close(rates.max().item(), 0.9 - 0.9e-3)
    torch.testing.assert_close(decays.min().item(), 1e-5)
    assert decays.max() > 1


def test_integers_are_rounded_stochastically_around_a_wave():
    domains = Space(holes=Integer(low=0.0, high=8.0, init=4.0))
    problem, _, _ = trained(Sinusoidal(0.5, period=4), 400, domains)
    up = [seen["holes"].item() for seen in problem.seen[1::4]]  # at the crest: 4.5
    assert set(up) == {4.0, 5.0}
    assert sum(up) / 100 == pytest.approx(4.5, abs=4 * 0.5 / 10)
    assert {seen["holes"].item() for seen in problem.seen[::4]} == {4.0}


# --- in a run


def givens(path):
    return {
        "replayed": lambda: Replayed(path),
        "gaussian": lambda: Gaussian(0.05),
        "wave": lambda: Sinusoidal(0.05, period=7),
    }


@pytest.mark.parametrize("kind", ["replayed", "gaussian", "wave"])
def test_a_run_resumes_bit_for_bit_and_does_not_wait(tmp_path, kind):
    path = written(tmp_path / "s.json", [0, 4, 8, 9], **three([0.1, 0.4, 0.5, 0.3]))

    def run(name, epochs, resume=False):
        solver = Fixed(
            hypers=givens(path)[kind](), inner_steps=3, inner_optimizer=sgd(0.05, momentum=0.9)
        )
        runner = CALM(epochs=epochs, warmup_epochs=0, evaluate_every=0.5)
        runner.run(Net(), solver, directory=tmp_path / name, resume=resume)
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        return [
            {k: v for k, v in line.items() if not k.startswith(("seconds", "peak_memory_bytes"))}
            for line in lines
        ], solver

    whole, first = run("whole", 3)
    run("parts", 1)
    parts, second = run("parts", 3, resume=True)
    assert parts == whole
    assert all(map(torch.equal, first.core.weights.leaves, second.core.weights.leaves))
    if kind == "replayed":
        assert [record["hypers.rate"] for record in whole] == [0.1, 0.1, 0.4, 0.3, 0.3, 0.3, 0.3]
    with no_waiting():
        second.step()


def test_resuming_with_another_schedule(tmp_path):
    path = written(tmp_path / "s.json", [0, 4], **three([0.1, 0.4]))
    CALM(epochs=1).run(Net(), Fixed(hypers=Replayed(path)), directory=tmp_path / "run")
    written(path, [0, 5], **three([0.1, 0.4]))
    with pytest.raises(
        BilevelError, match=r"s\.json has changed since this run began; restore the old schedule"
    ):
        CALM(epochs=2).run(
            Net(), Fixed(hypers=Replayed(path)), directory=tmp_path / "run", resume=True
        )


def test_by_command(tmp_path, elsewhere, capsys):
    base = ["problem=quadratic", "runner.progress=none", "runner.picture=false", "runner.epochs=30"]
    base += ["runner.warmup_epochs=2", "runner.evaluate_every=1"]
    assert main([*base, "response={_target_: bilevel.solvers.Dense}", "hydra.run.dir=first"]) == 0
    assert hyper_schedule.main(["first"]) == 0
    assert capsys.readouterr().out == "first/schedule.json\n"
    name = next(iter(read("first/schedule.json").hypers))
    replayed = "solver.hypers={_target_: bilevel.solvers.Replayed, path: first/schedule.json}"
    assert main([*base, "solver=fixed", replayed, "hydra.run.dir=second"]) == 0
    first, second = (
        [line[f"hypers.{name}"] for line in read_metrics(tmp_path / run / "metrics.jsonl")]
        for run in ("first", "second")
    )
    assert second == first
    assert first[-1] != first[0]
    assert main(["resume=second", "runner.epochs=40", "runner.progress=none"]) == 0
    assert [line[f"hypers.{name}"] for line in read_metrics(tmp_path / "second" / "metrics.jsonl")][
        -2:
    ] == first[-1:] * 2
    assert hyper_schedule.main(["third"]) == 1
    assert hyper_schedule.main([]) == 2
    shown = capsys.readouterr().err
    assert (
        "bilevel: cannot read third/metrics.jsonl (No such file or directory); "
        "give the directory of a run\n" in shown
    )
    assert main([*base, "solver=fixed", replayed.replace("first/", "frist/")]) == 1
    assert (
        "solver.hypers: cannot read the schedule frist/schedule.json (No such file or directory)"
        in capsys.readouterr().err
    )
    assert (
        main(
            [
                *base,
                "solver=fixed",
                "solver.hypers={_target_: bilevel.solvers.Gaussian, std: {nothing: 0.1}}",
            ]
        )
        == 1
    )
    assert (
        "std.nothing=0.1 names an unknown hyperparameter; choose from " in capsys.readouterr().err
    )


# --- errors


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not JSON; write a schedule with: python -m bilevel.loggers.hyper_schedule RUN"),
        ("[]", "lacks `steps` or `hypers`"),
        ('{"steps": [], "hypers": {"a": []}}', "steps of a hyperparameter schedule must be whole"),
        (
            '{"steps": [0.5], "hypers": {"a": [1]}}',
            "steps of a hyperparameter schedule must be whole",
        ),
        (
            '{"steps": [0, 0], "hypers": {"a": [1, 1]}}',
            "steps of a hyperparameter schedule must ascend",
        ),
        ('{"steps": [0], "hypers": {}}', "must map names to lists"),
        ('{"steps": [0, 1], "hypers": {"a": [1]}}', "hypers\\['a'\\] must have 2 values"),
        (
            '{"steps": [0, 7], "hypers": {"a": [1, null]}}',
            "hypers\\['a'\\] must be finite at step 7",
        ),
    ],
)
def test_what_is_no_schedule(tmp_path, content, sentence):
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(BilevelError, match=sentence):
        Replayed(tmp_path / "s.json")


def test_what_is_no_run(tmp_path):
    with pytest.raises(
        BilevelError,
        match=r"cannot read .*metrics\.jsonl \(No such file or directory\); give the directory",
    ):
        export(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "hypers.a": {"mean": 1.0, "min": 0.0, "max": 2.0}}\n'
    )
    with pytest.raises(BilevelError, match="`a` is too large"):
        export(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{]\n")
    with pytest.raises(BilevelError, match="is damaged"):
        export(tmp_path)
    for lines in ("", '{"step": 0}\n'):
        (tmp_path / "metrics.jsonl").write_text(lines)
        with pytest.raises(BilevelError, match="records no hyperparameter"):
            export(tmp_path)


@pytest.mark.parametrize(
    ("hypers", "changes", "sentence"),
    [
        ({"rate": [0.1]}, {}, r"has no `mask`, only rate; freeze `mask`"),
        (
            {**three([0.1]), "rote": [0.1]},
            {},
            r"has `rote` \(did you mean `rate`\?\), which the problem lacks",
        ),
        (three([[0.1, 0.2]]), {}, r"has `rate` in another shape than \[\]; give the schedule"),
        (three([0.95]), {}, "`rate` is 0.95 in .* at step 0, outside its domain"),
        (three([0.1]), {"rate": {"frozen": True}}, "`rate` is frozen at 0.2 and is 0.1 in"),
        (
            {**three([0.1, 0.2]), "lr": [0.1, 0.2]},
            {"lr": {"optimizer": "lr", "init": 0.1}},
            "`lr` is the inner optimizer's lr, .*; take the last values",
        ),
    ],
)
def test_schedules_that_do_not_fit(tmp_path, hypers, changes, sentence):
    steps = list(range(len(hypers.get("decay", [0]))))
    given = Replayed(written(tmp_path / "s.json", steps, **hypers))
    with pytest.raises(Refused, match=sentence):
        trained(given, 1, space(**changes))


@pytest.mark.parametrize("setting", ["lr", "weight_decay", "momentum"])
def test_the_last_values_set_the_optimizer_as_initial_values_do(tmp_path, setting):
    path = written(tmp_path / "s.json", [0, 6], **three([0.2, 0.2]), own=[0.01, 0.03])
    ends = []
    for hypers, init in ((Replayed(path, final=True), 0.5), (None, 0.03), (None, 0.01)):
        domains = space(own={"optimizer": setting, "init": init})
        _, solver, _ = trained(hypers, 3, domains)
        ends.append(solver.solution())
    assert ends[0].hypers["own"] == pytest.approx(0.03)
    for name, weight in ends[0].params.items():
        assert torch.allclose(weight, ends[1].params[name], rtol=1e-6)
        assert not torch.allclose(weight, ends[2].params[name], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Gaussian(-1.0), "std=-1.0 must be at least 0"),
        (lambda: Gaussian({"rate": "much"}), "std.rate='much' must be at least 0"),
        (lambda: Sinusoidal(float("nan"), 10), "amplitude=nan must be at least 0"),
        (lambda: Sinusoidal(0.1, 0), "period=0 must be positive and finite"),
    ],
)
def test_sizes_that_cannot_be(make, sentence):
    with pytest.raises(BilevelError, match=sentence):
        make()


def test_names_that_cannot_be_perturbed():
    with pytest.raises(
        Refused,
        match=r"std\.rote=0\.1 names an unknown hyperparameter \(did you mean `rate`\?\)",
    ):
        trained(Gaussian({"rote": 0.1}), 1)
    with pytest.raises(
        Refused, match=r"amplitude\.rate=0\.1 has no effect, because `rate` is frozen"
    ):
        trained(Sinusoidal({"rate": 0.1}, 9), 1, space(rate={"frozen": True}))
    with pytest.raises(Refused, match="`w` must sum to one"):
        trained(Gaussian(0.1), 1, Space(w=Simplex(init=[0.5, 0.5], shape=(2,))))
    setting = space(lr={"optimizer": "lr", "init": 0.1})
    with pytest.raises(Refused, match="`lr` is the inner optimizer's lr"):
        trained(Gaussian(0.1), 1, setting)
    trained(Gaussian({"rate": 0.1}), 1, setting)  # it stays
    problem, _, _ = trained(
        Gaussian(0.1, unconstrained=True), 1, Space(w=Simplex(init=[0.5, 0.5], shape=(2,)))
    )
    assert problem.seen[0]["w"].sum().item() == pytest.approx(1)
    assert problem.seen[0]["w"][0] != 0.5


def test_a_schedule_is_held():
    schedule = RecordedSchedule([2, 5], {"a": [1.0, 2.0]})
    assert [schedule.at(n)["a"] for n in (0, 2, 4, 5, 99)] == [1.0, 1.0, 1.0, 2.0, 2.0]
