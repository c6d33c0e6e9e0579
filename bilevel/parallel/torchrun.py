"""The command line under `torchrun`: the process group, one run directory, and every sentence printed once."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

from bilevel.errors import BilevelError


def world_size() -> int:
    """How many processes `torchrun` has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Launch:
    """This process among those of the command.

    Attributes:
        rank: its number, 0 for the one that writes.
        failed: whether it ends for an error of its own, which the others may know nothing of.
    """

    def __init__(self, rank: int = 0, store: dist.Store | None = None) -> None:
        self.rank, self.failed, self._store = rank, False, store
        self._said: Counter[str] = Counter()

    def prints(self, sentence: str) -> bool:
        """Whether it is this process that prints a sentence: the first that has it to say, of those that say the same."""
        if self._store is None:
            return True
        key = hashlib.sha256(sentence.encode()).hexdigest()
        self._said[key] += 1
        try:
            return self._store.add(f"said/{key}/{self._said[key]}", 1) == 1
        except RuntimeError:  # the store is gone, with whoever kept it
            return self.rank == 0

    def directory(self, own: Path) -> Path:
        """The first rank's run directory, for the time in its name is another on every rank; one made in vain is removed."""
        if self._store is None:
            return own
        if self.rank == 0:
            self._store.set("directory", str(own.absolute()))
        chosen = Path(self._store.get("directory").decode())
        if chosen != own.absolute():
            with suppress(OSError):  # something is in it
                own.rmdir()
        return chosen if self.rank else own


@contextmanager
def torchrun_launch() -> Iterator[Launch]:
    """The process group of `torchrun`, where that has started several processes; NCCL for tensors on CUDA, else gloo."""
    if world_size() == 1 or dist.is_initialized():
        yield Launch()
        return
    try:
        store, rank, world = next(iter(dist.rendezvous("env://")))
        backend = (
            "cpu:gloo,cuda:nccl"
            if torch.cuda.is_available() and dist.is_nccl_available()
            else "gloo"
        )
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    except (RuntimeError, ValueError) as error:
        raise BilevelError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but the processes do not find each other "
            f"({str(error).splitlines()[0]}); start them with torchrun, or unset WORLD_SIZE for a run of one"
        ) from None
    launch = Launch(rank, dist.PrefixStore("bilevel", store))
    yield launch
    if not launch.failed:  # else it would wait for what the others have begun, and torchrun for it
        dist.destroy_process_group()
