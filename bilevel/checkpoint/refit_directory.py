"""The folders of refits within a run, and the folder that holds the result of a run."""

import json
from pathlib import Path

from bilevel.loggers.records import SUMMARY
from bilevel.untrusted_files import read_bytes

NAMES = ("start", "best", "end")
"""The names of refits: the λ at which each trains."""


def refit_directory(name: str) -> str:
    """Return the name of the folder of a refit.

    Example:
        >>> refit_directory("end")
        'refit-end'
    """
    return f"refit-{name}"


def is_refit(directory: Path) -> bool:
    """Return whether a folder is that of a refit within a run."""
    return directory.name in map(refit_directory, NAMES)


def result_directory(run: Path) -> Path:
    """Return the folder with the chosen weights: that of the run, or of one of its refits.

    Example:
        >>> result_directory(Path("no/such/run"))
        PosixPath('no/such/run')
    """
    try:
        chosen = json.loads(read_bytes(run / SUMMARY))["refit"]["chosen"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return run  # without refits, or in progress
    return run / refit_directory(chosen) if chosen in NAMES else run
