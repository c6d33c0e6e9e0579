"""The command line under `torchrun`: process group, one run directory, messages printed once."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

from bilevel.errors import BilevelError
from bilevel.text import first_line


def world_size() -> int:
    """Return the number of processes that `torchrun` has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Launch:
    """This process among all processes of the command.

    Attributes:
        rank: its number; 0 writes the files.
        failed: True where it ends for an error that the other processes may not have.
    """

    def __init__(self, rank: int = 0, store: dist.Store | None = None) -> None:
        self.rank = rank
        self.failed = False
        self._store = store
        self._printed: Counter[str] = Counter()

    def prints(self, sentence: str) -> bool:
        """Return whether this process prints a sentence.

        The first process with the sentence prints it, so equal sentences appear once.
        """
        if self._store is None:
            return True
        key = hashlib.sha256(sentence.encode()).hexdigest()
        self._printed[key] += 1
        try:
            return self._store.add(f"printed/{key}/{self._printed[key]}", 1) == 1
        except RuntimeError:  # the process that kept the store has ended
            return self.rank == 0

    def directory(self, own: Path) -> Path:
        """Return the run directory of the first rank.

        Names contain the time and differ between ranks. An unused directory is removed.
        """
        if self._store is None:
            return own
        if self.rank == 0:
            self._store.set("directory", str(own.absolute()))
        chosen = Path(self._store.get("directory").decode())
        if chosen != own.absolute():
            with suppress(OSError):  # the directory is not empty
                own.rmdir()
        return chosen if self.rank else own


@contextmanager
def torchrun_launch() -> Iterator[Launch]:
    """Yield this process among those that `torchrun` has started.

    The process group uses NCCL for tensors on CUDA, and gloo otherwise.
    """
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
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} needs processes that find each other, which "
            f"failed ({first_line(error)}); start them with torchrun or srun, or set WORLD_SIZE=1 "
            "for a run of one process"
        ) from None
    launch = Launch(rank, dist.PrefixStore("bilevel", store))
    yield launch
    # after a failure this would wait for collectives that the other processes have begun
    if not launch.failed:
        dist.destroy_process_group()
