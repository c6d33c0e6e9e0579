"""Large hyperparameters of a summary: tensors in one file, beside the JSON that describes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel.checkpoint import file_format
from bilevel.errors import BilevelError
from bilevel.files import write_atomically
from bilevel.loggers.records import brief

FILE = "hypers.pt"
MOST = 1000
"""Number of entries up to which a hyperparameter is written as text: 10⁶ take 12 MB as text."""


class LargeValues:
    """Collect the large leaves of λ and σ for one file; equal ones are stored once.

    Example:
        >>> values = LargeValues()
        >>> values.entry("hypers", "decay", torch.tensor(0.5))
        0.5
        >>> large = values.entry("hypers", "weights", torch.ones(2000))
        >>> large["shape"], large["mean"], large["file"], large["entry"]
        ([2000], 1.0, 'hypers.pt', 'hypers/weights')
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def entry(self, part: str, name: str, leaf: Tensor) -> Any:
        """Return the value of a leaf as plain numbers, or its description if it is large."""
        if leaf.numel() <= MOST:
            return leaf.tolist()
        leaf, key = leaf.detach().cpu(), f"{part}/{name}"
        same = (known for known, tensor in self.tensors.items() if _equal(tensor, leaf))
        if (known := next(same, None)) is None:
            self.tensors[key] = leaf
        return {"shape": list(leaf.shape), **brief(leaf), "file": FILE, "entry": known or key}

    def write(self, directory: Path, environment: Mapping[str, Any]) -> None:
        """Write the collected leaves, if there are any, with the environment of the run.

        Raises:
            Unwritable: the file cannot be written.
        """
        if self.tensors:
            content = {"environment": dict(environment), "values": self.tensors}
            path = directory / FILE
            write_atomically(path, lambda file: file_format.write(content, file), mode="wb")


def read_value(directory: str | Path, value: Any) -> Tensor:
    """Return a hyperparameter of `summary.json` as a tensor, from `hypers.pt` if it is large.

    Args:
        directory: the run directory.
        value: an entry of `hypers`, `scales`, `initial` or `best.hypers`.

    Raises:
        BilevelError: the file is missing, damaged or foreign, or lacks the value.
    """
    if not isinstance(value, Mapping):
        return torch.as_tensor(value)
    path = Path(directory) / FILE
    try:
        found = file_format.read(path)["values"][value["entry"]]
    except file_format.Unreadable as error:
        raise BilevelError(f"{path} {error}; give a whole run directory") from None
    except (LookupError, TypeError):
        raise BilevelError(f"{path} lacks the value {value}; give a whole run directory") from None
    if not isinstance(found, Tensor) or list(found.shape) != value.get("shape"):
        raise BilevelError(f"{path} does not fit its {value}; give a whole run directory")
    return found


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
