"""Fuzz configurations and checkpoints: each gives one clear sentence or a correct run."""

import copy
import io
import json
import math
import os
import re
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from copy import deepcopy
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hydra import compose, initialize_config_module
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from bilevel import BilevelError
from bilevel.checkpoint import file_format
from bilevel.checkpoint.checkpoints import Checkpoints, CheckpointWarning, Identity, kept, load
from bilevel.cli import input_errors, job, run_config
from bilevel.cli.app import main as command
from bilevel.cli.app import prepared
from bilevel.loggers.records import read_metrics
from tests.soak.limits import soon

QUICK = (
    "wandb.mode=disabled",
    "runner.progress=none",
    "runner.picture=false",
    "runner.device=cpu",
    "runner.warmup_epochs=0",
)

COMPOSED = (
    ("problem=quadratic", "solver=delta_stn"),
    ("problem=ridge", "solver=implicit_cg"),
    ("problem=elastic_net", "solver=unrolled", "solver.inner_steps=2"),
    ("problem=quadratic", "solver=es"),
    ("problem=quadratic", "solver=tpe", "trial.epochs=1"),
    ("problem=digits", "problem.hidden=[4]", "solver=stn", "runner.epochs=0.1"),
    ("problem=quadratic", "solver=pbt", "solver.population=4"),
    ("problem=input_dropout", "solver=implicit_nystrom"),
    ("problem=linear_network", "solver=sama"),
)

VALUES = st.one_of(
    st.sampled_from([None, True, False, 0, 1, 2, 3, -1, 0.0, 0.5, -0.5, 1.0, 1e30, -1e30, 1e-30]),
    st.sampled_from([math.nan, math.inf, -math.inf, 2**63, -(2**70)]),
    st.sampled_from(
        [
            "",
            "many",
            "a b",
            "null",
            "1",
            "Δ",
            "../x",
            "nowhere.Thing",
            "torch.pi",
            "bilevel.Runner",
            "a,b",
            "='",
        ]
    ),
    st.sampled_from(
        [
            [],
            [1],
            [0.5, "a"],
            [[1, 2], [3]],
            [None],
            {},
            {"a": 1},
            {"init": -1},
            {"_target_": "nowhere.Thing"},
        ]
    ),
    st.sampled_from(
        [
            {"_target_": "builtins.dict"},
            {"_target_": "torch.optim.SGD", "_partial_": True},
            {"optimizer": "lr"},
        ]
    ),
    st.integers(-50, 50),
    st.floats(-10, 10),
    st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=6),
)
SIZES = re.compile(
    r"hidden|weights|width|features|examples|samples|nodes|cells|epochs|seconds|population|pairs|horizon|rank|tokens"
)
"""Settings whose large values are valid and take long."""


def examples(
    count: int,
    seed: int,
    strategy: st.SearchStrategy,
    check: Callable[[Any], None],
    *,
    shrink: bool = True,
) -> None:
    """Call `check` with `count` values, the same for the same seed; a failing one is shrunk."""
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    profile = settings(
        max_examples=count,
        phases=phases,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )

    @hypothesis.seed(seed)
    @profile
    @hypothesis.given(strategy)
    def law(value: Any) -> None:
        check(value)

    law()


# --- configurations, beyond Hydra ---


class Configurations:
    """Changes settings of a composed configuration, and runs it.

    Attributes:
        outcomes: how many were refused, ran, diverged.
    """

    def __init__(self, place: Path) -> None:
        self.place, self.outcomes = place, Counter[str]()
        job.add_resolvers()
        with initialize_config_module("bilevel.conf", version_base="1.3"):
            made = [
                compose(
                    "config",
                    prepared([*QUICK, "runner.epochs=2", *chosen]),
                    return_hydra_config=True,
                )
                for chosen in COMPOSED
            ]
        self.configs = []
        for composed, chosen in zip(made, COMPOSED, strict=True):
            named = dict(text.split("=") for text in chosen)
            names = {part: named[part] for part in ("problem", "solver")}
            OmegaConf.set_struct(composed, False)
            composed.names = names
            del composed["hydra"]
            self.configs.append(OmegaConf.to_container(composed, resolve=True))

    def strategy(self) -> st.SearchStrategy:
        """Draw a configuration and changes: pairs of a number for a setting, and an act."""
        act = st.one_of(
            st.tuples(st.just("set"), VALUES),
            st.tuples(st.just("add"), VALUES),
            st.just(("remove", None)),
        )
        change = st.tuples(st.integers(0, 10**6), act)
        return st.tuples(
            st.integers(0, len(self.configs) - 1), st.lists(change, min_size=1, max_size=2)
        )

    def check(self, value: tuple[int, list]) -> None:
        config = deepcopy(self.configs[value[0]])
        changed = [_change(config, number, act, new) for number, (act, new) in value[1]]
        if any(_too_long(path, config) for path in changed):
            return
        directory = Path(tempfile.mkdtemp(dir=self.place))
        try:
            self._run(config, directory / "run", changed)
        finally:
            shutil.rmtree(directory)

    def _run(self, config: dict[str, Any], directory: Path, changed: list[str]) -> None:
        said: str | None = ""
        try:
            with soon(), redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                summary = run_config.run_config(config, directory, resumed=False)
        except Exception as error:
            said = input_errors.sentence(error)
            if said is None:
                raise AssertionError(f"{changed}: {type(error).__name__}: {error}") from error
        if said:
            assert "\n" not in said
            assert len(said) > 10, f"{changed}: {said}"
            assert not directory.exists() or not list(directory.iterdir()), (
                f"{changed} left {list(directory.iterdir())}"
            )
            self.outcomes["refused"] += 1
            return
        lines = read_metrics(directory / "metrics.jsonl")
        assert summary["diverged"] or all(math.isfinite(line["valid_loss"]) for line in lines), (
            changed
        )
        assert summary["diverged"] or load(directory)["step"] == summary["steps"] > 0
        self.outcomes["diverged" if summary["diverged"] else "ran"] += 1


def _leaves(node: Any, path: tuple = ()) -> Iterator[tuple]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield (*path, key)
            yield from _leaves(value, (*path, key))


def _change(config: dict[str, Any], number: int, act: str, new: Any) -> str:
    new = copy.deepcopy(new)  # a value that is drawn twice is one object, and could hold itself
    paths = [path for path in _leaves(config) if path[0] not in ("names", "hydra")]
    path = paths[number % len(paths)]
    node: Any = config
    for key in path[:-1]:
        node = node[key]
    if act == "set":
        node[path[-1]] = new
    elif act == "remove":
        del node[path[-1]]
    elif isinstance(node[path[-1]], dict):
        node[path[-1]]["unheard_of"] = new
    else:
        node["unheard_of"] = new
    return f"{act} {'.'.join(map(str, path))} {new!r}"


def _too_long(changed: str, config: Any) -> bool:
    """Return whether a change asks for a size or a length that is valid and takes long."""
    act, path, value = changed.split(" ", 2)
    try:
        return act == "set" and bool(SIZES.search(path)) and abs(float(value)) > 1000
    except ValueError:
        return False


# --- command lines ---


GOOD = (
    *(
        "seed=3",
        "solver.inner_steps=2",
        "runner.evaluate_every=0.5",
        "lr.inner=0.02",
        "problem.space.hyper.init=0.5",
    ),
    *(
        "runner.keep_checkpoints=1",
        "runner.threads=1",
        "solver.clip_norm=1",
        "logger=jsonl",
        "runner.patience=2",
        "lr.outer=1e-3",
    ),
    *(
        "solver.linearize=false",
        "+solver.outer_steps=2",
        "runner.checkpoint_every=2",
        "runner.examples=9",
        "problem.seed=4",
    ),
)


def command_lines(configs: Configurations) -> st.SearchStrategy:
    """Draw overrides of real keys with any value, misspelled keys, and words without a key."""
    keys = sorted({".".join(map(str, path)) for path in _leaves(configs.configs[0])})
    keys = [key for key in keys if not key.startswith(("names", "loggers", "hydra", "data"))]
    written = VALUES.map(lambda value: json.dumps(value) if not isinstance(value, str) else value)
    sign = st.sampled_from(["", "", "", "+", "++", "~"])
    override = st.builds(
        lambda s, key, value: f"{s}{key}={value}", sign, st.sampled_from(keys), written
    )
    typo = st.builds(
        lambda key, at, value: f"{key[:at]}{key[at + 1 :]}={value}",
        st.sampled_from(keys),
        st.integers(0, 8),
        written,
    )
    group = st.builds(
        lambda g, option: f"{g}={option}",
        st.sampled_from(["problem", "solver", "logger", "+experiment", "resume"]),
        st.sampled_from(
            [
                "digit",
                "stn",
                "delta-stn",
                "ridge",
                "",
                "null",
                "[",
                "jsonl",
                "../x",
                "stn,fixed",
                "1",
                "nowhere",
            ]
        ),
    )
    noise = st.text(
        st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=12
    ).filter(lambda t: t[:1] != "-")
    good = st.sampled_from(GOOD)
    return st.one_of(
        st.lists(good, min_size=1, max_size=3),
        st.lists(st.one_of(good, override), min_size=1, max_size=2),
        st.lists(st.one_of(override, typo, group, noise), min_size=1, max_size=2),
    )


def check_command_line(overrides: list[str], place: Path) -> str:
    """Run one command line in an empty folder, and return how it ended."""
    if any(SIZES.search(text) and re.search(r"\d{4}|e\+?\d|Infinity", text) for text in overrides):
        return "left out"
    before, directory = os.getcwd(), Path(tempfile.mkdtemp(dir=place))
    os.chdir(directory)
    said = io.StringIO()
    first = ["problem=quadratic", *QUICK, "runner.epochs=2"]
    try:
        with (
            soon(),
            redirect_stderr(said),
            redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("default")
            rc = command([*first, *overrides])
        lines = [
            line
            for line in said.getvalue().splitlines()
            if not line.startswith("bilevel: warning: ")
        ]
        left = [path for path in directory.rglob("*") if path.is_file()]
        assert rc in (0, 1), (overrides, rc, lines)
        assert "Traceback" not in said.getvalue(), (overrides, lines)
        if rc == 0:
            assert any(path.name == "summary.json" for path in left) or "resume" in "".join(
                overrides
            ), (overrides, left)
            return "ran"
        assert len(lines) == 1, (overrides, lines)
        assert lines[0].startswith("bilevel: "), (overrides, lines)
        assert "HYDRA_FULL_ERROR" not in lines[0], (overrides, lines)
        if "diverged" in lines[0]:
            return "diverged"
        assert not left, (overrides, lines, left)
        return "refused"
    finally:
        os.chdir(before)
        shutil.rmtree(directory)


# --- checkpoints ---


class Harmful:
    """An object whose unpickling runs code."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("harm",)


class CheckpointFiles:
    """Damages the files of a directory with three checkpoints, and loads what is left."""

    STEPS = (10, 20, 30)

    def __init__(self, place: Path) -> None:
        self.place, self.outcomes = place, Counter[str]()
        self.whole = place / "whole"
        self.whole.mkdir()
        checkpoints = Checkpoints(self.whole, Identity("p", "s", 0), keep=3)
        self.states = {step: self.state(step) for step in self.STEPS}
        for state in self.states.values():
            checkpoints.save(state)
        self.contents = {path.name: path.read_bytes() for path in kept(self.whole)}
        self.size = len(self.contents["checkpoint.pt"])

    @staticmethod
    def state(step: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(step)
        return {
            "step": step,
            "w": torch.randn(40, generator=draw),
            "rng": draw.get_state(),
            "best": None,
            "text": "σ" * 9,
        }

    def strategy(self) -> st.SearchStrategy:
        at = st.integers(0, self.size - 1)
        damage = st.one_of(
            st.tuples(st.just("flip"), at, st.integers(0, 7)),
            st.tuples(st.just("flip from the end"), st.integers(1, 160), st.integers(0, 7)),
            st.tuples(st.just("cut"), at, st.just(0)),
            st.tuples(st.just("zeros"), at, st.integers(1, 600)),
            st.tuples(st.just("insert"), at, st.integers(1, 64)),
            st.tuples(st.just("append"), at, st.integers(1, 200)),
            st.tuples(st.just("missing"), at, st.just(0)),
            st.tuples(st.just("another"), at, st.integers(0, 2)),
            st.tuples(st.just("harm"), at, st.integers(0, 1)),
        )
        return st.lists(st.tuples(st.integers(0, 2), damage), min_size=1, max_size=4)

    def check(self, value: list) -> None:
        directory = Path(tempfile.mkdtemp(dir=self.place))
        contents: dict[str, bytes | None] = dict(self.contents)
        names = list(contents)
        for which, (how, at, much) in value:
            before = contents[names[which]]
            contents[names[which]] = None if before is None else self.damaged(before, how, at, much)
        for name, content in contents.items():
            if content is not None:
                (directory / name).write_bytes(content)
        before = os.getcwd()
        os.chdir(directory)
        try:
            self.load(directory, contents)
            assert not (directory / "harm").exists(), value
        finally:
            os.chdir(before)
            shutil.rmtree(directory)

    def load(self, directory: Path, contents: dict[str, bytes | None]) -> None:
        """Load the first intact file, bit for bit, or expect one sentence."""
        originals = list(self.contents.values())
        whole = [content in originals for content in contents.values()]
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                state = load(directory)
        except BilevelError as error:
            if any(whole) or "\n" in str(error):
                raise AssertionError(f"one was whole, and: {error}") from error
            self.outcomes["refused"] += 1
            return
        assert any(whole), "none was whole, and one was loaded"
        first = list(contents.values())[whole.index(True)]
        step = self.STEPS[::-1][originals.index(first)]
        assert state["step"] == step
        assert all(torch.equal(state[name], self.states[step][name]) for name in ("w", "rng"))
        assert [w.category for w in warned] == ([] if whole[0] else [CheckpointWarning])
        self.outcomes["the newest" if whole[0] else "an older one"] += 1

    def damaged(self, content: bytes, how: str, at: int, much: int) -> bytes | None:
        data = bytearray(content)
        at = min(at, max(0, len(data) - 1))
        if how == "missing":
            return None
        if how == "another":
            return list(self.contents.values())[much]
        if how == "harm":
            return harmful(sealing=bool(much))
        if not data:
            return content
        if how.startswith("flip"):
            data[at if how == "flip" else -min(at, len(data))] ^= 1 << much
        elif how == "cut":
            del data[at:]
        elif how == "zeros":
            data[at : at + much] = bytes(len(data[at : at + much]))
        elif how == "insert":
            data[at:at] = b"x" * much
        else:
            data += b"x" * much
        return bytes(data)


def harmful(*, sealing: bool) -> bytes:
    """A checkpoint that would run code, with a right checksum or without one."""
    file = io.BytesIO()
    if sealing:
        file_format.write(
            {**Identity("p", "s", 0)._asdict(), "state": {"step": 99, "x": Harmful()}}, file
        )
    else:
        torch.save(
            {"format": file_format.FORMAT, "version": 1, "state": {"step": 99, "x": Harmful()}},
            file,
        )
    return file.getvalue()


def main(seed: int, count: int, place: Path) -> int:
    """Fuzz all three kinds; return 1 if an input was neither refused nor right."""
    configs, files, ended = Configurations(place), CheckpointFiles(place), Counter[str]()

    def line(overrides: list[str]) -> None:
        ended[check_command_line(overrides, place)] += 1

    wrong = 0
    for name, strategy, check, outcomes in (
        ("checkpoints", files.strategy(), files.check, files.outcomes),
        ("configurations", configs.strategy(), configs.check, configs.outcomes),
        ("command lines", command_lines(configs), line, ended),
    ):
        began = time.monotonic()
        try:
            examples(count, seed, strategy, check)
        except Exception as error:
            wrong += 1
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
        told = ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items()))
        print(
            f"{name}: {count} examples, seed {seed}: {told}; {time.monotonic() - began:.0f} s",
            flush=True,
        )
    return min(wrong, 1)
