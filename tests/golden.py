"""Golden runs: recorded once, and compared bit for bit after every step of a refactoring.

    python -m tests.golden list
    python -m tests.golden record --to DIR
    python -m tests.golden check --against DIR

A case is a tiny run, given by overrides of the configuration (`tests.golden_cases`). What it leaves
is one JSON file: its records and summary, what every round returned, and its final tensors. Times,
memory, paths and messages are left out, and of an error only the class is kept.

Numbers are comparable on one machine with one version of PyTorch; none are kept in the repository.
The script relies on public names alone, and finds `solvers` at the top level or in `bilevel`.
"""

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

import bilevel
from tests.golden_cases import CASES, Case, write_text

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = "environment.json"
DENIED = (
    "second",
    "memory",
    "time",
    "directory",
    "path",
    "date",
    "host",
    "version",
    "message",
    "environment",
)
"""Parts of keys of what differs between equal runs, or is a sentence."""
SHOWN = 12
"""Differences that are told of each case."""
VALUES = 16
"""Entries up to which a tensor is kept as numbers beside its hash."""
SETTINGS = (
    *("runner.device=cpu", "runner.threads=1", "runner.progress=none", "runner.picture=false"),
    "runner.checkpoint_every=1000000",
)


# --- one case ---


def package(name: str) -> str:
    """Return the dotted name of `solvers` or `problems` in this tree."""
    for candidate in (f"bilevel.{name}", name):
        try:
            importlib.import_module(candidate)
        except ModuleNotFoundError as error:
            if error.name != candidate:
                raise
            continue
        return candidate
    raise ModuleNotFoundError(f"neither bilevel.{name} nor {name} can be imported")


def configuration(overrides: Iterable[str], places: Mapping[str, Any]) -> dict[str, Any]:
    """Return the resolved nodes `problem`, `solver` and `runner` from the YAML of this tree."""
    if not OmegaConf.has_resolver("bilevel.times"):
        OmegaConf.register_new_resolver("bilevel.times", lambda factor, value: factor * value)
    given, nodes = [], {}
    for text in (*SETTINGS, *overrides):
        for name, place in places.items():
            text = text.replace(f"<{name}>", str(place))
        for name in ("solvers", "problems"):
            text = re.sub(rf"(?<![\w.]){name}\.", f"{package(name)}.", text)
        key, _, value = text.partition("=")
        if value.startswith("{"):
            nodes[key] = value
        else:
            given.append(f"++{text}" if "." in key else text)
    folder = next(path for path in (ROOT / "bilevel" / "conf", ROOT / "conf") if path.is_dir())
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(folder), version_base="1.3"):
        config = compose("config", given)
    OmegaConf.set_struct(config, False)
    for key, value in nodes.items():  # a node replaces the one that is there, as Hydra's would not
        OmegaConf.update(config, key, OmegaConf.create(value), merge=False, force_add=True)
    built = ("problem", "solver", "runner")
    return {name: OmegaConf.to_container(config[name], resolve=True) for name in built}


def run(case: Case, places: Mapping[str, Any], directory: Path, stop: int | None = None) -> Any:
    """Run the case in the directory, or continue it there; and return what is known afterwards.

    Args:
        case: what is run.
        places: what stands for `<name>` in its overrides.
        directory: of the run; one that holds a checkpoint is continued.
        stop: the round after which the run is interrupted.
    """
    torch.manual_seed(case.seed)
    config = configuration(case.overrides, places)
    made = {name: instantiate(node, _convert_="all") for name, node in config.items()}
    problem, solver, runner = made["problem"], made["solver"], made["runner"]
    if case.make is not None:
        problem = case.make(importlib.import_module(package("problems")), bilevel)
    rounds = watched(solver, stop)
    resume = any(directory.glob("checkpoint*"))
    summary = runner.run(
        problem,
        solver,
        directory=directory,
        seed=case.seed,
        names=("problem", "solver"),
        resume=resume,
    )
    records = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    told = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    solution = solver.solution()
    found = {
        "description": told,
        "records": [json.loads(line) for line in records],
        "summary": summary,
        "rounds": rounds,
        "hypers": tensors(solution.hypers),
        "params": tensors(solution.params),
        "carry": tensors(solution.carry),
        "scales": tensors(solver.scales()),
        "beside": tensors(extra_tensors(solver)),
    }
    if stop is None:  # last, since it may draw and train
        try:
            gradient = solver.hypergradient()
            found["hypergradient"] = None if gradient is None else tensor(gradient)
        except Exception as error:
            found["hypergradient"] = type(error).__name__
    return allowed(found)


def extra_tensors(solver: Any) -> Mapping[str, Any]:
    """Return the tensors that are trained beside w, under today's name or the earlier one."""
    return solver.extra_tensors() if hasattr(solver, "extra_tensors") else solver.beside()


def watched(solver: Any, stop: int | None) -> list[dict[str, Any]]:
    """Record every call of `step` from now on; send Ctrl-C after the round `stop`."""
    rounds: list[dict[str, Any]] = []
    cls = type(solver)

    def step(self: Any, **asked: Any) -> Any:
        metrics = cls.step(self, **asked)
        if self is solver:  # and no copy of it, as a rehearsal may make
            values = {name: plain(value) for name, value in metrics.items()}
            counts = {"inner_count": solver.inner_count, "outer_count": solver.outer_count}
            rounds.append({"asked": asked, "metrics": values, **counts})
            if len(rounds) == stop:
                signal.raise_signal(signal.SIGINT)
        return metrics

    solver.__class__ = type(cls.__name__, (cls,), {"step": step, "__module__": cls.__module__})
    return rounds


def outcome(name: str) -> tuple[dict[str, Any], float]:
    """Return what is kept of the case, and the seconds that it took."""
    began, case = time.perf_counter(), CASES[name]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        places = {"text": write_text(Path(folder) / "text"), "earlier": Path(folder) / "earlier"}
        kept: dict[str, Any] = {}
        try:
            if case.earlier:
                run(case.earlier, places, places["earlier"])
            kept = run(case, places, Path(folder) / "straight")
            if case.stop is not None:
                directory = Path(folder) / "stopped"
                begun = run(case, places, directory, stop=case.stop)
                ended = run(case, places, directory)
                ended["rounds"] = begun["rounds"] + ended["rounds"]
                found = list(differences(kept, ended))
                kept["stopped"] = begun["summary"]
                kept["differences_of_the_resumed"] = [" ".join(map(str, d)) for d in found]
        except Exception as error:
            if os.environ.get("GOLDEN_TRACEBACK"):
                raise
            cause = error.__cause__ if isinstance(error, InstantiationException) else None
            kept = {"raised": type(cause or error).__name__}
    own = {w.category.__name__ for w in warned if w.category.__module__.startswith("bilevel")}
    return {**kept, "warnings": sorted(own)}, time.perf_counter() - began


def tensors(named: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {name: tensor(value) for name, value in named.items()}


def tensor(value: torch.Tensor) -> dict[str, Any]:
    """A tensor by its hash, with its values where they are few."""
    value = value.detach().cpu().contiguous()
    raw = value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    kept = {"dtype": str(value.dtype), "shape": list(value.shape)}
    kept["sha256"] = hashlib.sha256(raw).hexdigest()
    few = value.numel() <= VALUES
    return kept | ({"values": value.tolist()} if few else {"sum": value.double().sum().item()})


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value


def allowed(value: Any) -> Any:
    """The value without the keys that are denied, at any depth."""
    if isinstance(value, Mapping):
        kept = {str(k): v for k, v in value.items() if not any(d in str(k) for d in DENIED)}
        return {key: allowed(entry) for key, entry in kept.items()}
    if isinstance(value, (list, tuple)):
        return [allowed(entry) for entry in value]
    return value


# --- comparison ---

ABSENT = "(absent)"


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """The paths at which two values differ in any bit, with both values as text."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            below = f"{path}/{key}"
            yield from differences(old.get(key, ABSENT), new.get(key, ABSENT), below)
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            more = (old[len(new) :] or new[len(old) :])[0]
            lengths = str(len(old)), str(len(new))
            yield f"{path} (length; the first more is {brief(more)})", *lengths
        for index, pair in enumerate(zip(old, new, strict=False)):
            yield from differences(*pair, f"{path}/{index}")
    elif repr(old) != repr(new):  # of floats reversible; nan is nan, and -0.0 is not 0.0
        yield path, brief(old), brief(new)


def brief(value: Any) -> str:
    text = value if value == ABSENT else repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


# --- the command line ---


def outcomes(names: list[str], jobs: int) -> Iterator[tuple[str, dict[str, Any], float]]:
    """Every case as it is done, with its seconds."""
    if jobs == 1:
        for name in names:
            yield name, *outcome(name)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context) as pool:
        asked = {pool.submit(outcome, name): name for name in names}
        for future in as_completed(asked):
            yield asked[future], *future.result()


def chosen(name: str, only: list[str]) -> bool:
    """Return whether the case is asked for."""
    return not only or any(part in name for part in only)


def environment() -> dict[str, str]:
    return {"torch": torch.__version__, "python": sys.version.split()[0]}


def record(names: list[str], jobs: int, folder: Path) -> int:
    """Write a file for each case; the exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ENVIRONMENT).write_text(json.dumps(environment()), encoding="utf-8")
    raised = []
    for name, kept, seconds in outcomes(names, jobs):
        file = folder / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        note = f"  {kept['raised']}" if "raised" in kept else ""
        if apart := kept.get("differences_of_the_resumed"):
            note += f"  resumed differs: {len(apart)}, {apart[0]}"
        raised += [name] if "raised" in kept else []
        print(f"{seconds:6.2f} s  {name}{note}", flush=True)
    print(f"{len(names)} cases recorded in {folder}, of which {len(raised)} raise")
    return 0


def check(names: list[str], jobs: int, folder: Path, only: list[str]) -> int:
    """Compare each case with its file and tell the differences; the exit status."""
    before = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    if before != environment():
        print(f"warning: recorded under {before}, and this is {environment()}")
    files = {str(f.relative_to(folder))[:-5] for f in folder.rglob("*.json")} - {ENVIRONMENT[:-5]}
    gone = sorted(name for name in files - {*CASES} if chosen(name, only))
    failed = [f"{name}: there is no such case now" for name in gone]
    for line in failed:
        print(line)
    for name, kept, _ in outcomes(names, jobs):
        if name not in files:
            found = [("", "(no record)", "a case")]
        else:
            old = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
            found = list(differences(old, json.loads(json.dumps(kept))))
        if found:
            failed.append(name)
            print(f"{name}: {len(found)} differences")
            for path, then, now in found[:SHOWN]:
                print(f"  {path}: {then} -> {now}")
            if len(found) > SHOWN:
                print(f"  and {len(found) - SHOWN} more", flush=True)
    print(f"{len(names)} cases, {len(failed)} differ")
    return 1 if failed else 0


def main() -> int:
    """The command line; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", choices=["list", "record", "check"])
    parser.add_argument("--to", type=Path, help="the folder that is recorded to")
    parser.add_argument("--against", type=Path, help="the folder that is compared with")
    parser.add_argument("--only", nargs="+", default=[], help="parts of names of cases")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    given = parser.parse_args()
    names = [name for name in CASES if chosen(name, given.only)]
    if given.command == "list":
        print("\n".join(names))
        return 0
    print(f"bilevel is {bilevel.__file__}, solvers are {package('solvers')}")
    began = time.perf_counter()
    if given.command == "record":
        if given.to is None:
            parser.error("record needs --to DIR")
        status = record(names, given.jobs, given.to)
    else:
        if given.against is None:
            parser.error("check needs --against DIR")
        status = check(names, given.jobs, given.against, given.only)
    print(f"{time.perf_counter() - began:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
