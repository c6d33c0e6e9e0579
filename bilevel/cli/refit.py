"""The command `bilevel refit`: plain training at the hyperparameters that a run has found."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bilevel.cli import input_errors, user_modules
from bilevel.cli.job import printed_warnings
from bilevel.cli.resume import stored_config
from bilevel.cli.run_config import run_config
from bilevel.cli.standard_streams import print_line
from bilevel.cli.stored import check_trusted
from bilevel.errors import BilevelError
from bilevel.parallel.torchrun import Launch

KEPT = ("inner_steps", "inner_optimizer", "inner_scheduler", "clip_norm")
"""Settings of the steps on w, which the new run takes over."""

ON = ("train", "train+valid")


def main(arguments: Sequence[str]) -> int:
    """Refit a run, and return the exit status of the new run."""
    given = parser().parse_args(arguments)
    user_modules.add_working_directory()
    try:
        with printed_warnings(Launch()):
            config = refit_config(
                given.run,
                schedule=given.schedule,
                on=given.on,
                from_weights=given.from_weights,
                epochs=given.epochs,
                trust=given.trust,
            )
            result = run_config(config, given.out, resumed=False)
        if result["diverged"]:
            raise BilevelError(result["message"])
    except Exception as error:
        sentence = input_errors.sentence(error) or input_errors.unexpected(error)
        print_line(f"bilevel: {sentence}", sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 130 if result["interrupted"] else 0


def refit_config(
    run: Path,
    *,
    schedule: bool = False,
    on: str = "train",
    from_weights: bool = False,
    epochs: float | None = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Return the configuration of the new run: that of `run` with solver=fixed at its λ.

    Args:
        run: the run directory.
        schedule: follow λ as it moved in the run; by default its last values hold throughout.
        on: `train`, or `train+valid` for both splits together.
        from_weights: begin at the weights of the run's lowest validation loss, not at new ones.
        epochs: the budget; by default that of the run.
        trust: whether the stored configuration may name any class or function.

    Raises:
        BilevelError: the directory holds no run, or its configuration is not trusted.
    """
    try:
        config: Any = OmegaConf.to_container(stored_config(run), resolve=False)
        if not trust:
            check_trusted(config, {}, run)
    except BilevelError as error:  # its words are those of the command that resumes a run
        sentence = str(error).replace("resume=", "run=", 1).replace("trust=true", "--trust")
        raise BilevelError(sentence) from None
    old = config["solver"]
    path = str(run.resolve())
    config["solver"] = {
        "_target_": "bilevel.solvers.Fixed",
        "hypers": {"_target_": "bilevel.solvers.Replayed", "path": path, "final": not schedule},
        **{name: old[name] for name in KEPT if name in old},
    }
    if on == "train+valid":
        target = "bilevel.run.pooled_data.PooledData"
        config["problem"] = {"_target_": target, "problem": config["problem"]}
    if from_weights:
        config["runner"]["initial_params"] = path
    if epochs is not None:
        config["runner"]["epochs"] = epochs
    config["names"]["solver"] = f"refit-{config['names']['solver']}"
    config["origin"] = {
        "run": path,
        "hypers": "schedule" if schedule else "final",
        "on": on,
        "weights": "best" if from_weights else "new",
    }
    return config


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="bilevel refit",
        description="Train anew at the hyperparameters that a run has found, without tuning.",
    )
    made.add_argument("run", type=Path, metavar="RUN", help="the run directory")
    made.add_argument(
        "--schedule", action="store_true", help="follow λ as it moved, not its last values"
    )
    made.add_argument("--on", choices=ON, default="train", help="the examples to train on")
    made.add_argument(
        "--from-weights", action="store_true", help="begin at the best weights of the run"
    )
    made.add_argument("--epochs", type=float, metavar="N", help="the budget (default: as in RUN)")
    made.add_argument(
        "--out", type=Path, metavar="DIR", help="the directory of the new run (default: in runs/)"
    )
    made.add_argument(
        "--trust", action="store_true", help="build whatever the configuration of RUN names"
    )
    return made
