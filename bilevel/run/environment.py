"""The environment of a run: versions, commits, device and threads, which its files name."""

import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bilevel.untrusted_files import read_bytes

HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
MOST_BYTES = 2**24
"""Size up to which a file of git is read."""


def environment(device: torch.device, threads: int | None = None) -> dict[str, Any]:
    """Return the environment of a run by name; an unknown value is None.

    | name | value |
    |---|---|
    | `bilevel`, `torch`, `python` | the versions |
    | `commit` | the git commit of the working directory |
    | `bilevel_commit` | the git commit of bilevel, where it runs from a checkout |
    | `device` | the kind of the device and its name |
    | `threads` | the number of CPU threads of PyTorch |

    A commit is read from the files of git. Changes that were not committed are not seen.

    Args:
        device: the device of the run.
        threads: the number of CPU threads; by default the present one.

    Example:
        >>> list(environment(torch.device("cpu")))[:5]
        ['bilevel', 'torch', 'python', 'commit', 'bilevel_commit']
    """
    source = Path(__file__).resolve().parents[2]
    return {
        "bilevel": _own_version(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "commit": _commit_of_working_directory(),
        "bilevel_commit": commit(source),
        "device": f"{device.type}: {name_of(device)}",
        "threads": torch.get_num_threads() if threads is None else threads,
    }


def commit(checkout: Path) -> str | None:
    """Return the commit that a git checkout is at; None without one, or where it cannot be read.

    Args:
        checkout: the folder that holds `.git`, which is a folder, or in a worktree a file.
    """
    try:
        git = checkout / ".git"
        if git.is_file():
            git = checkout / _read(git).removeprefix("gitdir: ")
        head = _read(git / "HEAD")
        if not head.startswith("ref: "):
            return _hash(head)
        branch = head.removeprefix("ref: ")
        shared = git / _read(git / "commondir") if (git / "commondir").is_file() else git
        for folder in (git, shared):
            if (folder / branch).is_file():
                return _hash(_read(folder / branch))
        packed = _read(shared / "packed-refs").splitlines()
        found = (line.split(" ")[0] for line in packed if line.endswith(f" {branch}"))
        return _hash(next(found, ""))
    except (OSError, ValueError):  # not a repository, or one that we may not read
        return None


def name_of(device: torch.device) -> str:
    """Return the name of a device: that of the GPU, or that of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        cpus = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        cpus = ""
    found = re.search(r"^model name\s*:\s*(.+)$", cpus, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _commit_of_working_directory() -> str | None:
    try:
        here = Path.cwd()
        checkouts = (folder for folder in (here, *here.parents) if (folder / ".git").exists())
        return next(map(commit, checkouts), None)
    except OSError:  # it was removed, or is closed to us
        return None


def _own_version() -> str:
    try:
        return metadata.version("bilevel")
    except metadata.PackageNotFoundError:  # a copy that was not installed
        return "unknown"


def _read(path: Path) -> str:
    return read_bytes(path, MOST_BYTES).decode().strip()


def _hash(text: str) -> str | None:
    return text if HASH.fullmatch(text) else None
