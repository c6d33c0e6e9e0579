"""The command `bilevel export`: write what a run has found, as files or into a study of Optuna."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bilevel.checkpoint.checkpoints import best_of, load
from bilevel.checkpoint.refit_directory import result_directory
from bilevel.cli.job import printed_warnings
from bilevel.cli.standard_streams import print_line
from bilevel.cli.study import export_to_study
from bilevel.errors import BilevelError
from bilevel.files import strict_json, write_atomically
from bilevel.loggers import hyper_schedule
from bilevel.loggers.records import SUMMARY, environment_of
from bilevel.parallel.torchrun import Launch
from bilevel.run.result import save_tensors
from bilevel.untrusted_files import read_bytes

HYPERS = "hypers.json"


def main(arguments: Sequence[str]) -> int:
    """Export a run, print the paths of the files, and return the exit status."""
    given = parser().parse_args(arguments)
    try:
        with printed_warnings(Launch()):
            _run(given)
    except BilevelError as error:
        print_line(f"bilevel: {error}", sys.stderr)
        return 1
    return 0


def _run(given: argparse.Namespace) -> None:
    if given.optuna is not None:
        print_line(_to_study(given), sys.stdout)
        return
    if given.study is not None or given.completed:
        raise BilevelError("--study and --completed need a storage; add --optuna sqlite:///file.db")
    for path in export(given.run, given.out, suffix=given.format or "safetensors"):
        print_line(str(path), sys.stdout)


def export(run: Path, out: Path | None = None, *, suffix: str = "safetensors") -> Iterator[Path]:
    """Write the files of a run, and yield their paths.

    `hypers.json` has the final λ, or that of the last record while the run goes on, with the origin
    and the environment of the run.
    `schedule.json` has λ at every evaluation. `model.safetensors` has the weights and buffers of
    the lowest validation loss, and in its metadata their λ and their step. Nothing in the run
    directory is executed. With refits, λ and weights are those of the chosen candidate.

    Args:
        run: the run directory.
        out: the folder for the files; by default the run directory.
        suffix: the format of the weights, `safetensors` or `pt`.

    Raises:
        BilevelError: the directory holds no run, or a file cannot be written.
    """
    chosen = result_directory(run)
    state = load(chosen)
    out = run if out is None else out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BilevelError(
            f"out={out} cannot be made ({error.strerror}); choose another folder"
        ) from None
    found = {
        "origin": hyper_schedule.origin_of(run),
        "environment": environment_of(run),
        "hypers": _final(run),
    }
    content = strict_json(found, indent=1) + "\n"
    write_atomically(out / HYPERS, lambda file: file.write(content))
    yield out / HYPERS
    try:
        yield hyper_schedule.export(run, out / hyper_schedule.SCHEDULE)
    except BilevelError as error:  # an array of hyperparameters is not recorded
        print_line(f"bilevel: warning: no schedule is written: {error}", sys.stderr)
    best = best_of(state, chosen)
    hypers = {name: leaf.tolist() for name, leaf in best.hypers.items()}
    record = state["best"]["record"]
    about = {
        "hypers": hypers,
        "step": record["step"],
        "valid_loss": record["valid_loss"],
        "environment": environment_of(run),
    }
    path = out / f"model.{suffix}"
    save_tensors(path, {**best.params, **best.carry}, about)
    yield path


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="bilevel export",
        description="Write hypers.json, schedule.json and model.safetensors of a run; with "
        "--optuna, write its λ into a study.",
    )
    made.add_argument("run", type=Path, metavar="RUN", help="the run directory")
    made.add_argument(
        "--out", type=Path, metavar="DIR", help="the folder for the files (default: RUN)"
    )
    made.add_argument(
        "--format", choices=("safetensors", "pt"), help="of the weights (default: safetensors)"
    )
    made.add_argument(
        "--optuna",
        metavar="URL",
        help="write no files; enqueue the best λ in a study of this storage (sqlite:///file.db)",
    )
    made.add_argument("--study", metavar="NAME", help="the study (default: the only one)")
    made.add_argument(
        "--completed", action="store_true", help="add a complete trial with the validation loss"
    )
    return made


def _to_study(given: argparse.Namespace) -> str:
    if given.out is not None or given.format is not None:
        raise BilevelError("--optuna writes no files; leave --out and --format out")
    return export_to_study(given.run, given.optuna, given.study, completed=given.completed)


def _final(run: Path) -> dict[str, Any]:
    """Return the final λ by name; of a run without a summary, the last one recorded."""
    try:
        hypers = json.loads(read_bytes(run / SUMMARY))["hypers"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        hypers = None
    if isinstance(hypers, dict):
        return hypers
    schedule = hyper_schedule.from_run(run)
    return schedule.at(schedule.steps[-1])
