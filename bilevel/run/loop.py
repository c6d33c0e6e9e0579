"""The loop, written once: rounds of a solver, evaluations between them, and the state to go on from."""

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.data.tensor_stream import Data
from bilevel.device.device import Meter, rng_state, set_rng_state
from bilevel.errors import BilevelError
from bilevel.loggers.logger import Logger, Progress
from bilevel.loggers.records import Record, make_record
from bilevel.parallel.process_group import SINGLE_PROCESS, Ranks
from bilevel.params import Hypers, to_device, widen
from bilevel.problem import Problem
from bilevel.run.budget import Schedule
from bilevel.run.divergence import diverged, not_finite
from bilevel.run.evaluation import evaluate
from bilevel.run.faults import Loggers, Saving
from bilevel.run.hypergradient_error import Probe
from bilevel.solver import Solution, Solver
from bilevel.timers import Phases


class SolverWarning(UserWarning):
    """A solver has reason to doubt what it does; the run goes on."""


class Loop:
    """One run of a solver that is set up.

    Nothing that is measured here reaches the solver, but for the validation loss that it is told at the end of an epoch: the
    trajectory is the same whatever the evaluation interval, the display and the loggers.

    Attributes:
        initial: the hyperparameters before training.
        best: the record and the solution (on the CPU) of the lowest validation loss, or None.
        good: the record of the last evaluation whose losses were finite, or None.
        last: the record of the last evaluation.
        diverged: the sentence that says where the loss ceased to be finite, or None.
    """

    def __init__(
        self,
        *,
        problem: Problem,
        solver: Solver,
        data: Data,
        device: torch.device,
        schedule: Schedule,
        loggers: Sequence[Logger],
        save: Saving,
        patience: int | None = None,
        checkpoint_every: int = 1,
        probe: Probe | None = None,
        ranks: Ranks = SINGLE_PROCESS,
    ) -> None:
        self.problem, self.solver, self.data, self.device, self.probe = (
            problem,
            solver,
            data,
            device,
            probe,
        )
        self.schedule, self.loggers, self.save, self.patience = (
            schedule,
            Loggers(loggers),
            save,
            patience,
        )
        self.checkpoint_every, self.ranks = checkpoint_every, ranks
        self.meter = Meter(device)
        self.phases = solver.phases = Phases(device)
        self.evaluating = 0.0
        self.initial = _copied(solver.solution().hypers)
        self.best: dict[str, Any] | None = None
        self.good: Record | None = None
        self.last: Record | None = None
        self.diverged: str | None = None
        self.evaluations = 0
        self.stalled = 0
        self.epochs_ended = 0
        self.doubted: list[str] = []
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    @property
    def step(self) -> int:
        """Inner steps taken."""
        return self.solver.inner_count

    @property
    def examples(self) -> int:
        """Training and validation examples that the solver has drawn."""
        return self.data.train.examples + self.data.valid.examples

    def run(self, interrupted: Callable[[], bool]) -> str:
        """Rounds until something ends them; then a last evaluation, and a checkpoint.

        Returns:
            What ended the run: `epochs`, `seconds`, `examples`, `patience`, `interrupted` or `diverged`.
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
        self._checkpoint(last=True)
        return "diverged" if self.diverged else reason

    def _ended(self, interrupted: Callable[[], bool]) -> str | None:
        if self.diverged:
            return "diverged"
        seconds, stop = self.ranks.maximum(
            self.meter.elapsed(), interrupted()
        )  # which differ between processes
        spent = self.schedule.spent(self.step, seconds, self.examples)
        if over := [name for name, part in spent.items() if part >= 1]:
            return over[0]
        if self.patience is not None and self.stalled >= self.patience:
            return "patience"
        return "interrupted" if stop else None

    def _round(self) -> None:
        start = self.step
        metrics = self.solver.step(
            warmup=start < self.schedule.warmup_steps, limit=self.schedule.limit(start)
        )
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach()
            self._counts[name] = self._counts.get(name, 0) + 1
        if self.step == start:
            name = type(self.solver).__name__
            raise BilevelError(
                f"{name}.step took no inner step; a round must take at least one, and count it in inner_count"
            )
        due = self.schedule.evaluations(self.step) > self.schedule.evaluations(
            self.last["step"] if self.last else 0
        )
        if due:
            self.meter.stop()
            self._evaluate()
        while not self.diverged and self.epochs_ended < self.step // self.schedule.steps_per_epoch:
            self.epochs_ended += 1
            self.solver.epoch_ended(self.good["valid_loss"] if self.good else None)
        if due:
            if self.save.owed or (self.evaluations - 1) % self.checkpoint_every == 0:
                self._checkpoint()
            self.meter.start()
        spent = self.schedule.spent(self.step, self.meter.elapsed(), self.examples)
        epoch, fraction = self.step / self.schedule.steps_per_epoch, min(1.0, max(spent.values()))
        progress = Progress(self.step, epoch, fraction, self.stalled)
        self.loggers.tell("advance", progress)

    def _evaluate(self) -> None:
        began = time.perf_counter()
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(
            devices=cuda
        ):  # a DataLoader draws from the global state whenever it is iterated
            solution = self.solver.solution()
            self.ranks.check(solution._asdict(), self.step)
            valid = evaluate(self.problem, solution, self.data.valid)
            # what a solver minimizes while training is not comparable, so every solver is measured in this one way
            train = evaluate(
                self.problem,
                solution,
                self.data.train,
                limit=min(self.data.train.size, self.data.valid.size),
            )
            bad, hypergradient = not_finite("hyperparameter", solution.hypers), {}
            if self.probe is not None and math.isfinite(valid["loss"]) and not bad:
                hypergradient = self.probe.measure(self.solver, self.data, solution.hypers)
        metrics = self._step_metrics()
        self.evaluating += time.perf_counter() - began
        self.last = make_record(
            step=self.step,
            epoch=self.step / self.schedule.steps_per_epoch,
            seconds=self.meter.seconds,
            phases={**self.phases.read(), "evaluation": self.evaluating},
            examples=self.examples,
            train=train,
            valid=valid,
            hypers=solution.hypers,
            scales=self.solver.scales(),
            metrics=metrics,
            exact={
                name: float(value) for name, value in self.problem.exact(solution.hypers).items()
            },
            hypergradient=hypergradient,
            peak_memory_bytes=self.meter.peak_memory,
        )
        self.evaluations += 1
        bad |= not_finite("the scale of", self.solver.scales()) | not_finite(
            "the response", self.solver.beside()
        )
        self._judge({"the validation loss": valid["loss"], **bad})
        self._show(solution.hypers)
        self.loggers.tell("log", self.last)
        self._warn(self.solver.doubts(metrics))  # which may say why a run has diverged
        if self.diverged:
            return
        self.good = self.last
        if self.best is None or valid["loss"] < self.best["record"]["valid_loss"]:
            self.best, self.stalled = (
                {"record": self.last, "solution": _on_cpu(solution)._asdict()},
                0,
            )
        elif self.step > self.schedule.warmup_steps:  # λ has had no chance to move before
            self.stalled += 1

    def _show(self, hypers: Hypers) -> None:
        """Pictures to the loggers that take them, at the first evaluation, the second, the fourth, the eighth and so on."""
        takers = [logger for logger in self.loggers if logger.takes_pictures]
        if takers and self.evaluations & (self.evaluations - 1) == 0:
            with torch.no_grad():
                drawn = self.problem.pictures(hypers, torch.Generator(self.device).manual_seed(0))
            pictures = {
                name: picture.detach().clamp(0, 1).to("cpu", torch.float32)
                for name, picture in drawn.items()
            }
            for logger in takers if pictures else ():
                self.loggers.tell_one(logger, "show_pictures", pictures)

    def _judge(self, values: dict[str, float]) -> None:
        """Declare the run diverged where a loss of training, or one of `values`, is not finite."""
        self.diverged = diverged(self.solver.bad_step(), values, self.step, self.good)

    def _warn(self, doubts: Mapping[str, str]) -> None:
        for kind, sentence in doubts.items():
            if kind not in self.doubted:
                self.doubted.append(kind)
                warnings.warn(sentence, SolverWarning, stacklevel=2)

    def _step_metrics(self) -> dict[str, float]:
        """Means of the solver's own metrics since the last evaluation; waits for the device once."""
        if not self._sums:
            return {}
        values = torch.stack(
            [widen(total.to(self.device)) for total in self._sums.values()]
        ).tolist()
        means = {
            name: value / self._counts[name] for name, value in zip(self._sums, values, strict=True)
        }
        self._sums, self._counts = {}, {}
        return means

    def _checkpoint(self, *, last: bool = False) -> None:
        if not self.diverged:  # the last good one is kept
            self.save(self.state_dict(), last=last)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next round, and the records after it, depend on."""
        return {
            "step": self.step,
            "solver": self.solver.state_dict(),
            "train": self.data.train.state_dict(),
            "valid": self.data.valid.state_dict(),
            "device": self.device.type,
            "rng": rng_state(self.device),
            "loggers": self.loggers.state(),
            "seconds": self.meter.seconds,
            "phases": self.phases.read(),
            "evaluating": self.evaluating,
            "peak_memory": self.meter.peak_memory,
            "sums": self._sums,
            "counts": self._counts,
            **{name: getattr(self, name) for name in _PLAIN},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, bit for bit.

        Raises:
            BilevelError: the state does not fit this device, this solver or these data.
        """
        if (
            before := state["device"]
        ) != self.device.type:  # the states of their random generators have nothing in common
            raise BilevelError(
                f"the run began on {before} and random numbers cannot go on from there on {self.device.type}; "
                f"resume it with runner.device={before}, or start a new run"
            )
        try:
            self.data.train.load_state_dict(
                state["train"]
            )  # first: other data say so better than weights of another shape
            self.data.valid.load_state_dict(state["valid"])
            self.solver.load_state_dict(state["solver"])
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise BilevelError(
                f"the checkpoint does not fit this problem and solver ({type(error).__name__}: {str(error).splitlines()[0]}); "
                "resume it with the settings that it was started with"
            ) from error
        set_rng_state(state["rng"], self.device)
        self.meter.seconds, self.meter.peak_memory = state["seconds"], state["peak_memory"]
        self.phases.restore(state.get("phases", {}))  # of a run from before phases were told
        self.evaluating = state.get("evaluating", 0.0)
        self._sums, self._counts = to_device(state["sums"], self.device), state["counts"]
        for name in _PLAIN:
            setattr(self, name, state[name])
        self.save.resumed(state["step"])


_PLAIN = ("initial", "best", "good", "last", "evaluations", "stalled", "epochs_ended", "doubted")


def _on_cpu(solution: Solution) -> Solution:
    """A copy: solvers update their tensors in place."""
    return Solution(*(_copied(tensors) for tensors in solution))


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
