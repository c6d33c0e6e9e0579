"""The fields of a batch: their names in messages, their types, and rows that are not finite."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from dataclasses import fields as dataclass_fields
from typing import Any

import torch
from torch import Tensor

from bilevel.params import Batch

ALONE = "the tensor"
"""Names the only tensor of a batch that is one."""
FEW = 5
"""Number of columns that a sentence lists."""
WHOLE = (torch.int16, torch.int32, torch.int64)
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def fields(batch: Batch) -> dict[str, Any]:
    """Return the entries of a batch on its first level by the words that name them."""
    return {_words((name,)): child for name, child in _children(batch) or ()}


def strangers(batch: Batch) -> dict[str, str]:
    """Return the types of leaves that are no tensors, each with the first field that holds one.

    Example:
        >>> strangers((torch.ones(1), [1.0, 2.0]))
        {'float': 'field 1'}
    """
    found: dict[str, str] = {}
    for path, leaf in _walk(batch, ()):
        if not isinstance(leaf, Tensor):
            items = getattr(leaf, "dtype", None)  # of an array
            what = type(leaf).__name__ + ("" if items is None else f" of {items}")
            found.setdefault(what, _words(path[:1]))
    return found


def tensors(batch: Batch) -> dict[str, Tensor]:
    """Return the tensors of a batch by the words that name them in a message.

    Example:
        >>> list(tensors((torch.ones(3), {"y": torch.ones(3)}, 1))), list(tensors(torch.ones(2)))
        (['field 0', 'field `1.y`'], ['the tensor'])
    """
    return {name: leaf for name, leaf in leaves(batch) if isinstance(leaf, Tensor)}


def leaves(batch: Batch) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a batch, each with the words that name it in a message."""
    for path, leaf in _walk(batch, ()):
        yield _words(path), leaf


def within(field: str, what: str) -> str:
    """Return the words for a field of a batch or split; a tensor alone is that itself.

    Example:
        >>> within("field 0", "the train split"), within(ALONE, "the train split")
        ('field 0 of the train split', 'the train split')
    """
    return what if field == ALONE else f"{field} of {what}"


def kind(batch: Batch) -> str:
    """Return the form of a batch in words.

    Example:
        >>> kind((1, 2)), kind({"x": 1}), kind(torch.ones(2, 3))
        ('a tuple of 2 fields', 'a dict with the keys `x`', 'one tensor [2, 3]')
    """
    if isinstance(batch, Tensor):
        return f"one tensor {list(batch.shape)}"
    if isinstance(batch, Mapping):
        keys = ", ".join(f"`{key}`" for key in batch) or "none"
        return f"a {type(batch).__name__} with the keys {keys}"
    if isinstance(batch, (tuple, list)):
        number = "1 field" if len(batch) == 1 else f"{len(batch)} fields"
        return f"a {type(batch).__name__} of {number}"
    return f"a {type(batch).__name__}"


def dtype_of(t: Tensor) -> str:
    """Return the name of a type without `torch`."""
    return str(t.dtype).removeprefix("torch.")


def shown(t: Tensor) -> str:
    """Return type and shape of a tensor.

    Example:
        >>> shown(torch.ones(2, 3))
        'float32 [2, 3]'
    """
    return f"{dtype_of(t)} {list(t.shape)}"


def largest(t: Tensor) -> float:
    """Return the largest absolute value of a floating-point tensor, 0 for another one."""
    if t.dtype not in FLOATING or t.numel() == 0:
        return 0.0
    low, high = t.aminmax()
    return max(abs(float(low)), abs(float(high)))


def all_finite(t: Tensor) -> bool:
    """Return whether no entry is NaN or infinite; one pass over the tensor."""
    if t.dtype not in FLOATING or t.layout != torch.strided or t.numel() == 0:
        return True
    # NaN and infinity stay in a sum, which takes a tenth of the time; a sum may also overflow
    return bool(torch.isfinite(t.sum())) or bool(torch.isfinite(t).all())


def bad_rows(t: Tensor) -> Tensor:
    """Return the numbers of the rows with an entry that is not finite."""
    return (~torch.isfinite(t.reshape(len(t), -1)).all(1)).nonzero().flatten()


def telling_rows(tree: Batch) -> Tensor:
    """Return rows of tensors in memory that show what is wrong: not finite, least, greatest."""
    rows: list[Tensor] = []
    for t in tensors(tree).values():
        if not all_finite(t):
            rows.append(bad_rows(t)[:FEW])
        elif t.dtype in WHOLE and t.numel():
            flat, width = t.reshape(-1), t.numel() // len(t)
            rows.append(torch.stack([flat.argmin(), flat.argmax()]) // width)
    return torch.cat(rows).cpu().unique() if rows else torch.zeros(0, dtype=torch.int64)


@dataclass
class _Bad:
    """The entries of one field that are not finite, over several batches."""

    rows: int = 0
    nan: bool = False
    infinite: bool = False
    columns: frozenset[int] = frozenset()


def not_finite(batches: Iterable[Batch], of: str = "rows") -> str | None:
    """Return the field of some batches whose rows hold NaN or infinity, with their number.

    Args:
        batches: the batches.
        of: what is counted, in words.

    Example:
        >>> not_finite([(torch.tensor([[1.0, 2.0], [3.0, torch.nan]]),)])
        'field 0: 1 of 2 rows holds NaN (column 1); remove or impute it'
    """
    sizes: dict[str, int] = {}
    found: dict[str, _Bad] = {}
    for batch in batches:
        for name, t in tensors(batch).items():
            sizes[name] = sizes.get(name, 0) + (len(t) if t.ndim else 1)
            if not all_finite(t):
                _add(found.setdefault(name, _Bad()), t)
    for name, bad in found.items():
        what = " and ".join(["NaN"] * bad.nan + ["infinity"] * bad.infinite)
        one = bad.rows == 1
        verb, them = ("holds", "it") if one else ("hold", "them")
        return (
            f"{name}: {bad.rows:,} of {sizes[name]:,} {of} {verb} {what}{_columns(bad)}; "
            f"remove or impute {them}"
        )
    return None


def _add(bad: _Bad, t: Tensor) -> None:
    rows = t[bad_rows(t)].reshape(-1, *t.shape[1:]) if t.ndim else t[None]
    bad.rows += len(rows)
    bad.nan |= bool(rows.isnan().any())
    bad.infinite |= bool(rows.isinf().any())
    if t.ndim == 2 and t.shape[1] > 1:
        bad.columns |= set((~torch.isfinite(rows)).any(0).nonzero().flatten().tolist())


def _columns(bad: _Bad) -> str:
    if not bad.columns:
        return ""
    listed = ", ".join(map(str, sorted(bad.columns)[:FEW]))
    more = ", …" if len(bad.columns) > FEW else ""
    return f" ({'column' if len(bad.columns) == 1 else 'columns'} {listed}{more})"


def _walk(tree: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if (inside := _children(tree)) is None:
        yield path, tree
        return
    for name, child in inside:
        yield from _walk(child, (*path, name))


def _children(tree: Any) -> list[tuple[Any, Any]] | None:
    if isinstance(tree, Mapping):
        return list(tree.items())
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return list(zip(tree._fields, tree, strict=True))
    if isinstance(tree, (tuple, list)):
        return list(enumerate(tree))
    if is_dataclass(tree) and not isinstance(tree, type):
        return [(f.name, getattr(tree, f.name, None)) for f in dataclass_fields(tree)]
    return None


def _words(path: tuple[Any, ...]) -> str:
    if not path:
        return ALONE
    if len(path) == 1 and isinstance(path[0], int):
        return f"field {path[0]}"
    return f"field `{'.'.join(map(str, path))}`"
