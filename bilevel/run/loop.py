"""The training loop: rounds of a solver, evaluations between them, and the state to resume from."""

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.checks.splits import wrong_data
from bilevel.data.tensor_stream import Data
from bilevel.device.device import Meter, rng_state, set_rng_state
from bilevel.errors import BilevelError, SolverWarning
from bilevel.loggers.logger import Logger, Progress
from bilevel.loggers.records import Record, make_record
from bilevel.parallel.process_group import SINGLE_PROCESS, Ranks
from bilevel.params import Hypers, to_device, widen
from bilevel.problem import Problem
from bilevel.run.budget import Budget
from bilevel.run.divergence import RATES, diverged, not_finite
from bilevel.run.evaluation import evaluate
from bilevel.run.faults import CheckpointSaver, Loggers
from bilevel.run.fingerprint import check_fingerprint, fingerprint
from bilevel.run.hypergradient_check import HypergradientCheck
from bilevel.run.hypergradient_error import HypergradientError
from bilevel.run.tune_fraction import KEY, check_tuned_steps
from bilevel.selection import Selection
from bilevel.services import Services
from bilevel.solver import Solution, Solver
from bilevel.text import describe


class Loop:
    """One run of a solver that is set up.

    Measurements do not reach the solver, except the validation loss at the end of an epoch. So the
    trajectory does not depend on the evaluation interval, the display or the loggers.

    Attributes:
        initial: the hyperparameters before training.
        best: the record and the solution (on the CPU) of the best evaluation, or None.
        good: the record of the last evaluation whose losses were finite, or None.
        last: the record of the last evaluation.
        diverged: a sentence that reports the first loss that was not finite, or None.
        evaluating: seconds of evaluation so far.
        evaluations: evaluations so far.
        stalled: evaluations after warm-up since the best one.
        epochs_ended: epochs whose end the solver was notified of.
        warned: the kinds of warnings that the solver has given.
    """

    def __init__(
        self,
        *,
        problem: Problem,
        solver: Solver,
        services: Services,
        data: Data,
        device: torch.device,
        budget: Budget,
        loggers: Sequence[Logger],
        save: CheckpointSaver,
        select: Selection | None = None,
        patience: int | None = None,
        checkpoint_every: int = 1,
        hypergradient_error: HypergradientError | None = None,
        hypergradient_check: HypergradientCheck | None = None,
        ranks: Ranks = SINGLE_PROCESS,
    ) -> None:
        self.problem = problem
        self.solver = solver
        self.data = data
        self.device = device
        self.budget = budget
        self.loggers = Loggers(loggers)
        self.save = save
        self.select = Selection("valid_loss") if select is None else select
        self.patience = patience
        self.checkpoint_every = checkpoint_every
        self.hypergradient_error = hypergradient_error
        self.hypergradient_check = hypergradient_check
        self.ranks = ranks
        self.meter = Meter(device)
        self.services = services
        self.fingerprint = fingerprint(data)
        self.evaluating = 0.0
        self.initial = _copied(solver.solution().hypers)
        self.best: dict[str, Any] | None = None
        self.good: Record | None = None
        self.last: Record | None = None
        self.diverged: str | None = None
        self.evaluations = 0
        self.stalled = 0
        self.epochs_ended = 0
        self.warned: list[str] = []
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    @property
    def step(self) -> int:
        """Return the number of inner steps taken."""
        return self.solver.inner_count

    @property
    def examples(self) -> int:
        """Return the number of training and validation examples that the solver has drawn."""
        return self.data.train.examples + self.data.valid.examples

    def run(self, interrupted: Callable[[], bool]) -> str:
        """Take rounds until something ends the run; then evaluate, and save a checkpoint.

        Args:
            interrupted: returns whether a signal asks for the end of the run.

        Returns:
            `epochs`, `seconds`, `examples`, `patience`, `interrupted` or `diverged`.
        """
        if self.last is None:
            self._evaluate()
            self._checkpoint()
        self.meter.start()
        while (reason := self._ended(interrupted)) is None:
            self._round()
        self.meter.stop()
        if reason == "interrupted":
            self._judge({})
        elif reason != "diverged" and self.last is not None and self.last["step"] < self.step:
            self._evaluate()
        if reason != "interrupted" and not self.diverged:
            self.diverged = self._without_result()
        if not self.diverged:  # the last good checkpoint is kept
            self.save(self.state_dict(), last=True, interrupted=interrupted)
        return "diverged" if self.diverged else reason

    def _ended(self, interrupted: Callable[[], bool]) -> str | None:
        if self.diverged:
            return "diverged"
        # clocks and signals differ between processes
        seconds, stop = self.ranks.maximum(self.meter.elapsed(), interrupted())
        spent = self.budget.spent(self.step, seconds, self.examples)
        if over := [name for name, part in spent.items() if part >= 1]:
            return over[0]
        if self.patience is not None and self.stalled >= self.patience:
            return "patience"
        return "interrupted" if stop else None

    def _round(self) -> None:
        start, budget = self.step, self.budget
        phase, limit = budget.phase(start), budget.limit(start)
        if phase in ("plain", "frozen"):
            plain: Any = self.solver  # `check_phases` has looked at its step
            metrics = plain.step(limit=limit, frozen=True)
        else:
            metrics = self.solver.step(limit=limit, warmup=phase == "warmup")
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach()
            self._counts[name] = self._counts.get(name, 0) + 1
        if self.step == start:
            raise BilevelError(
                f"{type(self.solver).__name__}.step took no inner step; a round must take at least "
                "one, and count it in inner_count"
            )
        evaluated = self.last["step"] if self.last else 0
        due = budget.evaluations(self.step) > budget.evaluations(evaluated)
        if due:
            self.meter.stop()
            self._evaluate()
        while not self.diverged and self.epochs_ended < self.step // budget.steps_per_epoch:
            self.epochs_ended += 1
            self.solver.epoch_ended(self.good["valid_loss"] if self.good else None)
        if due:
            if self.save.owed or (self.evaluations - 1) % self.checkpoint_every == 0:
                self._checkpoint()
            self.meter.start()
        spent = budget.spent(self.step, self.meter.elapsed(), self.examples)
        epoch, fraction = self.step / budget.steps_per_epoch, min(1.0, max(spent.values()))
        self.loggers.call("advance", Progress(self.step, epoch, fraction, self.stalled))

    def _evaluate(self) -> None:
        began = time.perf_counter()
        cuda = [self.device] if self.device.type == "cuda" else []
        # a DataLoader draws from the global random state whenever it is iterated
        with torch.random.fork_rng(devices=cuda):
            solution = self.solver.solution()
            bad = not_finite("hyperparameter", solution.hypers)
            train, valid, hypergradient = self._measure(solution, finite=not bad)
        metrics = self._step_metrics()
        self.evaluating += time.perf_counter() - began
        exact = self.problem.exact(solution.hypers)
        self.last = make_record(
            step=self.step,
            epoch=self.step / self.budget.steps_per_epoch,
            seconds=self.meter.seconds,
            phases={**self.services.seconds(), "evaluation": self.evaluating},
            examples=self.examples,
            train=train,
            valid=valid,
            hypers=solution.hypers,
            scales=self.solver.scales(),
            metrics=metrics,
            exact={name: float(value) for name, value in exact.items()},
            hypergradient=hypergradient,
            peak_memory_bytes=self.meter.peak_memory,
        )
        self.evaluations += 1
        bad |= not_finite("the scale of", self.solver.scales())
        bad |= not_finite("the response", self.solver.extra_tensors())
        self._judge({"the validation loss": valid["loss"], **bad})
        self._show_pictures(solution.hypers)
        self.loggers.call("log", self.last)
        # before the return below, since a warning may explain why a run has diverged
        self._warn(self.solver.warnings(metrics))
        if self.diverged:
            return
        self.good = self.last
        if self.best is None:
            self.select.check(self.last)
        if self.best is None or self.select.improves(self.last, self.best["record"]):
            self.best = {"record": self.last, "solution": on_cpu(solution)._asdict()}
            self.stalled = 0
        elif self.step > self.budget.warmup_steps:  # λ could not move before
            self.stalled += 1

    def _measure(
        self, solution: Solution, *, finite: bool
    ) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
        """Return the metrics on training and validation data, and the hypergradient's error."""
        self.ranks.check(solution._asdict(), self.step)
        valid = evaluate(self.problem, solution, self.data.valid)
        # training losses are not comparable between solvers, so all are measured in this one way
        few = min(self.data.train.size, self.data.valid.size)
        train = evaluate(self.problem, solution, self.data.train, limit=few)
        measured: dict[str, float] = {}
        if not (finite and math.isfinite(valid["loss"])):
            return train, valid, measured
        if (error := self.hypergradient_error) is not None:
            measured |= error.measure(self.solver, self.data, solution.hypers)
        check, tunes = self.hypergradient_check, self.budget.phase(self.step) != "frozen"
        if check is not None and tunes and check.is_due(self.evaluations):
            measured |= check.measure(self.solver, self.data, self.evaluations)
        return train, valid, measured

    def _show_pictures(self, hypers: Hypers) -> None:
        """Send pictures to the loggers that take them, at evaluation 1, 2, 4, 8 and so on."""
        takers = [logger for logger in self.loggers if logger.takes_pictures]
        if takers and self.evaluations & (self.evaluations - 1) == 0:
            with torch.no_grad():
                drawn = self.problem.pictures(hypers, torch.Generator(self.device).manual_seed(0))
            pictures = {
                name: picture.detach().clamp(0, 1).to("cpu", torch.float32)
                for name, picture in drawn.items()
            }
            for logger in takers if pictures else ():
                self.loggers.call_one(logger, "show_pictures", pictures)

    def _judge(self, values: dict[str, float]) -> None:
        """Declare the run diverged if a training loss, or one of `values`, is not finite."""

        def flaw() -> str | None:
            return wrong_data(self.problem, self.data, self.device, numbers=True)

        self.diverged = diverged(self.services.bad_step(), values, self.step, self.good, flaw)

    def _without_result(self) -> str | None:
        """Return a sentence if all that the solver trained has diverged, else None."""
        if (lost := self.solver.lost()) is None:
            return None
        flaw = wrong_data(self.problem, self.data, self.device, numbers=True)
        return f"diverged: {lost}; {flaw or RATES}"

    def _warn(self, sentences: Mapping[str, str]) -> None:
        """Give each kind of warning once in a run."""
        for kind, sentence in sentences.items():
            if kind not in self.warned:
                self.warned.append(kind)
                warnings.warn(sentence, SolverWarning, stacklevel=2)

    def _step_metrics(self) -> dict[str, float]:
        """Return the means of the solver's metrics since the last evaluation.

        Waits for the device once.
        """
        if not self._sums:
            return {}
        totals = torch.stack([widen(total.to(self.device)) for total in self._sums.values()])
        means = {
            name: total / self._counts[name]
            for name, total in zip(self._sums, totals.tolist(), strict=True)
        }
        self._sums, self._counts = {}, {}
        return means

    def _checkpoint(self) -> None:
        if not self.diverged:  # the last good checkpoint is kept
            self.save(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next round and the records after it depend on."""
        return {
            "step": self.step,
            "solver": self.solver.state_dict(),
            "data": self.fingerprint,
            "train": self.data.train.state_dict(),
            "valid": self.data.valid.state_dict(),
            "device": self.device.type,
            "rng": rng_state(self.device),
            "loggers": self.loggers.state(),
            "seconds": self.meter.seconds,
            "phases": self.services.seconds(),
            "evaluating": self.evaluating,
            "peak_memory": self.meter.peak_memory,
            "sums": self._sums,
            "counts": self._counts,
            KEY: self.budget.tuned_steps,
            **{name: getattr(self, name) for name in _PLAIN},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, bit for bit.

        Raises:
            BilevelError: the state does not fit this device, this solver or these data.
        """
        # the random states of two kinds of devices have nothing in common
        if (before := state["device"]) != self.device.type:
            raise BilevelError(
                f"runner.device={self.device.type} cannot continue a run of {before}, whose random "
                f"numbers it does not have; resume with runner.device={before}, or start a new run"
            )
        check_tuned_steps(state, self.budget.tuned_steps)
        try:
            # the data come first: their error is clearer than weights of another shape
            self.data.train.load_state_dict(state["train"])
            self.data.valid.load_state_dict(state["valid"])
            check_fingerprint(state.get("data", {}), self.fingerprint)
            self.solver.load_state_dict(state["solver"])
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise BilevelError(
                f"the checkpoint does not fit this problem and solver ({describe(error)}); "
                "resume it with the settings that the run was started with"
            ) from error
        set_rng_state(state["rng"], self.device)
        self.meter.seconds, self.meter.peak_memory = state["seconds"], state["peak_memory"]
        self.services.restore(state["phases"])
        self.evaluating = state["evaluating"]
        self._sums, self._counts = to_device(state["sums"], self.device), state["counts"]
        for name in _PLAIN:
            setattr(self, name, state[name])
        self.save.resumed(state["step"])


_PLAIN = ("initial", "best", "good", "last", "evaluations", "stalled", "epochs_ended", "warned")


def on_cpu(solution: Solution) -> Solution:
    """Return a copy, since solvers update their tensors in place."""
    return Solution(*(_copied(tensors) for tensors in solution))


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
