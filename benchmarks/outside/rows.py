"""Rows of the table: a quantity, their value, our value, and how far apart they may be."""

import importlib.metadata
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

HEAD = ("test", "quantity", "theirs", "ours", "difference", "tolerance", "agrees")

NOT_RUN = "not run: "


class Missing(Exception):
    """A test cannot run here; the message is the reason."""


class Options(NamedTuple):
    """Settings that the command line gives to every test.

    Attributes:
        data: folder with `MNIST/raw`, or None.
        quick: run a reduced size, whose numbers do not follow the protocol.
        full: run distillation at the published length.
    """

    data: Path | None = None
    quick: bool = False
    full: bool = False

    def root(self) -> str:
        """Return the folder of MNIST.

        Raises:
            Missing: there is no such folder.
        """
        if self.data is None or not (self.data / "MNIST" / "raw").is_dir():
            raise Missing("give the folder with MNIST/raw (--data PATH, or make outside DATA=PATH)")
        return str(self.data)


class Row(NamedTuple):
    """One line of the table, as text; `agrees` is None where there is nothing to compare."""

    quantity: str
    theirs: str = ""
    ours: str = ""
    difference: str = ""
    tolerance: str = ""
    agrees: bool | None = None

    def cells(self, test: str) -> list[str]:
        """Return the cells under `HEAD`."""
        verdict = {True: "yes", False: "**no**", None: ""}[self.agrees]
        return [test, *self[:5], verdict]


def compared(
    quantity: str,
    theirs: Tensor | float,
    ours: Tensor | float,
    tolerance: float,
    *,
    relative: bool = True,
    form: str = ".10g",
) -> Row:
    """Return a row for two numbers, or for two vectors by their norms.

        difference = ‖ours − theirs‖ (relative: divided by ‖theirs‖)

    Example:
        >>> compared("Φ", 2.0, 2.002, 0.01).difference
        '1.0e-03 (relative)'
    """
    a = torch.as_tensor(theirs, dtype=torch.float64).detach().flatten()
    b = torch.as_tensor(ours, dtype=torch.float64).detach().flatten()
    distance = float((b - a).norm()) / (float(a.norm()) if relative else 1.0)
    kind = " (relative)" if relative else ""

    def show(v: Tensor) -> str:
        return f"{v.item():{form}}" if v.numel() == 1 else f"‖·‖ = {v.norm():{form}}"

    within = math.isfinite(distance) and distance <= tolerance
    return Row(
        quantity, show(a), show(b), f"{distance:.1e}{kind}", f"{tolerance:.2g}{kind}", within
    )


def sampled(
    quantity: str,
    theirs: str | Sequence[float],
    ours: Sequence[float],
    tolerance: float | None,
    *,
    mean: float | None = None,
    form: str = ".4f",
) -> Row:
    """Return a row for the means of runs with different seeds.

    Args:
        quantity: what is measured.
        theirs: the values of the other side, or its published text, with `mean`.
        ours: one value for each seed.
        tolerance: the largest distance of the two means; None if they differ by design.
        mean: the mean in a published text.
        form: format of a number.
    """
    other = statistics.mean(theirs) if mean is None else mean  # type: ignore[arg-type,type-var]
    distance = statistics.mean(ours) - other
    return Row(
        quantity,
        theirs if isinstance(theirs, str) else spread(theirs, form),
        spread(ours, form),
        f"{distance:+{form}}",
        "by design" if tolerance is None else f"{tolerance:g}",
        None if tolerance is None else abs(distance) <= tolerance,
    )


def spread(values: Sequence[float], form: str = ".4f") -> str:
    """Return mean ± standard deviation (n = number of values).

    Example:
        >>> spread([1.0, 2.0], ".1f")
        '1.5 ± 0.7 (n = 2)'
    """
    mean = f"{statistics.mean(values):{form}}"
    if len(values) == 1:
        return f"{mean} (n = 1)"
    return f"{mean} ± {statistics.stdev(values):{form}} (n = {len(values)})"


def not_run(quantity: str, reason: str) -> Row:
    """Return a row without values, which states why."""
    return Row(quantity, difference=f"{NOT_RUN}{reason}")


def version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
