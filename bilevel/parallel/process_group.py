"""The processes that a run is spread over, and what they do together: agree, copy, compare, and sum."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bilevel.device.device import rng_state, set_rng_state
from bilevel.errors import BilevelError
from bilevel.params import to_device

Result = TypeVar("Result")


class Ranks:
    """A run of one process: it agrees with itself. `ProcessGroup` are those of a process group."""

    rank = 0
    world = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def maximum(self, *numbers: float) -> list[float]:
        """The largest of every number over all ranks: what depends on a clock or on a signal is decided together."""
        return list(numbers)

    def on_first(self, act: Callable[[], Result]) -> Result:
        """What `act` answers on the first rank, on all of them; a `BilevelError` there is raised everywhere."""
        return act()

    def check(self, held: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Raise where ranks that should hold the same tensors do not.

        Raises:
            BilevelError: naming the first such tensor.
        """

    def share_rng_state(self, device: torch.device) -> None:
        """Give PyTorch's global generators the state of the first rank's: loaders and modules may draw from them."""


SINGLE_PROCESS = Ranks()


class ProcessGroup(Ranks):
    """All processes of `torch.distributed`'s group.

    Numbers and decisions travel between the CPUs by a gloo group of their own, so that no one waits for a GPU; tensors by
    the group of the run's device (NCCL on CUDA).
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.world, self.device = dist.get_rank(), dist.get_world_size(), device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # which NCCL asks for
        self.control: Any = dist.new_group(backend="gloo")
        self.group: Any = self.control if device.type == "cpu" else dist.group.WORLD

    def sum(self, tensor: Tensor) -> None:
        """Σ over ranks, in place; the host does not wait for it."""
        dist.all_reduce(tensor, group=self.group)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's small Python value, in the order of ranks."""
        values = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def copy(self, value: Any) -> Any:
        """The first rank's value, its tensors on the CPU."""
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
        return answer  # type: ignore[return-value]  # that of the first rank

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
        for (name, _), parted in zip(named, (largest != -smallest).tolist(), strict=True):
            if parted:
                raise BilevelError(
                    f"the ranks have parted: at step {step} they hold different values of the {name}, which all should hold "
                    "alike; look for what a problem of your own draws or reads beside its generators, and give every rank "
                    "the same kind of device"
                )

    def share_rng_state(self, device: torch.device) -> None:
        set_rng_state(self.copy(rng_state(device)), device)


def is_distributed() -> bool:
    """Whether this is one process of several: of the process group that is initialized, if one is."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def open_ranks(device: torch.device) -> Iterator[Ranks]:
    """The ranks of a run, which computes on `device` here.

    Raises:
        BilevelError: another process has ended meanwhile.
    """
    if not is_distributed():
        yield SINGLE_PROCESS
        return
    ranks = ProcessGroup(device)
    try:
        yield ranks
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not re.search("gloo|NCCL", str(error)):
            raise
        raise BilevelError(
            f"another process of the run has ended, or does not answer ({str(error).splitlines()[0][:200]}); see what it says "
            "itself, and resume the run from its last checkpoint"
        ) from error
    finally:
        dist.destroy_process_group(ranks.control)


def device_of_rank(name: str) -> str:
    """The device called `name` of this process: of several on one machine, each has a GPU of its own.

    Example:
        >>> device_of_rank("cpu")
        'cpu'

    Raises:
        BilevelError: there are fewer GPUs than processes, or one is named for all of them.
    """
    if is_distributed() and name.startswith("cuda:"):
        raise BilevelError(
            f"runner.device={name} is one GPU for all processes; use runner.device=cuda, and each has its own"
        )
    if not is_distributed() or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    own, there = int(os.environ.get("LOCAL_RANK", dist.get_rank())), torch.cuda.device_count()
    if own >= there:
        raise BilevelError(
            f"process {own} of this machine has no GPU to itself, there are {there}; start as many processes"
        )
    return f"cuda:{own}"


def bits(t: Tensor) -> Tensor:
    """The sum of a tensor's bits, read as whole numbers: [] in int64, NaN like any other."""
    t = torch.view_as_real(t.detach()) if t.is_complex() else t.detach()
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.contiguous().view(whole).sum(dtype=torch.int64)
