"""Run directories from somebody else: resume and compare each; nothing may run, hang or be lost."""

import io
import os
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import yaml

from bilevel.checkpoint import file_format
from bilevel.checkpoint.checkpoints import CHECKPOINT, Identity
from bilevel.cli import compare
from bilevel.cli.app import main as command

LIMIT = 60
"""Seconds within which every case must have ended."""

QUICK = (
    *("problem=ridge", "solver=implicit_cg", "runner.epochs=2", "runner.warmup_epochs=0"),
    *("runner.progress=none", "runner.picture=true", "seed=1", "wandb.mode=disabled"),
)

Change = Callable[[Path], None]
"""Makes a copy of a finished run hostile."""

OUTSIDE = (
    *("torch.load", "torch.nn.functional.torch.load", "torch.optim.adam.torch.save"),
    *("torch.hub.load", "torch.nn.init.torch.compile", "builtins.open", "os.system"),
    *("subprocess.run", "pathlib.Path.touch", "hydra.utils.instantiate", "planted.attack"),
    *("bilevel.cli.app.main", "bilevel.cli.job.os.system", "bilevel.files.write_atomically"),
    *("bilevel.solvers.base.descent.copy.deepcopy", "torch.nn.init.uniform_"),
)
"""Targets that a stored configuration may not name."""

PLACES = ("problem", "solver", "runner", "wandb", "solver.inner_optimizer", "solver.linear_solve")


class Planted:
    """A pickled object that leaves a file when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def of_config(change: Callable[[dict[str, Any]], None]) -> Change:
    """Return a change of the parsed `config.yaml`."""

    def apply(run: Path) -> None:
        config = yaml.safe_load((run / "config.yaml").read_text())
        change(config)
        (run / "config.yaml").write_text(yaml.safe_dump(config))

    return apply


def target(place: str, path: str) -> Change:
    """Return a change that names `path` as the target of a node."""

    def change(config: dict[str, Any]) -> None:
        *outer, last = place.split(".")
        node = config
        for name in outer:
            node = node[name]
        node[last] = {"_target_": path, "f": "payload", "weights_only": False}

    return of_config(change)


def text(name: str, content: bytes | str) -> Change:
    """Return a change that writes a file anew."""
    data = content.encode() if isinstance(content, str) else content
    return lambda run: (run / name).write_bytes(data) and None


def pipe(name: str) -> Change:
    def change(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)

    return change


def link(name: str, to: str) -> Change:
    """Return a change that makes `name` a symbolic link."""

    def change(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(to if to.startswith("/") else Path.cwd() / to)

    return change


def sealed(content: bytes) -> bytes:
    """Return the bytes of a zip archive with a valid checksum of bilevel in its comment."""
    out = io.BytesIO()
    writer = file_format._ChecksumWriter(out)
    writer.write(content)
    writer.seal(f"{file_format.FORMAT} {file_format.VERSION} sha256 ".encode())
    return out.getvalue()


def pickled(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return sealed(out.getvalue())


def bomb() -> bytes:
    """Return a sealed checkpoint of few bytes that would unpack to 256 MiB."""
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.save({"format": file_format.FORMAT, "zeros": torch.zeros(2**26)}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return sealed(packed.getvalue())


def only_checkpoint(content: bytes) -> Change:
    def change(run: Path) -> None:
        for older in run.glob("checkpoint*.pt"):
            older.unlink()
        (run / CHECKPOINT).write_bytes(content)

    return change


def cases() -> Mapping[str, Change]:
    """Return the changes by name."""
    aliases = "a: &a [x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    identity = Identity("ridge", "implicit_cg", 1)._asdict()
    made: dict[str, Change] = {f"target {p}": target("problem", p) for p in OUTSIDE}
    made |= {f"target at {place}": target(place, "torch.load") for place in PLACES}
    made |= {
        "target in a list": of_config(
            lambda c: c["problem"].update(extra=[{"_target_": "os.system", "command": "x"}])
        ),
        "environment in a setting": of_config(
            lambda c: c["problem"].update(examples="${oc.env:SECRET}")
        ),
        "environment in a name": of_config(lambda c: c["names"].update(problem="${oc.env:SECRET}")),
        "environment in wandb": of_config(lambda c: c["wandb"].update(tags=["${oc.env:SECRET}"])),
        "environment in a target": target("solver", "${oc.env:SECRET}"),
        "hydra in a setting": of_config(lambda c: c.update(seed="${hydra:runtime.cwd}")),
        "directory in a name": of_config(lambda c: c["names"].update(problem="../../outside")),
        "escapes in a name": of_config(lambda c: c["names"].update(solver="\x1b[2Jx\x07")),
        "dollars in a name": of_config(lambda c: c["names"].update(solver="a $ b $ \\frac")),
        "aliases": text("config.yaml", aliases),
        "deep nesting": text("config.yaml", "[" * 20000),
        "python tag": text("config.yaml", "seed: !!python/object/apply:os.system ['x']\n"),
        "empty config": text("config.yaml", ""),
        "binary config": text("config.yaml", bytes(range(256))),
        "huge config": text("config.yaml", "seed: 1\n# " + "x" * 2**25),
        "lists for numbers": text(
            "metrics.jsonl", '{"valid_loss":[1],"step":{"a":1},"epoch":[],"seconds":"x"}\n'
        ),
        "deep metrics": text("metrics.jsonl", "[" * 10**5 + "\n"),
        "strange summary": text("summary.json", '{"best": [1], "seed": {"a": 1}, "steps": "x"}'),
        "strange description": text("run.json", '{"space": {"decay": 3}, "problem": ["a"]}'),
        "executing checkpoint": only_checkpoint(pickled(Planted())),
        "executing state": only_checkpoint(
            pickled({"format": file_format.FORMAT, "version": 3, **identity, "state": Planted()})
        ),
        "checkpoint that unpacks to much": only_checkpoint(bomb()),
        "checkpoint of zeros": only_checkpoint(bytes(10**6)),
        "old temporary name": link(".checkpoint.pt.tmp", "victim"),
        "old temporary name of the log": link(".metrics.jsonl.tmp", "victim"),
    }
    written = ("metrics.jsonl", "summary.json", "config.yaml", "run.json", "curves.png")
    made |= {f"link {name} to a file": link(name, "victim") for name in written}
    read = ("metrics.jsonl", "summary.json", "config.yaml", "run.json", CHECKPOINT)
    made |= {f"link {name} to /dev/zero": link(name, "/dev/zero") for name in read}
    if hasattr(os, "mkfifo"):
        made |= {f"pipe {name}": pipe(name) for name in read}
    return made


@contextmanager
def limited(seconds: int = LIMIT) -> Iterator[None]:
    """Raise TimeoutError in the context after some seconds."""

    def ended(number: int, frame: Any) -> None:
        raise TimeoutError(f"it hung for {seconds} s")

    before = signal.signal(signal.SIGALRM, ended)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def prepare() -> None:
    """Make a finished run in `mine`, and the files that an attack would touch."""
    assert command([*QUICK, "hydra.run.dir=mine"]) == 0
    Path("victim").write_text("precious\n" * 3)
    Path("planted.py").write_text("open('executed', 'w').close()\n\ndef attack(**_): ...\n")
    torch.save(Planted(), "payload")


def faults(change: Change) -> list[str]:
    """Return what goes wrong when a changed copy of `mine` is resumed and compared."""
    theirs, wrong = Path("theirs"), []
    shutil.rmtree(theirs, ignore_errors=True)
    shutil.copytree("mine", theirs)
    change(theirs)
    out, err = io.StringIO(), io.StringIO()
    try:
        with limited(), redirect_stdout(out), redirect_stderr(err):
            status = command(["resume=theirs", "runner.epochs=3"])
            reported = compare.main(["mine", "theirs", "--out", "report"])
    except BaseException as error:
        wrong.append(f"{type(error).__name__}: {str(error)[:200]}")
    else:
        wrong += [] if status in (0, 1) else [f"status {status}"]
        wrong += [] if reported == 0 else ["the other run was not compared"]
    said = out.getvalue() + err.getvalue()
    wrong += ["a traceback"] if "Traceback" in said else []
    wrong += ["HYDRA_FULL_ERROR"] if "HYDRA_FULL_ERROR" in said else []
    wrong += ["an escape sequence"] if "\x1b" in said or "\x07" in said else []
    wrong += ["the environment was shown"] if "hidden-value" in said else []
    wrong += ["it executed code"] if Path("executed").exists() else []
    wrong += ["a file was overwritten"] if Path("victim").read_text() != "precious\n" * 3 else []
    stored = [p for p in theirs.rglob("*") if p.is_file() and not p.is_symlink()]
    wrong += [
        f"the environment is in {p.name}" for p in stored if b"hidden-value" in p.read_bytes()
    ]
    Path("executed").unlink(missing_ok=True)
    Path("victim").write_text("precious\n" * 3)
    return wrong


def main(place: Path) -> int:
    before = Path.cwd()
    os.chdir(place)
    os.environ["SECRET"] = "hidden-value"
    prepare()
    bad = 0
    for name, change in cases().items():
        if wrong := faults(change):
            bad += 1
            print(f"{name}: {'; '.join(wrong)}", file=sys.stderr)
    print(f"{len(cases())} hostile run directories, {bad} with a fault")
    os.chdir(before)
    return int(bad > 0)
