"""Run directories as a runner leaves them, with numbers that a test chooses."""

import json
from pathlib import Path
from typing import Any

import yaml


def records(losses, *, per_step=0.5, examples=10, **more) -> list[dict[str, Any]]:
    """Return one evaluation per loss, an epoch of two steps apart; `more` are further columns."""
    return [
        {
            "step": 2 * index,
            "epoch": float(index),
            "seconds": 2 * per_step * index,
            "examples": 2 * examples * index,
            "valid_loss": loss,
            **{name.replace("__", "."): values[index] for name, values in more.items()},
            "peak_memory_bytes": 2**20 * (index + 1),
        }
        for index, loss in enumerate(losses)
    ]


def write_run(
    place: Path,
    told: list[dict[str, Any]],
    *,
    problem="ridge",
    solver="stn",
    seed=0,
    settings=None,
    ended: str | None = "finished",
    test_loss=0.5,
    space=None,
) -> Path:
    """A run directory; `ended` is None for one that is still going."""
    place.mkdir(parents=True)
    (place / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in told))
    names = {"problem": problem, "solver": solver}
    config = {"seed": seed, "names": names, "runner": {"epochs": 9}, **(settings or {})}
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    description = {**names, "seed": seed, "warmup_epochs": 1, "space": space or {}}
    (place / "run.json").write_text(json.dumps(description))
    if ended:
        best = min((r for r in told if r["valid_loss"] is not None), key=lambda r: r["valid_loss"])
        kept = {name: best[name] for name in ("step", "epoch", "seconds", "examples", "valid_loss")}
        summary = {
            **names,
            "seed": seed,
            "best": {**kept, "test_loss": test_loss, "test_accuracy": 0.9},
            "last": {},
            **{
                "seconds": told[-1]["seconds"],
                "examples": told[-1]["examples"],
                "steps": told[-1]["step"],
                "outer_steps": 3,
            },
            "peak_memory_bytes": told[-1]["peak_memory_bytes"],
            **{"diverged": ended == "diverged", "interrupted": ended == "interrupted"},
            "message": None if ended == "finished" else f"{ended} at step 7",
        }
        (place / "summary.json").write_text(json.dumps(summary))
    return place
