"""The cases of `tests.golden`: tiny runs that meet every solver and every rare event."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        overrides: of the configuration; `<text>` stands for the folder of `write_text`, and
            `<earlier>` for the directory of the earlier run. What names `solvers.` or `problems.`
            is read in the layout of the tree.
        stop: the round after which it is interrupted, to be resumed and compared with the straight
            run; None for the straight run alone.
        earlier: a run that is made before.
        make: builds the problem in place of the configuration, of `problems` and `bilevel`.
        seed: of the run.
    """

    overrides: tuple[str, ...]
    stop: int | None = None
    earlier: "Case | None" = None
    make: Callable[[Any, Any], Any] | None = None
    seed: int = 3


SELF_TUNING = ("delta_stn", "centered_stn", "stn")
IMPLICIT = ("implicit_cg", "implicit_identity", "implicit_neumann", "implicit_nystrom")
UNROLLED = ("unrolled", "unrolled_forward")
SEARCH = ("random_search", "tpe", "gp")
OTHERS = ("es", "first_order", "fixed", "pbt", "penalty", "sama", "soba")
SOLVERS = (*SELF_TUNING, *IMPLICIT, *UNROLLED, *SEARCH, *OTHERS)
ON_LARGER = ("delta_stn", "stn", "fixed", "unrolled", "implicit_cg")
"""Solvers that are run on language, on random images and on architectures."""

OWN = {
    "es": ["solver.horizon=10"],  # particles go back to the central weights
    "pbt": ["solver.population=4", "solver.resample=0.5"],
    "unrolled": ["solver.inner_steps=4"],
    "unrolled_forward": ["solver.inner_steps=4"],
    "tpe": ["solver.sampler.startup=2"],
    "gp": ["solver.sampler.startup=2"],
    "implicit_cg": ["solver.linear_solve.iterations=4"],
    "implicit_neumann": ["solver.linear_solve.terms=4"],
    "implicit_nystrom": ["solver.linear_solve.rank=3"],
}
"""Overrides that make a solver small, so that its rare events occur."""
SCHEDULE = (
    "solver.inner_scheduler={_target_: torch.optim.lr_scheduler.StepLR, _partial_: true, "
    "step_size: %d, gamma: 0.7}"
)
PLATEAU = (
    "solver.inner_scheduler={_target_: torch.optim.lr_scheduler.ReduceLROnPlateau, "
    "_partial_: true, patience: 0, factor: 0.5, threshold: 0.1}"
)
NON_MONOTONE = "solver.inner_scheduler={_target_: solvers.NonMonotone, _partial_: true, window: 1}"
ADAM = "{_target_: torch.optim.Adam, _partial_: true, lr: 0.01}"

RIDGE = ("problem=ridge", "runner.epochs=23", "runner.evaluate_every=5", "trial.epochs=4")
"""A step is an epoch; 23 are no multiple of a round, and neither are 7 of warm-up."""
DIGITS = (
    *("problem=digits", "problem.hidden=[8]", "problem.batch_size=256", "runner.epochs=3.4"),
    *("runner.evaluate_every=1", "trial.epochs=1"),
)
"""Five steps an epoch, of which 17 are taken, after 7 of warm-up."""
WARM_RIDGE, WARM_DIGITS = "runner.warmup_epochs=7", "runner.warmup_epochs=1.4"
COLD = "runner.warmup_epochs=0"
GAUSSIAN = "problem.dropout=gaussian"
RATE = "problem.space.rate={optimizer: lr, init: 0.02}"
TINY = {
    "elastic_net": (["problem=elastic_net"], SOLVERS),
    "quadratic": (["problem=quadratic"], SOLVERS),
    "quadratic_direct": (["problem=quadratic", "problem.direct=1.0"], SOLVERS),
    "linear_network": (["problem=linear_network"], ("delta_stn", "unrolled", "implicit_cg")),
    "input_dropout": (["problem=input_dropout"], ("delta_stn", "stn", "es", "pbt", "unrolled")),
    "input_dropout_expected": (
        ["problem=input_dropout", "problem.expected=true"],
        ("delta_stn", "unrolled", "implicit_cg"),
    ),
    "cleaning": (["problem=cleaning"], ("implicit_identity", "sama", "penalty", "fixed")),
    "distillation": (["problem=distillation"], ("unrolled", "implicit_cg", "sama")),
    "sinusoid": (
        ["problem=sinusoid", "problem.hidden=[8]", "problem.tasks=4", "problem.unseen=8"],
        ("unrolled", "implicit_cg", "sama", "fixed"),
    ),
    "loss_weights": (
        ["problem=loss_weights", "problem.hidden=[8]", "problem.batch_size=64"],
        ("delta_stn", "stn", "implicit_neumann", "pbt"),
    ),
    "digits_augmented": (
        ["problem=digits_augmented", "problem.channels=[2,4]", "problem.hidden=8"],
        ("delta_stn", "stn", "es", "fixed", "pbt", "random_search"),
    ),
    "architecture": (
        ["problem=architecture_tabular", "problem.width=4", "problem.batch_size=256"],
        (*ON_LARGER, "first_order"),
    ),
    "architecture_images": (
        [
            *("problem=architecture_images", "problem.channels=2", "problem.cells=1"),
            *("problem.nodes=2", "problem.batch_size=256"),
        ],
        ("first_order",),
    ),
    "language": (
        [
            *("problem=language", "problem.text=<text>", "problem.embedding=6"),
            *("problem.hidden=6", "problem.batch_size=8", "problem.bptt=6", "lr.inner=0.3"),
        ],
        (*ON_LARGER, "es"),
    ),
}
"""Problems by name, with the solvers that are run on them for a few rounds."""
SHORT = {
    "cleaning": 12,
    "distillation": 12,
    "elastic_net": 12,
    "quadratic": 12,
    "quadratic_direct": 12,
    "linear_network": 12,
    "input_dropout": 12,
    "input_dropout_expected": 12,
    "sinusoid": 9,
    "digits_augmented": 2.75,
    "language": 1.5,
    "architecture_images": 2.7,
}
"""Their epochs; 3.5 for the others."""


def random_images(dropout: str, **more: Any) -> Callable[[Any, Any], Any]:
    """Random images and a convolutional network with batch norm."""

    def make(problems: Any, _: Any) -> Any:
        draws = torch.Generator().manual_seed(0)

        def part(n: int) -> tuple[torch.Tensor, torch.Tensor]:
            pixels = torch.randint(0, 256, (n, 3, 8, 8), generator=draws, dtype=torch.uint8)
            return pixels, torch.arange(n) % 10

        splits = [part(n) for n in (48, 16, 16)]
        images = problems.datasets.Images(*splits, mean=100.0, std=50.0, white=255.0, classes=10)
        return problems.images(
            images, "simple_cnn", norm="batch", width=0.125, batch_size=8, dropout=dropout, **more
        )

    return make


def write_text(folder: Path) -> Path:
    """A folder with a small text of few words, always the same."""
    folder.mkdir()
    draws, words = random.Random(0), [f"w{i}" for i in range(20)]
    for name, lines in (("train", 60), ("valid", 15), ("test", 15)):
        text = "\n".join(" ".join(draws.choices(words, k=9)) for _ in range(lines))
        (folder / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
    return folder


def every_solver() -> dict[str, Case]:
    """Every solver on ridge and digits: warm, scheduled and resumed; and cold."""
    cases = {}
    for solver in SOLVERS:
        own = (f"solver={solver}", *OWN.get(solver, []))
        longer = ["runner.epochs=8.6"] if solver == "pbt" else []
        ridge = (*RIDGE, *own)
        digits = (*DIGITS, *own, *longer)
        stop = 12 if solver in ("first_order", "soba") else 3
        cases[f"ridge/{solver}/warm"] = Case((*ridge, WARM_RIDGE, SCHEDULE % 5), stop)
        cases[f"ridge/{solver}/cold"] = Case((*ridge, COLD))
        warm = (*digits, WARM_DIGITS, SCHEDULE % 1)
        cases[f"digits/{solver}/warm"] = Case((*warm, GAUSSIAN), stop)
        cases[f"digits/{solver}/cold"] = Case((*digits, COLD, GAUSSIAN))
        cases[f"digits/{solver}/bernoulli"] = Case(warm, stop)
    return cases


def other_problems() -> dict[str, Case]:
    """The other problems, a few rounds each."""
    cases = {}
    for problem, (settings, solvers) in TINY.items():
        for solver in solvers:
            run = (f"runner.epochs={SHORT.get(problem, 3.5)}", "runner.warmup_epochs=1")
            every = "runner.evaluate_every=4" if SHORT.get(problem, 0) > 4 else ""
            few = ("solver.population=2",) if solver == "pbt" else ()
            own = (f"solver={solver}", *OWN.get(solver, []), *few, "trial.epochs=2")
            smooth = solver in ("unrolled", "implicit_cg") and problem == "language"
            drop = (GAUSSIAN,) if smooth else ()
            given = (*settings, *own, *run, every or "runner.evaluate_every=1", *drop)
            cases[f"{problem}/{solver}"] = Case(given, stop=2)
    for solver in ON_LARGER:
        smooth = solver in ("unrolled", "implicit_cg")
        augment = {} if smooth else {"augment": ["affine", "colour", "cutout"], "flip": True}
        own = (f"solver={solver}", *OWN.get(solver, []), "runner.epochs=2.5")
        make = random_images("gaussian" if smooth else "bernoulli", **augment)
        given = (*own, "runner.warmup_epochs=1", "runner.evaluate_every=1")
        cases[f"images/{solver}"] = Case(given, make=make, stop=3)
    language = (*TINY["language"][0], "solver=delta_stn", "runner.epochs=1.5", COLD)
    for name, more in {"gru": "problem.cell=gru", "one_layer": "problem.layers=1"}.items():
        cases[f"language/{name}"] = Case((*language, more), stop=2)
    sinusoid = TINY["sinusoid"][0]
    maml = ("solver=unrolled", "solver.restart=true", "solver.inner_steps=3")
    fresh = ("problem.fresh_tasks=true", "runner.epochs=9", "runner.evaluate_every=3")
    cases["sinusoid/maml"] = Case((*sinusoid, *maml, *fresh), stop=2)
    return cases


def variants() -> dict[str, tuple[str, list[str]]]:
    """Settings of solvers by name: the solver, and the overrides of it."""
    found: dict[str, tuple[str, list[str]]] = {}
    for flags in ("111", "110", "101", "100", "010", "000"):
        names = ("centered", "regularized_w0", "linearize")
        truth = {"0": "false", "1": "true"}
        settings = [f"solver.{n}={truth[f]}" for n, f in zip(names, flags, strict=True)]
        found[f"flags_{flags}"] = ("delta_stn", settings)
        found[f"flags_{flags}_dense"] = (
            "delta_stn",
            [*settings, "solver.response={_target_: solvers.Dense}", "solver.clip_norm=0.05"],
        )
    for solver in ("delta_stn", "stn"):
        found[f"{solver}_no_scale"] = (solver, ["solver.tune_scale=false"])
        found[f"{solver}_entropy"] = (solver, ["solver.entropy_weight=0.5"])
        found[f"{solver}_response_optimizer"] = (solver, [f"solver.response_optimizer={ADAM}"])
        found[f"{solver}_two_outer"] = (solver, ["solver.outer_steps=2", PLATEAU])
    found["delta_stn_non_monotone"] = ("delta_stn", [NON_MONOTONE])
    found["refused_flags"] = ("delta_stn", ["solver.centered=false"])
    solves = {
        "cg": "CG, iterations: 3",
        "identity": "Identity, scale: 0.5",
        "neumann": "Neumann, terms: 3",
        "neumann_step": "Neumann, terms: 3, step: 0.1",
        "fixed_point": "FixedPoint, iterations: 3",
        "nystrom": "Nystrom, rank: 3",
    }
    for name, solve in solves.items():
        for curvature in ("Hessian", "GaussNewton"):
            for warm in ("true", "false"):
                found[f"implicit_{name}_{curvature}_{warm}"] = (
                    "implicit_cg",
                    [
                        f"solver.linear_solve={{_target_: solvers.{solve}}}",
                        f"solver.curvature={{_target_: solvers.{curvature}, damping: 0.2}}",
                        f"solver.warm_start={warm}",
                        f"solver.batches={2 if warm == 'true' else 1}",
                    ],
                )
    reverse = "solver.mode={_target_: solvers.Reverse, truncate: %s, checkpoint: %s}"
    for solver in UNROLLED:
        found[f"{solver}_restart"] = (solver, ["solver.restart=true"])
        found[f"{solver}_adam"] = (solver, [f"solver.inner_optimizer={ADAM}"])
        found[f"{solver}_clip"] = (solver, ["solver.clip_norm=0.05"])
    found["unrolled_truncate"] = ("unrolled", [reverse % (2, "false")])
    found["unrolled_checkpoint"] = ("unrolled", [reverse % ("null", "true")])
    found["unrolled_both"] = ("unrolled", [reverse % (2, "true")])
    for solver in ("es", "penalty", "sama", "soba", "first_order", "pbt", "fixed", "random_search"):
        found[f"{solver}_adam_clip"] = (
            solver,
            [f"solver.inner_optimizer={ADAM}", "solver.clip_norm=0.05"],
        )
    found["es_truncated"] = ("es", ["solver.persistent=false"])
    found["es_one_pair"] = ("es", ["solver.pairs=1", PLATEAU])
    found["sama_double_backward"] = ("sama", ["solver.finite_difference=false"])
    found["soba_adjoint_lr"] = ("soba", ["solver.adjoint_lr=0.05"])
    found["penalty_large"] = ("penalty", ["solver.weight=2", "solver.growth=1"])
    found["first_order_two"] = ("first_order", ["solver.inner_steps=2", "solver.outer_steps=2"])
    found["pbt_ranges"] = ("pbt", ["solver.perturbation=1.0", "solver.resample=0", PLATEAU])
    found["pbt_long"] = ("pbt", [PLATEAU, "runner.epochs=40"])
    found["pbt_long_tuned_rate"] = ("pbt", [PLATEAU, RATE, "runner.epochs=40"])
    for name, pruner in {"median": "Median, startup: 1", "hyperband": "Hyperband"}.items():
        pruned = [f"solver.pruner={{_target_: solvers.{pruner}}}", "solver.trial_epochs=3"]
        found[f"tpe_{name}"] = ("tpe", pruned)
        found[f"random_search_{name}_last"] = (
            "random_search",
            [*pruned, "solver.early_stopping=false"],
        )
    found["fixed_gaussian"] = ("fixed", ["solver.hypers={_target_: solvers.Gaussian, std: 0.01}"])
    found["fixed_gaussian_u"] = (
        "fixed",
        ["solver.hypers={_target_: solvers.Gaussian, std: 0.3, unconstrained: true}"],
    )
    found["fixed_sinusoidal"] = (
        "fixed",
        ["solver.hypers={_target_: solvers.Sinusoidal, amplitude: 0.01, period: 6}"],
    )
    for solver in (*UNROLLED, "es", "pbt", *SEARCH, "delta_stn", "fixed", "soba"):
        found[f"{solver}_tuned_rate"] = (solver, [RATE])
    return found


def settings() -> dict[str, Case]:
    """The variants of solvers on digits and ridge, and settings of the runner."""
    cases = {}
    for name, (solver, more) in variants().items():
        own = (f"solver={solver}", *OWN.get(solver, []), *more)
        search = solver in (*SEARCH, "pbt")
        epochs = ["runner.epochs=8.6"] if search else ["runner.epochs=2.4"]
        drop = "problem.dropout=gaussian"
        digits = (*DIGITS, *epochs, "runner.warmup_epochs=0.6", drop, *own)
        stop = 6 if search or solver == "soba" else 2
        cases[f"variants/digits/{name}"] = Case(digits, stop)
        on_ridge = (*RIDGE, *own, "runner.epochs=13", WARM_RIDGE)
        if not search:
            cases[f"variants/ridge/{name}"] = Case(on_ridge)
        if solver == "first_order":  # refuses the two above
            table = (*TINY["architecture"][0], *own, "runner.epochs=2.4", COLD)
            cases[f"variants/architecture/{name}"] = Case((*table, SCHEDULE % 1), stop=3)
    delta = (*DIGITS, "solver=delta_stn")
    first = Case((*delta, COLD, "runner.epochs=2"))
    replayed = "solver.hypers={_target_: solvers.Replayed, path: '<earlier>'}"
    final = "solver.hypers={_target_: solvers.Replayed, path: '<earlier>', final: true}"
    fixed = (*DIGITS, "solver=fixed", COLD)
    cases["variants/replayed"] = Case((*fixed, replayed), 2, earlier=first)
    cases["variants/replayed_final"] = Case((*fixed, final), earlier=first)
    start = "runner.initial_params='<earlier>'"
    for solver in ("delta_stn", "pbt", "random_search"):
        given = (*DIGITS, f"solver={solver}", *OWN.get(solver, []), COLD, start)
        cases[f"variants/initial_params/{solver}"] = Case(given, earlier=first)
    patience = (*RIDGE, "solver=delta_stn", "lr.outer=1", COLD, "runner.evaluate_every=1")
    patience = (*patience, "runner.epochs=60")
    cases["runner/patience"] = Case((*patience, "runner.patience=2"), 4)
    cases["runner/examples"] = Case((*DIGITS, "solver=es", "runner.examples=9000", COLD))
    cases["runner/diverges"] = Case((*DIGITS, "solver=fixed", "lr.inner=1e30", COLD))
    cases["runner/bf16"] = Case((*DIGITS, "solver=delta_stn", COLD, "runner.precision=bf16"))
    cases["runner/all_warm"] = Case((*DIGITS, "solver=delta_stn", "runner.warmup_epochs=9"))
    for kind in ("per_weight", "false"):
        decay = f"problem.weight_decay={kind}"
        given = (*DIGITS, "solver=implicit_neumann", GAUSSIAN, COLD, decay)
        cases[f"digits/decay_{kind}"] = Case(given, 2)
    cases["digits/concrete"] = Case((*DIGITS, "solver=unrolled", "problem.dropout=concrete", COLD))
    for more in ("per_feature=true", "batch_size=7", "dtype=float64"):
        for solver in ("delta_stn", "implicit_cg", "unrolled", "es"):
            own = (f"solver={solver}", *OWN.get(solver, []), "runner.epochs=13", WARM_RIDGE)
            name = f"ridge/{solver}/{more.partition('=')[0]}"
            cases[name] = Case((*RIDGE, *own, f"problem.{more}"))
    return cases


CASES: dict[str, Case] = every_solver() | other_problems() | settings()
