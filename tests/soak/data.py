"""Wrong data in every split: each input ends in a right run, or in one sentence about the data."""

import math
import random
import re
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from operator import methodcaller
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo  # an optimizer imports it, which the limit of a case must not interrupt
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from bilevel import BilevelError, ModuleProblem, Positive, Runner, Solver, Space, squared_norm
from bilevel.errors import FaultWarning
from bilevel.solvers import Fixed, delta_stn, implicit_cg, random_search
from tests.soak.limits import TooLong, soon

ROWS = {"train": 24, "valid": 16, "test": 16}
CLASSES, WIDTH, WORDS = 4, 6, 10
SOLVERS: tuple[Callable[[], Solver], ...] = (
    Fixed,
    delta_stn,
    implicit_cg,
    lambda: random_search(trial_epochs=1),
)


class Base(NamedTuple):
    """A problem that is right: its network, its loss, and how a split is made of `x` and `y`."""

    network: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    x: Callable[[int], Tensor]
    y: Callable[[int], Tensor]
    named: bool = False
    loader: bool = False


class Pooled(nn.Module):
    """A module whose output is the mean of the first output of another over the second axis."""

    def __init__(self, inner: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.inner, self.last = inner, last

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return self.last((out[0] if isinstance(out, tuple) else out).mean(1))


def _mlp(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, outputs))


def _convolution() -> nn.Module:
    features = (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*features, nn.Linear(4 * 4 * 4, CLASSES))


def _labels(n: int) -> Tensor:
    return torch.arange(n) % CLASSES


def _binary(prediction: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(prediction.squeeze(1), y)


def _features(n: int) -> Tensor:
    return torch.randn(n, WIDTH)


CROSS_ENTROPY = (F.cross_entropy, _features, _labels)
BASES: Mapping[str, Base] = {
    "classes": Base(lambda: _mlp(CLASSES), *CROSS_ENTROPY),
    "named": Base(lambda: _mlp(CLASSES), *CROSS_ENTROPY, named=True),
    "loader": Base(lambda: _mlp(CLASSES), *CROSS_ENTROPY, loader=True),
    "regression": Base(lambda: _mlp(1), F.mse_loss, _features, lambda n: torch.randn(n, 1)),
    "double": Base(
        lambda: _mlp(1).double(),
        F.mse_loss,
        lambda n: _features(n).double(),
        lambda n: torch.randn(n, 1).double(),
    ),
    "binary": Base(lambda: _mlp(1), _binary, _features, lambda n: (torch.arange(n) % 2).float()),
    "images": Base(_convolution, F.cross_entropy, lambda n: torch.randn(n, 2, 6, 6), _labels),
    "tokens": Base(
        lambda: Pooled(nn.Embedding(WORDS, 5), nn.Linear(5, CLASSES)),
        F.cross_entropy,
        lambda n: torch.randint(WORDS, (n, 7)),
        _labels,
    ),
    "recurrent": Base(
        lambda: Pooled(nn.GRU(3, 5, batch_first=True), nn.Linear(5, CLASSES)),
        F.cross_entropy,
        lambda n: torch.randn(n, 4, 3),
        _labels,
    ),
}


class Problem(ModuleProblem):
    """A base with its data; `(x, y)` or `{"x": …, "y": …}`."""

    base: Base

    def _part(self, batch: Any, number: int) -> Any:
        return batch["xy"[number]] if self.base.named else batch[number]

    def inputs(self, hypers: Any, batch: Any, *, train: bool, generator: Any) -> Any:
        if self.base.named:
            return (batch["x"],), {}
        return super().inputs(hypers, batch, train=train, generator=generator)

    def inner_objective(self, hypers: Any, params: Any, prediction: Any, batch: Any) -> Tensor:
        penalty = (hypers["decay"] * squared_norm(params)).mean()
        return self.base.loss(prediction, self._part(batch, 1)) + penalty

    def outer_objective(self, hypers: Any, params: Any, prediction: Any, batch: Any) -> Tensor:
        return self.base.loss(prediction, self._part(batch, 1))


class Rows:
    """A data set whose rows are those of a pytree of tensors; other leaves stay as they are."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree
        [self.size] = {len(t) for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, row: int) -> Any:
        return pytree.tree_map(
            lambda leaf: leaf[row] if isinstance(leaf, Tensor) else leaf, self.tree
        )


def at(entry: Any, value: float) -> Callable[[Tensor], Tensor]:
    """Return a change that sets one entry of a copy, in a type that can hold it."""

    def change(t: Tensor) -> Tensor:
        t = t.clone() if math.isfinite(value) or t.is_floating_point() else t.float()
        t[entry] = value
        return t

    return change


def one_hot(y: Tensor) -> Tensor:
    return F.one_hot(y.long().flatten() % CLASSES, CLASSES)


Field = Callable[[Tensor], Any]
TYPES: Mapping[str, Field] = {
    name: methodcaller("to", getattr(torch, name))
    for name in (
        *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "uint8"),
        *("bool", "complex64"),
    )
}
FIELD: Mapping[str, Field] = {
    **TYPES,
    "one NaN": at(3, math.nan),
    "all NaN": at(slice(None), math.nan),
    "one inf": at(-1, math.inf),
    "minus inf": at((0, ...), -math.inf),
    "huge": lambda t: t.float() * 1e30 if t.dtype != torch.float64 else t * 1e200,
    "zeros": torch.zeros_like,
    "ones": torch.ones_like,
    "not contiguous": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1].expand(t.shape),
    "with gradient": lambda t: (t if t.is_floating_point() else t.float()).requires_grad_(),
    "a number": lambda t: t.flatten()[0],
    "no rows": lambda t: t[:0],
    "one row fewer": lambda t: t[:-1],
    "one row more": lambda t: torch.cat([t, t[:1]]),
    "one row": lambda t: t[:1],
    "extra axis": lambda t: t.unsqueeze(1),
    "extra last axis": lambda t: t.unsqueeze(-1),
    "extra first axis": lambda t: t.unsqueeze(0),
    "two columns": lambda t: torch.stack([t, t], -1),
    "flat": lambda t: t.flatten(),
    "transposed": lambda t: t.t() if t.ndim == 2 else t.transpose(0, -1),
    "sparse": lambda t: t.to_sparse(),
    "compressed": lambda t: t.reshape(len(t), -1).to_sparse_csr(),
    "nested": lambda t: torch.nested.nested_tensor(list(t.unsqueeze(-1))),
    "an array": lambda t: t.numpy(),
    "a list": lambda t: t.tolist(),
    "None": lambda t: None,
    "text": lambda t: "x",
    "meta": lambda t: t.to("meta"),
    "object": lambda t: object(),
}
FEATURES: Mapping[str, Field] = {
    "wider": lambda t: torch.cat([t, t[:, :1]], 1),
    "narrower": lambda t: t[:, 1:],
    "no columns": lambda t: t[:, :0],
    "first column": lambda t: t[:, 0],
    "out of the words": lambda t: t + WORDS,
    "negative": lambda t: -t - 1,
    "NaN column": lambda t: torch.cat([t[:, 1:].float(), t[:, :1] + torch.full((), math.nan)], 1),
}
TARGETS: Mapping[str, Field] = {
    "one class too many": lambda t: at(2, CLASSES)(t),
    "far out of range": lambda t: at(5, 10**6)(t),
    "minus one": lambda t: at(-1, -1)(t),
    "from one": lambda t: t + 1,
    "one ignored": lambda t: at(0, -100)(t),
    "all ignored": lambda t: torch.full_like(t, -100),
    "one-hot": one_hot,
    "one-hot floats": lambda t: one_hot(t).float(),
}
SPLIT: Mapping[str, Callable[[Tensor, Tensor, Base], Any]] = {
    "a list of both": lambda x, y, base: [x, y],
    "bare x": lambda x, y, base: x,
    "bare y": lambda x, y, base: y,
    "x alone": lambda x, y, base: (x,),
    "swapped": lambda x, y, base: _split(y, x, base),
    "within a tuple": lambda x, y, base: ((x, y),),
    "the other container": lambda x, y, base: (x, y) if base.named else {"x": x, "y": y},
    "other keys": lambda x, y, base: {"inputs": x, "labels": y},
    "three fields": lambda x, y, base: (x, y, y),
    "an empty tuple": lambda x, y, base: (),
    "an empty list": lambda x, y, base: [],
    "an empty dict": lambda x, y, base: {},
    "nothing": lambda x, y, base: None,
    "a word": lambda x, y, base: "train",
    "a path": lambda x, y, base: Path("data"),
    "a count": lambda x, y, base: 3,
    "a generator": lambda x, y, base: (row for row in x),
    "a data set": lambda x, y, base: Rows((x, y)),
    "a class": lambda x, y, base: Rows,
    "both without rows": lambda x, y, base: _split(x[:0], y[:0], base),
    "both with one row": lambda x, y, base: _split(x[:1], y[:1], base),
    "both with five rows": lambda x, y, base: _split(x[:5], y[:5], base),
    "list of rows": lambda x, y, base: list(zip(x, y, strict=True)),
    "list of batches": lambda x, y, base: [_split(x[:8], y[:8], base), _split(x[8:], y[8:], base)],
    "batches of other widths": lambda x, y, base: [
        _split(x[:8], y[:8], base),
        _split(x[8:, 1:], y[8:], base),
    ],
}
RUNS = {"zeros", "not contiguous", "expanded", "list of batches"}
"""Changes that every base takes, so they may not be refused."""


class Case(NamedTuple):
    """One input: a base, the changed splits, and a change of `x`, of `y` or of the split."""

    base: str
    splits: tuple[str, ...]
    what: str
    change: str

    @property
    def field(self) -> str | None:
        """The words for the changed field in a sentence."""
        if self.what == "split":
            return None
        number = "xy".index(self.what)
        return rf"field `{self.what}`" if BASES[self.base].named else rf"field {number}\b"


def cases() -> Iterator[Case]:
    """Yield every base with every change in every split, and in all three."""
    changes = {"x": {**FIELD, **FEATURES}, "y": {**FIELD, **TARGETS}, "split": SPLIT}
    for base in BASES:
        for what, named in changes.items():
            for change in named:
                for splits in (("train",), ("valid",), ("test",), tuple(ROWS)):
                    yield Case(base, splits, what, change)


def _split(x: Any, y: Any, base: Base) -> Any:
    return {"x": x, "y": y} if base.named else (x, y)


def _made(case: Case, name: str) -> Any:
    """Return one split of a case; a change that cannot be made raises."""
    base = BASES[case.base]
    x, y = base.x(ROWS[name]), base.y(ROWS[name])
    split = _split(x, y, base)
    if name in case.splits:
        if case.what == "split":
            split = SPLIT[case.change](x, y, base)
        elif case.what == "x":
            split = _split({**FIELD, **FEATURES}[case.change](x), y, base)
        else:
            split = _split(x, {**FIELD, **TARGETS}[case.change](y), base)
    if base.loader and isinstance(split, (tuple, dict)) and pytree.tree_leaves(split):
        return DataLoader(Rows(split), batch_size=8, shuffle=name == "train")
    return split


def outcome(case: Case, place: Path, solver: Callable[[], Solver] = Fixed) -> str:
    """Run a case; return `ran`, `refused`, `diverged`, `left out`, or the fault."""
    torch.manual_seed(0)
    base = BASES[case.base]
    try:
        splits = [_made(case, name) for name in ROWS]
    except Exception:  # this change does not exist for this field
        return "left out"
    directory = Path(tempfile.mkdtemp(dir=place))
    kind = type("Case", (Problem,), {"base": base})
    space = Space(decay=Positive(init=1e-3))
    try:
        with soon(), warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            problem = kind(base.network, space, *splits, batch_size=8)
            runner = Runner(epochs=2, warmup_epochs=0, progress="none", picture=False, device="cpu")
            summary = runner.run(problem, solver(), directory=directory / "run")
    except BilevelError as refusal:
        if case.change in RUNS:
            return f"a right input is refused: {refusal}"
        return _flaw(str(refusal), case) or "refused"
    except TooLong as error:
        return str(error)
    except Exception as error:
        return f"raw {type(error).__name__}: {str(error).splitlines()[:1]}"
    finally:
        shutil.rmtree(directory)
    if summary["diverged"]:
        return _flaw(summary["message"], case) or "diverged"
    lost = [str(w.message) for w in given if issubclass(w.category, FaultWarning)]
    if lost:
        return _flaw(lost[0], case) or "no test figures"
    figures = ["valid_loss"] + ["test_loss"] * (splits[2] is not None)
    bad = [name for name in figures if not math.isfinite(summary["best"][name] or math.nan)]
    return f"silent {', '.join(bad)}={summary['best'][bad[0]]}" if bad else "ran"


def _flaw(sentence: str, case: Case) -> str | None:
    """Return what a sentence about the data lacks."""
    lacks = []
    if "\n" in sentence.strip() or len(sentence) > 600:
        lacks.append("is no single sentence")
    if not any(re.search(rf"\b{name}\b", sentence) for name in case.splits):
        lacks.append("names no changed split")
    if case.field is not None and not re.search(case.field, sentence):
        lacks.append(f"lacks the {case.field}")
    if ";" not in sentence:
        lacks.append("has no remedy")
    return f"a sentence {' and '.join(lacks)}: {sentence}" if lacks else None


GOOD = ("ran", "refused", "diverged", "no test figures", "left out")


def main(seed: int, place: Path, count: int | None = None) -> int:
    """Run all cases, or `count` of them in a seeded order; print the figures and the faults."""
    chosen = list(cases())
    if count is not None:
        random.Random(seed).shuffle(chosen)
        chosen = chosen[:count]
    found: Counter[str] = Counter()
    changes = set()
    for number, case in enumerate(chosen):
        how = outcome(case, place, SOLVERS[(number + seed) % len(SOLVERS)])
        found[how if how in GOOD else "faults"] += 1
        found["raw errors"] += how.startswith("raw")
        found["silent NaN"] += how.startswith("silent")
        if how != "left out":
            changes.add((case.what, case.change))
        if how not in GOOD:
            print(f"{case.base} {'+'.join(case.splits)} {case.what} {case.change}: {how}")
    inputs = len(chosen) - found.pop("left out", 0)
    figures = ", ".join(f"{n} {name}" for name, n in found.items())
    print(f"{inputs} inputs of {len(changes)} changes: {figures}")
    return int(found["faults"] > 0)
