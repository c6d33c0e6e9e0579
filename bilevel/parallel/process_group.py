"""The processes of a run: what they decide together, copy, compare and sum."""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bilevel.device.device import rng_state, set_rng_state
from bilevel.errors import BilevelError
from bilevel.params import to_device
from bilevel.text import first_line

Result = TypeVar("Result")


class Ranks(ABC):
    """The processes of a run, each with its number.

    Attributes:
        rank: number of this process, from 0.
        world: number of processes.
    """

    rank: int
    world: int

    @property
    def first(self) -> bool:
        """Return whether this process writes the files of the run."""
        return self.rank == 0

    @abstractmethod
    def maximum(self, *numbers: float) -> list[float]:
        """Return the largest value of every number over all ranks.

        Ranks decide with it together on what depends on a clock or on a signal.
        """

    @abstractmethod
    def on_first(self, act: Callable[[], Result]) -> Result:
        """Return on all ranks the result of `act()` on the first one.

        A `BilevelError` of `act` is raised on all ranks.
        """

    @abstractmethod
    def check(self, held: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Check that all ranks hold the same tensors.

        Raises:
            BilevelError: with the name of the first tensor that differs.
        """

    @abstractmethod
    def share_rng_state(self, device: torch.device) -> None:
        """Copy the state of the first rank's global generators to all ranks.

        Loaders and modules may draw from those generators.
        """


class SingleProcess(Ranks):
    """A run of one process."""

    rank = 0
    world = 1

    def maximum(self, *numbers: float) -> list[float]:
        return list(numbers)

    def on_first(self, act: Callable[[], Result]) -> Result:
        return act()

    def check(self, held: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        pass

    def share_rng_state(self, device: torch.device) -> None:
        pass


SINGLE_PROCESS = SingleProcess()


class ProcessGroup(Ranks):
    """All processes of the group of `torch.distributed`.

    Numbers and decisions travel between the CPUs by a separate gloo group, so that no rank waits
    for a GPU. Tensors travel by the group of the run's device (NCCL on CUDA).
    """

    def __init__(self, device: torch.device) -> None:
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self.device = device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # NCCL needs it
        self.control: Any = dist.new_group(backend="gloo")
        self.group: Any = self.control if device.type == "cpu" else dist.group.WORLD

    def sum(self, tensor: Tensor) -> None:
        """Sum over ranks, in place; the host does not wait."""
        dist.all_reduce(tensor, group=self.group)

    def gather(self, value: Any) -> list[Any]:
        """Return the small Python values of all ranks, in the order of ranks."""
        values = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def copy(self, value: Any) -> Any:
        """Return the value of the first rank, with its tensors on the CPU."""
        box = [to_device(value, "cpu") if self.first else None]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def maximum(self, *numbers: float) -> list[float]:
        values = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.control)
        return values.tolist()

    def on_first(self, act: Callable[[], Result]) -> Result:
        answer, error = None, None
        if self.first:
            try:
                answer = act()
            except BilevelError as raised:
                error = raised
        answer, error = self.copy((answer, error))
        if error is not None:
            raise error
        return answer  # type: ignore[return-value]

    def check(self, held: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        named = [
            (f"{kind} `{name}`", t)
            for kind, tensors in held.items()
            for name, t in tensors.items()
            if t.numel()
        ]
        if not named:
            return
        sums = torch.stack([bits(t).to(self.device) for _, t in named])
        ends = torch.cat([sums, -sums])
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self.group)
        largest, smallest = ends.chunk(2)
        for (name, _), differs in zip(named, (largest != -smallest).tolist(), strict=True):
            if differs:
                raise BilevelError(
                    f"the ranks hold different values of the {name} at step {step}; look for draws "
                    "or inputs of the problem outside its generators, and give every rank the "
                    "same kind of device"
                )

    def share_rng_state(self, device: torch.device) -> None:
        set_rng_state(self.copy(rng_state(device)), device)


def is_distributed() -> bool:
    """Return whether this process is one of several in an initialized process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def open_ranks(device: torch.device) -> Iterator[Ranks]:
    """Yield the ranks of a run that computes on `device` in this process.

    Raises:
        BilevelError: another process has ended.
    """
    if not is_distributed():
        yield SINGLE_PROCESS
        return
    ranks = ProcessGroup(device)
    try:
        yield ranks
        # a launcher that sees one process end stops the others, and the first one writes files
        ranks.on_first(lambda: None)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not re.search("gloo|NCCL", str(error)):
            raise
        raise BilevelError(
            f"another process of the run has ended or does not answer ({first_line(error)[:200]}); "
            "read the output of that process, and resume the run from its last checkpoint"
        ) from error
    finally:
        dist.destroy_process_group(ranks.control)


def device_of_rank(name: str) -> str:
    """Return the device of this process for the name `name`.

    Of several processes on one machine, each has its own GPU.

    Example:
        >>> device_of_rank("cpu")
        'cpu'

    Raises:
        BilevelError: there are fewer GPUs than processes, or `name` is one GPU for all of them.
    """
    if is_distributed() and name.startswith("cuda:"):
        raise BilevelError(
            f"runner.device={name} is one GPU for all processes; use runner.device=cuda, which "
            "gives each process its own GPU"
        )
    if not is_distributed() or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    own, there = int(os.environ.get("LOCAL_RANK", dist.get_rank())), torch.cuda.device_count()
    if own >= there:
        raise BilevelError(
            f"process {own} of this machine has no GPU of its own, since there are {there}; start "
            f"{there} processes"
        )
    return f"cuda:{own}"


def bits(t: Tensor) -> Tensor:
    """Return the sum of a tensor's bits, read as whole numbers: [] in int64.

    NaN counts like any other value.
    """
    t = torch.view_as_real(t.detach()) if t.is_complex() else t.detach()
    t = t.contiguous()
    if t.numel() * t.element_size() % 8 == 0 and t.storage_offset() * t.element_size() % 8 == 0:
        # eight bytes at a time, which takes a tenth of the time for short entries
        return t.reshape(-1).view(torch.uint8).view(torch.int64).sum()
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.view(whole).sum(dtype=torch.int64)
