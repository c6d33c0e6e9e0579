"""A problem with given initial weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel.checkpoint.checkpoints import best_solution
from bilevel.errors import BilevelError
from bilevel.files import write_atomically
from bilevel.module_problem import ModuleProblem
from bilevel.params import Carry, Params
from bilevel.problem import Problem
from bilevel.problem_wrapper import ProblemWrapper
from bilevel.text import first_line, near
from bilevel.untrusted_files import read_bytes

KEPT = "initial_params.pt"
"""The file of a run directory with given initial weights, for the refits of the run."""


class WithInitialParams(ProblemWrapper):
    """`problem`, whose `init` returns given weights in place of random ones.

    Args:
        problem: the problem.
        params: one tensor for every weight, by name. Carried tensors (such as batch-norm
            statistics) may be among them. Tied weights may come under all their names, as in the
            `state_dict` of a module.

    Raises:
        BilevelError: tied weights have several values.
    """

    def __init__(self, problem: Problem, params: Mapping[str, Tensor]) -> None:
        super().__init__(problem)
        self.params = dict(params)
        for alias, name in (problem.aliases if isinstance(problem, ModuleProblem) else {}).items():
            if alias not in self.params:
                continue
            value = self.params.pop(alias)
            if not _equal(self.params.setdefault(name, value), value):
                raise BilevelError(
                    f"`{alias}` and `{name}` are one tied weight, but the initial weights hold two "
                    "values for it; give one value, or untie the weights in the module"
                )

    def init(self, generator: torch.Generator) -> tuple[Params, Carry]:
        """Return the given weights in the dtypes of the problem.

        Raises:
            BilevelError: a name or a shape does not match that of the problem.
        """
        params, carry = self.problem.init(generator)
        known = {**params, **carry}
        if unknown := [name for name in self.params if name not in known]:
            raise BilevelError(
                f"the initial weights hold `{unknown[0]}`{near(unknown[0], known)}, which the "
                f"problem does not have; give tensors named {_some(known)}"
            )
        if missing := [name for name in params if name not in self.params]:
            raise BilevelError(
                f"the initial weights lack `{missing[0]}`; give one tensor for each of "
                f"{_some(params)}"
            )
        for name, value in self.params.items():
            if not isinstance(value, Tensor) or value.shape != known[name].shape:
                found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise BilevelError(
                    f"the initial weight `{name}` is {found}; give a tensor of shape "
                    f"{list(known[name].shape)}"
                )
        start = {
            name: value.detach().to(known[name], copy=True) for name, value in self.params.items()
        }
        return {name: start[name] for name in params}, {
            name: start.get(name, value) for name, value in carry.items()
        }


def read_params(path: str | Path) -> dict[str, Any]:
    """Return the state dict in a file, or the weights and carry of a run at its best evaluation.

    Args:
        path: a file that `torch.save` wrote, a file of safetensors, or a run directory.

    Raises:
        BilevelError: the file is missing or holds no state dict, or the directory holds no
            readable checkpoint.
    """
    setting = f"initial_params={str(path)!r}"
    if Path(path).is_dir():
        try:
            _, weights, carry = best_solution(path)
        except BilevelError as error:
            raise BilevelError(f"{setting} gives no weights: {error}") from None
        return {**weights, **carry}
    if Path(path).suffix == ".safetensors":
        return _read_safetensors(path, setting)
    try:
        params = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise BilevelError(
            f"{setting} cannot be read ({error.strerror or error}); give a file of torch.save, or "
            "a run directory"
        ) from None
    except Exception:  # unpickling any other file raises nearly anything
        params = None
    if not isinstance(params, dict):
        raise BilevelError(
            f"{setting} holds no state dict; write one with torch.save(model.state_dict(), path)"
        )
    return params


def _read_safetensors(path: str | Path, setting: str) -> dict[str, Any]:
    try:
        from safetensors.torch import load
    except ImportError:
        raise BilevelError(
            f"{setting} needs safetensors, which is not installed; pip install safetensors"
        ) from None
    try:
        params: dict[str, Any] = load(read_bytes(Path(path)))
    except OSError as error:
        raise BilevelError(
            f"{setting} cannot be read ({error.strerror or error}); give a file of safetensors"
        ) from None
    except Exception as error:  # safetensors has an error class of its own
        raise BilevelError(
            f"{setting} is no file of safetensors ({first_line(error)}); write one with "
            "`bilevel export`"
        ) from None
    return params


def _equal(one: Any, other: Any) -> bool:
    return one is other or (
        isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    )


def _some(names: Mapping[str, Any]) -> str:
    return ", ".join(list(names)[:6]) + (", …" if len(names) > 6 else "")


def keep_params(directory: Path, params: Mapping[str, Any]) -> None:
    """Write the initial weights of a run, with which its refits begin too.

    Raises:
        BilevelError: the file cannot be written.
    """
    content = dict(params)
    write_atomically(directory / KEPT, lambda file: torch.save(content, file), mode="wb")


def kept_params(directory: Path) -> dict[str, Any] | None:
    """Return the weights that `keep_params` wrote; None for a run with random ones."""
    path = directory / KEPT
    return read_params(path) if path.exists() else None
