"""The libraries of the comparison, whether they are installed, and what each of them computes."""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from benchmarks.peers import jax_peers, torch_peers
from benchmarks.peers.workloads import Work

AIM = 0.95
"""The least lower bound of a ratio to a PyTorch library."""


class Library(NamedTuple):
    """A library that computes hypergradients.

    Attributes:
        modules: the modules that must exist.
        distributions: the packages whose versions are shown.
        install: how to install it.
        rows: for each method, a function from a problem to a call that returns dL_V/du.
        aim: the least lower bound that is wanted for its time over our own; None without an aim.
    """

    modules: tuple[str, ...]
    distributions: tuple[str, ...]
    install: str
    rows: dict[str, Callable[[Work], Callable[[], Tensor]]]
    aim: float | None = AIM

    def missing(self) -> str | None:
        """Return the reason to skip the library; None if it is installed."""
        for module in self.modules:
            try:
                found = importlib.util.find_spec(module) is not None
            except ImportError:  # the parent of a submodule is missing
                found = False
            if not found:
                return f"the module {module} is not installed; {self.install}"
        return None

    def versions(self) -> str:
        """Return the versions of its packages."""
        return ", ".join(f"{name} {_version(name)}" for name in self.distributions)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


EXTRA = 'pip install "bilevel[peers]"'

LIBRARIES: dict[str, Library] = {
    "hypertorch": Library(
        # another package of the name `hypergrad` lies on the package index
        ("hypergrad.CG_torch",),
        ("hypergrad",),
        "pip install git+https://github.com/prolearner/hypertorch",
        {
            "CG": torch_peers.hypertorch_cg,
            "Neumann": torch_peers.hypertorch_neumann,
            "reverse": torch_peers.hypertorch_reverse,
        },
    ),
    "higher": Library(("higher",), ("higher",), EXTRA, {"reverse": torch_peers.higher_reverse}),
    "TorchOpt": Library(
        ("torchopt",),
        ("torchopt",),
        EXTRA,
        {
            "CG": torch_peers.torchopt_cg,
            "Neumann": torch_peers.torchopt_neumann,
            "reverse": torch_peers.torchopt_reverse,
        },
    ),
    "Betty": Library(
        ("betty",),
        ("betty-ml",),
        EXTRA,
        {"CG": torch_peers.betty_cg, "Neumann": torch_peers.betty_neumann},
    ),
    "jaxopt (jit)": Library(
        ("jax", "jaxopt"),
        ("jaxopt", "jax", "jaxlib"),
        EXTRA,
        {"CG": jax_peers.jaxopt_cg},
        aim=None,
    ),
}
