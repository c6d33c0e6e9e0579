"""Test and measure on a GPU: `python -m benchmarks.gpu [--minutes 4] [--to runs/gpu]`.

It runs the tests that need CUDA, and then the benchmarks of `docs/speed.md`, within the minutes
given. It leaves `gpu.md`, `gpu.json` and the log of the tests. It needs no network, and neither W&B
nor Optuna. A benchmark that found no time has no row.
"""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine

TESTS_PART = 0.4
"""The largest part of the time that the tests may take."""

SLACK = 20.0
"""Seconds that a benchmark may take beyond its measuring: imports, set-up, memory."""

IMAGES = {
    "fp32, eager": [],
    "tf32, captured": ["--precision", "tf32", "--capture"],
    "bf16, channels last, captured": ["--precision", "bf16", "--channels-last", "--capture"],
    "bf16, channels last, captured, group norm": [
        *("--precision", "bf16", "--channels-last", "--capture"),
        *("--norm", "group", "--networks", "resnet18"),
    ],
}
"""The options of `benchmarks.images` for each table."""


@dataclass
class Outcome:
    """One child process.

    Attributes:
        name: the name of the part.
        command: what was run, after `python`.
        seconds: how long it took.
        status: its exit status; None if it was stopped.
        output: the last lines of what it printed, where it failed.
        result: what it measured.
    """

    name: str
    command: str
    seconds: float
    status: int | None
    output: str
    result: Any = None


def main() -> None:
    """Run all parts and write the two files."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--minutes", type=float, default=4.0, help="minutes for everything")
    parser.add_argument("--to", type=Path, default=Path("runs/gpu"), help="folder of the files")
    parser.add_argument("--device", default="cuda", help="`cpu` tries this script without a GPU")
    parser.add_argument("--tests", default="tests", help="file or folder of the tests")
    options = parser.parse_args()
    if not options.minutes > 0:
        parser.error(f"--minutes={options.minutes:g} must be positive; give at least 4")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(
            f"--device={options.device} needs a GPU, and PyTorch {torch.__version__} finds none; "
            "run this on a machine with one"
        )
    report = measured(options.minutes * 60, options.device, options.tests, options.to)
    (options.to / "gpu.json").write_text(json.dumps(report, indent=2))
    (options.to / "gpu.md").write_text(markdown(report))
    print(markdown(report))
    print(f"written to {options.to}/gpu.md, gpu.json and tests.log")
    if any(part["status"] != 0 for part in report["parts"]):
        sys.exit(1)


def measured(seconds: float, device: str, tests: str, to: Path) -> dict[str, Any]:
    """Return the outcomes of all parts, each in a process of its own."""
    to.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    parts = [run_tests(tests, to / "tests.log", seconds * TESTS_PART)]
    for i, (name, options) in enumerate(IMAGES.items()):
        left = (end - time.monotonic()) / (len(IMAGES) - i)
        networks = 1 if "--networks" in options else 5
        if (each := (left - SLACK) / networks) < 1:
            continue
        command = ["benchmarks.images", "--json", "--device", device, *options]
        command += ["--seconds", f"{each / 2:.1f}"]  # the other half is set-up and phases
        parts.append(child(f"images, {name}", command, left + SLACK, to, parse=json.loads))
    return {
        "machine": machine(torch.device(device)),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python -m benchmarks.gpu --minutes {seconds / 60:g}",
        "parts": [asdict(part) for part in parts],
    }


def run_tests(tests: str, log: Path, seconds: float) -> Outcome:
    """Run the tests marked `cuda`; their whole output lies in `log`."""
    command = ["pytest", tests, "-m", "cuda", "-p", "no:cacheprovider", "-p", "no:benchmark", "-ra"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "6", "--dist", "loadgroup"]
    outcome = child("tests", command, seconds, log.parent)
    log.write_text(outcome.output)
    counts = re.findall(r"(\d+) (passed|failed|errors?|skipped)", outcome.output)
    outcome.result = {kind: int(number) for number, kind in counts}
    outcome.output = _tail(outcome.output) if outcome.status else ""
    return outcome


def child(name: str, command: list[str], seconds: float, to: Path, parse: Any = None) -> Outcome:
    """Run `python -m command` for at most `seconds`."""
    print(f"{name}: python -m {' '.join(command)}", flush=True)
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, timeout=seconds
        )
        status, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as stopped:
        status = None
        out, err = (_text(part) for part in (stopped.stdout, stopped.stderr))
    took = time.monotonic() - start
    outcome = Outcome(name, " ".join(command), took, status, out + err)
    if parse is not None:
        outcome.result = parse(out) if status == 0 else None
        outcome.output = "" if status == 0 else _tail(out + err)
    return outcome


def commit() -> str | None:
    """Return the commit of this checkout, with + if files differ from it; None without git."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return f"{head}+" if _git("status", "--porcelain") else head
    except (OSError, subprocess.CalledProcessError):
        return None


def markdown(report: dict[str, Any]) -> str:
    """Return the report as a page."""
    lines = [
        f"# {report['machine']}",
        "",
        f"PyTorch {report['torch']}, CUDA {report['cuda']}, Python {report['python']}, "
        f"commit {report['commit']}, {report['date']}; `{report['command']}`.",
    ]
    for part in report["parts"]:
        lines += ["", f"## {part['name']}", "", f"`python -m {part['command']}`", ""]
        if part["name"] == "tests":
            lines.append(_tests_line(part))
        elif part["result"] is not None:
            lines += _table(part["result"])
        if part["status"] is None:
            lines.append(f"Stopped after {part['seconds']:.0f} s, its part of the time.")
        if part["output"]:
            lines += ["", "```", part["output"], "```"]
    return "\n".join(lines) + "\n"


def _tests_line(part: dict[str, Any]) -> str:
    counts = ", ".join(f"{number} {kind}" for kind, number in part["result"].items())
    return f"{counts or 'no test was counted'} in {part['seconds']:.0f} s."


def _table(result: dict[str, Any]) -> list[str]:
    """Return the rows of all networks: own steps, then the loops by hand."""
    lines = [
        f"Batch {result['batch']}, width × {result['width']:g}.",
        "",
        "| network | | ms | × plain | plain × it | Δ-STN × it | images/s | MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for network, found in result["networks"].items():
        for name, row in found["steps"].items():
            lines.append(
                f"| {network} | {name} | {row['milliseconds']:.2f} | {row['of_plain']:.2f} | | | "
                f"{row['images_per_second']:,.0f} | {row['peak_bytes'] / 2**20:.0f} |"
            )
        for name, row in found["by_hand"].items():
            lines.append(
                f"| {network} | {name} | {row['milliseconds']:.2f} | | {row['plain_of_it']:.2f} | "
                f"{row['delta_stn_of_it']:.2f} | | |"
            )
        shown = found["augmentation"]
        part = f"{shown['part_of_step']['plain']:.0%} of plain"
        lines.append(
            f"| {network} | augmentation, {part} | {shown['milliseconds']:.2f} | | | | | |"
        )
    return lines


def _git(*command: str) -> str:
    done = subprocess.run(["git", *command], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _tail(text: str, lines: int = 25) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


def _text(part: Any) -> str:
    """Return what a stopped process printed, which Python hands over as bytes or None."""
    return part.decode(errors="replace") if isinstance(part, bytes) else part or ""


if __name__ == "__main__":
    main()
