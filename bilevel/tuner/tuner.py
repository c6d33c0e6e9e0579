"""A solver in a user's own training loop, one batch at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.checks.check_problem import check_setup
from bilevel.checks.splits import check_splits, wrong_data
from bilevel.data.tensor_stream import Data, stream
from bilevel.device.precision import at_precision
from bilevel.errors import BilevelError
from bilevel.loggers.records import Record
from bilevel.params import Batch, Hypers, Metrics, detached
from bilevel.run.environment import environment
from bilevel.run.evaluation import evaluate
from bilevel.run.loop import on_cpu
from bilevel.run.out_of_memory import ran_out
from bilevel.run.result import Result
from bilevel.run.stages import DATA_ERRORS, generators
from bilevel.services import Services
from bilevel.solver import Solution, Stepwise
from bilevel.text import describe
from bilevel.tuner.attached_problem import AttachedProblem
from bilevel.tuner.caller_autocast import CallerAutocast
from bilevel.tuner.history import History
from bilevel.tuner.own_optimizer import Followers, OwnOptimizer
from bilevel.tuner.pushed import Pushed
from bilevel.tuner.saved_state import check_state
from bilevel.tuner.unchanged_model import UnchangedModel


class Tuner:
    """The steps of a solver, taken one batch at a time; made by `attach`.

    A round has `inner_steps` calls of `step`. Then `due` is true until `outer_step` was called
    `outer_steps` times.

    Attributes:
        solver: the solver; it is set up by the first step.
        metrics: the last value of each metric of the steps, on the device.
    """

    def __init__(
        self,
        make: Callable[[], AttachedProblem],
        problem: AttachedProblem,
        model: nn.Module,
        own: OwnOptimizer,
        solver: Stepwise,
        warmup_steps: int,
        seed: int,
    ) -> None:
        self.solver = solver
        self.metrics: Metrics = {}
        self._make = make
        self._problem = problem
        self._model = model
        self._own = own
        self._warmup_steps = warmup_steps
        self._seed = seed
        self._unchanged = UnchangedModel(model)
        self._device = self._unchanged.device
        self._train, self._valid = Pushed(self._device, "train"), Pushed(self._device, "valid")
        self._history = History()
        self._followers: Followers | None = None  # set by `set_up`, as is the next
        self._autocast: CallerAutocast
        self._pending: dict[str, Any] | None = None
        self._inner_left = self._outer_left = 0
        self._warmup = False
        self._written: dict[str, Tensor] = {}

    # --- steps ---

    @property
    def due(self) -> bool:
        """Return whether an outer step comes next."""
        return self._outer_left > 0

    def step(self, batch: Batch, valid_batch: Batch | None = None) -> Tensor:
        """Take an inner step: train w, and the response to λ; return L_T, [], on the device.

        Args:
            batch: a training batch.
            valid_batch: a validation batch, for solvers whose inner steps take one (SOBA, penalty).

        Raises:
            BilevelError: an outer step is due, or a batch is missing or too many.
        """
        if self.due:
            raise BilevelError(
                "an outer step is due before this step; call outer_step while tuner.due is true"
            )
        if self._followers is None:
            self.set_up(batch, batch if valid_batch is None else valid_batch)
        assert self._followers is not None
        pushed = self._pushed("step", self.solver.inner_takes, batch, valid_batch)
        self._followers.follow()
        with self._autocast.left(), self._wrong_data_named():
            if self._inner_left == 0:
                self._begin_round()
            metrics = self.solver.take_inner(*pushed)
            self._inner_left -= 1
            if self._inner_left == 0:
                metrics |= self.solver.end_inner()
                self._outer_left = 0 if self._warmup else self.solver.outer_steps
        self._write_buffers()
        self._note(metrics)
        return metrics["inner_loss"]

    def outer_step(self, batch: Batch | None = None) -> Tensor | None:
        """Take an outer step: move λ; return L_V, [], on the device, if the step measures it.

        Args:
            batch: a validation batch; None for a solver whose inner steps take it (SOBA).

        Raises:
            BilevelError: no outer step is due, or the batch is missing or too many.
        """
        if not self.due:
            raise BilevelError("no outer step is due; call outer_step only while tuner.due is true")
        pushed = self._pushed("outer_step", self.solver.outer_takes, None, batch)
        with self._autocast.left(), self._wrong_data_named():
            metrics = self.solver.take_outer(*pushed)
            self._outer_left -= 1
            if not self.due:
                metrics |= self.solver.end_outer()
        self._note(metrics)
        return metrics.get("outer_loss")

    def end_round(self) -> None:
        """End a round early and without outer steps, so that the state can be saved."""
        if self._inner_left:
            self._inner_left = 0
            self._note(self.solver.end_inner())
            self._write_buffers()

    # --- results ---

    @property
    def hypers(self) -> Hypers:
        """Return λ in its own units; before the first step, its initial values."""
        return self.solution().hypers

    def solution(self) -> Solution:
        """Return λ, and the weights and buffers that belong to it.

        The weights are those of the module, except for `stn`, where they are w₀ + Θλ.
        """
        if self._followers is not None:
            return self.solver.solution()
        if self._pending is not None:
            return Solution(*self._pending["solution"])
        space, own = self._problem.space, self._weights()
        others = {n: t for n, t in self._tensors().items() if n not in own}
        return Solution(space.constrain(space.init()), detached(own), detached(others))

    def evaluate(self, valid: Any, train: Any = None) -> Record:
        """Measure the present solution, and return a record for loggers and plots.

        It gives the warnings of the solver, each kind once. An evaluation counts as an epoch in the
        record. The solution of the lowest validation loss is kept for `result`.

        Args:
            valid: the validation split: a loader, a tuple of tensors, or an iterator over the
                batches of one pass, which are held in memory.
            train: the same of the training split; None leaves it out.

        Raises:
            BilevelError: a training loss was not finite, or a split cannot be read.
        """
        if valid is None:
            raise BilevelError("valid=None leaves nothing to measure; pass the validation split")
        self._raise_if_diverged()
        solution = self.solution()
        measured = {
            name: evaluate(self._problem, solution, self._stream(split, name))
            for name, split in (("train", train), ("valid", valid))
            if split is not None
        }
        examples, set_up = self._examples, self._followers is not None
        return self._history.add(self.solver, solution, measured, examples=examples, set_up=set_up)

    @property
    def records(self) -> list[Record]:
        """Return the results of `evaluate`."""
        return self._history.records

    @property
    def _examples(self) -> int:
        return self._train.examples + self._valid.examples

    def result(self) -> Result:
        """Return the present λ with the records, the network and the best evaluation so far."""
        solver, last = self.solver, on_cpu(self.solution())
        record, best = self._history.best or ({}, None)
        summary = {
            "problem": type(self._model).__name__,
            "solver": type(solver).__name__,
            "seed": self._seed,
            "environment": environment(self._device),
            "best": record,
            "last": self.records[-1] if self.records else {},
            "hypers": {name: leaf.tolist() for name, leaf in last.hypers.items()},
            "steps": solver.inner_count,
            "outer_steps": solver.outer_count,
            "examples": self._examples,
        }
        return Result(summary, problem=self._problem, best=best, last=last, records=self.records)

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next round depends on, between two rounds.

        It holds w, the state of the optimizer, λ and the generator. Schedules and the order of the
        data are the caller's.

        Raises:
            BilevelError: a round is not finished, or no step was taken.
        """
        if self._followers is None:
            raise BilevelError(
                "the tuner has no state before its first step; pass example=… to attach, or take "
                "a step"
            )
        if self._inner_left or self.due:
            raise BilevelError(
                "the state cannot be saved inside a round; take the outer steps that are due, or "
                "call end_round(), before state_dict()"
            )
        return {
            "weights": detached(self._weights()),
            "solution": tuple(self.solver.solution()),
            "solver": self.solver.state_dict(),
            "examples": [self._train.examples, self._valid.examples],
            "device": self._device.type,
            "solver_class": self._classes["solver"],
            "optimizer_class": self._classes["optimizer"],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a result of `state_dict`, bit for bit.

        Before the first step, the module and `hypers` have the values of `state` at once, and the
        solver continues from it when it is set up.

        Raises:
            BilevelError: the state does not fit.
        """
        check_state(
            state,
            tensors=self._tensors(),
            hypers=self.hypers,
            own={"device": self._device.type, **self._classes},
        )
        ours = self._tensors()
        with torch.no_grad():
            for name, value in {**state["weights"], **state["solution"][2]}.items():
                ours[name].copy_(value)
        self._pending = dict(state)
        if self._followers is not None:
            self._load()

    def _load(self) -> None:
        """Give the solver the state that waits for it."""
        assert self._pending is not None
        try:
            self.solver.load_state_dict(self._pending["solver"])
            self._train.examples, self._valid.examples = self._pending["examples"]
        except (LookupError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            self._followers = None  # half of the state is loaded
            raise BilevelError(
                f"the state does not fit the settings of this solver and optimizer "
                f"({describe(error)}); attach them as in the run that saved it"
            ) from error
        self._inner_left = self._outer_left = 0
        self._pending = None
        self._written = {}
        self._write_buffers()

    @property
    def _classes(self) -> dict[str, str]:
        """Return the classes whose states differ."""
        both = {"solver": self.solver, "optimizer": self._own.optimizer}
        return {what: type(made).__name__ for what, made in both.items()}

    # --- parts ---

    def set_up(self, batch: Batch, valid_batch: Batch) -> None:
        """Set the solver up with an example of each split; else the first step does it.

        Raises:
            BilevelError: the solver refuses the problem.
        """
        data = Data(self._train, self._valid)
        if self._pending is None:  # the caller may have loaded weights since attach
            self._problem = self._make()
        self._train.show(batch)
        self._valid.show(valid_batch)
        self._autocast = CallerAutocast(self._device.type)
        precision, solver = self._autocast.precision, self.solver
        problem = at_precision(self._problem, solver, precision, self._device)
        services = Services()
        services.leaves = self._weights()
        _, draws = generators(self._seed, self._device)
        with self._autocast.left():
            check_splits(problem, data, self._device)
            check_setup(problem, data, self._device, solver)
            solver.setup(problem, data, self._device, draws, services)
        self._unchanged.note_trained()
        self._followers = Followers(self._own.optimizer, solver.scheduled())
        if self._pending is not None:
            self._load()

    @contextmanager
    def _wrong_data_named(self) -> Iterator[None]:
        """Raise a sentence about the batches where they explain an error of PyTorch."""
        try:
            yield
        except DATA_ERRORS as error:
            data = Data(self._train, self._valid)
            flaw = None
            if not ran_out(error):
                flaw = wrong_data(self._problem, data, self._device, numbers=False)
            if flaw is None:
                raise
            raise BilevelError(flaw) from error

    def _begin_round(self) -> None:
        left = self._warmup_steps - self.solver.inner_count
        self._warmup = left > 0
        steps = self.solver.inner_steps
        self._inner_left = min(steps, left) if self._warmup else steps
        self.solver.begin_round(self._inner_left, warmup=self._warmup)

    def _pushed(
        self, call: str, takes: Sequence[str], batch: Batch | None, valid_batch: Batch | None
    ) -> list[Batch]:
        """Return the batches that a step takes, on the device."""
        given = {"train": batch, "valid": valid_batch}
        argument = {"train": "batch", "valid": "valid_batch" if call == "step" else "batch"}
        kind = type(self.solver).__name__
        for split, one in given.items():
            if one is not None and split not in takes:
                raise BilevelError(
                    f"{argument[split]} is one too many, since {call} of {kind} takes no {split} "
                    "batch; leave it out"
                )
            if one is None and split in takes:
                raise BilevelError(
                    f"{argument[split]}=None is missing, since {call} of {kind} takes a {split} "
                    f"batch; pass one to tuner.{call}"
                )
        self._unchanged.check()
        streams = {"train": self._train, "valid": self._valid}
        return [streams[split].push(given[split]) for split in takes]

    def _stream(self, split: Any, name: str) -> Any:
        draws = torch.Generator().manual_seed(self._seed)
        split = list(split) if isinstance(split, Iterator) else split
        return stream(split, None, draws, device=self._device, name=name)

    def _weights(self) -> dict[str, Tensor]:
        return {name: p for name, p in self._model.named_parameters() if p.requires_grad}

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}

    @torch.no_grad()
    def _write_buffers(self) -> None:
        """Write the carry into the buffers of the module."""
        carry = self.solver.carry
        own = dict(self._model.named_buffers()) if carry else {}
        for name, value in carry.items():
            if name in own and self._written.get(name) is not value:
                own[name].copy_(value)
        self._written = carry

    def _note(self, metrics: Metrics) -> None:
        self.metrics |= metrics
        self._history.note(metrics)

    def _raise_if_diverged(self) -> None:
        """Raise `BilevelError` if a loss of a step was not finite; this waits for the device."""
        bad = None if self._followers is None else self.solver.services.bad_step()
        if bad is not None:
            raise BilevelError(
                f"a loss became NaN or infinite at step {bad}; lower a learning rate, clip "
                "gradients (clip_norm of the solver), or start from other hyperparameters"
            )
