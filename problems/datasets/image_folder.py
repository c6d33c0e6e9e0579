"""Images in a folder with one subfolder per class, as torchvision's `ImageFolder` reads them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from bilevel import BilevelError
from bilevel.problems.datasets import free_memory
from bilevel.problems.datasets.duplicate_files import warn_of_duplicates
from bilevel.problems.datasets.image_files import ImageFileDataset, ImageFiles
from bilevel.problems.datasets.labelled_images import Images, channel_moments
from bilevel.problems.datasets.validation_split import SplitMethod, split_indices
from bilevel.text import byte_size
from bilevel.validate import whole, wrong

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
VALID = ("val", "valid", "validation")
DECODING = 10
"""Approximate bytes per pixel while an image is read: 4 in Pillow, 3 in the tensor and its copy."""
HIDDEN = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found")
"""Folders of other programs; they and names with a leading dot are passed over at any depth."""
SAMPLE = 2000
"""Number of training images that give the moments of images that stay in files."""

ClassFiles = dict[str, list[str]]
"""Sorted paths of the images of each class."""


def load_image_folder(
    path: str,
    size: int | None = None,
    channels: int | None = None,
    valid_fraction: float = 0.2,
    test_fraction: float = 0.2,
    split: SplitMethod = "stratified",
    split_seed: int = 0,
    in_memory: bool | Literal["auto"] = "auto",
    workers: int = 2,
    background: int | None = None,
) -> Images | ImageFiles:
    """Load the images in `path/CLASS/…`, or in `path/train/CLASS/…` and its sibling folders.

    The siblings of `train` are `val` (or `valid`, `validation`) and `test`. A split without a
    folder is set aside from the rest: test images first, then validation images. Images are
    standardized by the moments of each channel over the training images, or over 2,000 of them if
    they stay in files.

    Hidden files and folders are passed over. An orientation tag turns the image, as viewers do.

    Args:
        path: the folder.
        size: length of the shorter side after resizing, in pixels; a square is cut from the
            middle. None: all images have one size.
        channels: 1 or 3, to which all images are converted; None: all have those of the first one.
        valid_fraction: fraction of the training images, if there is no folder of validation
            images.
        test_fraction: fraction of all images, if there is no folder `test` and none `train`;
            0 for no test split.
        split: method of `bilevel.problems.datasets.validation_split.split_indices`.
        split_seed: seed of the splits and of the order of the images.
        in_memory: true decodes all images before training, false lets `workers` read them during
            training, `auto` decodes them if they fit.
        workers: number of processes.
        background: brightness, 0 to 255, on which transparent pixels are laid; None takes white
            and warns.

    Raises:
        BilevelError: the folder or its classes are missing, a class has no images, the splits have
            different classes, the memory is too small, `workers` is negative, or a split is
            impossible.
        UnreadableImage: an image is damaged or differs from the others. All images are checked
            beforehand if they are decoded beforehand.

    Warns:
        DataWarning: files of two splits have the same bytes, or an image has transparent pixels,
            several frames or CMYK colors.
    """
    root = Path(path)
    free = free_memory.free_bytes(torch.device("cpu"))
    whole(0, workers=workers)
    if size is not None and not free_memory.fits(needed := DECODING * size**2, free):
        reason = f"needs {byte_size(needed)} to read an image, and {byte_size(free or 0)} are free"
        raise wrong("size", size, reason, "lower size")
    if not root.is_dir():
        raise wrong("path", path, "is not a folder", "give a folder with one subfolder per class")
    subfolders = set(_subfolders(root))
    has_splits = _has_splits(root, subfolders)
    found = class_files(root / "train" if has_splits else root)
    generator = torch.Generator().manual_seed(split_seed)
    train = ImageFileDataset(
        *_paths_and_labels(found, None if split == "tail" else generator),
        size=size,
        channels=channels,
        workers=workers,
        background=background,
    )
    aside: dict[str, ImageFileDataset] = {}
    for kind, names in (("valid", VALID), ("test", ("test",))):
        for name in names if has_splits else ():
            if name in subfolders and kind not in aside:
                others = class_files(root / name)
                _require_same_classes(root, found, others, name)
                aside[kind] = train.with_files(*_paths_and_labels(others, generator))
    fractions = {"test": 0.0 if has_splits else test_fraction, "valid": valid_fraction}
    for kind, fraction in fractions.items():
        if kind not in aside and (fraction or kind == "valid"):
            kept, taken = split_indices(
                train.labels, fraction, split, split_seed, f"{kind}_fraction"
            )
            train, aside[kind] = train.subset(kept.tolist()), train.subset(taken.tolist())
    splits = {"train": train, **aside}
    warn_of_duplicates({name: images.paths for name, images in splits.items()})
    return _loaded(train, aside["valid"], aside.get("test"), in_memory, path, len(found))


def class_files(folder: Path) -> ClassFiles:
    """Return the image files below each class's folder; the name of a folder is its class.

    Raises:
        BilevelError: there is no class, a class has no image, or a link repeats a folder.
    """
    if not (classes := _subfolders(folder)):
        raise BilevelError(
            f"{folder} has no subfolder; put the images of each class into one, as CLASS/x.png"
        )
    found: ClassFiles = {}
    for name in classes:
        files = _files_below(folder / name)
        found[name] = sorted(str(file) for file in files if file.suffix.lower() in EXTENSIONS)
        if not found[name]:
            raise BilevelError(
                f"{folder / name} is a class without an image ({', '.join(EXTENSIONS)}); "
                "add images, or delete the folder"
            )
    return found


def _loaded(
    train: ImageFileDataset,
    valid: ImageFileDataset,
    test: ImageFileDataset | None,
    in_memory: bool | Literal["auto"],
    path: str,
    classes: int,
) -> Images | ImageFiles:
    if free_memory.decode_at_once((train, valid, test), in_memory, path):
        decoded = train.decode()
        mean, std = channel_moments(decoded[0])
        tensors = (decoded, valid.decode(), None if test is None else test.decode())
        return Images(*tensors, mean=mean, std=std, white=255.0, classes=classes)
    sample = train.subset(range(min(SAMPLE, len(train))))
    mean, std = channel_moments(sample.decode()[0])
    return ImageFiles(train, valid, test, mean, std, classes)


def _subfolders(folder: Path) -> list[str]:
    """Return the names of the subfolders that are not hidden, sorted."""
    entries = os.scandir(folder)
    return sorted(e.name for e in entries if e.is_dir() and not _hidden(e.name))


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in HIDDEN


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the files at any depth, following links; refuse a folder that a link repeats.

    Hidden files and folders are passed over: a folder `.ipynb_checkpoints` holds copies.
    """
    read: dict[str, str] = {}
    for place, inner, names in os.walk(folder, followlinks=True):
        inner[:] = [name for name in inner if not _hidden(name)]
        if (before := read.setdefault(os.path.realpath(place), place)) != place:
            raise BilevelError(
                f"{place} is the same folder as {before}, so its images would count twice; "
                "delete the link"
            )
        yield from (Path(place) / name for name in names if not _hidden(name))


def _has_splits(root: Path, subfolders: set[str]) -> bool:
    """Return whether `train` is a split; otherwise every subfolder is a class.

    Raises:
        BilevelError: `train` has subfolders, and its siblings include other names or two
            validation splits.
    """
    odd = sorted(subfolders - {"train", "test", *VALID})
    if "train" not in subfolders or (odd and not _any_folder(root / "train")):
        return False
    if odd:
        raise BilevelError(
            f"{root} holds train, with one folder per class, and {odd[0]}, which is not one of "
            f"{', '.join(VALID)} and test; move {odd[0]} elsewhere, or rename train if it is a "
            "class"
        )
    if len(twice := [name for name in VALID if name in subfolders]) > 1:
        raise BilevelError(
            f"{root} holds validation images in {' and in '.join(twice)}; keep one of these folders"
        )
    return True


def _any_folder(folder: Path) -> bool:
    return bool(_subfolders(folder))


def _paths_and_labels(
    found: ClassFiles, generator: torch.Generator | None
) -> tuple[list[str], Tensor]:
    """Return paths and classes in the order of the classes, or in a random order."""
    paths = [path for paths in found.values() for path in paths]
    labels = torch.tensor([label for label, paths in enumerate(found.values()) for _ in paths])
    if generator is None:
        return paths, labels
    order = torch.randperm(len(paths), generator=generator)
    return [paths[i] for i in order.tolist()], labels[order]


def _require_same_classes(root: Path, train: ClassFiles, others: ClassFiles, name: str) -> None:
    if odd := sorted(train.keys() ^ others.keys()):
        place = "train" if odd[0] in train else name
        raise BilevelError(
            f"{root / 'train'} has {len(train)} classes and {root / name} has {len(others)}, and "
            f"`{odd[0]}` is only in {place}; give all splits the same classes"
        )
