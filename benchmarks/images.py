"""Measure a training step on images: `python -m benchmarks.images [--json] [--device auto] …`.

Plain training, STN, centered STN and Δ-STN run on random images. The dropout rates and the
strengths of affine, colour and cutout are tuned per example. On a CPU the networks are a quarter
as wide.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.hand_written import Form, HandWritten
from benchmarks.machine import machine
from benchmarks.measure import Step, alternating, median_ratio, multiplications, peak_growth
from benchmarks.step import forward, training_step
from benchmarks.workloads import Timed, set_up
from bilevel import solvers
from bilevel.device.device import choose_device
from bilevel.device.precision import PRECISIONS, at_precision, matmul_precision
from bilevel.problems import Classification, images
from bilevel.problems.datasets.labelled_images import Images
from bilevel.run.cuda_graph import Capture
from bilevel.timers import Timers

VARIANTS: dict[str, Callable[[], Timed]] = {
    "plain": solvers.Fixed,
    "stn": solvers.stn,
    "centered_stn": solvers.centered_stn,
    "delta_stn": solvers.delta_stn,
}
SHAPES = {
    "mlp": (1, 28, 28),
    "simple_cnn": (1, 28, 28),
    "alexnet": (3, 32, 32),
    "vgg16": (3, 32, 32),
    "resnet18": (3, 32, 32),
}
MOST = {"stn": (2.5, 2.0), "delta_stn": (3.5, 2.67)}
"""The aim on a GPU for time and multiplications, in multiples of plain training."""
PHASES = ("data", "inner", "response", "outer")
PHASE_ROUNDS = 2
BY_HAND = "by hand"
"""Begins the names of the steps of a minimal loop."""


class Setting(NamedTuple):
    """The settings of a measurement."""

    batch: int
    width: float
    norm: str | None
    precision: str
    channels_last: bool
    capture: bool


def main() -> None:
    """Measure the networks, and print a table for each or JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.images", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, …")
    parser.add_argument("--networks", default=",".join(SHAPES), help="names, separated by commas")
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="seconds of measurement for each network"
    )
    parser.add_argument("--batch", type=int, help="default: 128 on a GPU, 32 on a CPU")
    parser.add_argument(
        "--width", type=float, help="a factor on channels and units: 1 on a GPU, 0.25 on a CPU"
    )
    parser.add_argument(
        "--norm", choices=["none", "batch", "group"], help="default: the usual norm of each network"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--capture", action="store_true", help="capture steps as CUDA graphs")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    gpu = device.type == "cuda"
    batch, width = options.batch or (128 if gpu else 32), options.width or (1.0 if gpu else 0.25)
    setting = Setting(
        batch, width, options.norm, options.precision, options.channels_last, options.capture
    )
    names = options.networks.split(",")
    if unknown := [name for name in names if name not in SHAPES]:
        parser.error(f"there is no network {unknown[0]!r}; there are {', '.join(SHAPES)}")
    memory = {name: memories(name, setting, device) for name in names}
    report = {
        "machine": machine(device),
        "torch": torch.__version__,
        **setting._asdict(),
        "networks": {},
    }
    if not options.json:
        print(f"{report['machine']}, torch {torch.__version__}, {setting}", flush=True)
    for name in names:
        report["networks"][name] = result = measured(
            name, setting, options.seconds, device, memory[name]
        )
        if not options.json:
            counts = f"{result['hyperparameters']} hyperparameters, {result['rounds']} rounds"
            print(f"\n{name}: {counts}\n{table(result)}", flush=True)
    if options.json:
        print(json.dumps(report, indent=2))


def problem_of(network: str, setting: Setting) -> Classification:
    """Return `network` on random images, with all its hyperparameters tuned."""
    generator, shape = torch.Generator().manual_seed(0), SHAPES[network]

    def split() -> tuple[Tensor, Tensor]:
        pixels = torch.randint(
            256, (4 * setting.batch, *shape), generator=generator, dtype=torch.uint8
        )
        return pixels, torch.randint(10, (4 * setting.batch,), generator=generator)

    data = Images(split(), split(), split(), mean=127.5, std=73.9, white=255.0, classes=10)
    norm = None if network == "mlp" else setting.norm
    operations = ["affine", "colour", "cutout"]
    return images(
        data,
        network,
        norm,  # type: ignore[arg-type]  # argparse holds it to its choices
        setting.width,
        augment=operations,  # type: ignore[arg-type]
        flip=True,
        channels_last=setting.channels_last,
        batch_size=setting.batch,
    )


def prepared(network: str, variant: str, setting: Setting, device: torch.device) -> Timed:
    """Return the solver `variant`, set up to tune `network`."""
    solver = VARIANTS[variant]()
    problem = at_precision(problem_of(network, setting), solver, setting.precision, device)
    generator = set_up(solver, problem, device)
    if setting.capture:
        solver.services.capture = Capture.of(solver, device, generator)
    return solver


def memories(network: str, setting: Setting, device: torch.device) -> dict[str, int]:
    """Return the bytes by which each variant raises the peak; call it before anything is timed."""
    return {
        variant: peak_growth(
            partial(_train, network, variant, setting), partial(_warm, setting), device
        )
        for variant in VARIANTS
    }


def measured(
    network: str,
    setting: Setting,
    seconds: float,
    device: torch.device,
    memory: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Return time, multiplications and `memory` of every variant, and augmentation's part."""
    with matmul_precision(setting.precision):
        ready = {variant: prepared(network, variant, setting, device) for variant in VARIANTS}
        steps = {variant: training_step(solver) for variant, solver in ready.items()}
        steps["augmentation"] = augmentation(ready["delta_stn"])
        steps |= hand_written(network, setting, device)
        for solver in ready.values():
            for _ in range(5):  # a capture records its graphs before the timing
                solver.step()
        taken = alternating(steps, seconds, device)
        by_phase = {variant: phases(solver, device) for variant, solver in ready.items()}
        eager = {
            variant: prepared(network, variant, setting._replace(capture=False), device)
            for variant in VARIANTS
        }
        unit = multiplications(forward(eager["plain"]))
        units = {
            variant: multiplications(training_step(solver)) / unit
            for variant, solver in eager.items()
        }
    rows = {
        variant: {
            "milliseconds": 1e3 * statistics.median(taken[variant]),
            "of_plain": median_ratio(taken[variant], taken["plain"]),
            "images_per_second": setting.batch / statistics.median(taken[variant]),
            "units": units[variant],
            "units_of_plain": units[variant] / units["plain"],
            "peak_bytes": None if memory is None else memory[variant],
            "phases": by_phase[variant],
        }
        for variant in VARIANTS
    }
    passes = {
        "plain": 1,
        "stn": 1,
        "centered_stn": 2,
        "delta_stn": 2,
    }  # passes over augmented images
    part = {
        variant: passes[variant] * median_ratio(taken["augmentation"], taken[variant])
        for variant in VARIANTS
    }
    by_hand = {
        name: {
            "milliseconds": 1e3 * statistics.median(times),
            "plain_of_it": median_ratio(taken["plain"], times),
            "delta_stn_of_it": median_ratio(taken["delta_stn"], times),
        }
        for name, times in taken.items()
        if name.startswith(BY_HAND)
    }
    return {
        "by_hand": by_hand,
        "hyperparameters": ready["plain"].core.problem.space.numel,
        "rounds": len(taken["plain"]),
        "steps": rows,
        "augmentation": {
            "milliseconds": 1e3 * statistics.median(taken["augmentation"]),
            "part_of_step": part,
        },
    }


def hand_written(network: str, setting: Setting, device: torch.device) -> dict[str, Step]:
    """Return the steps of a minimal loop of PyTorch: eager, and on CUDA as a graph and compiled."""
    forms: tuple[Form, ...] = ("eager",)
    if device.type == "cuda":
        forms = ("graph", "compiled") if setting.capture else ("eager", "compiled")
    bf16 = setting.precision == "bf16"
    return {
        f"{BY_HAND}, {form}": HandWritten(
            problem_of(network, setting), device, form=form, bf16=bf16
        )
        for form in forms
    }


def augmentation(solver: Timed) -> Step:
    """Augment one batch with strengths that differ between images."""
    problem = problem_in(solver)
    (x, *_), generator = (
        solver.core.data.train.peek(),
        torch.Generator(solver.core.device).manual_seed(3),
    )
    u = problem.space.init().to(solver.core.device)
    hypers = problem.space.constrain(
        u + torch.zeros(len(x), 1, device=solver.core.device), generator
    )

    def step() -> None:
        with torch.no_grad():
            problem._augment(hypers, x, generator)

    return step


def problem_in(solver: Timed) -> Classification:
    """Return the classification problem inside its wrappers."""
    problem = solver.core.problem
    while not isinstance(problem, Classification):
        problem = problem.problem  # type: ignore[attr-defined]  # a `ProblemWrapper` one
    return problem


def phases(solver: Timed, device: torch.device) -> dict[str, float]:
    """Return the milliseconds of each phase of a training step; `outer` is an outer step."""
    timers = solver.services.timers = Timers(device)
    before = solver.inner_count, solver.outer_count
    for _ in range(PHASE_ROUNDS):
        solver.step()
    solver.services.timers = None
    inner, outer = solver.inner_count - before[0], max(1, solver.outer_count - before[1])
    return {
        name: 1e3 * value / (outer if name == "outer" else inner)
        for name, value in timers.read().items()
    }


def table(result: dict[str, Any]) -> str:
    """Return the result of one network as text."""
    lines = [
        f"{'':13} {'units':>6} {'× plain':>7} {'ms':>8} {'× plain':>7} {'images/s':>9} "
        + " ".join(f"{name:>8}" for name in ("data", "w₀", "response", "outer"))
        + f" {'peak MiB':>9}"
    ]
    for name, row in result["steps"].items():
        line = f"{name:13} {row['units']:6.2f} {row['units_of_plain']:7.2f}"
        line += f" {row['milliseconds']:8.2f} {row['of_plain']:7.2f}"
        line += f" {row['images_per_second']:9,.0f} "
        line += " ".join(
            f"{row['phases'][phase]:8.2f}" if phase in row["phases"] else f"{'':8}"
            for phase in PHASES
        )
        lines.append(line + f" {row['peak_bytes'] / 2**20:9.1f}")
    shown = result["augmentation"]
    lines.append(
        f"augmentation  {shown['milliseconds']:.2f} ms a batch: "
        f"{shown['part_of_step']['plain']:.0%} of a plain step, "
        f"{shown['part_of_step']['delta_stn']:.0%} of one of Δ-STN"
    )
    for name, row in result["by_hand"].items():
        lines.append(
            f"{name}: {row['milliseconds']:.2f} ms; plain takes {row['plain_of_it']:.2f} × as long "
            f"(wanted on a GPU ≤ 1.2 × the graph), Δ-STN {row['delta_stn_of_it']:.2f} ×"
        )
    for variant, (time, units) in MOST.items():
        row = result["steps"][variant]
        lines.append(
            f"{variant} / plain: time {row['of_plain']:.2f} (wanted on a GPU ≤ {time}), "
            f"multiplications {row['units_of_plain']:.2f} (wanted ≤ {units})"
        )
    return "\n".join(lines)


def _train(network: str, variant: str, setting: Setting, device: torch.device) -> None:
    with matmul_precision(setting.precision):
        solver = prepared(network, variant, setting._replace(capture=False), device)
        for _ in range(3):
            solver.step(warmup=True, limit=1)


def _warm(setting: Setting, device: torch.device) -> None:
    _train("simple_cnn", "delta_stn", setting._replace(batch=4, width=0.05, norm="batch"), device)


if __name__ == "__main__":
    main()
