"""Training steps as CUDA graphs: recorded once, then replayed with one launch each."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel.errors import SpeedWarning
from bilevel.params import Batch, Metrics
from bilevel.solver import Solver

Step = Callable[[Batch], Metrics]


class Graph(Protocol):
    """Work of the device that was recorded once, on tensors that stay where they are."""

    def record(self, work: Callable[[], None]) -> None:
        """Note what `work` launches; nothing is computed."""

    def replay(self) -> None:
        """Do it."""


class CudaGraph:
    """PyTorch's; every replay draws anew from `generator` and from the global generator of the device."""

    def __init__(self, generator: torch.Generator) -> None:
        self._graph, self._device = torch.cuda.CUDAGraph(), generator.device
        self._graph.register_generator_state(generator)

    def record(self, work: Callable[[], None]) -> None:
        with torch.cuda.device(self._device), torch.cuda.graph(self._graph):
            work()

    def replay(self) -> None:
        self._graph.replay()


class Recorded(NamedTuple):
    """A step that was recorded: its graph, the tensors through which it is fed and tells, and what it was recorded with."""

    graph: Graph
    batch: Batch
    metrics: Metrics
    settings: list[Any]


class Capture:
    """Takes the steps of a solver: the first ones as they are, then a recording of them.

    A recording holds addresses and numbers, so all that changes from step to step must lie in tensors that stay: what a step
    binds anew to the solver (carries, the note of a bad step) is copied back to where it was before, the batch into a
    tensor of its own, and the number of the step, which `Solver.watch` notes, to the device. A setting of an optimizer that a
    schedule has changed, or a state that was loaded, is seen, and the step recorded again. A batch of another shape is taken
    step by step. What a recording cannot hold ends the recording, with one sentence, and the run goes on step by step.

    Args:
        solver: one that is set up.
        make_graph: makes an empty graph.
        device: where it computes.

    Warns:
        SpeedWarning: a step cannot be recorded.
    """

    EAGER = 3
    """Steps of each kind before a recording: optimizers make their state, and libraries what they keep."""

    def __init__(
        self, solver: Solver, make_graph: Callable[[], Graph], device: torch.device
    ) -> None:
        self.solver, self.make_graph = solver, make_graph
        self.recorded: dict[str, Recorded] = {}
        self.failed, self._recording = False, False
        self._taken: dict[str, int] = {}
        self._buffers: dict[str, Any] = {}
        self._count = solver.device_count = torch.zeros((), dtype=torch.int64, device=device)

    @classmethod
    def of(
        cls, solver: Solver, device: torch.device, generator: torch.Generator, processes: int = 1
    ) -> "Capture | None":
        """For a solver that is set up; None, with a sentence, where nothing can be recorded."""
        reason = solver.uncapturable()
        if device.type != "cuda":
            reason = f"{device.type} has no graphs"
        elif processes > 1:
            reason = "several processes train together, and wait for each other in every step"
        elif reason is None:
            reason = _prepare(solver.optimizers())
        if reason is not None:
            _warn(reason)
            return None
        return cls(solver, lambda: CudaGraph(generator), device)

    def __call__(self, step: Step, batch: Batch) -> Metrics:
        """What `step(batch)` does."""
        if self.failed:
            return step(batch)
        self._count.fill_(self.solver.inner_count)
        self._adopt()
        name = step.__name__  # type: ignore[attr-defined]  # a bound method
        self._taken[name] = self._taken.get(name, 0) + 1
        recorded = self.recorded.get(name)
        if self._taken[name] <= self.EAGER:
            if self._taken[name] < self.EAGER or self._count.device.type != "cuda":
                return self._in_place(step, batch)
            with _watched() as waited:  # a step that waits would break a recording in the middle
                metrics = self._in_place(step, batch)
            if waited:
                self._fail(f"`{name}` waits for the device")
            return metrics
        if recorded is not None and not _alike(batch, recorded.batch):
            return self._in_place(step, batch)
        settings = self._settings()
        if recorded is None or recorded.settings != settings:
            self.recorded.pop(name, None)  # first, so that its memory can be used again
            try:
                recorded = self.recorded[name] = self._record(step, batch, settings)
            except (
                Exception
            ) as error:  # whatever the problem's own code raises while nothing is computed
                self._fail(
                    f"`{name}` cannot be recorded ({type(error).__name__}: {str(error).splitlines()[0]})"
                )
                return step(batch)
        pytree.tree_map(_copy, recorded.batch, batch)
        recorded.graph.replay()
        return {key: value.clone() for key, value in recorded.metrics.items()}

    def _record(self, step: Step, batch: Batch, settings: list[Any]) -> Recorded:
        """A recording of `step`; the solver is left as it was."""
        static = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, batch)
        graph, metrics, before = self.make_graph(), {}, dict(vars(self.solver))
        self.solver.phases = None  # a clock's events belong to no graph
        self._recording = True
        try:
            graph.record(lambda: metrics.update(self._in_place(step, static)))
            after = dict(vars(self.solver))
        finally:
            self._recording = False
            vars(self.solver).update(before)
        if moved := [name for name, value in _numbers(before).items() if after[name] != value]:
            raise ValueError(f"`{moved[0]}` changes on the host")
        return Recorded(graph, static, metrics, settings)

    def _in_place(self, step: Step, batch: Batch) -> Metrics:
        """Take the step; what it binds anew goes back to where it was."""
        before = _tensors(self.solver)
        metrics = step(batch)
        for name, bound in _tensors(self.solver).items():
            if bound is not before.get(name):
                self._keep(name, bound)
        return metrics

    def _keep(self, name: str, bound: Any) -> None:
        if name in self._buffers and _alike(bound, self._buffers[name]):
            pytree.tree_map(_copy, self._buffers[name], bound)
        elif self._recording:
            raise ValueError(f"`{name}` changes its shape")
        else:
            self._buffers[name] = pytree.tree_map(
                torch.clone, bound
            )  # several names may have been bound to one tensor
            self.recorded.clear()
        setattr(self.solver, name, self._buffers[name])

    def _adopt(self) -> None:
        """See that the solver holds the buffers, also after a state was loaded."""
        for name, buffer in self._buffers.items():
            if (bound := getattr(self.solver, name)) is not buffer:
                self._keep(name, bound)

    def _settings(self) -> list[Any]:
        """All that a recording holds as numbers, or by address."""
        return [
            (
                _Same(optimizer.state),
                [
                    {key: value for key, value in group.items() if key != "params"}
                    for group in groups
                ],
            )
            for optimizer in self.solver.optimizers()
            for groups in [optimizer.param_groups]
        ]

    def _fail(self, reason: str) -> None:
        self.failed, self.solver.device_count = True, None
        self.recorded.clear()
        _warn(reason)


class _Same:
    """Equal to itself alone, however equal what it holds may be to something else."""

    def __init__(self, held: object) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.held is other.held


def _prepare(optimizers: list[torch.optim.Optimizer]) -> str | None:
    """Have the optimizers count their steps on the device; the sentence about one that cannot."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = True
            elif not isinstance(optimizer, torch.optim.SGD):  # which counts no steps
                return f"{type(optimizer).__name__} has no capturable form"
        for state in optimizer.state.values():
            if "step" in state:  # of a resumed run that was not captured
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(
                    optimizer.param_groups[0]["params"][0].device
                )
    return None


@contextmanager
def _watched() -> Iterator[list[str]]:
    """Collects what CUDA says whenever it is waited for; other warnings are handed on."""
    waited: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waited
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        if "called a synchronizing" in str(warning.message):
            waited.append(str(warning.message))
        elif "debug mode is a prototype" not in str(
            warning.message
        ):  # which PyTorch says of the mode itself, once
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


def _tensors(solver: Solver) -> dict[str, Any]:
    """The attributes that hold tensors, bare or by name."""
    held = {
        name: value
        for name, value in vars(solver).items()
        if isinstance(value, (Tensor, dict)) and name != "device_count"
    }
    return {
        name: value
        for name, value in held.items()
        if all(isinstance(x, Tensor) for x in pytree.tree_leaves(value))
    }


def _numbers(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in attributes.items()
        if value is None or isinstance(value, (int, float, str))
    }


def _alike(one: Any, other: Any) -> bool:
    """Whether two pytrees have the same structure, and their tensors the same shapes and types."""
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
        f"capture=true has no effect, since {reason}; the run goes on step by step",
        SpeedWarning,
        stacklevel=3,
    )
