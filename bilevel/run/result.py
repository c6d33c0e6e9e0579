"""The result of a run: its summary, the path of λ, and the trained network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from bilevel import studies
from bilevel.errors import BilevelError
from bilevel.files import strict_json, write_atomically
from bilevel.loggers.hyper_schedule import RecordedSchedule, from_records, from_run
from bilevel.loggers.records import METRICS, Record, read_metrics
from bilevel.module_problem import ModuleProblem
from bilevel.problem import Problem
from bilevel.problem_wrapper import ProblemWrapper
from bilevel.solver import Solution
from bilevel.validate import one_of, path_of

if TYPE_CHECKING:
    import optuna

At: TypeAlias = Literal["best", "last"]


class Result(dict[str, Any]):
    """The summary of a run as a dictionary, with its network and its hyperparameters.

    Args:
        summary: the content of `summary.json`.
        problem: the problem of the run.
        best: the solution of the lowest validation loss, on the CPU; None if there is none.
        last: the solution at the end, on the CPU.
        directory: the run directory, None without one.
        records: the records of the evaluations where there is no directory.
        candidates: with refits, the result of the run itself as `run`, and that of each refit.

    Attributes:
        candidates: see above; {} without refits.

    Example:
        >>> import tempfile
        >>> from bilevel import Runner
        >>> from bilevel.problems import digits
        >>> from bilevel.solvers import delta_stn
        >>> runner = Runner(epochs=1, warmup_epochs=0, progress="none", picture=False)
        >>> result = runner.run(digits(hidden=[8]), delta_stn(), directory=tempfile.mkdtemp())
        >>> sorted(result.solution().hypers)
        ['dropout1', 'input_dropout', 'weight_decay']
        >>> result.schedule.steps
        [0, 16]
        >>> type(result.module()).__name__
        'MLP'
    """

    def __init__(
        self,
        summary: Record,
        *,
        problem: Problem,
        best: Solution | None,
        last: Solution,
        directory: Path | None = None,
        records: Sequence[Record] = (),
        candidates: Mapping[str, "Result"] | None = None,
    ) -> None:
        super().__init__(summary)
        self.problem = problem
        # the working directory of the caller may change
        self.directory = None if directory is None else directory.absolute()
        self._solutions = {"best": best, "last": last}
        self._records = list(records)
        self.candidates = dict(candidates or {})

    def of_run(
        self, summary: Record, *, directory: Path, candidates: Mapping[str, "Result"]
    ) -> "Result":
        """Return the result of a run with refits whose chosen candidate is this one."""
        best, last = self._solutions["best"], self._solutions["last"]
        assert last is not None
        return Result(
            summary,
            problem=self.problem,
            best=best,
            last=last,
            directory=directory,
            candidates=candidates,
        )

    @property
    def metrics(self) -> list[Record]:
        """Return the records of all evaluations.

        Raises:
            BilevelError: the file of the records is missing or damaged.
        """
        if self.directory is None:
            return self._records
        path = self.directory / METRICS
        try:
            return read_metrics(path)
        except OSError as error:
            reason = error.strerror or str(error)
        except (ValueError, RecursionError):
            reason = "a line of it is not JSON"
        raise BilevelError(f"cannot read {path} ({reason}); restore the file from a copy")

    @property
    def schedule(self) -> RecordedSchedule:
        """Return λ at every evaluation, which `bilevel.solvers.Replayed` can replay.

        Raises:
            BilevelError: there is no record, or a hyperparameter is too large to be recorded.
        """
        if self.directory is not None:
            return from_run(self.directory)
        if not self._records:
            raise BilevelError("the result has no record of λ; call tuner.evaluate before result")
        return from_records(self._records, "the records of this result")

    def solution(self, at: At = "best") -> Solution:
        """Return λ, w and the carry at the lowest validation loss or at the end, on the CPU.

        Raises:
            BilevelError: the run has no finite validation loss.
        """
        one_of(("best", "last"), at=at)
        found = self._solutions[at]
        if found is None:
            raise BilevelError(
                "at='best' has no solution, since no validation loss was finite or measured; "
                "evaluate, or choose at='last'"
            )
        return found

    def module(self, at: At = "best") -> nn.Module:
        """Return a new module of the problem, on the CPU, with the weights and buffers of the run.

        It is in evaluation mode. Its names are those of the module that the problem was given.

        Raises:
            BilevelError: the problem has no module, or see `solution`.
        """
        problem = _innermost(self.problem)
        if not isinstance(problem, ModuleProblem):
            raise BilevelError(
                f"problem={type(problem).__name__} is no ModuleProblem, so it has no module; use "
                "solution(), which holds the weights by name"
            )
        _, params, carry = self.solution(at)
        return problem.module_with(params, carry).eval()

    def save(self, path: str | Path, at: At = "best") -> None:
        """Write the weights and buffers as a state dict; the suffix chooses the format.

        Args:
            path: a file that ends in `.safetensors`, `.pt` or `.pth`. Safetensors files hold λ
                and the environment in their metadata.
            at: `best` or `last`.

        Raises:
            BilevelError: the suffix is another one, safetensors is not installed, or see
                `solution`.
        """
        hypers, params, carry = self.solution(at)
        tensors = {**params, **carry}
        if isinstance(_innermost(self.problem), ModuleProblem):
            tensors = self.module(at).state_dict()  # with all names of tied weights
        lists = {name: leaf.tolist() for name, leaf in hypers.items()}
        about = {"hypers": lists, "environment": self.get("environment", {})}
        save_tensors(path_of(path=path), tensors, about)

    def to_study(self, study: "optuna.Study", at: At = "best", *, completed: bool = False) -> None:
        """Give λ to a study of Optuna, as its next trial or as a complete one.

        Args:
            study: a study with one parameter for each coordinate of λ; see `bilevel.studies`.
            at: `best` or `last`.
            completed: add a complete trial with the validation loss there. Otherwise the study
                evaluates λ in its next trial.

        Raises:
            BilevelError: the study has other parameters or narrower ranges, or cannot take a
                complete trial; or see `solution`.
        """
        params = studies.params_of(self.solution(at).hypers, self.problem.space)
        if completed:
            studies.add(study, params, self[at]["valid_loss"])
        else:
            studies.enqueue(study, params)


def save_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write tensors in the format that the suffix of `path` names.

    Args:
        path: the file.
        tensors: by name; tensors that share memory are written twice.
        about: the metadata of a safetensors file, each value written as JSON.

    Raises:
        BilevelError: the suffix is unknown, or safetensors is not installed.
    """
    apart = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    if path.suffix in (".pt", ".pth"):
        write_atomically(path, lambda file: torch.save(apart, file), mode="wb")
        return
    if path.suffix != ".safetensors":
        raise BilevelError(
            f"path={str(path)!r} has no known suffix; choose .safetensors, .pt or .pth"
        )
    try:
        from safetensors.torch import save
    except ImportError:
        raise BilevelError(
            f"path={str(path)!r} needs safetensors, which is not installed; pip install "
            "safetensors, or choose a name that ends in .pt"
        ) from None
    texts = {name: strict_json(value) for name, value in about.items()}
    content = save(apart, metadata={"format": "pt", **texts})
    write_atomically(path, lambda file: file.write(content), mode="wb")


def _innermost(problem: Problem) -> Problem:
    """Return the problem below all wrappers."""
    while isinstance(problem, ProblemWrapper):
        problem = problem.problem
    return problem
