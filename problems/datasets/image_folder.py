"""Images of one's own: a folder of folders, one for each class, as torchvision's `ImageFolder` reads it."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bilevel import BilevelError

if TYPE_CHECKING:
    pass
from typing import Literal

from bilevel.problems.datasets import free_memory, validation_split
from bilevel.problems.datasets.image_files import Files, ImageFiles
from bilevel.problems.datasets.labelled_images import Images, moments
from bilevel.problems.datasets.validation_split import Split
from bilevel.text import byte_size

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
VALID = ("val", "valid", "validation")
DECODING = 10
"""Bytes a pixel, about: Pillow's own four, and three of the tensor and of its copy."""
SAMPLE = 2000
"""Training images of which the moments are taken where they do not lie in memory."""


def load_image_folder(
    path: str,
    size: int | None = None,
    channels: int | None = None,
    valid_fraction: float = 0.2,
    test_fraction: float = 0.2,
    split: Split = "stratified",
    split_seed: int = 0,
    in_memory: bool | Literal["auto"] = "auto",
    workers: int = 2,
) -> Images | ImageFiles:
    """The images in `path/CLASS/…`, or in `path/train/CLASS/…` with `val` (or `valid`, `validation`) and `test` beside `train`.

    What has no folder is set aside from the rest: test images first, then validation images. Images are normalized by the
    moments of each channel over the training images, over 2,000 of them where they do not lie in memory.

    Args:
        path: the folder.
        size: pixels that the shorter side is brought to; a square is cut from the middle. None: all are of one size.
        channels: 1 or 3, to which all are converted; None: all have those that the first one has.
        valid_fraction: of the training images, where there is no folder of validation images.
        test_fraction: of all, where there is no folder of test images and none is called `train`; 0 for no test.
        split: as `bilevel.problems.datasets.validation_split.split` says.
        split_seed: of the splits, and of the order of the images.
        in_memory: whether all are decoded at once, or by `workers` while training goes on; `auto`: at once where they fit.
        workers: processes.

    Raises:
        BilevelError: no such folder, no class or one without images, folders that do not have the same classes or that are
            no part, too little memory, workers below 0, or a split that cannot be made.
        UnreadableImage: an image that is damaged or unlike the others (which one is said): all are looked at beforehand where
            they are decoded at once.
    """
    root, there = Path(path), free_memory.free_bytes(torch.device("cpu"))
    if workers < 0:
        raise BilevelError(f"workers={workers} is no number of processes; give 0 or more")
    if size is not None and not free_memory.fits(one := DECODING * size**2, there):
        raise BilevelError(
            f"an image of size={size} takes {byte_size(one)} while it is read, and {byte_size(there or 0)} are free; lower size"
        )
    if not root.is_dir():
        raise BilevelError(
            f"there is no folder {root}; give the path of one that holds a folder for each class, CLASS/x.png"
        )
    inside = {
        entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    }
    parted = _parted(root, inside)
    found = listed(root / "train" if parted else root, EXTENSIONS)
    generator = torch.Generator().manual_seed(split_seed)
    whole = Files(
        *_flat(found, None if split == "tail" else generator),
        size=size,
        channels=channels,
        workers=workers,
    )
    apart: dict[str, Files] = {}
    for kind, folders in (("valid", VALID), ("test", ("test",))):
        for name in folders if parted else ():
            if name in inside and kind not in apart:
                others = listed(root / name, EXTENSIONS)
                _check_classes(root, found, others, name)
                apart[kind] = whole.beside(*_flat(others, generator))
    train: Files = whole
    if "test" not in apart and not parted and test_fraction:
        kept, aside = validation_split.split(
            train.labels, test_fraction, split, split_seed, "test_fraction"
        )
        train, apart["test"] = train.taken(kept.tolist()), train.taken(aside.tolist())
    if "valid" not in apart:
        kept, aside = validation_split.split(
            train.labels, valid_fraction, split, split_seed, "valid_fraction"
        )
        train, apart["valid"] = train.taken(kept.tolist()), train.taken(aside.tolist())
    valid, test = apart["valid"], apart.get("test")
    if free_memory.decode_at_once((train, valid, test), in_memory, str(root)):
        decoded = train.decoded()
        mean, std = moments(decoded[0])
        tensors = (decoded, valid.decoded(), None if test is None else test.decoded())
        return Images(*tensors, mean=mean, std=std, white=255.0, classes=len(found))
    mean, std = moments(train.taken(range(min(SAMPLE, len(train)))).decoded()[0])
    return ImageFiles(train, valid, test, mean, std, len(found))


def _parted(root: Path, inside: set[str]) -> bool:
    """Whether `train` is the part, and no class.

    Raises:
        BilevelError: it holds folders as a part does, and beside it is something else, or validation images twice.
    """
    odd = sorted(inside - {"train", "test", *VALID})
    if "train" not in inside or (
        odd and not any(entry.is_dir() for entry in (root / "train").iterdir())
    ):
        return False
    if odd:
        raise BilevelError(
            f"{root} holds train, with a folder for each class, and {odd[0]} beside it, which is neither "
            f"{', '.join(VALID)} nor test; move {odd[0]} elsewhere, or rename train where it is a class"
        )
    if len(twice := [name for name in VALID if name in inside]) > 1:
        raise BilevelError(
            f"{root} holds validation images in {' and in '.join(twice)}; keep one of these folders"
        )
    return True


def _flat(
    found: dict[str, list[str]], generator: torch.Generator | None
) -> tuple[list[str], Tensor]:
    """Paths and classes, class by class, or in a random order, of which the first are a sample."""
    paths = [path for paths in found.values() for path in paths]
    labels = torch.tensor([label for label, paths in enumerate(found.values()) for _ in paths])
    if generator is None:
        return paths, labels
    order = torch.randperm(len(paths), generator=generator)
    return [paths[i] for i in order.tolist()], labels[order]


def _check_classes(
    root: Path, train: dict[str, list[str]], others: dict[str, list[str]], name: str
) -> None:
    if odd := sorted(train.keys() ^ others.keys()):
        here, there = ("train", name) if odd[0] in train else (name, "train")
        raise BilevelError(
            f"{root / here} has {len(train if here == 'train' else others)} classes and {root / there} "
            f"{len(others if here == 'train' else train)}: `{odd[0]}` is in {here} alone; give all parts the same classes"
        )


def listed(folder: Path, extensions: Sequence[str]) -> dict[str, list[str]]:
    """The images below each class's folder, sorted; a class is a folder.

    Raises:
        BilevelError: there is no class, or one without an image, or a link by which a folder is read twice.
    """
    classes = sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.is_dir() and not entry.name.startswith(".")
    )
    if not classes:
        raise BilevelError(
            f"{folder} has no folder in it; put the images of each class into a folder of its own, CLASS/x.png"
        )
    found: dict[str, list[str]] = {}
    for name in classes:
        found[name] = sorted(
            str(file) for file in _below(folder / name) if file.suffix.lower() in extensions
        )
        if not found[name]:
            raise BilevelError(
                f"{folder / name} is a class without an image ({', '.join(extensions)}); put some there, or delete the folder"
            )
    return found


def _below(folder: Path) -> Iterator[Path]:
    """The files at any depth, links followed; a folder that would be read twice, or without end, is an error."""
    read: dict[str, str] = {}
    for place, _, names in os.walk(folder, followlinks=True):
        if (before := read.setdefault(os.path.realpath(place), place)) != place:
            raise BilevelError(
                f"{place} is the same folder as {before}, and its images would count twice; delete the link"
            )
        yield from (Path(place) / name for name in names)
