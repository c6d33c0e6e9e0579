"""Training steps as CUDA graphs: recorded once, then replayed with one launch each."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel.device.recording import CudaGraph, Graph, count_on_device, device_waits
from bilevel.errors import SpeedWarning
from bilevel.params import Batch, Metrics
from bilevel.services import Capturable
from bilevel.solver import Solver
from bilevel.text import describe

Step = Callable[..., Metrics]


class Recorded(NamedTuple):
    """A recorded step.

    Attributes:
        graph: the recording.
        batches: its input tensors.
        metrics: its output tensors.
        settings: the settings of the optimizers that are part of it.
    """

    graph: Graph
    batches: tuple[Batch, ...]
    metrics: Metrics
    settings: list[Any]


class Cell(NamedTuple):
    """An attribute that a step binds anew."""

    owner: object
    name: str

    @property
    def value(self) -> Any:
        """The present value of the attribute."""
        return getattr(self.owner, self.name)


class Capture:
    """Take the steps of a solver: the first ones directly, the later ones as a replayed graph.

    A recording holds addresses and numbers, so whatever changes from step to step must lie in
    tensors that keep their memory. The solver declares the attributes that a step binds anew
    (`Solver.capturable`); after a step their values are copied back to where they were. The batch
    is copied into a tensor of its own, and the number of the step lies on the device. A recording
    fails if a step binds anything else anew.

    A setting of an optimizer that a schedule has changed, or a state that was loaded, is noticed,
    and the step is recorded again. A batch of another shape is taken directly. If recording fails,
    the run continues without captures, after one warning.

    Args:
        solver: a solver after its set-up.
        make_graph: makes an empty graph.
        device: the device that computes.

    Warns:
        SpeedWarning: a step cannot be recorded.
    """

    EAGER = 3
    """Steps of each kind before a recording: optimizers and libraries make their state in them."""

    def __init__(
        self, solver: Solver, make_graph: Callable[[], Graph], device: torch.device
    ) -> None:
        self.solver = solver
        self.services = solver.services
        self.make_graph = make_graph
        self.recorded: dict[str, Recorded] = {}
        self.failed = False
        declared = solver.capturable()
        if not isinstance(declared, Capturable):
            raise ValueError(_reason(solver, declared))
        self._optimizers = declared.optimizers
        self._owners = [solver, self.services, *(owner for owner, _ in declared.owners)]
        self._cells = [Cell(self.services, "first_bad_step")] + [
            Cell(owner, name) for owner, names in declared.owners for name in names
        ]
        self._recording = False
        self._taken: dict[str, int] = {}
        self._buffers: dict[Cell, Any] = {}
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self.services.device_count = self._count

    @classmethod
    def of(
        cls, solver: Solver, device: torch.device, generator: torch.Generator, processes: int = 1
    ) -> "Capture | None":
        """Return a capture for a solver after its set-up; None, with a warning, if it cannot be."""
        declared = solver.capturable()
        reason: str | None = None
        if device.type != "cuda":
            reason = f"{device.type} has no graphs"
        elif processes > 1:
            reason = "several processes train together and wait for each other in every step"
        elif not isinstance(declared, Capturable):
            reason = _reason(solver, declared)
        else:
            reason = count_on_device(declared.optimizers)
        if reason is not None:
            _warn(reason)
            return None
        return cls(solver, lambda: CudaGraph(generator), device)

    def __call__(self, step: Step, *batches: Batch) -> Metrics:
        """Return the result of `step(*batches)`."""
        if self.failed:
            return step(*batches)
        self._count.fill_(self.solver.inner_count)
        self._adopt()
        name = step.__name__
        self._taken[name] = self._taken.get(name, 0) + 1
        recorded = self.recorded.get(name)
        if self._taken[name] <= self.EAGER:
            if self._taken[name] < self.EAGER or self._count.device.type != "cuda":
                return self._in_place(step, batches)
            with device_waits() as waits:  # a step that waits would break a recording in the middle
                metrics = self._in_place(step, batches)
            if waits:
                self._fail(f"`{name}` waits for the device")
            return metrics
        if recorded is not None and not _alike(batches, recorded.batches):
            return self._in_place(step, batches)
        settings = self._settings()
        if recorded is None or recorded.settings != settings:
            self.recorded.pop(name, None)  # first, so that its memory can be used again
            try:
                recorded = self.recorded[name] = self._record(step, batches, settings)
            except Exception as error:  # the problem's own code may raise anything here
                self._fail(f"`{name}` cannot be recorded ({describe(error)})")
                return step(*batches)
        pytree.tree_map(_copy, recorded.batches, batches)
        recorded.graph.replay()
        return {key: value.clone() for key, value in recorded.metrics.items()}

    def _record(self, step: Step, batches: tuple[Batch, ...], settings: list[Any]) -> Recorded:
        """Return a recording of `step`; the solver is left as it was."""
        static = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, batches)
        graph, metrics = self.make_graph(), {}
        before = [dict(vars(owner)) for owner in self._owners]
        self.services.timers = None  # the events of a timer belong to no graph
        self._recording = True
        try:
            graph.record(lambda: metrics.update(self._in_place(step, static)))
            self._check_declared(before)
        finally:
            self._recording = False
            for owner, state in zip(self._owners, before, strict=True):
                vars(owner).update(state)
        return Recorded(graph, static, metrics, settings)

    def _check_declared(self, before: list[dict[str, Any]]) -> None:
        """Raise if a recorded step has bound an attribute that is not declared."""
        declared = {(id(cell.owner), cell.name) for cell in self._cells}
        declared.add((id(self.services), "timers"))
        for owner, old in zip(self._owners, before, strict=True):
            for name, value in vars(owner).items():
                then = old.get(name, _ABSENT)
                same = value is then or (isinstance(value, (int, float, str)) and value == then)
                if not same and (id(owner), name) not in declared:
                    raise ValueError(f"`{name}` changes on the host")

    def _in_place(self, step: Step, batches: tuple[Batch, ...]) -> Metrics:
        """Take the step; what it binds anew is copied back to where it was."""
        before = [cell.value for cell in self._cells]
        metrics = step(*batches)
        for cell, old in zip(self._cells, before, strict=True):
            if cell.value is not old and cell.value is not None:
                self._keep(cell, cell.value)
        return metrics

    def _keep(self, cell: Cell, bound: Any) -> None:
        if cell in self._buffers and _alike(bound, self._buffers[cell]):
            pytree.tree_map(_copy, self._buffers[cell], bound)
        elif self._recording:
            raise ValueError(f"`{cell.name}` changes its shape")
        else:  # a copy: several names may have been bound to one tensor
            self._buffers[cell] = pytree.tree_map(torch.clone, bound)
            self.recorded.clear()
        setattr(cell.owner, cell.name, self._buffers[cell])

    def _adopt(self) -> None:
        """Put the buffers back into the solver, also after a state was loaded."""
        for cell, buffer in list(self._buffers.items()):
            if (bound := cell.value) is not buffer:
                self._keep(cell, bound)

    def _settings(self) -> list[Any]:
        """Return all that a recording holds as numbers, or by address."""
        return [
            (
                _Same(optimizer.state),
                [{k: v for k, v in group.items() if k != "params"} for group in groups],
            )
            for optimizer in self._optimizers
            for groups in [optimizer.param_groups]
        ]

    def _fail(self, reason: str) -> None:
        self.failed = True
        self.services.device_count = None
        self.recorded.clear()
        _warn(reason)


_ABSENT = object()


class _Same:
    """An object that equals another one only if both hold the same object."""

    def __init__(self, held: object) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.held is other.held


def _reason(solver: Solver, declared: str | None) -> str:
    return declared or f"the steps of {type(solver).__name__} change what lies on the host"


def _alike(one: Any, other: Any) -> bool:
    """Return whether two pytrees agree in structure, and their tensors in shape and type."""
    (ours, spec), (theirs, other_spec) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return spec == other_spec and all(
        a.shape == b.shape and a.dtype == b.dtype
        if isinstance(a, Tensor) and isinstance(b, Tensor)
        else a == b
        for a, b in zip(ours, theirs, strict=True)
    )


def _copy(to: Any, value: Any) -> None:
    if isinstance(to, Tensor) and to.data_ptr() != value.data_ptr():
        to.copy_(value)


def _warn(reason: str) -> None:
    warnings.warn(
        f"steps are not captured as CUDA graphs, since {reason}; the run continues with plain "
        "steps (runner.capture=false silences this)",
        SpeedWarning,
        stacklevel=3,
    )
