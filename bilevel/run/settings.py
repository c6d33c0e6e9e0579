"""The settings of a run: its length, and what is measured, shown and saved on the way."""

import math
from dataclasses import dataclass
from types import NoneType
from typing import Literal

from bilevel import validate
from bilevel.device.precision import check_precision
from bilevel.errors import BilevelError
from bilevel.loggers.display import DISPLAYS
from bilevel.run.budget import Budget
from bilevel.selection import Selection

REFITS: dict[str, tuple[str, ...]] = {
    "none": (),
    "end": ("end",),
    "best": ("best",),
    "all": ("start", "end"),
}
"""The refits that each value of `refit` asks for."""

MOST_THREADS = 1024
"""Number of CPU threads above which the system may end the process without an error."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The settings that `Runner` takes as keywords.

    The run ends at the first budget that is reached. Epochs are counted in inner steps, so warm-up
    and the epochs budget end exactly. The other budgets end the run after the round that reaches
    them.

    Attributes:
        epochs: budget in passes over the training split.
        seconds: budget of training time; evaluation, checkpoints and set-up do not count.
        examples: budget of training and validation examples together.
        plain_epochs: epochs of plain training at the initial λ, before anything else. They cost
            what plain training costs.
        warmup_epochs: epochs of warm-up after them, before the first outer step (the paper uses 5).
            Warm-up trains the response too.
        tune_fraction: the part of `epochs` after which λ stays as it is. Then w trains on at the
            cost of plain training. 1 tunes λ to the end.
        evaluate_every: epochs between evaluations. It must be at most 1 if a `ReduceLROnPlateau`
            should read a validation loss after every epoch.
        select: the metric that makes an evaluation the best one, `valid_loss` or another entry of
            the records, such as `valid_accuracy`. Its name says if a high value is good; `max NAME`
            and `min NAME` say it for any other metric.
        patience: number of evaluations after warm-up without a new best one after which the run
            ends; None never ends it.
        checkpoint_every: evaluations between checkpoints. The end of a run always writes one,
            also after Ctrl-C.
        keep_checkpoints: number of checkpoints to keep, the newest included. An older one replaces
            a damaged one.
        device: `auto` (CUDA, else CPU) or a device name of PyTorch. With several processes on one
            machine, each process takes its own GPU.
        threads: number of CPU threads. The default is one thread below a million weights, where
            threads cost more than they save, and PyTorch's own number otherwise.
        precision: `fp32` or `tf32` products on CUDA, or `bf16` on any device. `bf16` runs
            `predict` under autocast and everything else in float32.
        capture: record a training step once as a CUDA graph and replay it, which saves the
            launches. If this is impossible, a warning gives the reason and the run takes plain
            steps. Learning-rate schedules are followed. `auto` does so on CUDA and is silent
            elsewhere.
        deterministic: refuse operations whose bits may differ between runs. Only CUDA has such
            operations, and the setting costs time there. An operation without a deterministic
            form ends the run with an error that names it.
        requeue: ask SLURM to run the job again after a signal that announces a time limit (USR1).
            This happens after everything is saved.
        progress: `live` display, `plain` lines, `none`, or `auto`, which is `live` in a terminal.
        initial_params: initial weights with the names and shapes of the problem: a file of
            `torch.save(model.state_dict(), …)`, or a run directory. A run directory gives the
            weights at its best evaluation.
        picture: draw `curves.png` at the end of the run.
        refit: train w anew when the run has ended, at constant λ: `end` (or true) at the last λ,
            `best` at that of the best evaluation, `all` at the initial and at the last λ, `none`
            (or false) not at all. Each refit has new initial weights from the same seed, no
            warm-up and budgets of its own. The best of run and refits by `select` is the result.
        hypergradient_check: evaluations from one comparison of the solver's hypergradient with
            finite differences of short trainings to the next; None for none. It is expensive, and
            changes no bit of the run.
        check_steps: inner steps of such a training.
        check_coordinates: coordinates of u that a comparison takes, drawn anew for each.
        check_size: the step of the finite differences, in unconstrained coordinates.
        check_batches: validation batches of a comparison; None for as many as the split has.
        sensitivities: measure at the end how the validation loss depends on each hyperparameter,
            for the cost of a few evaluations (`bilevel.run.sensitivities`).

    Raises:
        BilevelError: there is no budget, or a value is out of its range.
    """

    epochs: float | None = None
    seconds: float | None = None
    examples: int | None = None
    plain_epochs: float = 0
    warmup_epochs: float = 5
    tune_fraction: float = 1.0
    evaluate_every: float = 1
    select: str = "valid_loss"
    patience: int | None = None
    checkpoint_every: int = 1
    keep_checkpoints: int = 3
    device: str = "auto"
    threads: int | None = None
    precision: str = "fp32"
    capture: bool | Literal["auto"] = "auto"
    deterministic: bool = False
    requeue: bool = False
    progress: str = "auto"
    initial_params: str | None = None
    picture: bool = True
    refit: str | bool | None = "none"
    hypergradient_check: int | None = None
    check_steps: int = 100
    check_coordinates: int = 3
    check_size: float = 0.3
    check_batches: int | None = None
    sensitivities: bool = True

    def __post_init__(self) -> None:
        budgets = ("epochs", "seconds", "examples")
        if all(getattr(self, name) is None for name in budgets):
            raise BilevelError(
                "runner.epochs=None leaves the run without a budget; set epochs, seconds or "
                "examples"
            )
        if self.threads is not None:
            validate.whole(1, **self._named("threads"))
            validate.between(1, MOST_THREADS, **self._named("threads"))
        for name in (*budgets, "patience"):
            if getattr(self, name) is not None:
                validate.positive(**self._named(name))
        if self.evaluate_every != math.inf:  # infinity: at the start and at the end alone
            validate.positive(**self._named("evaluate_every"))
        validate.finite(**self._named("plain_epochs", "warmup_epochs"))
        validate.at_least(0, **self._named("plain_epochs", "warmup_epochs"))
        self._check_tune_fraction()
        validate.whole(1, **self._named("checkpoint_every", "keep_checkpoints"))
        validate.whole(1, **self._named("check_steps", "check_coordinates"))
        validate.positive(**self._named("check_size"))
        for name in ("hypergradient_check", "check_batches"):
            if getattr(self, name) is not None:
                validate.whole(1, **self._named(name))
        switches = ("deterministic", "requeue", "picture", "sensitivities")
        validate.one_of([True, False], **self._named(*switches))
        for name in ("select", "device"):
            if not isinstance(value := getattr(self, name), str):
                raise validate.wrong(f"runner.{name}", value, "must be a name", "give a string")
        if self.initial_params is not None:
            validate.path_of(**self._named("initial_params"))
        Selection(self.select)
        check_precision(self.precision)
        validate.one_of(["auto", True, False], **self._named("capture"))
        validate.one_of(DISPLAYS, **self._named("progress"))
        if not isinstance(self.refit, (bool, NoneType)):
            validate.one_of([*REFITS, True, False], **self._named("refit"))

    @property
    def refits(self) -> tuple[str, ...]:
        """Return the names of the refits: `start`, `best` and `end` name the λ of each.

        Example:
            >>> RunSettings(epochs=1, refit="all").refits
            ('start', 'end')
        """
        if isinstance(self.refit, str):
            return REFITS[self.refit]
        return REFITS["end" if self.refit else "none"]

    @property
    def first_tuning_epoch(self) -> float:
        """Return the epochs before the first outer step."""
        return self.plain_epochs + self.warmup_epochs

    @property
    def last_tuning_epoch(self) -> float | None:
        """Return the epochs after which λ is frozen, or None if it never is."""
        if self.epochs is None or self.tune_fraction == 1:
            return None
        return self.tune_fraction * self.epochs

    def budget(self, steps_per_epoch: int) -> Budget:
        """Return the budgets and the evaluation times of a run, in inner steps."""
        last = self.last_tuning_epoch
        return Budget(
            steps_per_epoch=steps_per_epoch,
            steps=None if self.epochs is None else max(1, round(self.epochs * steps_per_epoch)),
            seconds=self.seconds,
            examples=self.examples,
            plain_steps=round(self.plain_epochs * steps_per_epoch),
            warmup_steps=round(self.first_tuning_epoch * steps_per_epoch),
            tuned_steps=None if last is None else round(last * steps_per_epoch),
            evaluate_every=self.evaluate_every,
        )

    def _check_tune_fraction(self) -> None:
        setting = f"runner.tune_fraction={self.tune_fraction!r}"
        choose = "choose a part above 0 and up to 1"
        validate.positive(choose, **self._named("tune_fraction"))
        if self.tune_fraction > 1:
            raise BilevelError(f"{setting} must not exceed 1; {choose}")
        if self.tune_fraction < 1 and self.epochs is None:
            raise BilevelError(f"{setting} is a part of runner.epochs, which is not set; set it")
        last = self.last_tuning_epoch
        if last is not None and last <= self.first_tuning_epoch:
            raise BilevelError(
                f"{setting} leaves no epoch for tuning, since plain_epochs and warmup_epochs take "
                f"{self.first_tuning_epoch:g} of the first {last:g}; raise it, or lower them"
            )

    def _named(self, *names: str) -> dict[str, object]:
        return {f"runner.{name}": getattr(self, name) for name in names}
